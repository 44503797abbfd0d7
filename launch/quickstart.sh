#!/usr/bin/env bash
# From a clean machine to a trained language model: installs, prepares data, trains, evaluates, generates.
# Run again it continues where it stopped, or says that it is done. Arguments (--set …) go to `archscale train`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
began=$SECONDS
TARGET_LOSS=3.1 # nats per token on held-out files; a uniform guess is 8.3
RUN=runs/quickstart

bash launch/install.sh
export PATH="$PWD/.venv/bin:$PATH"

archscale data prepare data_prep/python_stdlib.yaml

# Two processes: on a GPU each if there are two, otherwise on the CPU or one GPU; bf16 on a GPU.
gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
on_gpu=()
[ "$gpus" -gt 0 ] && on_gpu=(--set training.precision=bf16)
processes=$((gpus > 2 ? 2 : gpus > 0 ? gpus : 2))
cores=$(python -c 'import os; print(len(os.sched_getaffinity(0)))')
export OMP_NUM_THREADS=$((cores / processes > 0 ? cores / processes : 1))
torchrun --standalone --nproc_per_node="$processes" -m archscale train configs/quickstart.yaml \
  --run-dir "$RUN" "${on_gpu[@]}" "$@"

echo "--- a continuation of 'def ':"
archscale generate "$RUN" --prompt "def " --max-tokens 80

loss=$(python - "$RUN/metrics.jsonl" <<'PY'
import json, sys
print([json.loads(line)["val_loss"] for line in open(sys.argv[1]) if "val_loss" in line][-1])
PY
)
echo "---"
echo "validation loss $loss nats per token, metrics $RUN/metrics.jsonl, checkpoints $RUN/checkpoints"
echo "quickstart: $((SECONDS - began)) s in all"
python -c "import sys; sys.exit(0 if float('$loss') < $TARGET_LOSS else f'quickstart: validation loss $loss is not below $TARGET_LOSS')"
