#!/usr/bin/env bash
# deploy-programs.sh DIR: docker-compose, promtool and amtool of Debian's unstable suite under DIR/usr, without installing anything.
#
# They read what is in config/deploy as production will. No container engine is needed for that: `docker-compose config` resolves and
# checks, and starts nothing. Like sound-etcd.sh: fetched and verified by apt with lists of its own.
set -euo pipefail
target=${1:?usage: deploy-programs.sh DIR}
mkdir -p "$target"
target=$(cd "$target" && pwd)
if [ ! -x "$target/usr/bin/promtool" ]; then
    command -v apt-get >/dev/null || { echo "deploy-programs: this needs apt-get" >&2; exit 1; }
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
    (cd "$work" && "${apt[@]}" download docker-compose prometheus-alertmanager promtool)
    for package in "$work"/*.deb; do dpkg -x "$package" "$target"; done
fi
"$target/usr/libexec/docker/cli-plugins/docker-compose" version --short
