#!/usr/bin/env bash
# Trains over two hosts by ssh and torchrun: no hostfile, no pdsh. See --help.

case "${1:---help}" in -h | --help)
  cat <<'HELP'
[RANKS=N] [PORT=P] launch/two_hosts.sh HOST_A HOST_B --config FILE [--section.key value …]

Starts RANKS ranks (1) on each host, and ends both where one fails or Ctrl-C comes. Both hosts need this folder and python's
environment at the same path, and ssh without a password from here; run.output_dir lies on a disk that HOST_A sees. Rank 0 is on
HOST_A and listens at PORT (29500), which HOST_B must reach. Where hosts have several networks, name one:
--topology.interface eth1.

  RANKS=4 launch/two_hosts.sh hospital-a hospital-b --config configs/cxr_regions.yaml
HELP
  exit ;;
esac

set -euo pipefail
hosts=("$1" "$2")
shift 2
arguments=$(printf ' %q' "$@")
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT

for node in 0 1; do
  # -tt: the command ends with its ssh
  ssh -tt -o BatchMode=yes "${hosts[node]}" "cd $(printf %q "$PWD") && exec $(printf %q "$(command -v python)") -m torch.distributed.run \
    --nnodes 2 --node_rank $node --nproc_per_node ${RANKS:-1} --master_addr ${hosts[0]} --master_port ${PORT:-29500} \
    -m feddra_ds train$arguments" </dev/null &
  pids+=($!)
done
wait -n        # the first that ends; where it failed, `set -e` ends this script, and the trap the other host
wait
