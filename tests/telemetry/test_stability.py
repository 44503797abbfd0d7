"""Stability indicators against a float64 recomputation from activations, on any layout, without a
trace in the trajectory."""

import math

import numpy as np
import pytest
import torch

from archscale.config import ModelConfig
from archscale.model import Transformer, initialize
from archscale.model.layers import attention_mask, rotate
from archscale.model.moe import MoE
from archscale.telemetry.stability import (
    OUTLIER,
    LayerSums,
    Probe,
    chunked_log_sum_exp,
    log_sum_exp,
    stability_metrics,
)
from tests.train.tiny import LAYOUTS, config, run, tiny_data

CUDA = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
)
INDICATORS = (
    "attention_z",
    "router_z",
    "attention_output_rms",
    "mlp_output_rms",
    "attention_outlier_pct",
    "mlp_outlier_pct",
)
SHAPE = {
    "depth": 3,
    "width": 48,
    "head_dim": 8,
    "heads": 6,
    "kv_heads": 2,
    "context": 24,
    "vocab_size": 60,
}
MODELS: dict[str, dict] = {
    "dense": {"depth_mup": True},
    "experts": {"moe": {"sparsity": 3, "top_k": 3}, "depth_mup": True},
    "window": {"window": 5, "qk_norm": False, "gated_attention": False},
    "documents": {"mlp": "relu2"},
}


