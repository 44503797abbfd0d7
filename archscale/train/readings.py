"""What training measures, read from the device once an interval: the lines of metrics.jsonl.

Numbers of every step, and what a look into the last one showed, travel in a single transfer: the
one place where the host waits for the device.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from archscale.config import ModelConfig, TelemetryConfig
from archscale.config.batch import BatchSchedule
from archscale.distributed import from_rank_zero
from archscale.model.loss import load_share
from archscale.optim import MatrixOptimizer
from archscale.optim.orthogonalize import orthogonality_residual
from archscale.plan.counting import training_flops
from archscale.telemetry.guard import Guard
from archscale.telemetry.spectrum import heterogeneity_gain, nuclear_norm_estimate
from archscale.telemetry.spectrum import spectrum as spectrum_of
from archscale.telemetry.stability import Probe, stability_metrics
from archscale.train.step import PADDING, Seen

# Of M̂, from ⟨M̂, Q⟩; of gradients by decomposition, as the rest.
ESTIMATED = ("sigma_mean", "effective_rank")
DECOMPOSED = ("sigma_max", "flattening_gain")
SPECTRUM = ESTIMATED + DECOMPOSED
# Beside the means, with telemetry.per_layer.
PER_MATRIX = ("trust_ratio", "clipped_ratio", "relative_update", "weight_norm")


class MatrixWatch:
    """What the ranks that own whole matrices measure of M̂ and its Q on the steps that are read.

    Args:
        spectrum: also what takes a decomposition: σ_max and the flattening gain, and all four of
            the gradient.
    """

    def __init__(self, spectrum: bool):
        self.spectrum = spectrum
        self.keys: tuple[str, ...] = (
            "orthogonality_residual",
            *(SPECTRUM if spectrum else ESTIMATED),
        )
        self.gradients: tuple[str, ...] = SPECTRUM if spectrum else ()

    def __call__(self, momentum: Tensor, direction: Tensor) -> Tensor:
        nuclear, square = (
            nuclear_norm_estimate(momentum, direction),
            momentum.flatten(1).float().square().sum(-1),
        )
        rank = torch.where(square == 0, 0.0, nuclear.square() / square)
        measured = [orthogonality_residual(direction), nuclear / min(momentum.shape[-2:]), rank]
        if self.spectrum:
            spectrum = spectrum_of(momentum)
            measured += [spectrum[key] for key in DECOMPOSED]
        return torch.stack(measured)

    def of_gradient(self, gradient: Tensor) -> Tensor:
        spectrum = spectrum_of(gradient)
        return torch.stack([spectrum[key] for key in SPECTRUM])


class Readings:
    """Collects steps, and turns them into lines.

    Args:
        batches: sequences of every step.
        grad_clip: as the step clips gradients, which spectra are freed of.
        optimizer: whose `watch` is set on the steps that are looked into.
        packed: whether there may be padding, whose share is then a metric.
        peak: dense FLOP/s of all devices together; None where it is not known: then there is no
            `mfu`.
    """

    def __init__(
        self,
        model: ModelConfig,
        telemetry: TelemetryConfig,
        batches: BatchSchedule,
        grad_clip: float | None,
        optimizer: MatrixOptimizer,
        peak: float | None = None,
        packed: bool = False,
    ):
        self._clip = grad_clip
        self._per_token = None if peak is None else training_flops(model) / peak
        self.model, self.telemetry, self.optimizer = model, telemetry, optimizer
        self.batches, self._packed = batches, packed
        self._pending: list[tuple[int, float, dict[str, Tensor]]] = []
        self._rows: tuple[Tensor, list[str], Tensor] | None = None
        self._short: Tensor | None = None
        self._orthogonal: set[str] = set()  # names of matrices that have a spectrum

    def look(self, step: int, reading: bool) -> Probe | None:
        """The probe of `step` (1-based), if it is to be read; sets the optimizer's watch."""
        self.optimizer.watch = MatrixWatch(self._spectral(step)) if reading else None
        return Probe() if reading else None

    def due(self, step: int) -> bool:
        """Whether `step` (1-based) is to be read for its own sake."""
        return step % self.telemetry.every == 0 or self._spectral(step)

    def _spectral(self, step: int) -> bool:
        every = self.telemetry.spectrum_every
        return every > 0 and step % every == 0

    def add(self, step: int, lr: float, measured: dict[str, Tensor]) -> None:
        kept = {key: value for key, value in measured.items() if key != PADDING or self._packed}
        self._pending.append((step, lr, kept))

    def read(self, seen: Seen, seconds: float, applied: bool = True) -> list[dict[str, Any]]:
        """The lines of the steps since the last reading, the last one with what was seen in it.

        Args:
            seconds: that they took together. applied: whether the optimizer took part in the last
                one.
        """
        keys = list(self._pending[0][2])
        table = torch.stack(
            [measured[key].float() for _, _, measured in self._pending for key in keys]
        )
        extra = {
            key: value.float().to(table.device) for key, value in self._seen(seen, applied).items()
        }
        numbers = torch.cat([table, *(value.reshape(-1) for value in extra.values())]).tolist()
        first, last = self._pending[0][0], self._pending[-1][0]
        tokens = self._tokens(last) - self._tokens(first - 1)
        timing = {
            "step_seconds": seconds / len(self._pending),
            "tokens_per_second": tokens / seconds,
        }
        if self._per_token is not None:
            timing["mfu"] = self._per_token * tokens / seconds
        lines: list[dict[str, Any]] = [
            {
                "step": step,
                "tokens": self._tokens(step),
                **dict(zip(keys, numbers[i * len(keys) :])),
                "lr": lr,
                **timing,
            }
            for i, (step, lr, _) in enumerate(self._pending)
        ]
        at = table.numel()
        for key, value in extra.items():
            lines[-1][key] = numbers[at] if value.ndim == 0 else numbers[at : at + value.numel()]
            at += value.numel()
        self._pending = []
        return lines

    def forget(self) -> None:
        """Drop the steps since the last reading."""
        self._pending = []

    def _tokens(self, step: int) -> int:
        return self.batches.at(step)[0] * self.model.context

    def _seen(self, seen: Seen, applied: bool) -> dict[str, Tensor]:
        """What the last step showed: scalars, and vectors over experts."""
        step, metrics = self._pending[-1][0], dict[str, Tensor]()
        per_layer, model = self.telemetry.per_layer, self.model
        if seen.sums is not None:
            tokens = self._tokens(step) - self._tokens(step - 1)
            metrics |= stability_metrics(seen.sums, tokens, model.heads, model.width, per_layer)
        if seen.load is not None and per_layer:
            metrics |= {
                f"moe/layer_{i:02d}/load": share for i, share in enumerate(load_share(seen.load))
            }
        return metrics | (self._of_optimizer(self.optimizer.diagnostics()) if applied else {})

    def _of_optimizer(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """`optimizer/*` and `spectrum/*`, over all matrices whose rule uses norms."""
        if not seen:
            return {}
        metrics = {
            "optimizer/trust_ratio_mean": seen["trust_ratio"].mean(),
            "optimizer/trust_ratio_min": seen["trust_ratio"].min(),
            "optimizer/trust_ratio_max": seen["trust_ratio"].max(),
            "optimizer/clip_fraction": seen["clipped"].float().mean(),
            "optimizer/calibration_mean": seen["calibration"].mean(),
            "optimizer/effective_decay": seen["effective_decay"].mean(),
            "optimizer/relative_update_mean": seen["relative_update"].mean(),
            "optimizer/relative_update_max": seen["relative_update"].max(),
            "optimizer/weight_norm_drift": seen["norm_drift"].abs().max(),
        }
        orthogonal = self.optimizer.orthogonal()
        if not orthogonal.numel():
            return metrics
        metrics["optimizer/orthogonality_residual"] = seen["orthogonality_residual"][
            orthogonal
        ].mean()
        spectral = {f"spectrum/{key}": seen[key] for key in SPECTRUM if key in seen}
        if "gradient_sigma_mean" in seen:
            # The optimizer has seen gradients that were clipped: back to what they were.
            norm = self._pending[-1][2]["grad_norm"].to(orthogonal.device)
            clip = self._clip
            clipped_by = 1.0 if clip is None else ((norm + 1e-6) / clip).clamp(min=1.0)
            for key in SPECTRUM:
                scale = clipped_by if key.startswith("sigma") else 1.0
                spectral[f"spectrum/gradient/{key}"] = seen[f"gradient_{key}"] * scale
        metrics |= {key: values[orthogonal].mean() for key, values in spectral.items()}
        if "gradient_sigma_mean" in seen:
            rank = self._ranks(orthogonal)
            nuclear = spectral["spectrum/gradient/sigma_mean"][orthogonal].float() * rank
            metrics["spectrum/gradient/nuclear_norm"] = nuclear.sum()
            metrics["spectrum/gradient/heterogeneity_gain"] = heterogeneity_gain(nuclear, rank)
        if self.telemetry.per_layer:
            names, index, counts = self._matrices(orthogonal.device)
            each = {f"optimizer/matrix/{key}": seen[key] for key in PER_MATRIX} | spectral
            for group, values in each.items():
                means = counts.new_zeros(len(names)).index_add_(0, index, values.float()) / counts
                path, key = group.rsplit("/", 1)
                shown = set(names) if path == "optimizer/matrix" else self._orthogonal
                metrics |= {
                    f"{path}/{name}/{key}": mean
                    for name, mean in zip(names, means.unbind())
                    if name in shown
                }
        return metrics

    def _ranks(self, matrices: Tensor) -> Tensor:
        """min(m, n) of each."""
        if self._short is None:
            short = [float(min(rows, cols)) for _, _, rows, cols in self.optimizer.views()]
            self._short = torch.tensor(short, device=matrices.device)
        return self._short[matrices]

    def _matrices(self, device: torch.device) -> tuple[list[str], Tensor, Tensor]:
        """Names of the matrices, those of a stack of experts under one; which name each has, and
        how many have it."""
        if self._rows is None:
            each = [re.sub(r"\[\d+\]", "", name) for name in self.optimizer.matrix_names()]
            names = list(dict.fromkeys(each))
            index = torch.tensor([names.index(name) for name in each], device=device)
            self._rows = index, names, torch.bincount(index, minlength=len(names)).float()
            self._orthogonal = {each[v] for v in self.optimizer.orthogonal().tolist()}
        index, names, counts = self._rows
        return names, index, counts


class FallBack(Exception):
    """Raised on all ranks together when the guard has skipped too many steps in a row."""

    def __init__(self, step: int, cause: str):
        super().__init__(cause)
        self.step = step


class Judgement:
    """The guard's word on every step: before the update where it acts, at the reading where it only
    warns."""

    def __init__(self, guard: Guard | None):
        self._guard = guard
        self._causes: list[str | None] = []  # of the steps since the last reading, if it acts
        self.cause = ""  # of the last bad step

    def allow(self, loss: Tensor, norm: Tensor) -> bool:
        """Whether a step may be applied; the same on all ranks. Waits for the device."""
        assert self._guard is not None
        values = from_rank_zero(torch.stack([loss.float(), norm.float()])).tolist()
        cause = self._guard.judge(dict(zip(("loss", "grad_norm"), values)))
        self._causes.append(cause)
        self.cause = cause or self.cause
        return cause is None

    @property
    def applied(self) -> bool:
        """Whether the last step was."""
        return not self._causes or self._causes[-1] is None

    def annotate_events(
        self, lines: list[dict[str, Any]], watch: bool = True
    ) -> list[dict[str, Any]]:
        """The lines, with an `event` where something was wrong; with `watch` the last one has what
        the optimizer showed."""
        if self._guard is None:
            return lines
        if self._guard.acts:
            causes = [cause and f"skipped: {cause}" for cause in self._causes]
        else:
            causes = [self._guard.judge(line) for line in lines]
        self._causes = []
        for line, cause in zip(lines, causes, strict=True):
            if cause:
                line["event"] = cause
        if watch and (wrong := self._guard.watch(lines[-1])):
            lines[-1]["event"] = "; ".join(filter(None, [lines[-1].get("event"), wrong]))
        return lines
