"""An export computes what the run's own model does, in transformers and without archscale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale.export.export import export
from archscale.train.generate import generate, load_run
from tests.export.runs import MUP, make_run
from tests.train.tiny import tiny_data

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

PLAIN = {"gated_attention": False}
EXPERTS = {"sparsity": 4, "top_k": 2, "shared_expert": False, "sqrt_gate": False}
# name → (class, model section); all with grouped queries
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {**PLAIN, "tied_embeddings": False}),
    "qwen3_window": ("Qwen3ForCausalLM", {**PLAIN, "window": 5}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**PLAIN, "moe": EXPERTS}),
    "qwen3_moe_window": ("Qwen3MoeForCausalLM", {**PLAIN, "moe": EXPERTS, "window": 5}),
    "llama": ("LlamaForCausalLM", {**PLAIN, "qk_norm": False}),
    "mistral": ("MistralForCausalLM", {**PLAIN, "qk_norm": False, "window": 5}),
    "mixtral": ("MixtralForCausalLM", {**PLAIN, "qk_norm": False, "moe": EXPERTS}),
    "arcee": ("ArceeForCausalLM", {**PLAIN, "qk_norm": False, "mlp": "relu2"}),
    "gated": ("ArchscaleForCausalLM", {"tied_embeddings": False}),
    "gated_window": ("ArchscaleForCausalLM", {"window": 5}),
    "relu2_qk_norm": ("ArchscaleForCausalLM", {**PLAIN, "mlp": "relu2"}),
    "sqrt_gate_shared": (
        "ArchscaleForCausalLM",
        {**PLAIN, "moe": {"sparsity": 4, "top_k": 3}},
    ),
    "shared": (
        "ArchscaleForCausalLM",
        {"mlp": "relu2", "moe": {**EXPERTS, "top_k": 3, "shared_expert": True}},
    ),
    "indivisible_width": (
        "ArchscaleForCausalLM",
        {**PLAIN, "qk_norm": False, "heads": 5},
    ),
}
FIRST = ("qwen3", "qwen3_window", "llama", "arcee", "gated", "sqrt_gate_shared", "qwen3_moe")
SLOW = [name for name in CASES if name not in FIRST]
NAMES = [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def made(data: str, tmp_path_factory: pytest.TempPathFactory):
    """name → (run directory, its export), made once; all with Depth-μP and a logit scale."""
    folder = tmp_path_factory.mktemp("made")

    def make(name: str) -> tuple[Path, Path]:
        run_dir, out = folder / name, folder / f"{name}.out"
        if not out.exists():
            model = {"depth_mup": True, **CASES[name][1]}
            make_run(data, run_dir, "adamw", model=model, **MUP)
            export(run_dir, out, shard_size="5GB")
        return run_dir, out

    return make


def load(out: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    return model.eval()


def some_tokens(batch: int = 2, time: int = 16) -> torch.Tensor:
    return torch.randint(2, 300, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_and_generation_are_those_of_the_run(name, made):
    run_dir, out = made(name)
    config, native, tokenizer = load_run(run_dir)
    exported = load(out)
    assert type(exported).__name__ == CASES[name][0]
    assert exported.dtype == torch.float32
    tokens = some_tokens()
    expected = native(tokens).logits
    # Float32 of some 1e-7 a sum: logits of size 4 through 2 blocks differ by a few 1e-6.
    assert 0.2 < expected.std() < 10
    print("ERR", name, expected.std(), (exported(tokens).logits-expected).abs().max())
    torch.testing.assert_close(exported(tokens).logits, expected, atol=1e-4, rtol=0)
    # Every prefix by itself too, one token after another from the cache.
    fast = transformers.AutoTokenizer.from_pretrained(out)
    text = "abcd efgh"
    inputs = fast(text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [tokenizer.eos_id, *tokenizer.encode(text)]
    count = config.model.context - inputs.input_ids.shape[1]
    with_cache, without = (
        exported.generate(**inputs, max_new_tokens=count, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()
    ours = generate(run_dir, text, max_tokens=count, temperature=0.0, top_k=None, seed=0)
    assert tokenizer.decode(with_cache[0].tolist()) == ours
    assert len(ours) > len(text)
