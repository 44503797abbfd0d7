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
# SIGTERM, SIGUSR1 and SIGINT to this script, to torchrun or to one process end the run with a checkpoint, as does a terminal
# that is closed. The exit status is then 75 (130 after SIGINT), and not torchrun's, which is 1.
set -euo pipefail

fail() { echo "torchrun.sh: $*" >&2; exit 2; }

agent="" asked="" passed=""  # process id of torchrun; the first signal; whether torchrun has it

# shellcheck disable=SC2329  # the traps call it
ask() {
  asked=${asked:-$1}
  pass_on
}

# Once: at its third signal torchrun leaves the processes that it waits for while they save.
pass_on() {
  if [ -n "$asked" ] && [ -z "$passed" ] && listens; then
    passed=yes
    kill -s "$asked" "$agent" 2>/dev/null || true
  fi
}

# Whether torchrun catches SIGTERM, as it does from just before it starts processes; also when it is gone.
listens() {
  local key mask=""
  [ -n "$agent" ] || return 1
  [ ! "/proc/$agent/exe" -ef "/proc/$$/exe" ] || return 1  # not torchrun yet, with the traps of this script
  { while read -r key mask; do [ "$key" != SigCgt: ] || break; done <"/proc/$agent/status"; } 2>/dev/null || return 0
  ((0x${mask:-0} >> 14 & 1))
}

end_if_asked() {
  case "$asked" in
    "") ;;
    INT) exit 130 ;;
    *) exit 75 ;;
  esac
}

trap 'ask INT' INT
trap 'ask USR1' USR1
trap 'ask TERM' TERM HUP QUIT

[ $# -gt 0 ] || fail "no config: launch/torchrun.sh CONFIG [--set a.b=c …]"
if ! command -v torchrun >/dev/null; then
  PATH="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin:$PATH"
  command -v torchrun >/dev/null || fail "no torchrun on PATH and no .venv: run launch/install.sh"
fi

nodes=${NNODES:-1}
[[ $nodes =~ ^[1-9][0-9]*(:[1-9][0-9]*)?$ ]] ||
  fail "NNODES is '$nodes': give a whole number of at least 1, or the least and the most as 1:4"
processes=${NPROC_PER_NODE:-$("$(dirname "$(command -v torchrun)")/python" -c 'import torch; print(torch.cuda.device_count() or 1)')} ||
  { end_if_asked; fail "cannot count the GPUs: set NPROC_PER_NODE"; }
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
end_if_asked

# In the background: bash hears a signal only while it waits for nothing in the foreground. In a session of its own: a terminal
# would send Ctrl-C to torchrun too.
setsid=$(command -v setsid || true)  # macOS has none
${setsid:+"$setsid"} torchrun "${options[@]}" -m archscale train "$@" &
agent=$!
until listens; do
  [ -z "$asked" ] || kill -s TERM "$agent" 2>/dev/null || true  # it has started nothing yet, and would ignore Ctrl-C
  sleep 0.5 || true
done
pass_on
while kill -0 "$agent" 2>/dev/null; do
  wait "$agent" || true
done
status=0
wait "$agent" || status=$?
[ "$status" != 0 ] || exit 0
[ ! -s "$ARCHSCALE_STATUS_FILE" ] || exit "$(cat "$ARCHSCALE_STATUS_FILE")"
end_if_asked
exit "$status"
