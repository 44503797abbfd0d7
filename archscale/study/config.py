"""The YAML schema of studies. `load_study` reads a file as `archscale.config.load_config` does:
inheritance, overrides, no unknown keys, one-line errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from archscale.config import Config, MatrixRule, ModelConfig, Section
from archscale.config.explain import explain
from archscale.config.layers import Layer, merge, read_layers
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


def several(*values: float) -> Any:
    """The default of a list that may not be empty."""
    return Field(default=list(values), min_length=1)


class LeastSquaresRace(Section):
    """Trajectories at equal step size on matrix least squares."""

    sigma_means: list[Positive] = several(0.1, 10.0)  # σ̄ of the first gradient, by scaling the loss
    exponent: NonNegative = 1.0  # α of the first gradient's spectrum, σ_i ∝ i^(−α)
    condition: Positive = 100.0  # condition number of the curvature
    lrs: list[Positive] = several(0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # step sizes η
    steps: Count = 200  # updates of each trajectory
    target: PositiveShare = 0.1  # loss to reach, relative to the first


class LeastSquaresStudy(Section):
    """Edges on matrix least squares with planted spectra, where the theorem is exact."""

    rows: Count = 48  # m, outputs of the matrix
    columns: Count = 96  # n, inputs of the matrix
    lipschitz: Positive = 1.0  # L, the largest curvature
    exponents: list[NonNegative] = several(0.0, 0.5, 1.0, 2.0)  # α of planted spectra, σ_i ∝ i^(−α)
    sigma_means: list[Positive] = several(0.1, 1.0, 10.0)  # σ̄ of planted gradients
    conditions: list[Positive] = several(1.0, 100.0)  # of the curvature; 1: an exact theorem
    race: LeastSquaresRace = LeastSquaresRace()


class KroneckerStudy(Section):
    """Conditioning of a planted Kronecker-factored curvature A ⊗ B, where the model holds."""

    rows: Count = 24  # m, the size of B
    columns: Count = 96  # n, the size of A
    input_condition: Positive = 10.0  # condition number of A
    output_conditions: list[Positive] = several(1.0, 10.0, 100.0, 1000.0)  # condition numbers of B
    samples: Count = 256  # gradients of independent Gaussian errors, for the gradient covariance


class LanguageRace(Section):
    """Training at equal step size."""

    sigma_means: list[Positive] = several(0.1, 10.0)  # σ̄ of the first gradient over all matrices
    lrs: list[Positive] = several(0.003, 0.01, 0.03, 0.1, 0.3)  # step sizes η of the matrices
    steps: Count = 80  # updates of each run
    target: Positive = 4.5  # loss to reach, nats per token


class LanguageStudy(Section):
    """Edges, trajectories and conditioning on a small language model."""

    model: ModelConfig = ModelConfig()
    data: Text  # directory of token shards
    batch: Count = 8  # sequences of a batch
    after: list[CountOrZero] = several(0, 50)  # training steps after which edges are measured
    lr: Positive = 0.02  # step size of Muon in those steps
    momentum: BelowOne = 0.95  # in those steps
    element_lr: Positive = 0.003  # AdamW's rate for embedding and vectors, in all training
    lanczos: Count = 24  # iterations for the largest curvature L
    samples: Count = 16  # batches for the covariances of activations and gradients
    damping: NonNegative = 1e-3  # of those covariances, relative to their mean eigenvalue
    race: LanguageRace = LanguageRace()


class BaseStudy(Section):
    """What every study has."""

    study: Literal["spectral_flattening", "hybrids", "sqrt_gate"]
    name: Text  # of the study and of its directory, runs/<name>
    seeds: list[CountOrZero] = several(0, 1, 2)  # of everything random

    def problems(self) -> Iterator[ConfigError]:
        yield from _directory_problems(self.name, "name")


def _directory_problems(name: str, key: str) -> Iterator[ConfigError]:
    if name.startswith(".") or "/" in name or "\\" in name:
        problem = f"{name!r} cannot name a directory"
        yield ConfigError(problem, key, "leave out slashes and leading dots")


class SpectralStudy(BaseStudy):
    """Step-size edges, divergence, steps to a target and conditioning (arXiv 2605.13079)."""

    orthogonalizer: Literal["polar_express", "quintic", "quintic_tuned"] = "polar_express"
    tolerance: Positive = 1e-4  # relative width at which bisection ends
    least_squares: LeastSquaresStudy = LeastSquaresStudy()
    kronecker: KroneckerStudy = KroneckerStudy()
    language: LanguageStudy

    def problems(self) -> Iterator[ConfigError]:
        yield from super().problems()
        for key, conditions in {
            "least_squares.conditions": self.least_squares.conditions,
            "least_squares.race.condition": [self.least_squares.race.condition],
            "kronecker.input_condition": [self.kronecker.input_condition],
            "kronecker.output_conditions": self.kronecker.output_conditions,
        }.items():
            for condition in conditions:
                if condition < 1:
                    problem = f"no condition number is {condition}"
                    yield ConfigError(problem, key, "give at least 1")


class Arm(Section):
    """One rule at one setting."""

    label: Text  # short name, unique in the study
    rule: MatrixRule  # update rule of the matrices
    lr: Positive  # learning rate of the matrices
    weight_decay: NonNegative


class HybridStudy(BaseStudy):
    """The three failing hybrids beside a control (arXiv 2605.07815): each predicted symptom, from
    the telemetry of training runs."""

    run: dict[str, Any]  # config of every run, without name, seed and what an arm sets
    arms: Annotated[list[Arm], Field(min_length=1)]

    def problems(self) -> Iterator[ConfigError]:
        yield from super().problems()
        labels = [arm.label for arm in self.arms]
        for label in sorted({label for label in labels if labels.count(label) > 1}):
            yield ConfigError(f"two arms are called {label!r}", "arms", "give each its own label")
        for label in labels:
            yield from _directory_problems(label, "arms")
        for key in ("name", "seed"):
            if key in self.run:
                yield ConfigError(f"{key} is set by the study", f"run.{key}", "remove it")

    def config(self, arm: Arm, seed: int) -> Config:
        """Config of one run. Raises ConfigError, with the key as it stands in the study."""
        settings = {
            "name": f"{arm.label}_seed{seed}",
            "seed": seed,
            "optimizer": {"matrix": {"rule": arm.rule}, "weight_decay": arm.weight_decay},
            "parameterization": {"base": {"lr": arm.lr}},
        }
        try:
            return Config.from_dict(merge([Layer("run", self.run), Layer("arm", settings)]))
        except ConfigError as error:
            where = f"run of arm {arm.label}: {error.where}"
            raise ConfigError(error.what, where, error.remedy) from None


class GateStudy(BaseStudy):
    """SqrtGate (arXiv 2603.28743): output RMS of fresh mixtures of experts over granularity."""

    granularities: list[Count] = several(1, 2, 4, 8, 16, 32, 64)  # k, experts a token
    sparsity: Count = 8  # S, experts per active one
    width: Count = 256  # features of a token
    hidden: Count = 1024  # hidden features of all active experts together
    mlp: Literal["swiglu", "relu2"] = "swiglu"
    tokens: Count = 512  # over which the RMS is taken

    def problems(self) -> Iterator[ConfigError]:
        yield from super().problems()
        for k in self.granularities:
            if self.hidden % k:
                problem = f"{k} does not divide {self.hidden} hidden features"
                yield ConfigError(problem, "granularities", "give divisors of hidden")


STUDIES: dict[str, type[BaseStudy]] = {
    "spectral_flattening": SpectralStudy,
    "hybrids": HybridStudy,
    "sqrt_gate": GateStudy,
}


def load_study(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> BaseStudy:
    """The study of a file, under the overrides. Raises ConfigError."""
    layers = read_layers(path, overrides)
    content = merge(layers)
    kind = content.get("study")
    if kind not in STUDIES:
        names, close = ", ".join(STUDIES), nearest(kind, list(STUDIES))
        problem = "study is missing"
        if kind is not None:
            problem = f"got {show(kind)}, expected one of {names}"
        remedy = f"did you mean {close}?" if close else f"add `study: {' or '.join(STUDIES)}`"
        raise ConfigError(problem, f"study in {path}", remedy)
    try:
        study = STUDIES[kind].model_validate(content)
    except ValidationError as error:
        raise explain(error, STUDIES[kind], layers) from None
    if isinstance(study, HybridStudy):
        for arm in study.arms:  # before the first run, not in the middle
            study.config(arm, study.seeds[0])
    return study
