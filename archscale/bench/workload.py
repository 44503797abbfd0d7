"""A config's model with its optimizer on one process and random tokens, trained as `archscale
train` would train it: what the benches of training measure."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from archscale.config import Config, MoEConfig
from archscale.data.loader import Batch
from archscale.distributed import Fragment
from archscale.model import initialize
from archscale.optim.roles import assign_roles
from archscale.parallel.mesh import MeshSizes
from archscale.parallel.native import NativeEngine
from archscale.plan.devices import Device, this_device
from archscale.plan.plan import Plan, make_plan
from archscale.plan.preflight import plan_config, refuse
from archscale.plan.transfer import transfer_of
from archscale.train.balance import LoadedExperts, StepBalance
from archscale.train.build import DTYPES, build_model, build_optimizer
from archscale.train.readings import Readings
from archscale.train.step import train_step

EOS = 0  # ends a document, where documents are separated
DOCUMENT_TOKENS = 400  # mean length of a random document
CPU = Device("cpu", None, None, "this machine")  # however much memory it has


def plan_one_process(values: dict[str, Any], device: Device | None = None) -> Plan:
    """The plan of a config on one process and at its full batch. Random tokens need no data, unless
    the size of the vocabulary is to come from there.

    Args:
        values: keys and values, as in a YAML config.
        device: as of `make_plan`.

    Raises:
        ConfigError: what `archscale plan` would say of the model or the optimizer.
    """
    schedule = values.get("schedule", {}) | {"batch_ramp_tokens": 0}
    config = Config.from_dict(values | {"schedule": schedule, "parallel": {}})
    config = config.with_precision(this_device().precision)
    if config.model.vocab_size:
        plan = make_plan(config, device=device)
    else:
        plan = plan_config(config, world_size=1, device=device)
    refuse(plan)
    return plan


def random_batch(config: Config) -> list[Batch]:
    """The micro-batches of one step on one process, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    micro_batch, model = config.training.micro_batch, config.model
    assert model.vocab_size is not None
    batch = []
    for _ in range(config.accumulation(1)):
        shape = micro_batch, model.context + 1
        tokens = torch.randint(1, model.vocab_size, shape, generator=generator)
        if config.data.document_mask:
            ends = torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS
            tokens[ends] = EOS
        batch.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
    return batch


def objective(
    forward: Callable[..., Any], moe: MoEConfig | None, inputs: Tensor, targets: Tensor
) -> Tensor:
    """Loss per token of one micro-batch that is a whole step's batch; with experts their balance
    loss joins it."""
    count = torch.full((), float(targets.numel()), device=inputs.device)
    output = forward(inputs, targets)
    if moe is None:
        return output.loss / count
    return output.loss / count + StepBalance(moe, count).loss(output.routing)


class Workload:
    """Model, optimizer and batch.

    Args:
        values: keys and values of the config; all processes of its `parallel` are this one.
        fill: makes the weights; None: the config's initialization.

    Attributes:
        config: resolved.
        planned: bytes at the peak of a step, as `archscale plan` says, without a checkpoint's copy.
        batch: micro-batches of one step, on the host.
    """

    def __init__(
        self,
        values: dict[str, Any],
        device: torch.device,
        *,
        fill: Callable[[nn.Module], None] | None = None,
    ):
        plan = plan_one_process(values, CPU if device.type == "cpu" else None)
        self.config = config = plan.config
        transfer = transfer_of(config)
        memory = plan.figures["memory"]
        self.planned: int = memory["peak"] - memory["terms"].get("checkpoint_copy", 0)
        self.device = device
        self.engine = NativeEngine(
            lambda: build_model(config, EOS, transfer),
            fill or (lambda model: initialize(model, config.seed)),
            device=device,
            sizes=MeshSizes(),
            reshard=False,
            dtype=DTYPES[config.precision],
            compile=config.training.compile,
        )
        roles = assign_roles(self.engine.module)
        self.optimizer = build_optimizer(config, roles, transfer.roles)
        self.batch = random_batch(config)
        moe = config.model.moe
        self._experts = None if moe is None else LoadedExperts(moe)
        self._first = [tokens.to(device) for tokens in self.batch[0][:2]]
        self._readings = Readings(
            config.model,
            config.telemetry,
            config.batches,
            config.optimizer.grad_clip,
            self.optimizer,
        )

    def passes(self) -> None:
        """Forward and backward pass of the first micro-batch."""
        loss = objective(self.engine.forward, self.config.model.moe, *self._first)
        self.engine.backward(loss)

    def update(self) -> None:
        """Clipping and the optimizer's step, from the gradients that there are."""
        self.engine.update(self.optimizer, self.config.optimizer.grad_clip)

    def step(self, looking: bool = False) -> dict[str, Any]:
        """A whole training step. With `looking` telemetry looks into it and reads it: returns its
        line; otherwise what was measured, on the device."""
        config, probe = self.config, self._readings.look(1, looking)
        measured, seen = train_step(
            self.engine,
            self.optimizer,
            self.batch,
            self.device,
            config.optimizer.grad_clip,
            self._experts,
            probe,
        )
        self._readings.add(1, 0.0, measured)
        if looking:
            return self._readings.read(seen, 1.0)[-1]
        self._readings.forget()
        return measured

    def resident(self) -> int:
        """Bytes that stay between steps."""
        states = self.optimizer.fragments().values()
        tensors = [t.data if isinstance(t, Fragment) else t for s in states for t in s.values()]
        return sum(t.nbytes for t in (*self.engine.module.parameters(), *tensors))
