"""One self-contained HTML file about a run, or about several side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from archscale.errors import ConfigError
from archscale.files import CONFIG, write_atomically
from archscale.report.curves import AXES
from archscale.report.figures import Section, make_figures
from archscale.report.maps import palette
from archscale.report.measured import plan_rows, state, tiles, trained
from archscale.report.page import render as render_page
from archscale.report.page import writing
from archscale.report.read import RunRecord, is_number
from archscale.report.scale import knots, number
from archscale.yaml_reader import parse_yaml

MOST_EVALUATIONS = 100  # results of `archscale eval` that are listed: the newest
MOST_KINDS = 40  # kinds of events that are listed
READ_OUT_EVENTS = 200  # events that the read-out under the pointer knows
COLORS = 8  # of runs; more begin again with the first


def write_run_page(runs: list[RunRecord], path: Path) -> None:
    """Write the page of runs, which may still be going on, to `path`.

    Raises:
        ArchscaleError: it cannot be written.
    """
    html = render(runs, make_figures(runs))
    with writing(path):
        write_atomically(path, html)


def render(runs: Sequence[RunRecord], sections: Sequence[Section]) -> str:
    """The whole file."""
    flops = all(run.flops_per_token for run in runs)
    started = [run.steps for run in runs if len(run.steps)]
    first = min((int(steps[0]) for steps in started), default=0)
    last = max((int(steps[-1]) for steps in started), default=0)
    return render_page(
        "run.html",
        title=" beside ".join(run.name for run in runs),
        runs=runs,
        heads=[(state(run), trained(run)) for run in runs],
        tiles=_by_run([{tile.name: tile for tile in tiles(run)} for run in runs]),
        plans=_by_run([{row.name: row for row in plan_rows(run)} for run in runs]),
        environments=_by_run([run.environment for run in runs]),
        sections=sections,
        axes=[
            (kind, name.removeprefix("training "))
            for kind, name in AXES.items()
            if kind != "flops" or flops
        ],
        steps=(first, max(last, first + 1)),
        evaluations=[_evaluations(run) for run in runs],
        samples=[_samples(run) for run in runs],
        events=[_events(run) for run in runs],
        differences=_differences(runs),
        data=_data(runs, sections),
        made_at=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        colors=COLORS,
    )


def _by_run(values: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Each key's value of every run; None where a run has none."""
    keys = dict.fromkeys(key for own in values for key in own)
    return {key: [own.get(key) for own in values] for key in keys}


def _evaluations(run: RunRecord) -> list[tuple[int, str, str, str]]:
    """(step, what, with what settings, figures) of each result, for people."""
    rows = []
    for row in run.evaluations[-MOST_EVALUATIONS:]:
        settings = row.get("settings")
        told = settings.items() if isinstance(settings, dict) else ()
        figures = [
            f"{key} {number(value, 6) if is_number(value) else 'not finite'}"
            for key, value in row["figures"].items()
        ]
        with_what = ", ".join(f"{key} {value}" for key, value in told)
        rows.append((row["step"], f"{row['kind']} {row['name']}", with_what, ", ".join(figures)))
    return rows


def _samples(run: RunRecord) -> tuple[int, list[tuple[str, str]]] | None:
    """(step, prompts and their continuations) of the last step that has any."""
    if not run.samples:
        return None
    last = run.samples[-1]["step"]
    return last, [(row["prompt"], row["text"]) for row in run.samples if row["step"] == last]


def _events(run: RunRecord) -> tuple[list[tuple[str, list[int]]], int]:
    """(what happened and at which steps, how many more kinds of events there are)."""
    kinds: dict[str, list[int]] = {}
    for step, text in run.events:
        kinds.setdefault(text, []).append(step)
    return list(kinds.items())[:MOST_KINDS], max(0, len(kinds) - MOST_KINDS)


def _differences(runs: Sequence[RunRecord]) -> dict[str, list[Any]]:
    """Config values of all runs by key, where they are not the same."""
    configs = [_flat(_parsed(run)) for run in runs]
    return {k: v for k, v in _by_run(configs).items() if len(set(map(repr, v))) > 1}


def _parsed(run: RunRecord) -> Any:
    try:
        return parse_yaml(run.config, CONFIG) or {}
    except ConfigError:
        return {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _data(runs: Sequence[RunRecord], sections: Sequence[Section]) -> dict[str, Any]:
    """What the script draws and reads out."""
    return {
        "charts": [chart.as_dict() for section in sections for chart in section.charts],
        "palette": palette() if any(section.maps for section in sections) else "",
        "runs": [
            {
                "name": run.name,
                "tokens": knots(run.steps, run.tokens),
                "flops": run.flops_per_token,
                "events": [[step, text[:200]] for step, text in run.events[:READ_OUT_EVENTS]],
                "eventSteps": np.unique([step for step, _ in run.events]).tolist(),
            }
            for run in runs
        ],
    }
