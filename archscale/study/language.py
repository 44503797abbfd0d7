"""The small language model of the spectral study: losses along a step, curvature, training runs,
covariances.

Shapes: B batch, T time, N = B T tokens, V vocabulary; a view is (m, n), a logical matrix within a
stored one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from archscale.data.sampler import sample_index
from archscale.data.shards import TokenSplit
from archscale.errors import ConfigError
from archscale.model import Transformer, initialize
from archscale.optim import MatrixOptimizer, Rule
from archscale.optim.roles import assign_roles, parameter_groups
from archscale.study.config import LanguageStudy

MUON = Rule("study_muon", shape="one")  # W ← W − η Q, without shape factor: the step of the theorem
SGD = Rule("study_sgd", direction="momentum")
RULES = {"muon": MUON, "sgd": SGD}


class View(NamedTuple):
    """Rows [lo, hi) of a stored parameter."""

    name: str
    parameter: nn.Parameter
    lo: int
    hi: int

    def of(self, stored: Tensor) -> Tensor:
        return stored[self.lo : self.hi]


class Language:
    """A model at its initialization, and its data."""

    def __init__(self, settings: LanguageStudy, seed: int):
        self.settings, self.seed = settings, seed
        self.split = TokenSplit(settings.data, "train", settings.model.context)
        self.validation = TokenSplit(settings.data, "validation", settings.model.context)
        size = settings.model.vocab_size or self.split.vocab_size
        if size < self.split.vocab_size:
            raise ConfigError(
                f"vocab_size {size} is smaller than the data's {self.split.vocab_size} tokens",
                "language.model.vocab_size",
                "set it to null",
            )
        if settings.model.moe is not None:
            raise ConfigError(
                "the study's model has experts", "language.model.moe", "set it to null"
            )
        self.model = Transformer(settings.model.model_copy(update={"vocab_size": size}))
        initialize(self.model, seed)
        self.views = []
        for row in assign_roles(self.model):
            if row.role == "matrix":
                lo = 0
                for block, rows in row.blocks or (("", row.shape[0]),):
                    name = f"{row.name}.{block}" if block else row.name
                    self.views.append(View(name, row.parameter, lo, lo + rows))
                    lo += rows

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) that a training step takes."""
        return self._windows(self.split, step)

    def held_out(self, number: int = 0) -> tuple[Tensor, Tensor]:
        """A batch (B, T) of the validation split; edges and races are measured on number 0."""
        return self._windows(self.validation, number)

    def _windows(self, split: TokenSplit, number: int) -> tuple[Tensor, Tensor]:
        numbers = np.arange(self.settings.batch, dtype=np.int64) + number * self.settings.batch
        windows = sample_index(self.seed, numbers, split.num_samples)
        block = torch.from_numpy(np.stack([split.sample(int(i)) for i in windows]))
        return block[:, :-1].contiguous(), block[:, 1:].contiguous()

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean nats per token; can be differentiated twice."""
        inputs, targets = batch
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
            logits = self.model(inputs).logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    def gradients(self, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Of every view, (m, n)."""
        found = dict(zip(self._stored(), torch.autograd.grad(self.loss(batch), self._stored())))
        return [view.of(found[view.parameter]).clone() for view in self.views]

    def _stored(self) -> list[nn.Parameter]:
        return list(dict.fromkeys(view.parameter for view in self.views))

    def rise(
        self, views: list[View], steps: list[Tensor], batch: tuple[Tensor, Tensor]
    ) -> Callable[[float], float]:
        """η → loss(W − η D) − loss(W), float32; leaves the weights as they are."""

        @torch.no_grad()
        def change(lr: float) -> float:
            saved = [view.of(view.parameter).clone() for view in views]
            for view, D in zip(views, steps, strict=True):
                view.of(view.parameter.data).sub_(D.to(view.parameter.dtype), alpha=lr)
            moved = self.loss(batch).item()
            for view, old in zip(views, saved):
                view.of(view.parameter.data).copy_(old)
            return moved - before

        with torch.no_grad():
            before = self.loss(batch).item()
        return change

    def curvature(
        self, views: list[View], batch: tuple[Tensor, Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """v → H v of the loss in these views, both flat; exact second derivatives of one graph."""
        stored = list(dict.fromkeys(view.parameter for view in views))
        found = dict(zip(stored, torch.autograd.grad(self.loss(batch), stored, create_graph=True)))
        gradient = torch.cat([view.of(found[view.parameter]).flatten() for view in views])

        def product(v: Tensor) -> Tensor:
            rows = dict(
                zip(
                    stored,
                    torch.autograd.grad(gradient, stored, v.to(gradient.dtype), retain_graph=True),
                )
            )
            return torch.cat([view.of(rows[view.parameter]).flatten() for view in views])

        return product

    def train(
        self, rule: str, lr: float, steps: int, momentum: float, scale: float = 1.0, first: int = 0
    ) -> Iterator[float]:
        """Held-out loss before each step and after the last one.

        Args:
            scale: of the loss that is differentiated; what is returned is the plain one.
            first: number of the first step's batch.
        """
        options = {
            role: {"rule": "adamw", "lr": self.settings.element_lr}
            for role in ("embedding", "head", "vector")
        } | {
            "matrix": {
                "rule": RULES[rule],
                "lr": lr,
                "momentum": momentum,
                "nesterov": momentum > 0,
            }
        }
        groups = parameter_groups(assign_roles(self.model), options)
        optimizer = MatrixOptimizer(groups, lr=lr, compute_dtype=torch.float32)
        compared = self.held_out()
        for step in range(steps):
            with torch.no_grad():
                now = self.loss(compared).item()
            yield now
            if not math.isfinite(now):
                return
            optimizer.zero_grad()
            (self.loss(self.batch(first + step)) * scale).backward()
            optimizer.step()
        with torch.no_grad():
            yield self.loss(compared).item()

    def covariances(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Of each view: its name, A = E[a aᵀ] (n, n) of its input activations, B = E[δ δᵀ] (m, m)
        of the derivatives of a token's loss by its outputs, targets drawn from the model (so that A
        ⊗ B approximates the Gauss–Newton matrix, as in K-FAC, Martens and Grosse 2015), and its
        gradients on `samples` batches with their real targets (k, m, n)."""
        settings = self.settings
        modules = {
            m.weight: m for m in self.model.modules() if getattr(m, "weight", None) is not None
        }
        stored = self._stored()
        inputs: dict[Tensor, Tensor] = {}
        A, B = dict[Tensor, Tensor](), dict[Tensor, Tensor]()

        def watch(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            inputs[weight] = given[0].detach().flatten(0, -2).double()
            out.register_hook(lambda grad: see(weight, grad.flatten(0, -2).double()))

        def see(weight: Tensor, delta: Tensor) -> None:
            a, n = inputs[weight], len(delta) * settings.samples
            A[weight] = A.get(weight, 0) + a.mT @ a / n
            B[weight] = B.get(weight, 0) + delta.mT @ delta / n

        generator = torch.Generator().manual_seed(self.seed)
        hooks = [modules[p].register_forward_hook(watch) for p in stored]
        batches = [self.held_out(1 + i) for i in range(settings.samples)]
        for tokens, _ in batches:
            with sdpa_kernel(SDPBackend.MATH):
                logits = self.model(tokens).logits.flatten(0, 1)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
            torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), stored)
        for hook in hooks:
            hook.remove()
        gradients = [self.gradients(batch) for batch in batches]
        for i, view in enumerate(self.views):
            block = B[view.parameter][view.lo : view.hi, view.lo : view.hi]
            yield (
                view.name,
                A[view.parameter],
                block,
                torch.stack([found[i] for found in gradients]),
            )
