"""The keys of a grid file; what they mean together is in `archscale.sweep.grid`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, field_validator
from pydantic_core import PydanticCustomError

from archscale.config.sections import Section
from archscale.config.values import EXPECTED, Count, CountOrZero, Text
from archscale.errors import ConfigError
from archscale.fit.fit import Settings
from archscale.fit.groups import FitRequest
from archscale.sweep.launchers.config import ClusterSections

MOST_RUNS = 10_000


class FitConfig(Section):
    """A fit over the runs of a grid, as `archscale fit` makes it."""

    form: Literal["power", "power_irreducible", "quadratic_log", "chinchilla"]
    """Of the law."""
    x: Annotated[list[Text], Field(min_length=1)]
    """Column of the law, two for chinchilla."""
    y: Text
    """Column that the law predicts."""
    where: Text | None = None
    """Expression over columns; runs for which it is false are not fitted."""
    group: list[Text] = Field(default_factory=list)
    """Columns; each combination of their values has its own fit."""
    against: Text | None = None
    """With quadratic_log: a power law of the optimal x in this column."""
    joint: StrictBool = False
    """That law by one fit of all points."""
    block: Text | None = None
    """With quadratic_log: a column whose values, such as seeds, shift whole bowls."""
    nearest: Annotated[int, Field(ge=3)] | None = None
    """With quadratic_log: only that many different x around the best one; null: all."""
    leverage: Annotated[list[Text], Field(min_length=2, max_length=2)] | None = None
    """How many times the x of the first group the second needs."""
    at: list[float] = Field(default_factory=list)
    """Where to take the leverage."""
    space: Literal["log", "linear"] | None = None
    """Residuals of ln y or of y."""
    loss: Literal["squares", "huber"] = "squares"
    """huber for data with outliers."""
    delta: Annotated[float, Field(gt=0)] | None = None
    """Of Huber's loss."""
    replicates: Annotated[int, Field(ge=99, le=100_000)] = 999
    """Of the bootstrap."""
    confidence: Annotated[float, Field(ge=0.5, le=0.99)] = 0.95
    """Of the intervals."""
    seed: CountOrZero = 0
    """Of the bootstrap."""

    def request(self) -> FitRequest:
        """As `archscale.fit` takes it."""
        settings = Settings(
            self.space,
            self.loss,
            self.delta,
            self.replicates,
            self.confidence,
            self.seed,
            self.nearest,
        )
        return FitRequest(
            self.form,
            self.x,
            self.y,
            self.group,
            self.against,
            self.joint,
            (self.leverage[0], self.leverage[1]) if self.leverage else None,
            self.at,
            self.block,
            settings,
            self.where,
        )

    @field_validator("x", "group", mode="before")
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


Seeds = Annotated[list[CountOrZero], Field(min_length=1)]


class RefineConfig(Section):
    """More seeds where they matter, once the runs of the first ones are there."""

    x: Text
    """Axis along which the best value is looked for."""
    y: Text = "val_loss"
    """Column that is lowest at the best value."""
    points: Count = 3
    """Values of x that get the seeds: the best one and its neighbours."""
    seeds: Seeds
    """In the file also how many, from 0 on."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _so_many(cls, value: Any) -> Any:
        return seeds_of(value)


class GridConfig(ClusterSections):
    """The keys of a grid file; `processes` and those of clusters are in
    `archscale.sweep.launchers.config`."""

    name: Text
    """Name of the sweep and of its directory, runs/<name>."""
    base: Text
    """Config of all runs, relative to the grid file."""
    axes: dict[str, list[Any]] = Field(default_factory=dict)
    """Values of dotted keys; their product."""
    zip: list[Annotated[list[dict[str, Any]], Field(min_length=1)]] = Field(default_factory=list)
    """Lists of points whose keys move together; in the file also one such list."""
    derive: dict[str, Any] = Field(default_factory=dict)
    """Keys that follow from others: an expression in text, or a constant."""
    where: Text | None = None
    """Expression; a combination for which it is false is dropped."""
    seeds: Seeds | None = None
    """In the file also how many, from 0 on; null: the base's."""
    refine: RefineConfig | None = None
    """A second stage: more seeds around the best value of one axis, for each combination of the
    others."""
    fit: list[FitConfig] = Field(default_factory=list)
    """Fits over the finished runs."""

    def problems(self) -> Iterator[ConfigError]:
        yield from super().problems()
        if not re.fullmatch(r"[\w+-][\w.+-]*", self.name):
            yield ConfigError(
                f"{self.name!r} cannot name a directory", "name", "use letters, digits, - and _"
            )

    @field_validator("zip", mode="before")
    @classmethod
    def _one_zip(cls, value: Any) -> Any:
        return (
            [value] if isinstance(value, list) and value and isinstance(value[0], dict) else value
        )

    @field_validator("seeds", mode="before")
    @classmethod
    def _so_many(cls, value: Any) -> Any:
        return value if value is None else seeds_of(value)


def seeds_of(value: Any) -> Any:
    """Seeds from a list of them or from how many there are."""
    if isinstance(value, list):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_RUNS:
        raise PydanticCustomError(
            EXPECTED, "", {"expected": f"a whole number from 1 to {MOST_RUNS} or a list of seeds"}
        )
    return list(range(value))
