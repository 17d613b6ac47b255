#!/usr/bin/env bash
# debian.sh PACKAGE… makes sure that these Debian packages are installed: as root on Debian it installs the missing ones,
# elsewhere it says what to install and goes on, since what needs them then skips or fails with its own words.
set -euo pipefail

command -v dpkg-query >/dev/null || exit 0
missing=()
for package; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] || missing+=("$package")
done
[ ${#missing[@]} -gt 0 ] || exit 0
if [ "$(id -u)" != 0 ]; then
	echo "debian: not installed and you are not root: sudo apt-get install ${missing[*]}" >&2
	exit 0
fi
echo "debian: installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq && apt-get install -y -q --no-install-recommends "${missing[@]}" ||
	echo "debian: could not install ${missing[*]} (above); going on without" >&2
