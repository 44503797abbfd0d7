"""The page of a sweep: what came of it at a glance, figures, tables, the grid, its runs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from archscale import __version__
from archscale.files import REPORT
from archscale.fit.text import render as fits_as_text
from archscale.report.indicators import parse_key
from archscale.report.page import definitions, section
from archscale.report.plot import inline
from archscale.report.records import Analysis, SweepRecord, label_in, name_of
from archscale.report.scale import compact, number
from archscale.report.sweep_figures import FigureOf, end_text, with_ends
from archscale.report.sweep_tables import Row, growth, verdict

Drawn = list[tuple[FigureOf, list[str]]]  # each with the SVG text of its panels
SECTIONS = {
    "flops": ("Loss against training FLOPs", "curves"),
    "bowls": ("Loss against {tuned}", "optima"),
    "optima": ("How the optimal {tuned} moves", None),
    "drift": ("Transfer: how the optimum drifts", "drift"),
    "leverage": ("Compute-efficiency leverage", "leverage"),
    "stability": ("Indicators over scale", "stability"),
    "others": ("Other axes of the grid", "indicators"),
}
MOST_SHOWN = 12  # findings and reasons that the head lists
OPEN_ROWS = 24  # of a table that is open at first
LONG = 44  # letters of a cell from which on it is broken into lines


def render(
    sweep: SweepRecord, found: Analysis, drawn: Drawn, tables: Mapping[str, list[Row]], page: Path
) -> str:
    """The whole file. `page` is where it will lie, for links; its tables and figures lie in a
    folder of its name beside it."""
    folder = folder_of(page)
    parts = [f"<h1>{escape(sweep.name)}</h1>", _head(sweep, found)]
    shown: set[str] = set()
    for name, (title, table) in SECTIONS.items():
        figures = [(figure, panels) for figure, panels in drawn if figure.section == name]
        content = "".join(_figure(figure, panels, folder) for figure, panels in figures)
        if table and table in tables and (figures or table in ("optima", "drift", "leverage")):
            content += _table(tables[table], f"{folder}/{table}.csv")
            shown.add(table)
        if content:
            title = title.format(tuned=name_of(found.axes.tuned) if found.axes.tuned else "size")
            parts.append(section(name, escape(title), content))
    if "indicators" in tables and "indicators" not in shown:
        parts.append(
            section(
                "indicators",
                "Indicators at each one's best setting",
                _table(tables["indicators"], f"{folder}/indicators.csv"),
            )
        )
    if found.fits or found.notes:
        parts.append(section("fits", "Fits of the grid", _fits(sweep, found)))
    parts.append(section("grid", "Grid", _grid(sweep)))
    parts.append(section("runs", "Runs", _runs(sweep, tables.get("runs", []), page, folder)))
    parts.append(section("environment", "Environment", _environment(sweep)))
    parts.append(f"<footer>archscale {__version__}</footer>")
    here = files("archscale.report")
    style = here.joinpath("page.css").read_text() + here.joinpath("sweep.css").read_text()
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f'<title>{escape(sweep.name)}</title><link rel="icon" href="data:,"/><style>{style}</style>'
        f"</head><body><main>{''.join(parts)}</main></body></html>\n"
    )


def folder_of(page: Path) -> str:
    """Name of the folder beside the page that has its figures and tables."""
    return page.stem if page.suffix else f"{page.name}_files"


def _head(sweep: SweepRecord, found: Analysis) -> str:
    done, planned = len(sweep.table.rows), len(sweep.values)
    kind = "good" if done == planned else "partial"
    word = "finished" if done == planned else "partly finished"
    share = f"{done} of {planned} runs finished"
    more = [f"{len(sweep.failed)} failed"] if sweep.failed else []
    more += [f"{len(sweep.unfinished)} not finished or not started"] if sweep.unfinished else []
    more += [f"{len(found.diverged)} without a finite loss"] if found.diverged else []
    flops = [value for value in sweep.table.columns.get("flops", []) if isinstance(value, float)]
    tiles = [
        ("runs", f"{done} / {planned}", "; ".join(more)),
        ("groups", str(len(found.arms)), ", ".join(found.arms)[:120]),
    ]
    if flops:
        tiles.append(
            (
                "training FLOPs of finished runs",
                compact(sum(flops)),
                f"{compact(min(flops))} to {compact(max(flops))} a run",
            )
        )
    if found.combinations:
        best = min(found.combinations, key=lambda one: float(one.means[one.best]))
        tuned = (
            f", {name_of(found.axes.tuned)} {number(float(best.x[best.best]))}"
            if found.axes.tuned
            else ""
        )
        tiles.append(
            (
                f"lowest {name_of(str(found.axes.y))}",
                f"{best.means[best.best]:.4f}",
                f"{_told(found, best.row)}{tuned}",
            )
        )
    content = "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd>{escape(value)}</dd><dd'
        f' class="note">{escape(note)}</dd></div>'
        for name, value, note in tiles
    )
    missing = [f"<li>{escape(text)}</li>" for text in [*_missing(sweep, found), *sweep.warnings]]
    findings = [f"<li>{escape(text)}</li>" for text in _findings(found)]
    return (
        f'<header><p class="lead"><span class="state {kind}">{word}</span>'
        f' {escape("; ".join([share, *more]))}</p><div class="progress {kind}"><i'
        f' style="width:{100 * done / max(1, planned):.4g}%"></i></div><dl'
        f' class="tiles">{content}</dl>'
        + (f'<ul class="warnings">{"".join(missing)}</ul>' if missing else "")
        + (f'<ul class="findings">{"".join(findings)}</ul>' if findings else "")
        + "</header>"
    )


def _told(found: Analysis, row: Mapping[str, Any]) -> str:

    return label_in(found.axes, row, found.axes.numbers)


def _missing(sweep: SweepRecord, found: Analysis) -> list[str]:
    lines = [f"{name} failed: {reason}" for name, reason in sweep.failed.items()]
    lines += [f"{name}: {reason}: left out of all fits" for name, reason in found.diverged]
    if len(lines) > MOST_SHOWN:
        lines = [
            *lines[: MOST_SHOWN - 1],
            f"and {len(lines) - MOST_SHOWN + 1} more, in the table of runs",
        ]
    if sweep.unfinished:
        lines.append(
            f"{len(sweep.unfinished)} runs are missing here because they have not finished; what"
            " follows is of the others"
        )
    return lines


def _findings(found: Analysis) -> list[str]:
    """The main figures in sentences."""
    lines = []
    tuned = name_of(found.axes.tuned) if found.axes.tuned else ""
    for arm in found.arms:
        own = [one for one in found.combinations if one.arm == arm]
        fitted = [one.optimum for one in own if one.optimum]
        edges = sum(bool(one.edge) for one in own)
        if not tuned:
            continue
        if len(fitted) == 1:
            text = f"optimal {tuned} {with_ends(fitted[0])}"
        elif fitted:
            values = [optimum.value for optimum in fitted]
            text = (
                f"optimal {tuned} from {number(min(values), 3)} to {number(max(values), 3)} over"
                f" {len(fitted)} combinations"
            )
        else:
            text = f"no optimal {tuned} could be fitted"
        text += (
            f" ({len(own) - len(fitted)} of {len(own)} not fitted)"
            if 0 < len(fitted) < len(own)
            else ""
        )
        text += (
            f"; in {edges} of {len(own)} the best value tried is at the edge of the grid"
            if edges
            else ""
        )
        lines.append(f"{arm}: {text}.")
    for along in found.axes.numbers:
        for arm in found.arms:
            drifts = [
                drift
                for drift in found.drifts
                if (drift.along, drift.arm) == (along, arm) and drift.exponent
            ]
            exponents = [drift.exponent for drift in drifts if drift.exponent]
            if len(exponents) == 1:
                text = f"{with_ends(exponents[0])}; {verdict(exponents[0], drifts[0].reference)}"
                arm = drifts[0].label
            elif exponents:
                values = [exponent.value for exponent in exponents]
                within = sum(
                    verdict(drift.exponent, drift.reference).endswith("within the interval")
                    for drift in drifts
                )
                expected = f"the expected {drifts[0].reference:g}" if drifts[0].reference else "0"
                text = (
                    f"from {number(min(values), 3)} to {number(max(values), 3)}; {expected} is"
                    f" within {within} of {len(drifts)} intervals"
                )
            else:
                unknown = [
                    drift.law.refused.what
                    for drift in found.drifts
                    if (drift.along, drift.arm) == (along, arm) and drift.law.refused
                ]
                if unknown:
                    lines.append(
                        f"{arm}: how the optimum moves along {name_of(along)} is not known:"
                        f" {unknown[0]}."
                    )
                continue
            lines.append(f"{arm}: exponent of the optimum along {name_of(along)} {text}.")
    for name, base, points in found.leverage:
        usable = (
            [point for point in points if math.isfinite(point.ratio.value)]
            if not isinstance(points, str)
            else []
        )
        if usable:
            last = usable[-1]
            notes = [
                f"extrapolates {' and '.join(last.extrapolated)}" if last.extrapolated else "",
                found.at_edge(name, base),
            ]
            beyond = f" ({'; '.join(filter(None, notes))})" if any(notes) else ""
            lines.append(
                f"{name}: reaches its loss with {with_ends(last.ratio)} times fewer FLOPs than"
                f" {base} at {compact(last.x)} FLOPs{beyond}."
            )
    return lines + _growth(found)


def _growth(found: Analysis) -> list[str]:
    """What is known of each indicator over FLOPs; what could not be fitted is not known, whatever
    its plot looks like."""
    lines, verdicts = (
        [],
        {name: [growth(group) for group in fits.groups] for name, fits in found.growth.items()},
    )
    verdicts |= {name: [f"not known: {reason}"] for name, reason in found.unfitted.items()}
    for name, of_groups in verdicts.items():
        if growing := of_groups.count("grows"):
            unknown = sum(verdict.startswith("not known") for verdict in of_groups)
            rest = f", and is not known in {unknown}" if unknown else ""
            lines.append(
                f"{parse_key(name).title} grows with FLOPs in {growing} of {len(of_groups)}"
                f" groups{rest}."
            )
    without = {name: of_groups for name, of_groups in verdicts.items() if "grows" not in of_groups}
    level = [name for name, of_groups in without.items() if set(of_groups) == {"does not grow"}]
    if level:
        lines.append(f"Does not grow with FLOPs: {_titles(level)}.")
    undecided = [name for name, of_groups in without.items() if "undecided" in of_groups]
    if undecided:
        lines.append(
            "Growth with FLOPs is neither shown nor excluded by the interval of the exponent:"
            f" {_titles(undecided)}."
        )
    by_reason: dict[str, list[str]] = {}
    for name in without:
        if name not in level and name not in undecided:
            reason = next(verdict for verdict in without[name] if verdict.startswith("not known"))
            by_reason.setdefault(reason.removeprefix("not known: "), []).append(name)
    lines += [
        f"Whether these grow with FLOPs is not known ({reason}): {_titles(names)}."
        for reason, names in by_reason.items()
    ]
    return lines


def _titles(names: Sequence[str]) -> str:
    return ", ".join(parse_key(name).title for name in names)


def _figure(figure: FigureOf, panels: Sequence[str], folder: str) -> str:
    drawn = "".join(
        f"<figure>{inline(svg, panel.finding, f'{figure.name}{number}')}</figure>"
        for number, (panel, svg) in enumerate(zip(figure.panels, panels))
    )
    links = ", ".join(
        f'<a href="{quote(folder)}/{figure.name}.{kind}">{kind.upper()}</a>'
        for kind in ("svg", "png")
    )
    kind = "grid" if len(panels) > 1 else "single"
    return f'<p class="about">{escape(figure.caption)} {links}</p><div class="{kind}">{drawn}</div>'


def _table(rows: Sequence[Row], link: str) -> str:
    """Estimates with their ends in one cell; a link to the CSV file, which has all digits."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    shown = [key for key in columns if not key.endswith((" low", " high"))]
    shown = [
        key
        for key in shown
        if key != "coefficient" and any(row.get(key) not in (None, "") for row in rows)
    ]
    head = _header(rows, shown)
    body = "".join(f"<tr>{''.join(_cell(row, key) for key in shown)}</tr>" for row in rows)
    html = (
        '<div class="scroll"><table'
        f' class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )
    name = link.rpartition("/")[2]
    return (
        f"<details{' open' if len(rows) <= OPEN_ROWS else ''}><summary>Table: {len(rows)}"
        f" {'row' if len(rows) == 1 else 'rows'}, "
        f'<a href="{quote(link)}">{escape(name)}</a></summary>{html}</details>'
    )


def _header(rows: Sequence[Row], shown: Sequence[str]) -> str:
    text = {key for key in shown if all(isinstance(row.get(key) or "", str) for row in rows)}
    return "".join(
        f'<th scope="col" class="{"text" if key in text else ""}">{escape(key)}</th>'
        for key in shown
    )


def _cell(row: Row, key: str) -> str:
    value = row.get(key)
    if isinstance(value, str) or value is None:
        long = " long" if value and len(value) > LONG else ""
        return f'<td class="text{long}">{escape(value or "")}</td>'
    if isinstance(value, float):
        text = compact(value) if math.isfinite(value) and abs(value) >= 1e9 else number(value, 5)
        if f"{key} low" in row:
            ends = [row[f"{key} low"], row[f"{key} high"]]
            text += f" <small>[{', '.join(end_text(end, 4) for end in ends)}]</small>"
        return f"<td>{text}</td>"
    return f"<td>{escape(str(value))}</td>"


def _fits(sweep: SweepRecord, found: Analysis) -> str:
    parts = []
    told = set(sweep.table.left_out)  # in the table of runs
    for fit in found.fits:
        what = f"{fit.asked.form} of {fit.asked.y} over {', '.join(fit.asked.x)}"
        if fit.fits is None:
            parts.append(
                f"<h3>{escape(what)}</h3><p>refused:"
                f" {escape(str(fit.refusal) if fit.refusal else '')}</p>"
            )
        else:
            shown = replace(
                fit.fits, excluded=[pair for pair in fit.fits.excluded if pair not in told]
            )
            parts.append(
                f"<h3>{escape(what)}</h3><div"
                f' class="scroll"><pre>{escape(fits_as_text(shown))}</pre></div>'
            )
    if found.notes:
        parts.append(
            "<h3>Refused of what this report looked for</h3><ul>"
            + "".join(f"<li>{escape(n)}</li>" for n in found.notes)
            + "</ul>"
        )
    return "".join(parts)


def _grid(sweep: SweepRecord) -> str:
    content = sweep.grid
    shown: dict[str, Any] = {"base": content.get("base")}
    axes = content.get("axes")
    shown |= (
        {key: ", ".join(map(_text, values)) for key, values in axes.items()}
        if isinstance(axes, dict)
        else {}
    )
    for number_, part in enumerate(content.get("zip") or [], 1):
        points = part if isinstance(part, list) else [part]
        shown[f"moving together {number_}"] = "; ".join(_text(point) for point in points)
    for key, value in (content.get("derive") or {}).items():
        shown[f"{key} ="] = _text(value)
    shown |= {key: content.get(key) for key in ("where",) if content.get(key)}
    seeds = content.get("seeds")
    shown["seeds"] = ", ".join(map(str, seeds)) if isinstance(seeds, list) else "the base's"
    shown |= {
        key: _text(value)
        for key, value in content.items()
        if key not in {"name", "base", "axes", "zip", "derive", "where", "seeds", "fit"}
        and value not in (None, [], {})
    }
    return definitions(shown)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(item)}" for key, item in value.items())
    return value if isinstance(value, str) else json.dumps(value)


