"""A plan as text for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def render(plan: Mapping[str, Any]) -> str:
    """`Plan.as_dict()` as text; problems are left to whoever prints it."""
    f, lines = plan, [f"plan of {plan['name']}"]

    def section(title: str, rows: dict[str, str]) -> None:
        width = max(map(len, rows))
        lines.extend(["", title, *(f"  {key:<{width}}  {value}" for key, value in rows.items())])

    if "model" in f:
        section("model", _model_rows(f["model"]))
    if "training" in f:
        section(
            f"parameterization: {f['parameterization']['kind']}",
            _transfer_rows(f["parameterization"]),
        )
        section("training", _training_rows(f))
        if rows := mixture_rows(f["data"]):
            section("data mixture", rows)
    if "flops" in f:
        section("FLOPs", _flops_rows(f["flops"]))
    if "memory" in f:
        m = f["memory"]
        fullest = max(m["phases"], key=m["phases"].get)
        rows = {
            "peak": (
                f"{size(m['peak'])}, reached in phase {fullest.replace('_', ' ')}; what takes most:"
            )
        }
        terms = sorted(m["terms"].items(), key=lambda item: -item[1])
        section("memory a device", rows | {k.replace("_", " "): size(v) for k, v in terms if v})
        sent = {k.replace("_", " "): size(v) for k, v in f["communication"].items() if v}
        section(
            "communication: bytes that a device sends in a step", sent or {"none": "one device"}
        )
        c = f["checkpoint"]
        section(
            "disk",
            {
                "a checkpoint": size(c["bytes"]),
                f"{c['kept']} kept and one being written": size(c["disk"]),
                "a process's copy while it is written, on the host": size(c["host_copy"]),
            },
        )
    if f.get("devices"):
        rows = {}
        for d in f["devices"]:
            time = "n/a"
            if d["seconds"] is not None:
                time = f"{duration(d['seconds'])}, a step {duration(d['step_seconds'])}"
                if d["bandwidth"]:
                    time += f" (communication hidden above {size(d['bandwidth'])}/s a device)"
            fits = {True: "fits", False: "does not fit", None: "memory n/a"}[d["fits"]]
            peak = (
                "peak n/a" if d["peak_flops"] is None else f"{d['peak_flops'] / 1e12:,.4g} TFLOP/s"
            )
            rows[f"{d['count']} × {d['device']}"] = (
                f"{time} at {d['mfu']:.0%} of {peak}, {fits} ({d['source']})"
            )
        section("time", rows)
    if plan["advice"]:
        lines += [
            "",
            "advice",
            *("  {what} ({where}): {remedy}".format(**a) for a in plan["advice"]),
        ]
    return "\n".join(lines)


def _model_rows(m: dict[str, Any]) -> dict[str, str]:
    p = m["parameters"]
    heads = f"{m['heads']} heads of {m['head_dim']}, {m['kv_heads']} of keys and values"
    rows = {
        "shape": (
            f"depth {m['depth']}, width {m['width']}, {heads}, {m['mlp']} of {m['mlp_hidden']},"
            f" context {m['context']}"
        ),
        "vocabulary": f"{m['vocab_size']:,}, {'tied' if m['tied_embeddings'] else 'untied'}",
        "parameters": (
            f"{p['total']:,} ({p['active']:,} active): matrices {p['matrix']:,}, embedding"
            f" {p['embedding']:,}, head {p['head']:,}, vectors {p['vector']:,}"
        ),
        "published count N": (
            f"{m['published_parameters']:,} (what token budgets of hyperp and mup++ follow)"
        ),
    }
    if m["moe"]:
        e = m["moe"]
        slots = e["sparsity"] * e["top_k"]
        shared = ", one of them shared" if e["shared_expert"] else ""
        gate = "SqrtGate" if e["sqrt_gate"] else "plain gate"
        rows["experts"] = (
            f"{slots} slots{shared}, {e['top_k']} active, {gate}, {e['balance']} balance"
            f" ({e['balance_scope']}) × {e['balance_weight']}"
        )
    return rows


def _transfer_rows(p: dict[str, Any]) -> dict[str, str]:
    base = p["base"]
    size = (
        f" at depth {base['depth']}, width {base['width']}, {base['tokens']:.4g} tokens, batch"
        f" {base['batch_tokens']:,}"
    )
    # `standard` transfers nothing: of the base it reads the learning rate alone.
    rows = {"base": f"lr {base['lr']:g}" + ("" if p["kind"] == "standard" else size)}
    roles = p.get("roles", {})
    shared = (
        [f for f in roles["matrix"]["factors"] if all(f in r["factors"] for r in roles.values())]
        if roles
        else []
    )
    if shared:
        rows["factors of every lr"] = " × ".join(map(_factor, shared))
    for role, r in roles.items():
        own = [_factor(f) for f in r["factors"] if f not in shared]
        factors = ", of it " + " × ".join(own) if own else ""
        decay = f", weight decay {r['weight_decay']:g}" if r["weight_decay"] else ""
        rows[role] = (
            f"{r['rule']}, lr {r['lr']:.4g}{factors}{decay}, starts at {r['initialization']}"
        )
    if p["residual_multiplier"] != 1:
        rows["residual branches"] = f"× {p['residual_multiplier']:.4g} [1/√(2 depth), Depth-μP]"
    if p.get("logit_scale", 1) != 1:
        rows["logits"] = f"× {p['logit_scale']:.4g} [base width / width, μP]"
    return rows


def _factor(f: Mapping[str, Any]) -> str:
    return (
        f"{f['name']} {f['value']:.4g} [{f['formula']}{'; ' if f['formula'] else ''}{f['source']}]"
    )


def _training_rows(f: Mapping[str, Any]) -> dict[str, str]:
    t, s, parameters = f["training"], f["training"]["schedule"], f["model"]["parameters"]
    each = f"{_ratio(t['tokens_per_parameter'])} for each of the {parameters['total']:,} parameters"
    if parameters["active"] < parameters["total"]:
        each += f", {_ratio(t['tokens_per_active_parameter'])} for each active one"
    accumulation = t["accumulation"]
    per_step = (
        "which do not divide the batch" if accumulation is None else f"accumulation {accumulation}"
    )
    rows = {
        "tokens": (
            f"{t['tokens']:,} ({each}; {_ratio(t['tokens_per_published_parameter'])} by the"
            " published count N)"
        ),
        "data": _data_row(f["data"]),
        "steps": (
            f"{t['steps']:,} of {t['batch_tokens']:,} tokens ({t['batch_sizes'][-1]:,} sequences)"
        ),
        "devices": f"{t['world_size']}, micro-batch {t['micro_batch']}, {per_step}",
        "precision": t["precision"] + (", chosen by the device" if t["precision_chosen"] else ""),
        "devices that fit": ", ".join(map(str, t["world_sizes"])) or "none",
        "schedule": f"{s['kind']} to {s['final_ratio']:g}, warm-up {s['warmup_tokens']:,} tokens",
    }
    if len(t["batch_sizes"]) > 1:
        rows["batch ramp"] = (
            " → ".join(map(str, t["batch_sizes"]))
            + f" sequences over {s['batch_ramp_tokens']:,} tokens"
        )
    return rows


def _ratio(value: float) -> str:
    return f"{value:,.1f}" if value >= 1 else f"{value:.2g}"


def reading_text(data: Mapping[str, Any], parameters: int) -> str:
    """How much text a run reads, and how often: in a sentence for its start."""
    real = data["real_tokens"]
    text = f"reads {real:,} tokens, {_ratio(real / parameters)} for each parameter"
    if len(data["sources"]) == 1 and data["passes"] is not None:
        text += f", and the data {data['passes']:,.3g} times"
    return text


def _data_row(data: Mapping[str, Any]) -> str:
    mixed = mixture_rows(data)
    if data["passes"] is None:
        return (
            "see the mixture" if mixed else "tokens and passes not known: there is no data set yet"
        )
    if mixed:
        return f"{data['tokens']:,} tokens in a mixture of {len(mixed)}"
    (source,) = data["sources"]
    rows = f"{data['tokens']:,} tokens, passed {data['passes']:,.3g} times", packing_text(source)
    return "; ".join(filter(None, rows))


def mixture_rows(data: Mapping[str, Any]) -> dict[str, str]:
    """For each source of a mixture its share of the run and its passes; empty for `data.train`."""
    rows = {}
    for source in data["sources"]:
        if source["name"] is None:
            continue
        passes = (
            "passes not known, there is no data set yet"
            if source["passes"] is None
            else f"{source['passes']:,.3g} passes over its {source['tokens']:,}"
        )
        rows[source["name"]] = "; ".join(
            filter(
                None,
                (
                    f"{source['share']:.4g} of the run, {source['drawn']:,} tokens: {passes}",
                    packing_text(source),
                ),
            )
        )
    return rows


def packing_text(source: Mapping[str, Any]) -> str:
    """How full the windows of a source are, where that is known; otherwise empty."""
    packed = source["packed"]
    if packed is None:
        return ""
    return (
        f"packed into {packed['windows']:,} windows, of whose positions {packed['padding']:.3%} are"
        " padding"
    )


def _flops_rows(f: dict[str, Any]) -> dict[str, str]:
    forward = ", ".join(
        f"{part.replace('_', ' ')} {flops / 1e6:,.4g}M"
        for part, flops in f["forward_per_token"].items()
    )
    rows = {
        "a token": (
            f"{f['training_per_token']:.4g} to train (published count, attention in full:"
            f" {f['published_per_token']:.4g})"
        ),
        "a token forward": forward,
        "in all": f"{f['total']:.4g}, and {f['executed']:.4g} with all that runs beside it",
    }
    if f["recomputation_per_token"]:
        rows["recomputation"] = (
            f"{f['recomputation_per_token'] / f['training_per_token']:.1%} on top"
        )
    if f["counting_pass_per_token"]:
        rows["counting pass"] = (
            f"{counting_pass_share(f):.1%} on top, to know all loads before the first backward"
            " pass; none at accumulation 1, nor with balance_scope: previous"
        )
    rows["optimizer"] = (
        f"{f['optimizer_per_step']:.4g} a step on all devices together, {f['optimizer_share']:.2%}"
        " of training's"
    )
    return rows


def counting_pass_share(flops: Mapping[str, Any]) -> float:
    """What the counting pass of a global balance loss adds to training's work."""
    return flops["counting_pass_per_token"] / flops["training_per_token"]


def size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.4g} {unit}"
        count /= 1000
    return f"{count:.4g} TB"


def duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    for size, unit in ((60, "min"), (3600, "h")):
        if seconds < 120 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.3g} days"
