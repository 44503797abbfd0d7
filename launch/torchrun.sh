#!/usr/bin/env bash
# `archscale train` on this node of a job, one process per GPU: `launch/torchrun.sh CONFIG [--set a.b=c …]`.
#
# Run it on every node with the same arguments and, from the environment:
#   NNODES          nodes of the job (default 1), or the least and the most, such as 1:4
#   RDZV_ENDPOINT   host:port of the node that hosts the rendezvous; required when NNODES is not 1
#   RDZV_ID         name of the job, the same on every node, and no other job's (default RDZV_ENDPOINT)
#   NODE_RANK       0 on the node of RDZV_ENDPOINT, 1 and up on the others; optional: torchrun finds out by host name,
#                   and hangs where names do not resolve to the address of RDZV_ENDPOINT
#   LOCAL_ADDR      address of this node that the others reach; optional, for the same networks
#   NPROC_PER_NODE  processes on this node (default: its GPUs, 1 without any)
#   MAX_RESTARTS    restarts after a failed process (default 3); each resumes from the newest checkpoint
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT  seconds that processes may take to end after a signal (default here 600: they save)
#
# SIGTERM, SIGUSR1 and SIGINT to this script, to torchrun or to one process end the run with a checkpoint. The exit status is
# that of the processes then, 75 (130 after SIGINT), and not torchrun's, which is 1.
set -euo pipefail

fail() { echo "torchrun.sh: $*" >&2; exit 2; }

[ $# -gt 0 ] || fail "no config: launch/torchrun.sh CONFIG [--set a.b=c …]"
if ! command -v torchrun >/dev/null; then
  PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
  command -v torchrun >/dev/null || fail "no torchrun on PATH and no .venv: run launch/install.sh"
fi

nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
  fail "NNODES is '$nodes': give a whole number of at least 1, or the least and the most as 1:4"
processes=${NPROC_PER_NODE:-$("$(dirname "$(command -v torchrun)")/python" -c 'import torch; print(torch.cuda.device_count() or 1)')} ||
  fail "cannot count the GPUs: set NPROC_PER_NODE"
[[ $processes =~ ^[1-9][0-9]*$ ]] || fail "NPROC_PER_NODE is '$processes': give a whole number of at least 1"

options=(--nproc-per-node="$processes" --max-restarts="${MAX_RESTARTS:-3}")
if [ "$nodes" = 1 ]; then
  options+=(--standalone)
else
  [[ ${RDZV_ENDPOINT:-} =~ ^.+:[0-9]+$ ]] ||
    fail "NNODES is $nodes and RDZV_ENDPOINT is '${RDZV_ENDPOINT:-}': set it to host:port of one node, the same on all"
  options+=(--nnodes="$nodes" --rdzv-backend=c10d --rdzv-endpoint="$RDZV_ENDPOINT" --rdzv-id="${RDZV_ID:-$RDZV_ENDPOINT}")
  case "${NODE_RANK:-}" in
    "") ;;
    0) options+=(--rdzv-conf=is_host=1) ;;
    *) options+=(--rdzv-conf=is_host=0) ;;
  esac
  [ -z "${LOCAL_ADDR:-}" ] || options+=(--local-addr="$LOCAL_ADDR")
fi
# Otherwise the nodes that stay keep the address of an earlier start's store, and one that joins or comes to have rank 0
# waits at another.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}  # torchrun would die of others
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}
ARCHSCALE_STATUS_FILE=$(mktemp) || fail "cannot write to ${TMPDIR:-/tmp}"
export ARCHSCALE_STATUS_FILE
trap 'rm -f "$ARCHSCALE_STATUS_FILE"' EXIT

# In the background: bash hears a signal only while it waits for nothing in the foreground. Ctrl-C, which what runs there would
# ignore, is passed on as well.
torchrun "${options[@]}" -m archscale train "$@" &
agent=$!
for signal in TERM USR1 INT; do
  # shellcheck disable=SC2064  # the values of now
  trap "kill -$signal $agent 2>/dev/null || true" "$signal"
done
status=0
while kill -0 "$agent" 2>/dev/null; do
  status=0
  wait "$agent" || status=$?
done
if [ -s "$ARCHSCALE_STATUS_FILE" ] && [ "$status" != 0 ]; then
  status=$(cat "$ARCHSCALE_STATUS_FILE")
fi
exit "$status"