def definition(
    model: Transformer, tokens: torch.Tensor, model_config: ModelConfig, eos: int | None
) -> dict:
    """The indicators of every layer, in float64, with whole attention matrices."""
    seen: dict[str, list] = {name: [] for name in INDICATORS}
    mask = attention_mask(tokens, model_config.window, eos, torch.float64)
    T = tokens.shape[1]
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)

    def attention(module, inputs, output) -> None:
        x, rope, *_ = inputs
        q, k, *_ = module.qkv(x).split(module.sizes, dim=-1)
        q = rotate(module.q_norm(q.unflatten(-1, (module.heads, -1))), rope)
        k = rotate(module.k_norm(k.unflatten(-1, (module.kv_heads, -1))), rope)
        k = k.repeat_interleave(module.heads // module.kv_heads, 2)
        logits = torch.einsum("bihd,bjhd->bhij", q, k) * module.scale + mask
        seen["attention_z"].append(logits.logsumexp(-1).square().mean())
        branch(output.hidden, "attention")

    def branch(h, name) -> None:
        h = h * model.blocks[0].multiplier
        seen[f"{name}_output_rms"].append(h.square().mean().sqrt())
        far = (h - h.mean(-1, keepdim=True)).abs() > OUTLIER * h.std(-1, keepdim=True, correction=0)
        seen[f"{name}_outlier_pct"].append(100 * far.double().mean())

    for block in model.blocks:
        block.attention.register_forward_hook(attention)
        block.mlp.register_forward_hook(
            lambda m, i, o: branch(o.hidden if isinstance(m, MoE) else o, "mlp")
        )
        if isinstance(block.mlp, MoE):
            block.mlp.router.register_forward_hook(
                lambda m, i, o: seen["router_z"].append(o.logsumexp(-1).square().mean())
            )
    model(tokens, tokens)
    return {name: torch.stack(values) for name, values in seen.items() if values}


@pytest.mark.parametrize("name", MODELS)
def test_every_indicator_equals_its_definition(name):
    model_config, eos = ModelConfig(**SHAPE | MODELS[name]), 0 if name == "documents" else None
    tokens = torch.randint(0, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    fast, slow = (
        Transformer(model_config, dtype, eos_id=eos) for dtype in (torch.float32, torch.float64)
    )
    for model in (fast, slow.double()):
        initialize(model, 0)
        with torch.no_grad():
            for (
                parameter
            ) in model.parameters():  # a few features far from the rest, so that there are outliers
                if parameter.ndim == 2 and len(parameter) == 48:
                    parameter[7] *= 40
    expected = definition(slow, tokens, model_config, eos)
    layers = fast(tokens, tokens, probe=Probe()).probed
    fields = zip(*[[value for value in layer if value is not None] for layer in layers])
    sums = LayerSums(*map(torch.stack, fields))
    metrics = stability_metrics(sums, tokens.numel(), 6, 48, per_layer=True)
    # Features are sums of 48 float32 products of which one is 40 times the rest: 48 · 6e-8 · 40.
    close = {"rtol": 1.2e-4, "atol": 1e-6}
    for key, values in expected.items():
        torch.testing.assert_close(metrics[f"stability/{key}"].double(), values.mean(), **close)
        for i, value in enumerate(values):
            found = metrics[f"stability/layer_{i:02d}/{key}"].double()
            torch.testing.assert_close(found, value, **close)
    assert expected["mlp_outlier_pct"].min() > 0.5
    assert ("router_z" in expected) == (name == "experts") == ("stability/router_z" in metrics)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_the_kernels_log_sum_exp_is_the_chunked_one(monkeypatch, device, masked, dtype):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 70, 32, generator=generator).to(device, dtype) for h in (6, 2))
    tokens = torch.randint(0, 5, (2, 70), generator=generator).to(device)
    mask = attention_mask(tokens, 9, 0, dtype) if masked else None
    monkeypatch.setattr(
        "archscale.telemetry.stability.CHUNK_ELEMENTS", 2 * 6 * 70 * 11
    )  # several chunks, the last short
    expected = chunked_log_sum_exp(q.double(), k.double().repeat_interleave(3, 1), 0.4, mask)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-4
    torch.testing.assert_close(
        log_sum_exp(q, k, 0.4, mask), expected.float(), rtol=tolerance, atol=tolerance
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_data(tmp_path_factory.mktemp("data"))


MOE = {"sparsity": 3, "top_k": 3}
EVERY = {"telemetry": {"every": 1, "spectrum_every": 3}, "parameterization": {"base": {"lr": 4e-4}}}


def lines(data: str, folder: str, /, **sections) -> list[dict]:
    model = {"moe": sections.pop("moe", MOE)}
    return run(config(data, "orscale_lm", 6, model=model, **sections), folder)


def looked_into(found: list[dict]) -> list[dict]:
    groups = ("stability/", "moe/", "spectrum/", "optimizer/")
    return [{key: value for key, value in line.items() if key.startswith(groups)} for line in found]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    return lines(data, str(tmp_path_factory.mktemp("alone")), training={"micro_batch": 24}, **EVERY)


VARIANTS: dict[str, dict] = {
    "accumulation": {"training": {"micro_batch": 4}},
    "recomputation": {"training": {"micro_batch": 24, "activation_checkpoint": "block"}},
    **{
        name: {"world": LAYOUTS[name][0], **LAYOUTS[name][1]} for name in ("ddp2", "fsdp2", "hsdp4")
    },
    "ep2": {"world": 2, "parallel": {"expert": 2}},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_metrics_are_global(pool, data, alone, tmp_path, variant):
    """Over micro-batches and ranks, with the loads of experts, trust ratios and spectra of every
    matrix."""
    sections = {**EVERY, **VARIANTS[variant]}
    world = sections.pop("world", 1)
    if world == 1:
        found = [lines(data, str(tmp_path), **sections)]
    else:
        sections.setdefault("training", {"micro_batch": 3})
        found = pool(world).run(lines, data, str(tmp_path), **sections)
    for other in found:
        for line, expected in zip(looked_into(other), looked_into(alone), strict=True):
            assert line.keys() == expected.keys()
            for key, value in expected.items():
                np.testing.assert_allclose(line[key], value, rtol=2e-4, atol=2e-6, err_msg=key)


def test_what_a_reading_holds(alone):
    stability = [f"stability/{name}" for name in INDICATORS]
    stability += [f"stability/layer_{i:02d}/{name}" for i in range(2) for name in INDICATORS]
    for line in alone:
        assert set(stability) <= line.keys()
        assert {
            "optimizer/orthogonality_residual",
            "spectrum/sigma_mean",
            "spectrum/effective_rank",
        } <= line.keys()
        assert (
            ("spectrum/sigma_max" in line)
            == ("spectrum/gradient/sigma_max" in line)
            == (line["step"] % 3 == 0)
        )
        if "spectrum/gradient/heterogeneity_gain" in line:
            assert 1 < line["spectrum/gradient/heterogeneity_gain"] < 100
            assert line["spectrum/gradient/nuclear_norm"] > line["grad_norm"]
        for layer in range(2):
            assert len(line[f"moe/layer_{layer:02d}/load"]) == 8
            assert sum(line[f"moe/layer_{layer:02d}/load"]) == pytest.approx(1)
        assert line["optimizer/matrix/blocks.0.mlp.experts.up.weight.gate/trust_ratio"] > 0


NEUTRAL: dict[str, dict] = {
    "dense": {"moe": None},
    "experts": {},
    "bf16": {"training": {"precision": "bf16"}},
    **{name: VARIANTS[name] for name in ("accumulation", "recomputation", "ddp2", "fsdp2", "ep2")},
}


@pytest.mark.parametrize("variant", NEUTRAL)
def test_a_look_changes_nothing(pool, data, tmp_path, variant):
    """Bitwise, with everything at every step against nothing but the last one."""
    sections = dict(NEUTRAL[variant])
    world = sections.pop("world", 1)
    curves = []
    for telemetry in (EVERY["telemetry"], {"every": 100, "per_layer": False}):
        options = {
            **sections,
            "telemetry": telemetry,
            "parameterization": EVERY["parameterization"],
        }
        folder = str(tmp_path / str(telemetry["every"]))
        if world == 1:
            curves.append(lines(data, folder, **options))
        else:
            curves.append(pool(world).run(lines, data, folder, **options)[0])
    watched, plain = curves
    for key in ("loss", "grad_norm"):
        assert [line[key] for line in watched] == [line[key] for line in plain]
    assert ("stability/attention_z" in watched[0], "stability/attention_z" in plain[0]) == (
        True,
        False,
    )


def test_a_model_without_experts_has_no_router(data, tmp_path):
    found = lines(data, str(tmp_path), moe=None, telemetry={"every": 3})
    assert [("stability/attention_z" in line) for line in found] == [False, False, True] * 2
    assert not any("router" in key or key.startswith("moe/") for line in found for key in line)
