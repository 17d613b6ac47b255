#!/usr/bin/env bash
# get.sh DIR puts the pinned ONNX Runtime library into DIR as libonnxruntime.so.1, unless the right one is there already.
#
# The library comes out of the npm package onnxruntime-node, whose own install script is never run. npm checks the package
# against the integrity hash in package-lock.json; this script checks the library itself against SHA256SUMS.
# RXVISION_ORT_LIBRARY=/path/to/libonnxruntime.so names a library of your own (CUDA, TensorRT…): then nothing is downloaded.
set -euo pipefail

readonly unpacked_mib=292 # what npm has written once the package is complete, for the progress line

die() { echo "ort: $*" >&2; exit 1; }
sha256() { sha256sum "$1" | cut -d' ' -f1; }

[ $# = 1 ] || die "usage: get.sh DIR"
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1"
lib=$(cd "$1" && pwd -P)/libonnxruntime.so.1

if [ -n "${RXVISION_ORT_LIBRARY:-}" ] && [ "$RXVISION_ORT_LIBRARY" != "$lib" ]; then
	[ -f "$RXVISION_ORT_LIBRARY" ] || die "RXVISION_ORT_LIBRARY=$RXVISION_ORT_LIBRARY is not a file; correct it, or unset it to get the pinned library"
	echo "ort: using your own library $RXVISION_ORT_LIBRARY"
	exit 0
fi

case "$(uname -s)/$(uname -m)" in
Linux/x86_64) part=linux/x64 ;;
Linux/aarch64) part=linux/arm64 ;;
*) die "no pinned library for $(uname -s)/$(uname -m); install ONNX Runtime 1.30 and set RXVISION_ORT_LIBRARY to its shared library" ;;
esac
want=$(awk -v f="$part/libonnxruntime.so.1" '$2 == f { print $1 }' "$here/SHA256SUMS")
[ -n "$want" ] || die "SHA256SUMS has no line for $part/libonnxruntime.so.1"
if [ -f "$lib" ] && [ "$(sha256 "$lib")" = "$want" ]; then exit 0; fi

command -v npm >/dev/null || die "npm is missing (Node 20 or later has it); or set RXVISION_ORT_LIBRARY to an ONNX Runtime 1.30 library of your own"
work=$(mktemp -d "$(dirname "$lib")/.ort.XXXXXX")
npm=
cleanup() { [ -z "$npm" ] || kill "$npm" 2>/dev/null || true; rm -rf "$work"; }
trap cleanup EXIT
trap 'exit 130' INT TERM
cp "$here/package.json" "$here/package-lock.json" "$here/.npmrc" "$work/"

echo "ort: downloading onnxruntime-node@$(sed -n 's/.*"onnxruntime-node": "\(.*\)".*/\1/p' "$here/package.json") with npm (about 100 MB)"
start=$SECONDS
(cd "$work" && exec npm ci --ignore-scripts --no-audit --no-fund --loglevel http) >"$work/npm.log" 2>&1 &
npm=$!
for ((tick = 1; ; tick++)); do
	sleep 1
	kill -0 "$npm" 2>/dev/null || break
	if [ -t 1 ]; then end='\r'; elif ((tick % 5)); then continue; else end='\n'; fi
	mib=$(du -sm "$work" 2>/dev/null | cut -f1)
	printf "ort: %3d s, %3d of about %d MiB unpacked$end" $((SECONDS - start)) "${mib:-0}" "$unpacked_mib"
done
rc=0
wait "$npm" || rc=$?
npm=
[ "$rc" = 0 ] || { cat "$work/npm.log" >&2; die "npm ci failed (its output is above); check the network, or set RXVISION_ORT_LIBRARY to a library of your own"; }

from=$work/node_modules/onnxruntime-node/bin/napi-v6/$part/libonnxruntime.so.1
[ -f "$from" ] || die "the package has no ${from#"$work"/}"
got=$(sha256 "$from")
[ "$got" = "$want" ] || die "$part/libonnxruntime.so.1 has SHA-256 $got, SHA256SUMS says $want: not used"
chmod 0644 "$from"
mv "$from" "$lib"
echo "ort: $lib, hash checked, $((SECONDS - start)) s"
