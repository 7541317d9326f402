#!/usr/bin/env bash
# from-sid.sh DIR PROGRAM PACKAGE...: packages of Debian's unstable suite, unpacked under DIR, without installing anything; once DIR/PROGRAM is
# there, nothing is done. Fetched and verified by apt, with lists of its own.
set -euo pipefail
target=${1:?usage: from-sid.sh DIR PROGRAM PACKAGE...} program=${2:?}
shift 2
mkdir -p "$target"
target=$(cd "$target" && pwd)
[ ! -x "$target/$program" ] || exit 0
command -v apt-get >/dev/null || { echo "from-sid: this needs apt-get; put $(basename "$program") on PATH instead" >&2; exit 1; }
work=$(mktemp -d "$target/.fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir -p "$work/lists/partial" "$work/archives/partial"
# the machine's own mirror and keys, with the suite replaced
if [ -e /etc/apt/sources.list.d/debian.sources ]; then
    awk '/^$/ { exit } { sub(/^Suites:.*/, "Suites: sid"); print }' /etc/apt/sources.list.d/debian.sources > "$work/sid.sources"
    list="$work/sid.sources"
else
    awk '$1 == "deb" { print $1, $2, "sid main"; exit }' /etc/apt/sources.list > "$work/sid.list"
    list="$work/sid.list"
fi
apt=(apt-get -qq -o "Dir::State::Lists=$work/lists" -o "Dir::Etc::SourceList=$list" -o Dir::Etc::SourceParts=/dev/null
    -o "Dir::Cache=$work" -o APT::Sandbox::User=root)
"${apt[@]}" update
(cd "$work" && "${apt[@]}" download "$@")
for package in "$work"/*.deb; do dpkg -x "$package" "$target"; done
