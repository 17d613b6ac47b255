#!/usr/bin/env bash
# server.sh NAME DIR gets a real HashiCorp server (nomad, consul, vault) for the tests and prints its path as the last
# line: the one on PATH when it has exactly the version that tools/NAME/go.mod pins, else DIR/NAME-VERSION/NAME, which is
# built first from those modules (minutes on 2 cores, seconds from a warm build cache).
set -euo pipefail

[ $# = 2 ] || { echo "usage: server.sh NAME DIR" >&2; exit 1; }
name=$1
module=$(cd "$(dirname "$0")/$name" && pwd)
version=$(cd "$module" && go list -m -f '{{.Version}}' "github.com/hashicorp/$name")

# "Nomad v1.11.1" alone, or followed by more, as in "Vault v1.19.0, built…".
is_pinned() { [[ "$("$1" version 2>/dev/null | head -n 1) " == "${name^} $version"[\ ,]* ]]; }

if path=$(command -v "$name") && is_pinned "$path"; then
	echo "$path"
	exit 0
fi
mkdir -p "$2"
binary=$(cd "$2" && pwd)/$name-${version#v}/$name
if ! is_pinned "$binary"; then
	echo "$name: building $version from its pinned modules, a few minutes; \`go build\` names what it downloads" >&2
	start=$SECONDS
	(cd "$module" && go build -o "$binary" "github.com/hashicorp/$name")
	is_pinned "$binary" || { echo "$name: $binary does not call itself $version: $("$binary" version | head -n 1)" >&2; exit 1; }
	echo "$name: built in $((SECONDS - start)) s" >&2
fi
echo "$binary"
