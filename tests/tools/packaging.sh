#!/usr/bin/env bash
# The three ways to install, each in an environment of its own; each must find its residents and say its version.
set -euo pipefail
cd "$(dirname "$0")/../.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
uv build -q --wheel --out-dir "$work/tree" .
uv build -q --sdist --out-dir "$work/sdist" .
uv build -q --wheel --out-dir "$work/via-sdist" "$work"/sdist/*.tar.gz

try() { # try NAME INSTALL-ARGS...
    local name=$1
    shift
    uv venv -q "$work/$name"
    uv pip install -q --python "$work/$name/bin/python" "$@"
    (cd "$work" && "$name/bin/python" -m ifabric --version && "$name/bin/ifabric" --version >/dev/null &&
        "$name/bin/ifabric" playbook outage >/dev/null &&
        "$name/bin/python" -c 'from ifabric.loader import load; assert load("coordinator").component == "coordinator"' &&
        "$name/bin/python" -c 'from ifabric.http.page.shell import Shell; assert {"/", "/page.css", "/page.js", "/page/dom.js"} <= {*Shell().paths}')
    echo "packaging: $name ok"
}

try wheel-from-tree "$work"/tree/*.whl
try wheel-via-sdist "$work"/via-sdist/*.whl
try editable -e .
