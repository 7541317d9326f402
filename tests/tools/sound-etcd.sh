#!/usr/bin/env bash
# sound-etcd.sh DIR: etcd, etcdctl and etcdutl of Debian's unstable suite under DIR/usr/bin, without installing anything.
#
# The etcd on PyPI (3.5.1) can lose committed data when it is killed, and acknowledges before its fsync; Debian 12's is 3.4. Both would make
# our fault tests blame us, or hide what is ours. The packages are static Go programs, fetched and verified by apt with lists of its own.
set -euo pipefail
target=${1:?usage: sound-etcd.sh DIR}
mkdir -p "$target"
target=$(cd "$target" && pwd)
if [ ! -x "$target/usr/bin/etcd" ]; then
    command -v apt-get >/dev/null || { echo "sound-etcd: this needs apt-get; put an etcd >= 3.5.30 on PATH instead" >&2; exit 1; }
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
    (cd "$work" && "${apt[@]}" download etcd-server etcd-client)
    for package in "$work"/*.deb; do dpkg -x "$package" "$target"; done
fi
"$target/usr/bin/etcd" --version | sed -n 1p  # not head: it hangs up, and pipefail would take that for a failure
