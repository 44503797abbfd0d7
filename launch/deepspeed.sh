#!/usr/bin/env bash
# `archscale train` on all nodes of a hostfile with DeepSpeed's own launcher: `launch/deepspeed.sh CONFIG [--set a.b=c …]`.
#
# Run it on one node: it reaches all of them by ssh, with the same paths. Where there is no ssh, run it on every node with
# NODE_RANK and MASTER_ADDR.
#   HOSTFILE        file of lines `host slots=8`; without it this node alone
#   NPROC_PER_NODE  processes on each node (default: the hostfile's slots; without a hostfile the GPUs, 1 without any)
#   NODE_RANK       this node's line in the hostfile, from 0; only without ssh
#   MASTER_ADDR, MASTER_PORT  where the ranks meet (default: the first host, 29500)
# `launch/torchrun.sh` starts the same run and also restarts a failed one.
set -euo pipefail

fail() { echo "deepspeed.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || fail "no config: launch/deepspeed.sh CONFIG [--set a.b=c …]"
if ! command -v deepspeed >/dev/null; then
  PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
  command -v deepspeed >/dev/null || fail "no deepspeed on PATH and none in .venv: run launch/install.sh deepspeed"
fi

options=(--no_local_rank)
if [ -n "${HOSTFILE:-}" ]; then
  [ -f "$HOSTFILE" ] || fail "HOSTFILE is '$HOSTFILE', which is no file: give lines such as 'node-a slots=8'"
  grep -qE '^[[:space:]]*[^#[:space:]]+[[:space:]]+slots=[1-9][0-9]*' "$HOSTFILE" ||
    fail "HOSTFILE $HOSTFILE names no host: give lines such as 'node-a slots=8'"
  options+=(--hostfile "$HOSTFILE")
  [ -z "${NPROC_PER_NODE:-}" ] || options+=(--num_gpus "$NPROC_PER_NODE")
  if [ -n "${NODE_RANK:-}" ]; then
    [ -n "${MASTER_ADDR:-}" ] || fail "NODE_RANK is '$NODE_RANK' and MASTER_ADDR is not set: set it to the first host's address"
    options+=(--no_ssh --node_rank "$NODE_RANK")
  fi
else
  processes=${NPROC_PER_NODE:-$("$(dirname "$(command -v deepspeed)")/python" -c 'import torch; print(torch.cuda.device_count() or 1)')} ||
    fail "cannot count the GPUs: set NPROC_PER_NODE"
  [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE is '$processes': give a whole number of at least 1"
  options+=(--hostfile /dev/null --num_gpus "$processes")
fi
[ -z "${MASTER_ADDR:-}" ] || options+=(--master_addr "$MASTER_ADDR")
[ -z "${MASTER_PORT:-}" ] || options+=(--master_port "$MASTER_PORT")
exec deepspeed "${options[@]}" --module archscale train "$@"
