#!/usr/bin/env bash
# compile.sh OUTPUT PACKAGE builds one program, showing what goes on: first the downloads of missing modules, then the
# number of packages compiled. It prints how long the compiling took, downloads apart.
set -euo pipefail

[ $# = 2 ] || { echo "usage: compile.sh OUTPUT PACKAGE" >&2; exit 1; }
go list -deps "$2" >/dev/null # downloads, one line each
start=$SECONDS
# -v names each package as it is compiled; everything else is for the reader.
go build -v -o "$1" "$2" 2>&1 | awk -v what="$1" '
	/^[A-Za-z0-9._\/~-]+$/ { n++; if (n % 50 == 0) { printf "build: %d packages compiled\n", n; fflush() }; next }
	{ print; fflush() }
	END { if (n) printf "build: %d packages compiled\n", n }'
echo "build: $1 in $((SECONDS - start)) s"
