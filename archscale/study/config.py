"""The YAML schema of studies: `study: spectral_flattening` or `study: hybrids`, and the settings of
each.

`load_study` reads a file as `archscale.config.load_config` does: inheritance, overrides, no unknown
keys, one-line errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from archscale.config import Config, ModelConfig, Section
from archscale.config.explain import explain
from archscale.config.layers import merge, read_layers
from archscale.config.sections import MatrixRule
from archscale.config.values import (
    BelowOne,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    PositiveShare,
    Text,
)
from archscale.errors import ConfigError, nearest, show

Seeds = Annotated[list[CountOrZero], Field(min_length=1)]
Positives = Annotated[list[Positive], Field(min_length=1)]
NonNegatives = Annotated[list[NonNegative], Field(min_length=1)]


class LeastSquaresRace(Section):
    """Trajectories at equal step size on matrix least squares."""

    sigma_means: Positives = Field(default=[0.1, 10.0])
    """σ̄ of the first gradient: how the loss is scaled."""
    exponent: NonNegative = 1.0
    """α of the first gradient's spectrum, σ_i ∝ i^(−α)."""
    condition: Positive = 100.0
    """Condition number of the curvature."""
    lrs: Positives = Field(default=[0.03, 0.1, 0.3, 1.0, 3.0, 10.0])
    """Step sizes η."""
    steps: Count = 200
    """Updates of each trajectory."""
    target: PositiveShare = 0.1
    """Loss to reach, relative to the first."""


class LeastSquaresStudy(Section):
    """Edges on matrix least squares with planted spectra."""

    rows: Count = 48
    """m, outputs of the matrix."""
    columns: Count = 96
    """n, inputs of the matrix."""
    lipschitz: Positive = 1.0
    """L, the largest curvature."""
    exponents: NonNegatives = Field(default=[0.0, 0.5, 1.0, 2.0])
    """α of planted gradient spectra, σ_i ∝ i^(−α)."""
    sigma_means: Positives = Field(default=[0.1, 1.0, 10.0])
    """σ̄ of planted gradients."""
    conditions: Positives = Field(default=[1.0, 100.0])
    """Condition numbers of the curvature; 1: the same in all directions, where the theorem is an
    equality."""
    race: LeastSquaresRace = LeastSquaresRace()
    """Trajectories."""

    def problems(self) -> Iterator[ConfigError]:
        for condition in [*self.conditions, self.race.condition]:
            if condition < 1:
                yield ConfigError(
                    f"no condition number is {condition}",
                    "least_squares.conditions",
                    "give at least 1",
                )


class KroneckerStudy(Section):
    """Conditioning of a planted Kronecker-factored curvature."""

    rows: Count = 24
    """m, the size of B."""
    columns: Count = 96
    """n, the size of A."""
    input_condition: Positive = 10.0
    """Condition number of A."""
    output_conditions: Positives = Field(default=[1.0, 10.0, 100.0, 1000.0])
    """Condition numbers of B."""
    samples: Count = 256
    """Gradients, of independent Gaussian errors, that the gradient covariance is estimated from."""

    def problems(self) -> Iterator[ConfigError]:
        for key, value in [
            ("input_condition", self.input_condition),
            *(("output_conditions", v) for v in self.output_conditions),
        ]:
            if value < 1:
                yield ConfigError(
                    f"no condition number is {value}", f"kronecker.{key}", "give at least 1"
                )


class LanguageRace(Section):
    """Training at equal step size."""

    sigma_means: Positives = Field(default=[0.1, 10.0])
    """σ̄ of the first gradient, over all matrices: how the loss is scaled."""
    lrs: Positives = Field(default=[0.003, 0.01, 0.03, 0.1, 0.3])
    """Step sizes η of the matrices."""
    steps: Count = 80
    """Updates of each run."""
    target: Positive = 4.5
    """Loss to reach, nats per token."""


class LanguageStudy(Section):
    """Edges, trajectories and conditioning on a small language model."""

    model: ModelConfig = ModelConfig()
    """Architecture."""
    data: Text
    """Directory of token shards."""
    batch: Count = 8
    """Sequences of a batch."""
    after: Annotated[list[CountOrZero], Field(min_length=1)] = Field(default=[0, 50])
    """Training steps after which edges are measured."""
    lr: Positive = 0.02
    """Step size of Muon in those steps."""
    momentum: BelowOne = 0.95
    """Momentum in those steps."""
    element_lr: Positive = 0.003
    """AdamW's rate for embedding and vectors, in all training."""
    lanczos: Count = 24
    """Iterations for the largest curvature L."""
    samples: Count = 16
    """Batches that covariances of activations and gradients are estimated from."""
    damping: NonNegative = 1e-3
    """Of those covariances, relative to their mean eigenvalue."""
    race: LanguageRace = LanguageRace()
    """Training at equal step size."""


