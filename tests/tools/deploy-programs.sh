#!/usr/bin/env bash
# deploy-programs.sh DIR: docker-compose, Prometheus, promtool, Alertmanager and amtool of Debian's unstable suite under DIR/usr, without
# installing anything.
#
# They read what is in config/deploy as production will, and the tests run the two servers on it. No container engine is needed for that:
# `docker-compose config` resolves and checks, and starts nothing.
set -euo pipefail
target=${1:?usage: deploy-programs.sh DIR}
bash "$(dirname "$0")/from-sid.sh" "$target" usr/bin/prometheus docker-compose prometheus prometheus-alertmanager promtool
"$target/usr/libexec/docker/cli-plugins/docker-compose" version --short
