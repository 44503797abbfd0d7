"""The page around the figures: what a run did at a glance, the plan beside what was measured,
events, config."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np
import yaml

from archscale import __version__
from archscale.report.charts import AXES
from archscale.report.figures import Figures
from archscale.report.heat import PALETTE
from archscale.report.indicators import ABOUT, SECTIONS
from archscale.report.measured import Row, head, plan_rows, state, trained
from archscale.report.read import RunRecord
from archscale.report.scale import knots

MOST_KINDS = 40  # kinds of events that are listed
READ_OUT_EVENTS = 200  # events that the read-out under the pointer knows


def render(runs: Sequence[RunRecord], figures: dict[str, Figures]) -> str:
    """The whole file."""
    title = " beside ".join(run.name for run in runs)
    heads = "".join(_head(run, number, len(runs)) for number, run in enumerate(runs))
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<div class="pair">{heads}</div>' if len(runs) > 1 else heads,
    ]
    warnings = [
        f"<li>{escape(_of(run, runs) + text)}</li>" for run in runs for text in run.warnings
    ]
    if warnings:
        parts.append(f'<ul class="warnings">{"".join(warnings)}</ul>')
    parts.append(
        section(
            "plan",
            "Plan beside measured",
            _side_by_side(runs, [_table(plan_rows(run)) for run in runs]),
        )
    )
    if figures:
        parts.append(_controls(runs))
    for name, (curves, maps) in figures.items():
        content = f'<p class="about">{ABOUT[name]}</p>' if name in ABOUT else ""
        content += f'<div class="grid">{"".join(curves)}</div>' if curves else ""
        content += (
            f'<div class="grid {"pairs" if len(runs) > 1 else ""}">{"".join(maps)}</div>'
            if maps
            else ""
        )
        parts.append(section(name, SECTIONS[name], content))
    if any(maps for _, maps in figures.values()):
        parts.append(
            '<p class="about">A cell of a map shows the value of its steps that lies farthest from'
            " its row's median, so peaks and dips both survive. Curves keep the extremes of every"
            " few steps; where they have many, the bold line is their mean.</p>"
        )
    if any(run.events for run in runs):
        parts.append(
            section("events", "Events", _side_by_side(runs, [_events(run) for run in runs]))
        )
    texts = [definitions(dict(sorted(run.texts.items()))) for run in runs]
    if any(run.texts for run in runs):
        parts.append(section("texts", "Other values (last)", _side_by_side(runs, texts)))
    if len(runs) > 1:
        parts.append(section("differences", "Config: what differs", _differences(runs)))
    configs = [
        f'<pre class="config">{escape(run.config)}</pre>' if run.config else "<p>not there</p>"
        for run in runs
    ]
    parts.append(section("config", "Config", _side_by_side(runs, configs)))
    environments = [definitions(run.environment) for run in runs]
    parts.append(section("environment", "Environment", _side_by_side(runs, environments)))
    made_at = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    parts.append(f"<footer>archscale {__version__}, written {made_at}</footer>")
    here = files("archscale.report")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<title>{escape(title)}</title><link rel="icon"'
        f' href="data:,"/><style>{here.joinpath("page.css").read_text()}</style>'
        f'</head><body><main>{"".join(parts)}</main><div id="tip" hidden="hidden"></div>'
        f'<script type="application/json" id="data">{_data(runs)}</script>'
        f"<script>{here.joinpath('page.js').read_text()}</script></body></html>\n"
    )


def _of(run: RunRecord, runs: Sequence[RunRecord]) -> str:
    return f"{run.name}: " if len(runs) > 1 else ""


def _head(run: RunRecord, index: int, count: int) -> str:
    name = f'<h2><span class="k c{index}">{escape(run.name)}</span></h2>' if count > 1 else ""
    word, kind, share = state(run)
    bar = (
        ""
        if share is None
        else f'<div class="progress {kind}"><i style="width:{100 * share:.4g}%"></i></div>'
    )
    tiles = "".join(
        f'<div class="tile {row.kind}"><dt>{escape(row.name)}</dt><dd>{escape(row.measured)}</dd>'
        f'<dd class="note">{escape(row.note)}</dd></div>'
        for row in head(run)
    )
    return (
        f'<header>{name}<p class="lead"><span class="state {kind}">{escape(word)}</span>'
        f' {escape(trained(run))}</p>{bar}<dl class="tiles">{tiles}</dl></header>'
    )


def section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{title}</h2>{content}</section>\n'


def _side_by_side(runs: Sequence[RunRecord], contents: Sequence[str]) -> str:
    if len(runs) == 1:
        return contents[0]
    columns = (
        f"<div><h3>{escape(run.name)}</h3>{content}</div>" for run, content in zip(runs, contents)
    )
    return f'<div class="pair">{"".join(columns)}</div>'


def _table(rows: Sequence[Row]) -> str:
    body = "".join(
        f'<tr class="{row.kind}"><th'
        f' scope="row">{escape(row.name)}</th><td>{escape(row.planned)}</td>'
        f"<td>{escape(row.measured)}</td><td>{escape(row.note)}</td></tr>"
        for row in rows
    )
    if not rows:
        return "<p>neither a plan nor metrics</p>"
    top = '<tr><td></td><th scope="col">planned</th><th scope="col">measured</th><td></td></tr>'
    return (
        '<div class="scroll"><table'
        f' class="plan"><thead>{top}</thead><tbody>{body}</tbody></table></div>'
    )


def _events(run: RunRecord) -> str:
    """One row for each kind of event."""
    if not run.events:
        return "<p>none</p>"
    kinds: dict[str, list[int]] = {}
    for step, text in run.events:
        kinds.setdefault(text, []).append(step)
    rows = "".join(
        f"<tr><td>{steps[0]:,}</td><td>{f'{steps[-1]:,}' if len(steps) > 1 else ''}</td>"
        f'<td>{len(steps):,}</td><td class="text">{escape(text)}</td></tr>'
        for text, steps in list(kinds.items())[:MOST_KINDS]
    )
    more = f"<p>and {len(kinds) - MOST_KINDS} more kinds</p>" if len(kinds) > MOST_KINDS else ""
    top = "<tr><th>first step</th><th>last step</th><th>times</th><th>what</th></tr>"
    return (
        f'<div class="scroll"><table><thead>{top}</thead><tbody>{rows}</tbody></table></div>{more}'
    )


def definitions(values: dict[str, Any]) -> str:
    rows = "".join(
        f"<div><dt>{escape(str(k))}</dt><dd>{escape(str(v))}</dd></div>"
        for k, v in values.items()
        if v is not None
    )
    return f'<dl class="pairs">{rows}</dl>' if rows else "<p>not there</p>"


def _differences(runs: Sequence[RunRecord]) -> str:
    flat = [_flat(_parsed(run)) for run in runs]
    keys = [key for key in {**flat[0], **flat[1]} if flat[0].get(key) != flat[1].get(key)]
    if not keys:
        return "<p>nothing</p>"
    rows = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td>{escape(str(one.get(key, '–')))}</td>" for one in flat)
        + "</tr>"
        for key in keys
    )
    top = "<td></td>" + "".join(f'<th scope="col">{escape(run.name)}</th>' for run in runs)
    return (
        "<div"
        f' class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _parsed(run: RunRecord) -> Any:
    try:
        return yaml.safe_load(run.config) or {}
    except yaml.YAMLError:
        return {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for name, child in tree.items()
        for k, v in _flat(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def _controls(runs: Sequence[RunRecord]) -> str:
    """Switches that only work with JavaScript, which shows them."""
    kinds = [kind for kind in AXES if kind != "flops" or all(run.flops_per_token for run in runs)]

    def switch(name: str, label: str, choices: Sequence[tuple[str, str]]) -> str:
        checked = [' checked="checked"'] + [""] * len(choices)
        buttons = "".join(
            f'<label><input type="radio" name="{name}" value="{value}"{mark}/>{text}</label>'
            for (value, text), mark in zip(choices, checked)
        )
        return f"<fieldset><legend>{label}</legend>{buttons}</fieldset>"

    x = switch("x", "x axis", [(kind, AXES[kind].removeprefix("training ")) for kind in kinds])
    y = switch("y", "y axis", [("auto", "auto"), ("linear", "linear"), ("log", "log")])
    return f'<form id="controls" hidden="hidden">{x}{y}</form>'


def _data(runs: Sequence[RunRecord]) -> str:
    """What the script needs beside the figures."""
    content = {
        "palette": PALETTE.hex(),
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
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
