#!/usr/bin/env bash
# fuzz.sh DURATION [PACKAGE…] runs every fuzz target of the packages (default all) for that long, one after the other.
set -euo pipefail

[ $# -ge 1 ] || { echo "usage: fuzz.sh DURATION [PACKAGE…]" >&2; exit 1; }
duration=$1
shift
[ $# -gt 0 ] || set -- ./...
found=0
for package in $(go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}}{{end}}' "$@"); do
	for target in $(go test -list '^Fuzz' "$package" | grep '^Fuzz' || true); do
		found=1
		echo "fuzz: $package $target for $duration"
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$duration" -fuzzminimizetime 20x "$package"
	done
done
[ "$found" = 1 ] || { echo "fuzz: no fuzz target in $*" >&2; exit 1; }
