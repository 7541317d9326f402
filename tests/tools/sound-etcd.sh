#!/usr/bin/env bash
# sound-etcd.sh DIR: etcd, etcdctl and etcdutl of Debian's unstable suite under DIR/usr/bin, without installing anything.
#
# The etcd on PyPI (3.5.1) can lose committed data when it is killed, and acknowledges before its fsync; Debian 12's is 3.4. Both would make
# our fault tests blame us, or hide what is ours. The packages are static Go programs.
set -euo pipefail
target=${1:?usage: sound-etcd.sh DIR}
bash "$(dirname "$0")/from-sid.sh" "$target" usr/bin/etcd etcd-server etcd-client
"$target/usr/bin/etcd" --version | sed -n 1p  # not head: it hangs up, and pipefail would take that for a failure
