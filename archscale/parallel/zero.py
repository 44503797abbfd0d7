"""The DeepSpeed engine: ZeRO 1, 2, 3 (arXiv 1910.02054) around the same model and optimizer.

DeepSpeed shards, gathers and reduces; the update is ours. It is given a client optimizer
(`_Client`) with one parameter group, whose `step` it calls exactly once per accumulated batch: once
per group at stages 1 and 2, once per sub-group at stage 3, of which there is one. That step clips
and runs the optimizer on fragments: the intervals that this rank owns of each parameter, as views
of DeepSpeed's flat float32 partition. A partition cuts matrices anywhere.

Where DeepSpeed keeps what, by version (`TESTED`): `_hp_mapping` of a parameter at stages 1 and 2
(utils/tensor_fragment.py), `grad_position` and `fp32_partitioned_groups_flat` at stage 3
(runtime/zero/stage3.py).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from archscale.distributed import Fragment, is_distributed, rank, world_size
from archscale.errors import ConfigError
from archscale.parallel.engine import Allow, Optimizer, clip_gradients

# Versions from the first to before the second. So narrow because patches change configuration keys.
TESTED = ((0, 19, 8), (0, 19, 9))


def check_deepspeed() -> None:
    """Raises ConfigError where DeepSpeed is missing or of a version whose fragments this module
    does not know."""
    low, high = (".".join(map(str, version)) for version in TESTED)
    remedy = f"pip install --no-build-isolation 'deepspeed>={low},<{high}', or set it to native"
    try:
        version = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError("deepspeed is not installed", "parallel.engine", remedy) from None
    numbers = tuple(
        int(part) if part.isdigit() else 0 for part in version.split("+")[0].split(".")[:3]
    )
    if not TESTED[0] <= numbers < TESTED[1]:
        problem = (
            f"deepspeed {version} is installed, this version of archscale is tested with {low} up"
            f" to before {high}"
        )
        raise ConfigError(problem, "parallel.engine", remedy)


def import_deepspeed(device: torch.device) -> Any:
    """The package, set to use `device` and not to compile its own communication.

    Raises:
        ConfigError: as `check_deepspeed`.
    """
    check_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # It would be compiled at the first start, for a minute, and needs a compiler.
    __compatible_ops__["deepspeed_shm_comm"] = False
    # Names that DeepSpeed calls and torch has renamed.
    warnings.filterwarnings("ignore", r".*`torch.distributed.\w+` is deprecated", FutureWarning)
    return deepspeed


@dataclass(frozen=True)
class Part:
    """What this rank owns of a parameter: elements [lo, lo + numel) of its row-major flattening, at
    `start` of `flat`, DeepSpeed's float32 partition."""

    shape: tuple[int, ...]
    lo: int
    numel: int
    flat: Tensor
    start: int

    def view(self, flat: Tensor) -> Tensor:
        """The part (numel,) of a tensor laid out like `flat`: the partition itself, or its
        gradient."""
        return flat.detach()[self.start : self.start + self.numel]


class _Client(torch.optim.Optimizer):
    """What DeepSpeed takes for the optimizer: one group, no state, one call per step."""

    def __init__(self, params: list[nn.Parameter], apply: Callable[[], None]):
        super().__init__([{"params": params}], {"lr": 0.0})
        self._apply = apply

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._apply()


