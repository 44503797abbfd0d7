"""The DeepSpeed configuration that follows from a run's YAML, and a user's own JSON merged into it.
Needs no DeepSpeed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from archscale.errors import ConfigError, explain_os_error

WHERE = "parallel.deepspeed"
# Gradient elements reduced at a time. DeepSpeed's own 5e8 are a buffer of 2 GB, however small the
# model.
BUCKET = 1 << 25
SUGGESTED = {"zero_optimization.reduce_bucket_size"}  # what a user's JSON may set differently
# Key → what to do instead. What archscale does itself, or what takes the whole matrices from the
# optimizer.
REFUSED = {
    "optimizer": "set the optimizer section of the config",
    "scheduler": "set the schedule section of the config",
    "train_batch_size": "set training.batch_tokens",
    "compression_training": "remove it",
    "data_efficiency": "remove it",
    "curriculum_learning": "remove it",
    "progressive_layer_drop": "remove it",
    "eigenvalue": "remove it",
    "elasticity": "remove it",
    "autotuning": "remove it",
    "pipeline": "remove it",
    "tensor_parallel": "remove it",
    "sparse_gradients": "remove it",
    "amp": "set training.precision",
    "torch_autocast": "set training.precision",
    "compile": "set training.compile",
    "activation_checkpointing": "set training.activation_checkpoint",
    "zero_optimization.offload_param": "remove it",
    "zero_optimization.offload_optimizer": "set parallel.offload_optimizer",
    "zero_optimization.cpu_offload": "set parallel.offload_optimizer",
    "bf16.bf16_master_weights_and_grads": "remove it",
    "bf16.bf16_optimizer_states": "remove it",
    "fp16.fp16_master_weights_and_grads": "remove it",
    "zero_optimization.zenflow": "remove it",
    "zero_optimization.super_offload": "remove it",
    "zero_optimization.mics_shard_size": "remove it",
    "zero_optimization.zero_hpz_partition_size": "remove it",
    "zero_optimization.zero_quantized_weights": "remove it",
    "zero_optimization.zero_quantized_gradients": "remove it",
    "zero_optimization.zero_quantized_nontrainable_weights": "remove it",
}


def settings(
    *, stage: int, bf16: bool, micro_batch: int, offload: bool, parameters: int
) -> dict[str, Any]:
    """What archscale needs DeepSpeed to do.

    Gradients are reduced and accumulated in float32, and averaged once per step whatever the
    accumulation; clipping and the update are archscale's own; every sub-group of ZeRO-3 would be an
    optimizer step, so there is one.

    Args:
        micro_batch: sequences per device and forward pass.
        offload: keep masters and optimizer state in host memory.
        parameters: elements of all of them.
    """
    zero: dict[str, Any] = {
        "stage": stage,
        "sub_group_size": 10**15,
        "reduce_bucket_size": min(BUCKET, parameters),
        "round_robin_gradients": False,  # its fragments' addresses are wrong
        "parameter_alignment": False,
        "memory_efficient_linear": False,  # it would replace torch's linear in the whole process
    }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        # The boundary is set by hand: accumulation may change during a run.
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,  # the default is 1
        "gradient_allreduce_op": "mean",
        "prescale_gradients": False,
        "gradient_predivide_factor": 1.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "fp16": {"enabled": False},
        "bf16": {"enabled": bf16, "immediate_grad_update": True, "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


def merge(own: dict[str, Any], path: str | Path | None) -> dict[str, Any]:
    """`own` with the keys of the JSON file `path` added; "auto" stands for what `own` has.

    Raises:
        ConfigError: the file cannot be read, or a key of it contradicts `own` or does what
            archscale does.
    """
    if path is None:
        return own
    try:
        theirs = json.loads(Path(path).read_text())
    except OSError as error:
        cause, remedy = explain_os_error(error, "name a DeepSpeed JSON file")
        raise ConfigError(f"cannot read {path}: {cause}", WHERE, remedy) from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}", WHERE, "correct the JSON there") from None
    if not isinstance(theirs, dict):
        raise ConfigError(f"{path} holds no JSON object", WHERE, "name a DeepSpeed JSON file")
    problems = list(_conflicts(own, theirs, ""))
    if problems:
        raise ConfigError.several(problems)
    return _merged(own, theirs)


def _conflicts(own: dict[str, Any], theirs: dict[str, Any], prefix: str) -> Iterator[ConfigError]:
    """Each key of `theirs` that is refused or contradicts `own`; `prefix` is the path to both."""
    for name, value in theirs.items():
        key = prefix + name
        if value == "auto" or value is None or (name in own and own[name] == value):
            continue
        if isinstance(value, dict) and (key not in REFUSED) and isinstance(own.get(name, {}), dict):
            yield from _conflicts(own.get(name, {}), value, f"{key}.")
        elif key in REFUSED and value != {"device": "none"}:
            yield ConfigError(
                f"{key} of the DeepSpeed JSON is not DeepSpeed's to decide here",
                WHERE,
                REFUSED[key],
            )
        elif name in own and key not in SUGGESTED:
            yield ConfigError(
                f"{key} is {json.dumps(value)} in the DeepSpeed JSON, the run's config makes it"
                f" {json.dumps(own[name])}",
                WHERE,
                f"leave {key} out of the JSON",
            )


def _merged(own: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """`own` with what `theirs` sets; there are no conflicts."""
    merged = dict(own)
    for name, value in theirs.items():
        if isinstance(value, dict):
            merged[name] = _merged(own.get(name) or {}, value)
        elif value != "auto" and value is not None:
            merged[name] = value
    return merged
