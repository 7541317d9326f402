# The small verbs of the project. `just` alone lists them.

set shell := ["bash", "-euo", "pipefail", "-c"]

_default:
    @just --list --unsorted

# install everything into .venv
setup:
    uv sync -q

# fetch a sound etcd (3.5.30 or newer) into .tools/etcd, from Debian's unstable suite, without touching the system's packages
etcd:
    @bash tests/tools/sound-etcd.sh .tools/etcd

# an example PKI for config/deploy: an authority, and a certificate for each part
certs *args:
    uv run ifabric bootstrap certs config/deploy/certs {{args}}

# fetch docker-compose, Prometheus and Alertmanager into .tools/deploy: they read and run config/deploy in the tests
deploy-programs:
    @bash tests/tools/deploy-programs.sh .tools/deploy

# run the daemon with embedded servers
run *args:
    uv run ifabric run {{args}}

# a swarm on this machine, start to end
demo *args:
    uv run ifabric demo {{args}}

# the default tests (under ten minutes)
test *args:
    uv run pytest {{args}}

# proofs of minutes: faults, many daemons, long loads
proofs *args:
    uv run pytest -m slow {{args}}

# style and types
lint:
    uv run ruff check .
    uv run ruff format --check .
    uv run mypy

# write the code as the formatter wants it
fmt:
    uv run ruff check --fix -q .
    uv run ruff format .

# the figures of bench/README.md
bench *args:
    uv run python -m bench {{args}}

# wheel from the tree, wheel through the sdist, editable install: each must start
packaging:
    @bash tests/tools/packaging.sh

# exactly what CI runs
ci:
    @bash .ci/run