class ZeroEngine:
    """`parallel.engine.Engine` on DeepSpeed ZeRO, over all ranks.

    Args:
        build: makes the model: on the meta device at stages 1 and 2, under `deepspeed.zero.Init` at
            stage 3, where each module's parameters are partitioned as soon as it exists.
        initialize: fills the given weights, by name, each rank its own fragments.
        config: DeepSpeed's, `deepspeed_json.settings` with a user's keys merged into it.
        dtype: of the model's copy of the parameters and of matrix products; masters are float32.
            Masters that are offloaded lie in host memory with the optimizer's state, and the update
            is computed there.

    Raises:
        ConfigError: DeepSpeed is missing or of another version.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        initialize: Callable[[nn.Module, Mapping[str, Fragment]], None],
        *,
        config: dict[str, Any],
        device: torch.device,
        dtype: torch.dtype,
        compile: bool,
    ):
        deepspeed, stage = import_deepspeed(device), config["zero_optimization"]["stage"]
        if not is_distributed():  # DeepSpeed knows no run without a process group
            backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        if stage == 3:
            # Its own argument for the dtype is ignored on a CPU; the config's is not.
            with _refusals_as_config_errors(), deepspeed.zero.Init(config_dict_or_path=config):
                self.module = build()
        else:
            with torch.device("meta"):
                self.module = build()
            self.module.to(dtype).to_empty(device=device)
        if compile:
            parts: Any = self.module
            parts.compile_parts()
        client = _Client(list(self.module.parameters()), self._apply)
        with _refusals_as_config_errors():
            self._engine, self._zero, *_ = deepspeed.initialize(
                model=self.module, optimizer=client, config=config, dist_init_required=False
            )
        self._stage, self._device = stage, device
        _leave_norms_to_us(self._zero)
        self._parts = {
            name: self._part(parameter) for name, parameter in self.module.named_parameters()
        }
        self._parameters = {
            name: nn.Parameter(part.view(part.flat)) for name, part in self._parts.items()
        }
        self._step: tuple[Optimizer, float | None, Allow | None] | None = None
        self._norm: Tensor | None = None
        self.forward: Callable[..., Any] = self._engine
        self.gradient_scale = float(world_size())  # DeepSpeed averages over ranks
        initialize(self.module, self.weights())
        self.weights_changed()

    def _part(self, parameter: Any) -> Part:
        zero = self._zero
        if self._stage == 3:
            group, start, chunk = zero.grad_position[zero.get_param_id(parameter)]
            flat = zero.fp32_partitioned_groups_flat[group]
            lo = min(rank() * chunk, parameter.ds_numel)
            return Part(
                tuple(parameter.ds_shape), lo, min(chunk, parameter.ds_numel - lo), flat, start
            )
        (flat,) = zero.optimizer.param_groups[0]["params"]
        mapping, shape = parameter._hp_mapping, tuple(parameter.shape)
        if mapping is None:
            return Part(shape, 0, 0, flat, 0)
        lp, hp = mapping.lp_fragment_address, mapping.hp_fragment_address
        return Part(shape, lp.start, lp.numel, flat, hp.start)

    def parameters(self) -> dict[str, nn.Parameter]:
        """What the optimizer updates, by name: 1-D views of the float32 masters; where they lie,
        `weights` says."""
        return self._parameters

    def weights(self) -> dict[str, Fragment]:
        return {
            name: Fragment(part.shape, part.lo, part.view(part.flat))
            for name, part in self._parts.items()
        }

    @torch.no_grad()
    def weights_changed(self) -> None:
        """Copy the masters into the model's parameters, as a step does."""
        zero = self._zero
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch. Stage 1 reduces once, with the last one;
        stages 2 and 3 reduce each."""
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, objective: Tensor) -> None:
        self._engine.backward(objective, scale_wrt_gas=False)

    def update(
        self, optimizer: Optimizer, grad_clip: float | None, allow: Allow | None = None
    ) -> Tensor:
        self._step, self._norm = (optimizer, grad_clip, allow), None
        self._engine.step()
        assert self._norm is not None, "DeepSpeed skipped the optimizer"
        return self._norm

    def _apply(self) -> None:
        """The optimizer's step, called by DeepSpeed once gradients are reduced and accumulated."""
        assert self._step is not None, "DeepSpeed called the optimizer twice in a step"
        (optimizer, grad_clip, allow), self._step = self._step, None
        grads: list[Tensor] = []
        for name, part in self._parts.items():
            assert part.flat.grad is not None
            grads.append(part.view(part.flat.grad))
            self._parameters[name].grad = grads[-1]
        self._norm = clip_gradients(grads, grad_clip, dist.group.WORLD).to(self._device)
        if allow is None or allow(self._norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _refusals_as_config_errors() -> Iterator[None]:
    """DeepSpeed checks its own configuration, which may hold a user's keys: what it refuses becomes
    a ConfigError."""
    try:
        yield
    except (ValueError, TypeError, AssertionError) as error:  # pydantic's among them
        text = " ".join(str(error).split())[:300] or type(error).__name__
        refused = ConfigError(
            f"DeepSpeed refuses its configuration: {text}",
            "parallel.deepspeed",
            "correct the JSON, or set parallel.deepspeed: null",
        )
        refused.on_every_rank = True
        raise refused from None


def _leave_norms_to_us(zero: Any) -> None:
    """Make DeepSpeed's own gradient norm a constant zero: it costs a collective, and a step whose
    norm is not finite would be skipped."""
    name = type(zero).__name__
    nothing = torch.zeros(())
    if name == "DeepSpeedZeroOptimizer_Stage3":
        zero._get_norm_groups = lambda: [nothing]
    elif name == "DeepSpeedZeroOptimizer":
        zero.scaled_global_norm = lambda norm_type=2: nothing
    elif name == "BF16_Optimizer":  # stage 1 with bf16 parameters and float32 accumulation
        zero.get_grads_for_norm = lambda for_clipping=False: ([nothing], {})
    else:
        raise ConfigError(
            f"DeepSpeed made a {name}, whose fragments are not known",
            "parallel.deepspeed",
            "remove keys of the JSON",
        )
