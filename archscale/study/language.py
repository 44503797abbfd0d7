"""The small language model of the spectral study: losses along a step, curvature, training runs,
covariances.

Shapes: B batch, T time, N = B T tokens, V vocabulary; a view is (m, n), a logical matrix within a
stored one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from archscale.data.loader import Batch
from archscale.data.sampler import sample_index
from archscale.data.split import TokenSplit
from archscale.data.windows import read_windows
from archscale.errors import ConfigError
from archscale.model import Transformer, initialize
from archscale.optim import MatrixOptimizer, Rule
from archscale.optim.roles import assign_roles, parameter_groups
from archscale.study.config import LanguageStudy

RULES = {  # without shape factor: W ← W − η Q is the step of the theorem
    "muon": Rule("study_muon", shape="one"),
    "sgd": Rule("study_sgd", direction="momentum"),
}


class View(NamedTuple):
    """Rows [lo, hi) of a stored parameter."""

    name: str
    parameter: nn.Parameter
    lo: int
    hi: int

    def of(self, stored: Tensor) -> Tensor:
        return stored[self.lo : self.hi]


def derivatives(views: list[View], output: Tensor, **options: Any) -> list[Tensor]:
    """By each view, (m, n); `options` go to torch.autograd.grad."""
    stored = list(dict.fromkeys(view.parameter for view in views))
    whole = dict(zip(stored, torch.autograd.grad(output, stored, **options)))
    return [view.of(whole[view.parameter]) for view in views]


def flat(parts: list[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


class Language:
    """A model at its initialization, and its data."""

    def __init__(self, settings: LanguageStudy, seed: int):
        self.settings, self.seed = settings, seed
        self.split = TokenSplit(settings.data, "train", settings.model.context)
        self.validation = TokenSplit(settings.data, "validation", settings.model.context)
        tokens = self.split.vocab_size
        size = settings.model.vocab_size or tokens
        if size < tokens:
            problem = f"vocab_size {size} is smaller than the data's {tokens} tokens"
            raise ConfigError(problem, "language.model.vocab_size", "set it to null")
        if settings.model.moe is not None:
            problem = "the study's model has experts"
            raise ConfigError(problem, "language.model.moe", "set it to null")
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

    def held_out(self, number: int = 0) -> Batch:
        """A batch of the validation split; edges and races are measured on number 0."""
        return self._windows(self.validation, number)

    def _windows(self, split: TokenSplit, number: int) -> Batch:
        numbers = np.arange(self.settings.batch, dtype=np.int64) + number * self.settings.batch
        windows = sample_index(self.seed, numbers, split.num_samples)
        return Batch.of_windows(read_windows(split, windows))

    def logits(self, inputs: Tensor) -> Tensor:
        """(N, V); can be differentiated twice, unlike the fused attention kernels."""
        with sdpa_kernel(SDPBackend.MATH):
            return self.model(inputs).logits.flatten(0, 1)

    def loss(self, batch: Batch) -> Tensor:
        """Mean nats per token."""
        return F.cross_entropy(self.logits(batch[0]), batch[1].flatten())

    @torch.no_grad()
    def loss_value(self, batch: Batch) -> float:
        return self.loss(batch).item()

    def gradients(self, batch: Batch) -> list[Tensor]:
        """Gradient of every view, (m, n)."""
        return derivatives(self.views, self.loss(batch))

    def rise(self, views: list[View], batch: Batch, *D: Tensor) -> Callable[[float], float]:
        """η → loss(W − η D) − loss(W), float32; leaves the weights as they are."""
        before = self.loss_value(batch)
        weights = [view.of(view.parameter.data) for view in views]

        def change(lr: float) -> float:
            saved = [W.clone() for W in weights]
            for W, step in zip(weights, D, strict=True):
                W.sub_(step.to(W.dtype), alpha=lr)
            after = self.loss_value(batch)
            for W, old in zip(weights, saved):
                W.copy_(old)
            return after - before

        return change

    def curvature(self, views: list[View], batch: Batch) -> Callable[[Tensor], Tensor]:
        """v → H v of the loss in these views, both flat; exact second derivatives of one graph."""
        gradient = flat(derivatives(views, self.loss(batch), create_graph=True))

        def product(v: Tensor) -> Tensor:
            v = v.to(gradient.dtype)
            return flat(derivatives(views, gradient, grad_outputs=v, retain_graph=True))

        return product

    def train(
        self, rule: str, lr: float, steps: int, momentum: float, scale: float = 1.0, first: int = 0
    ) -> Iterator[float]:
        """Held-out loss before each step and after the last one.

        Args:
            scale: of the loss that is differentiated; what is returned is the plain one.
            first: number of the first step's batch.
        """
        element = {"rule": "adamw", "lr": self.settings.element_lr}
        options = dict.fromkeys(("embedding", "head", "vector"), element)
        options["matrix"] = {"rule": RULES[rule], "lr": lr, "momentum": momentum}
        options["matrix"]["nesterov"] = momentum > 0
        groups = parameter_groups(assign_roles(self.model), options)
        optimizer = MatrixOptimizer(groups, lr=lr, compute_dtype=torch.float32)
        compared = self.held_out()
        for step in range(first, first + steps):
            loss = self.loss_value(compared)
            yield loss
            if not math.isfinite(loss):
                return
            optimizer.zero_grad()
            (self.loss(self._windows(self.split, step)) * scale).backward()
            optimizer.step()
        yield self.loss_value(compared)

    def covariances(self) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """For each view: its name, A = E[a aᵀ] (n, n) of its input activations, B = E[δ δᵀ] (m, m)
        of the derivatives of a token's loss by its outputs, targets drawn from the model (so that
        A ⊗ B approximates the Gauss–Newton matrix, as in K-FAC, arXiv 1503.05671), and its
        gradients on `samples` batches with their real targets (k, m, n)."""
        samples, owners = self.settings.samples, {}
        for module in self.model.modules():
            owners[getattr(module, "weight", None)] = module
        stored = list(dict.fromkeys(view.parameter for view in self.views))
        inputs, A, B = (dict[Tensor, Any]() for _ in range(3))

        def watch(module: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
            weight = module.weight
            assert isinstance(weight, Tensor)
            inputs[weight] = given[0].detach().flatten(0, -2).double()
            out.register_hook(lambda grad: add(weight, grad.flatten(0, -2).double()))

        def add(weight: Tensor, delta: Tensor) -> None:
            a, n = inputs[weight], len(delta) * samples
            A[weight] = A.get(weight, 0) + a.mT @ a / n
            B[weight] = B.get(weight, 0) + delta.mT @ delta / n

        generator = torch.Generator().manual_seed(self.seed)
        hooks = [owners[p].register_forward_hook(watch) for p in stored]
        batches = [self.held_out(1 + i) for i in range(samples)]
        for batch in batches:
            logits = self.logits(batch.inputs)
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
            torch.autograd.grad(F.cross_entropy(logits, drawn, reduction="sum"), stored)
        for hook in hooks:
            hook.remove()
        gradients = zip(*(self.gradients(batch) for batch in batches))
        for view, G in zip(self.views, gradients):
            block = B[view.parameter][view.lo : view.hi, view.lo : view.hi]
            yield view.name, A[view.parameter], block, torch.stack(G)
