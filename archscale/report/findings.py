"""What came of a sweep, in sentences: only what an interval shows is said to be known."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from archscale.report.indicators import parse_key
from archscale.report.records import Analysis, Combination, Drift, SweepRecord, name_of, with_ends
from archscale.report.scale import compact, number
from archscale.report.sweep_tables import growth, verdict

MOST_SHOWN = 12  # reasons that the head lists
UNKNOWN = "not known: "


def problems(sweep: SweepRecord, analysis: Analysis) -> list[str]:
    """What failed or is missing."""
    lines = [f"{name} failed: {reason}" for name, reason in sweep.failed.items()]
    lines += [f"{name}: {reason}: left out of all fits" for name, reason in analysis.diverged]
    if len(lines) > MOST_SHOWN:
        rest = len(lines) - MOST_SHOWN + 1
        lines = [*lines[: MOST_SHOWN - 1], f"and {rest} more, in the table of runs"]
    if sweep.unfinished:
        lines.append(
            f"{len(sweep.unfinished)} runs are missing here because they have not finished; what"
            " follows is of the others"
        )
    return lines + sweep.warnings


def findings(analysis: Analysis) -> list[str]:
    """The main figures."""
    lines = []
    if analysis.axes.tuned:
        for arm in analysis.arms:
            own = [member for member in analysis.combinations if member.arm == arm]
            lines.append(f"{arm}: {_optimum(own, name_of(analysis.axes.tuned))}.")
    for along in analysis.axes.numbers:
        for arm in analysis.arms:
            drifts = [d for d in analysis.drifts if (d.along, d.arm) == (along, arm)]
            lines += _drift(arm, name_of(along), drifts)
    return [*lines, *_leverage(analysis), *_growth(analysis)]


def _optimum(own: Sequence[Combination], tuned: str) -> str:
    fitted = [member.optimum for member in own if member.optimum]
    edges = sum(bool(member.edge) for member in own)
    if len(fitted) == 1:
        text = f"optimal {tuned} {with_ends(fitted[0])}"
    elif fitted:
        values = [optimum.value for optimum in fitted]
        low, high = number(min(values), 3), number(max(values), 3)
        text = f"optimal {tuned} from {low} to {high} over {len(fitted)} combinations"
    else:
        text = f"no optimal {tuned} could be fitted"
    if 0 < len(fitted) < len(own):
        text += f" ({len(own) - len(fitted)} of {len(own)} not fitted)"
    if edges:
        text += f"; in {edges} of {len(own)} the best value tried is at the edge of the grid"
    return text


def _drift(arm: str, along: str, drifts: Sequence[Drift]) -> Iterator[str]:
    known = [(drift, drift.exponent) for drift in drifts if drift.exponent]
    if not known:
        reasons = [drift.law.refused.what for drift in drifts if drift.law.refused]
        if reasons:
            yield f"{arm}: how the optimum moves along {along} is not known: {reasons[0]}."
        return
    first, exponent = known[0]
    if len(known) == 1:
        arm, text = first.label, f"{with_ends(exponent)}; {verdict(exponent, first.reference)}"
    else:
        values = [exponent.value for _, exponent in known]
        verdicts = [verdict(exponent, drift.reference) for drift, exponent in known]
        within = sum(text.endswith("within the interval") for text in verdicts)
        expected = f"the expected {first.reference:g}" if first.reference else "0"
        text = f"from {number(min(values), 3)} to {number(max(values), 3)}; {expected} is"
        text += f" within {within} of {len(known)} intervals"
    yield f"{arm}: exponent of the optimum along {along} {text}."


def _leverage(analysis: Analysis) -> Iterator[str]:
    for name, base, points in analysis.leverage:
        if isinstance(points, str):
            continue
        usable = [point for point in points if math.isfinite(point.ratio.value)]
        if not usable:
            continue
        last = usable[-1]
        notes = [f"extrapolates {' and '.join(last.extrapolated)}"] if last.extrapolated else []
        notes += filter(None, [analysis.at_edge(name, base)])
        beyond = f" ({'; '.join(notes)})" if notes else ""
        yield (
            f"{name}: reaches its loss with {with_ends(last.ratio)} times fewer FLOPs than"
            f" {base} at {compact(last.x)} FLOPs{beyond}."
        )


def _growth(analysis: Analysis) -> Iterator[str]:
    """What is known of each indicator over FLOPs; what could not be fitted is not known, whatever
    its plot looks like."""
    verdicts = {
        name: [growth(group) for group in fits.groups] for name, fits in analysis.growth.items()
    }
    verdicts |= {name: [UNKNOWN + reason] for name, reason in analysis.unfitted.items()}
    level, undecided, by_reason = [], [], dict[str, list[str]]()
    for name, groups in verdicts.items():
        title = parse_key(name).title
        reasons = [text.removeprefix(UNKNOWN) for text in groups if text.startswith(UNKNOWN)]
        if growing := groups.count("grows"):
            rest = f", and is not known in {len(reasons)}" if reasons else ""
            yield f"{title} grows with FLOPs in {growing} of {len(groups)} groups{rest}."
        elif set(groups) == {"does not grow"}:
            level.append(title)
        elif "undecided" in groups:
            undecided.append(title)
        else:
            by_reason.setdefault(reasons[0], []).append(title)
    if level:
        yield f"Does not grow with FLOPs: {', '.join(level)}."
    if undecided:
        text = "Growth with FLOPs is neither shown nor excluded by the interval of the exponent: "
        yield f"{text}{', '.join(undecided)}."
    for reason, titles in by_reason.items():
        yield f"Whether these grow with FLOPs is not known ({reason}): {', '.join(titles)}."
