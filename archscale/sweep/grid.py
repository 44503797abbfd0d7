"""Grids: a base config and axes over its keys, expanded to runs with readable names.

    grid = read_grid("configs/sweeps/lr_transfer.yaml")
    runs = grid.runs()              # GridRun(name="width64_lr0.01_seed0", values=…, config=…)

    name: lr_transfer
    base: ../small/transfer.yaml                        # relative to this file
    axes: {model.width: [32, 64], parameterization.base.lr: [0.01, 0.02]}     # their product
    zip:                                    # move together; a list of such lists: their product
      - {model.depth: 2, model.kv_heads: 1}
      - {model.depth: 4, model.kv_heads: 2}
    derive: {training.tokens: "20 * model.width ** 2", model.aspect: null}  # expressions, constants
    where: model.width >= 64 or model.depth == 2        # drops all other combinations
    seeds: 1                                # one seed, 0; or a list
    refine: {x: parameterization.base.lr, seeds: 3}     # then 0, 1, 2 around each best rate
    processes: 2                            # of each run, under torchrun
    fit: [{form: quadratic_log, x: parameterization.base.lr, y: val_loss, group: model.width}]

A name in an expression has the value that the run's config will have, with defaults and what
follows from other keys.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import zlib
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from archscale.config import Config
from archscale.config.explain import all_keys, explain, our_name
from archscale.config.layers import Layer, flatten, read_file, read_layers
from archscale.errors import ConfigError, nearest, show
from archscale.fit.fit import window
from archscale.sweep.config import MOST_RUNS, GridConfig, RefineConfig
from archscale.sweep.expressions import Expression, as_number

LONGEST_NAME = 120  # characters; file systems allow 255 bytes
KEYS = frozenset(all_keys(Config))

Point = dict[str, Any]  # dotted key → value


@dataclass(frozen=True)
class GridRun:
    """One combination.

    Attributes:
        name: of its directory.
        values: all that the grid says of it, by dotted key.
        where: for errors: its values and the file.
        config: with `name`; not resolved.
    """

    name: str
    values: Point
    where: str
    config: Config


class Grid:
    """A grid file that has been read and checked.

    Args:
        path: of the file.
        content: its keys.
        overrides: of the base, `section.key=value`.
    """

    def __init__(self, path: Path, content: GridConfig, overrides: Sequence[str] = ()):
        self.path, self.content = path, content
        self.base = Path(os.path.normpath(path.parent / content.base))
        self._layers = read_layers(self.base, overrides)
        self._check_keys()
        self._derived = self._in_order()
        self._where = self._expression(content.where, "where") if content.where else None
        for layer in self._layers[len(self._layers) - len(overrides) :]:
            key = next(iter(flatten(layer.data)))
            if taken := next((k for k in self.keys if _overlap(k, key)), None):
                raise ConfigError(
                    f"the grid sets {taken}", layer.origin, f"change {taken} in {path}"
                )

    @cached_property
    def keys(self) -> list[str]:
        """All keys that the grid sets, in the order of the names of runs."""
        seeds = ["seed"] if self.content.seeds is not None else []
        zips = [key for part in self.content.zip for key in part[0]]
        return [*zips, *self.content.axes, *seeds, *self.content.derive]

    def runs(self) -> list[GridRun]:
        """Every run but those of `refine`, in the order of zip, axes and seeds, the last one
        fastest.

        Raises:
            ConfigError: none are left, or one of them has no config; the line names its values.
        """
        return self._expand(self.content.seeds)

    def refined(self, y: Mapping[str, float], kept: Container[str] = ()) -> list[GridRun]:
        """The runs of `refine` that are not among `runs`.

        Each combination of all keys but x and the seed gets them at `points` consecutive values of
        x around the one whose y, the mean over its seeds, is lowest; at an end of the axis the
        window stays inside. A combination of which no run has a y gets none.

        Args:
            y: of finished runs, by name; what is not finite is left out.
            kept: names of runs that stay, whatever is the best value now.
        """
        refine = self.content.refine
        if refine is None:
            return []
        losses: dict[str, dict[Any, list[float]]] = {}  # of each combination, by x
        for run in self.runs():
            measured = losses.setdefault(self._others(run), {}).setdefault(run.values[refine.x], [])
            if math.isfinite(y.get(run.name, math.nan)):
                measured.append(y[run.name])
        windows = {}
        for others, by_x in losses.items():
            values = sorted(by_x, key=as_number)
            means = [sum(by_x[x]) / len(by_x[x]) if by_x[x] else math.inf for x in values]
            if min(means) < math.inf:
                windows[others] = values[
                    window(means.index(min(means)), refine.points, len(values))
                ]
        seeds = [seed for seed in refine.seeds if seed not in (self.content.seeds or [])]
        return [
            run
            for run in (self._expand(seeds) if seeds else [])
            if run.name in kept or run.values[refine.x] in windows.get(self._others(run), [])
        ]

    def _others(self, run: GridRun) -> str:
        """What a run shares with those between which `refine` chooses."""
        skip = {
            "seed",
            *([self.content.refine.x] if self.content.refine else []),
            *self.content.derive,
        }
        return json.dumps([run.values[key] for key in self.keys if key not in skip], default=str)

    def _expand(self, seeds: Sequence[int] | None) -> list[GridRun]:
        content = self.content
        parts = [
            *content.zip,
            *([{key: value} for value in values] for key, values in content.axes.items()),
        ]
        if seeds is not None:
            parts.append([{"seed": seed} for seed in seeds])
        count = math.prod(map(len, parts))
        if count > MOST_RUNS:
            remedy = "leave out values, or make several grids of it"
            raise ConfigError(
                f"{count:,} combinations are more than {MOST_RUNS:,}", str(self.path), remedy
            )
        runs, problems, causes = [], [], set()
        for combination in itertools.product(*parts):
            point = {key: value for part in combination for key, value in part.items()}
            where = f"{describe(point)} in {self.path}"
            try:
                run = self._run(point, self._name(combination), where)
            except ConfigError as error:
                causes.add(str(error))
                problems.append(
                    ConfigError(
                        f"{error.what}, {error.where.partition(' in ')[0]}", where, error.remedy
                    )
                )
                if len(causes) == 1 and len(problems) == count:
                    raise  # not the fault of one combination: say where it stands
                continue
            if run is not None:
                runs.append(run)
        if problems:
            raise ConfigError.several(problems)
        if not runs:
            raise ConfigError(
                f"`where` drops all {count} combinations",
                f"where in {self.path}",
                "loosen it, or add values",
            )
        return runs

    def _run(self, point: Point, name: str, where: str) -> GridRun | None:
        values = dict(point)
        resolved: list[
            Mapping[str, Any]
        ] = []  # of the values so far, built only where an expression needs it

        def value(key: str) -> Any:
            if key in values:
                return values[key]
            if not resolved:
                resolved.append(self._config(values, name).resolved())
            part_value: Any = resolved[0]
            for part in key.split("."):
                # keys of a section that is null are null
                part_value = None if part_value is None else part_value[part]
            return part_value

        for key, derived in self._derived:
            values[key] = derived(value) if isinstance(derived, Expression) else derived
            resolved.clear()
        if self._where and not self._where(value):
            return None
        return GridRun(name, values, where, self._config(values, name))

    def _config(self, values: Point, name: str) -> Config:
        tree: dict[str, Any] = {"name": name}
        for key, value in values.items():
            *sections, last = key.split(".")
            inner = tree
            for section in sections:
                inner = inner.setdefault(section, {})
            inner[last] = value
        return Config.from_layers([*self._layers, Layer(f"{self.path}", tree)])

    def _name(self, combination: Sequence[Point]) -> str:
        """Such as `width64_lr0.01_seed0`. Of keys that move together as few as tell them apart."""
        zips = self.content.zip
        parts: list[str] = []
        for i, part in enumerate(combination):
            keys = _telling(zips[i]) if i < len(zips) else list(part)
            parts += [f"{self._short(key)}{_value_text(part[key])}" for key in keys]
        name = "_".join(parts) or self.content.name
        exact = json.dumps(combination, sort_keys=True, default=str)
        if len(name) > LONGEST_NAME or any(
            isinstance(v, dict | list) for part in combination for v in part.values()
        ):
            name = f"{name[:LONGEST_NAME]}_{zlib.crc32(exact.encode()):08x}"
        return name

    def _short(self, key: str) -> str:
        """As much of the end of a key as no other key of the grid ends with."""
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            end = parts[-length:]
            if sum(other.split(".")[-length:] == end for other in self.keys) == 1:
                break
        return ".".join(end)

    def _in_order(self) -> list[tuple[str, Any]]:
        """Derived keys, each after those that it names; among them first what needs nothing but the
        grid's own values, so that a config which is built to look up any other key has as many of
        them as can be."""
        pending = {
            key: self._expression(value, f"derive.{key}") if isinstance(value, str) else value
            for key, value in self.content.derive.items()
        }
        names = {
            key: value.names if isinstance(value, Expression) else set()
            for key, value in pending.items()
        }
        own = set(self.keys) - pending.keys()
        ordered: list[tuple[str, Any]] = []
        while pending:
            ready = [key for key in pending if not names[key] & pending.keys()]
            if not ready:
                circle = ", ".join(pending)
                raise ConfigError(
                    "derived keys need each other",
                    f"derive of {circle} in {self.path}",
                    "break the circle",
                )
            key = next((key for key in ready if names[key] <= own), ready[0])
            ordered.append((key, pending.pop(key)))
            own.add(key)
        return ordered

    def _expression(self, text: str, where: str) -> Expression:
        return Expression(text, f"{where} in {self.path}", KEYS)

    def _check_keys(self) -> None:
        content, path = self.content, self.path
        named = [("axes", key) for key in content.axes]
        named += [("derive", key) for key in content.derive]
        for number, part in enumerate(content.zip):
            section_name = f"zip.{number}" if len(content.zip) > 1 else "zip"
            self._check_zip(part, f"{section_name} in {path}")
            named += [(section_name, key) for key in part[0]]
        if not content.axes and not content.zip and content.seeds is None:
            raise ConfigError(
                "the grid has no axes",
                str(path),
                "give `axes:`, `zip:` or `seeds:`, or use archscale train",
            )
        if content.seeds is not None:
            if len(set(content.seeds)) < len(content.seeds):
                raise ConfigError("a seed is there twice", f"seeds in {path}", "remove one of them")
            named.append(("seeds", "seed"))
        if content.refine is not None:
            self._check_refine(content.refine)
        for section, key in named:
            _check_key(key, f"{section}.{key} in {path}")
        for (_, first), (section, second) in itertools.combinations(named, 2):
            if _overlap(first, second):
                what = (
                    f"{first} is set twice"
                    if first == second
                    else f"{first} and {second} set the same"
                )
                raise ConfigError(what, f"{section}.{second} in {path}", "leave one of them out")
        for key, values in content.axes.items():
            where = f"axes.{key} in {path}"
            if not values:
                raise ConfigError(
                    "the axis has no values", where, "give a list of values, or remove it"
                )
            if twice := _twice([{key: value} for value in values]):
                raise ConfigError(f"{show(twice[key])} is there twice", where, "remove one of them")

    def _check_zip(self, part: Sequence[Point], where: str) -> None:
        """Entries of one `zip` have the same keys, and no two the same values."""
        if not part[0]:
            raise ConfigError(
                "there is nothing in it", where, "give `key: value` pairs, or remove it"
            )
        for point in part[1:]:
            if point.keys() != part[0].keys():
                odd = sorted(point.keys() ^ part[0].keys())[0]
                raise ConfigError(f"{odd} is not in all of its entries", where, "give it in all")
        if twice := _twice(part):
            raise ConfigError(f"{describe(twice)} is there twice", where, "remove one of them")

    def _check_refine(self, refine: RefineConfig) -> None:
        where = f"refine in {self.path}"
        if refine.x not in self.content.axes:
            raise ConfigError(
                f"{show(refine.x)} is no axis",
                f"refine.x in {self.path}",
                (
                    f"give one of {', '.join(self.content.axes)}"
                    if self.content.axes
                    else "add it to `axes:`"
                ),
            )
        if any(
            isinstance(as_number(value), bool) or not isinstance(as_number(value), int | float)
            for value in self.content.axes[refine.x]
        ):
            raise ConfigError(
                f"the values of {refine.x} are not all numbers, so none has neighbours",
                f"refine.x in {self.path}",
                "give an axis of numbers",
            )
        if self.content.seeds is None:
            raise ConfigError("more seeds than none", where, "add `seeds: 1`, or remove refine")
        if set(refine.seeds) <= set(self.content.seeds):
            raise ConfigError(
                "all of its seeds are in `seeds`",
                f"refine.seeds in {self.path}",
                "add others, or remove refine",
            )


def read_grid(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Grid:
    """The grid in a file, checked; `overrides` (`section.key=value`) change its base.

    Raises:
        ConfigError: an unknown key, an expression that is not allowed, or nothing to run.
    """
    file = Path(path)
    data = read_file(file, needs="`name`, `base` and `axes`")
    try:
        content = GridConfig.model_validate(data)
    except ValidationError as error:
        raise explain(error, GridConfig, [Layer(str(file), data)]) from None
    return Grid(file, content, overrides)


def _check_key(key: str, where: str) -> None:
    """Refuses what is no key of the config, or none that a grid may set."""
    if key in ("name", "base"):
        raise ConfigError(
            f"a grid cannot set {key}", where, "leave it out: runs are named by their values"
        )
    if key not in KEYS:
        keys = sorted(KEYS)
        meant = (
            our_name(key, keys)
            or next((known for known in keys if known.endswith(f".{key}")), None)
            or nearest(key, keys)
        )
        remedy = f"did you mean {meant}?" if meant else "give dotted keys of the config"
        raise ConfigError(f"unknown key {show(key)}", where, remedy)


def describe(point: Mapping[str, Any]) -> str:
    """Such as `model.width 64, seed 0`."""
    return ", ".join(
        f"{key} {value if isinstance(value, str) else show(value)}" for key, value in point.items()
    )


def _twice(points: Sequence[Point]) -> Point | None:
    seen = set()
    for point in points:
        text = json.dumps(
            {key: as_number(value) for key, value in point.items()}, sort_keys=True, default=str
        )
        text = re.sub(r"\.0(?=[,}\]])", "", text)  # 1 and 1.0 are one value
        if text in seen:
            return point
        seen.add(text)
    return None


def _telling(points: Sequence[Point]) -> list[str]:
    """As few keys, in order, as tell the points apart."""
    keys = list(points[0])

    def apart(chosen: Sequence[str]) -> int:
        return len({json.dumps([point[key] for key in chosen], default=str) for point in points})

    for count in range(1, len(keys)):
        for chosen in itertools.combinations(keys, count):
            if apart(chosen) == len(points):
                return list(chosen)
    return keys


def _value_text(value: Any) -> str:
    number = as_number(value)
    if isinstance(number, int | float) and not isinstance(number, bool):
        return str(value)
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return "-" + re.sub(r"[^\w.+-]+", "-", text).strip("-")


def _overlap(a: str, b: str) -> bool:
    return a == b or a.startswith(b + ".") or b.startswith(a + ".")