def _runs(sweep: SweepRecord, rows: Sequence[Row], page: Path, folder: str) -> str:
    if not rows:
        return "<p>none</p>"
    shown = [
        key
        for key in rows[0]
        if key != "run" and any(row.get(key) not in (None, "") for row in rows)
    ]
    body = []
    for row in rows:
        name = str(row["run"])
        report = sweep.directory / name / REPORT
        label = escape(name)
        if report.is_file():
            label = f'<a href="{quote(os.path.relpath(report, page.parent))}">{label}</a>'
        kind = "bad" if row["status"] == "failed" or row["reason"] else ""
        cells = "".join(_cell(row | {key: _value(row[key])}, key) for key in shown)
        body.append(f'<tr class="{kind}"><th scope="row">{label}</th>{cells}</tr>')
    table = (
        '<div class="scroll"><table class="figures">'
        f"<thead><tr>{_header(rows, ['run', *shown])}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    opened = " open" if len(rows) <= OPEN_ROWS else ""
    link = f'<a href="{quote(folder)}/runs.csv">runs.csv</a>'
    return f"<details{opened}><summary>{len(rows)} runs, {link}</summary>{table}</details>"


def _value(value: Any) -> Any:
    return value if value is None or isinstance(value, str | float) else _text(value)


def _environment(sweep: SweepRecord) -> str:
    """What all runs share, and what differs with how many values."""
    found: dict[str, list[str]] = {}
    for environment in sweep.environments.values():
        for key, value in environment.items():
            found.setdefault(key, []).append(_text(value))
    shown = {}
    for key, values in found.items():
        different = list(dict.fromkeys(values))
        if different == ["null"]:
            continue
        shown[key] = (
            different[0]
            if len(different) == 1
            else f"{len(different)} different: {', '.join(different[:3])}"
            + (" …" if different[3:] else "")
        )
    return definitions(shown)