class SpectralStudy(Section):
    """Seed 004: step-size edges, divergence, steps to a target, conditioning."""

    study: Literal["spectral_flattening"]
    """Which study this is."""
    name: Text
    """Of the study and of its directory, runs/<name>."""
    seeds: Seeds = Field(default=[0, 1, 2])
    """Of everything random."""
    orthogonalizer: Literal["polar_express", "quintic", "quintic_tuned"] = "polar_express"
    """Five iterations of this scheme, beside the exact factor."""
    tolerance: Positive = 1e-4
    """Relative width at which bisection ends."""
    least_squares: LeastSquaresStudy = LeastSquaresStudy()
    """Edges where the theorem is exact."""
    kronecker: KroneckerStudy = KroneckerStudy()
    """Conditioning where the model holds."""
    language: LanguageStudy
    """Both on a language model."""

    def problems(self) -> Iterator[ConfigError]:
        yield from _name_problems(self.name)


class Arm(Section):
    """One rule at one setting."""

    label: Text
    """Short name, unique in the study."""
    rule: MatrixRule
    """Update rule of the matrices."""
    lr: Positive
    """Learning rate of the matrices."""
    weight_decay: NonNegative
    """Weight decay."""


class HybridStudy(Section):
    """The three failing hybrids beside a control: each predicted symptom, from the telemetry of
    training runs."""

    study: Literal["hybrids"]
    """Which study this is."""
    name: Text
    """Of the study and of its directory, runs/<name>."""
    seeds: Seeds = Field(default=[0, 1, 2])
    """Of initialization and data order."""
    run: dict[str, Any]
    """Training config of every arm (configs/README.md), without name, seed and what an arm sets."""
    arms: Annotated[list[Arm], Field(min_length=1)]
    """What is compared."""

    def problems(self) -> Iterator[ConfigError]:
        yield from _name_problems(self.name)
        labels = [arm.label for arm in self.arms]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            yield ConfigError(f"two arms are called {label!r}", "arms", "give each its own label")
        for label in labels:
            if "/" in label or label.startswith("."):
                yield ConfigError(
                    f"{label!r} cannot name a directory",
                    "arms",
                    "leave out slashes and leading dots",
                )
        for key in ("name", "seed"):
            if key in self.run:
                yield ConfigError(f"{key} is set by the study", f"run.{key}", "remove it")

    def config(self, arm: Arm, seed: int) -> Config:
        """The training config of one run. Raises ConfigError, with the key as it stands in the
        study."""
        optimizer = self.run.get("optimizer") or {}
        parameterization = self.run.get("parameterization") or {}
        try:
            return Config.from_dict(
                self.run
                | {
                    "name": f"{arm.label}_seed{seed}",
                    "seed": seed,
                    "optimizer": (
                        optimizer
                        | {
                            "matrix": (optimizer.get("matrix") or {}) | {"rule": arm.rule},
                            "weight_decay": arm.weight_decay,
                        }
                    ),
                    "parameterization": (
                        parameterization
                        | {"base": (parameterization.get("base") or {}) | {"lr": arm.lr}}
                    ),
                }
            )
        except ConfigError as error:
            raise ConfigError(
                error.what, f"run of arm {arm.label}: {error.where}", error.remedy
            ) from None


class GateStudy(Section):
    """SqrtGate: output RMS of fresh mixtures of experts over their granularity."""

    study: Literal["sqrt_gate"]
    """Which study this is."""
    name: Text
    """Of the study and of its directory, runs/<name>."""
    seeds: Seeds = Field(default=[0, 1, 2])
    """Of initialization and tokens."""
    granularities: Annotated[list[Count], Field(min_length=1)] = Field(
        default=[1, 2, 4, 8, 16, 32, 64]
    )
    """k, active experts a token; each divides `hidden`."""
    sparsity: Count = 8
    """S, experts per active one."""
    width: Count = 256
    """Features of a token."""
    hidden: Count = 1024
    """Hidden features of all active experts together."""
    mlp: Literal["swiglu", "relu2"] = "swiglu"
    """Feed-forward of an expert."""
    tokens: Count = 512
    """Tokens that the RMS is taken over."""

    def problems(self) -> Iterator[ConfigError]:
        yield from _name_problems(self.name)
        for k in self.granularities:
            if self.hidden % k:
                yield ConfigError(
                    f"{k} does not divide {self.hidden} hidden features",
                    "granularities",
                    "give divisors of hidden",
                )


Study = SpectralStudy | HybridStudy | GateStudy
STUDIES: dict[str, type[Study]] = {
    "spectral_flattening": SpectralStudy,
    "hybrids": HybridStudy,
    "sqrt_gate": GateStudy,
}


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Study:
    """The study of a file, under the overrides. Raises ConfigError."""
    layers = read_layers(path, overrides)
    data = merge(layers)
    kind = data.get("study")
    if kind not in STUDIES:
        close = nearest(kind, list(STUDIES))
        what = (
            "study is missing"
            if kind is None
            else f"got {show(kind)}, expected one of {', '.join(STUDIES)}"
        )
        remedy = f"did you mean {close}?" if close else f"add `study: {' or '.join(STUDIES)}`"
        raise ConfigError(what, f"study in {path}", remedy)
    root = STUDIES[kind]
    try:
        study = root.model_validate(data)
    except ValidationError as error:
        raise explain(error, root, layers) from None
    if isinstance(study, HybridStudy):
        for arm in study.arms:  # before the first run, not in the middle
            study.config(arm, study.seeds[0])
    return study


def _name_problems(name: str) -> Iterator[ConfigError]:
    if name.startswith(".") or "/" in name or "\\" in name:
        yield ConfigError(
            f"{name!r} cannot name a directory", "name", "leave out slashes and leading dots"
        )
