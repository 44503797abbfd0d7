"""An export computes what the run's own model does, in transformers and without archscale."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale.checkpoint.target import find_target
from archscale.export.export import export
from archscale.train.loading import load_model
from tests.export.runs import MUP, make_run
from tests.train.texts import continued
from tests.train.tiny import tiny_data

transformers = pytest.importorskip("transformers")
pytest.importorskip("safetensors")

# Numbers that follow from no other, and that transformers has not by itself.
OWN = {"rope_theta": 500000.0, "heads": 4, "head_dim": 16, "vocab_size": 320}
PLAIN = {"gated_attention": False}
EXPERTS = {"sparsity": 4, "top_k": 2, "shared_expert": False, "sqrt_gate": False}
# name → (class, model section); all with grouped queries
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3ForCausalLM", {**PLAIN, "tied_embeddings": False}),
    "qwen3_window": ("Qwen3ForCausalLM", {**PLAIN, **OWN, "window": 5}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**PLAIN, "moe": EXPERTS}),
    "qwen3_moe_window": ("Qwen3MoeForCausalLM", {**PLAIN, "moe": EXPERTS, "window": 5}),
    "llama": ("LlamaForCausalLM", {**PLAIN, "qk_norm": False}),
    "mistral": ("MistralForCausalLM", {**PLAIN, "qk_norm": False, "window": 5}),
    "mixtral": ("MixtralForCausalLM", {**PLAIN, "qk_norm": False, "moe": EXPERTS}),
    "arcee": ("ArceeForCausalLM", {**PLAIN, "qk_norm": False, "mlp": "relu2"}),
    "gated": ("ArchscaleForCausalLM", {**OWN, "tied_embeddings": False}),
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
FIRST = ("qwen3_window", "gated")
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


def gated_alone(out: Path) -> str:
    """Prints logits in a process that has no archscale."""
    return f"""
import sys
sys.modules["archscale"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)
torch.save(model.eval()(torch.load("tokens.pt")).logits.detach(), "logits.pt")
assert not [name for name in sys.modules if name.startswith("archscale.")]
try:
    import archscale
except ImportError:
    print("alone")
"""


def some_tokens(batch: int = 2, time: int = 16) -> torch.Tensor:
    return torch.randint(2, 300, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_and_generation_are_those_of_the_run(name, made):
    run_dir, out = made(name)
    target = find_target(run_dir)
    native, tokenizer = load_model(target), target.tokenizer
    exported = load(out)
    assert type(exported).__name__ == CASES[name][0]
    assert exported.dtype == torch.float32
    tokens = some_tokens()
    expected = native(tokens).logits
    # Sums of a hundred float32 terms in two orders, through 2 blocks: logits of size 3 differ by
    # less than 1e-5. An ε of 1e-6 in the norms would be seen.
    assert 0.2 < expected.std() < 10
    torch.testing.assert_close(exported(tokens).logits, expected, atol=2e-5, rtol=0)
    # Every prefix by itself too, one token after another from the cache.
    fast = transformers.AutoTokenizer.from_pretrained(out)
    text = "abcd efgh"
    inputs = fast(text, return_tensors="pt")
    assert inputs.input_ids[0].tolist() == [tokenizer.eos_id, *tokenizer.encode(text)]
    count = target.config.model.context - inputs.input_ids.shape[1]
    with_cache, without = (
        exported.generate(**inputs, max_new_tokens=count, do_sample=False, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert with_cache.tolist() == without.tolist()
    ours = continued(run_dir, text, count)
    assert tokenizer.decode(with_cache[0].tolist()) == ours
    assert len(ours) > len(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "sqrt_gate_shared"])
@torch.no_grad()
def test_the_code_beside_the_weights_needs_no_archscale(name, made, tmp_path):
    run_dir, out = made(name)
    tokens = some_tokens()
    torch.save(tokens, tmp_path / "tokens.pt")
    done = subprocess.run(
        [sys.executable, "-c", gated_alone(out)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "alone", done.stderr
    expected = load_model(find_target(run_dir))(tokens).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gated", "gated_window"])
@torch.no_grad()
def test_padding_changes_nothing(name, made):
    _, out = made(name)
    model = load(out)
    long, short = some_tokens(2, 9)
    alone = model(short[None, :5]).logits[0]
    nowhere = torch.zeros(4, dtype=torch.long)
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    for positions in (None, (mask.cumsum(1) - 1).clamp(min=0)):
        batch = torch.stack([long, torch.cat([nowhere, short[:5]])])
        logits = model(batch, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(logits[1, 4:], alone, atol=2e-5, rtol=0)
    right = torch.cat([short[:5], nowhere])
    logits = model(torch.stack([long, right]), attention_mask=mask.flip(1)).logits
    torch.testing.assert_close(logits[1, :5], alone, atol=2e-5, rtol=0)
    together = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert (
        together[1, 9:].tolist()
        == model.generate(short[None, :5], max_new_tokens=6, do_sample=False)[0, 5:].tolist()
    )


@torch.no_grad()
def test_the_code_does_what_trainers_ask_of_it(made):
    model = load(made("gated")[1])
    tokens = some_tokens()
    output = model(tokens, labels=tokens, output_hidden_states=True)
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(output.loss, expected)
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1
    last = model(tokens, logits_to_keep=1).logits
    torch.testing.assert_close(last, output.logits[:, -1:], atol=1e-6, rtol=0)
    embedded = model.get_input_embeddings()(tokens)
    torch.testing.assert_close(model(inputs_embeds=embedded).logits, output.logits)
    # A text in two parts, the first of which is in the cache.
    first = model(tokens[:, :6], use_cache=True)
    cache = first.cache if "cache" in first else first.past_key_values
    rest = model(tokens[:, 6:], past_key_values=cache).logits
    torch.testing.assert_close(rest, output.logits[:, 6:], atol=2e-5, rtol=0)
    with pytest.raises(ValueError, match="output_attentions"):
        model(tokens, output_attentions=True)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()


def test_blocks_on_several_devices_have_their_masks_there():
    from archscale.export.modeling_archscale import VisibleKeys

    visible = VisibleKeys(torch.tensor([[0, 1, 1]]), 0, 3, None)
    places = [torch.device(name) for name in ("cpu", "meta", "cpu")]
    assert [visible.mask(3, place).device for place in places] == places


@pytest.mark.slow
def test_a_saved_copy_is_the_same_model(made, tmp_path):
    """What fine-tuning saves can be loaded again, code and all; tied weights stay tied."""
    for name in ("gated", "gated_window"):
        model = load(made(name)[1])
        model.save_pretrained(tmp_path / name)
        again = load(tmp_path / name)
        tokens = some_tokens()
        torch.testing.assert_close(again(tokens).logits, model(tokens).logits, atol=0, rtol=0)
        body = transformers.AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True)
        states = body.eval()(tokens).last_hidden_state
        torch.testing.assert_close(again.lm_head(states), model(tokens).logits, atol=0, rtol=0)
        tied = again.lm_head.weight is again.get_input_embeddings().weight
        assert tied == again.config.tie_word_embeddings == (name == "gated_window")


@pytest.mark.slow
@torch.no_grad()
def test_bfloat16_computes_what_training_in_bfloat16_did(data, tmp_path):
    sections = {"training": {"precision": "bf16"}, "model": {"tied_embeddings": False}}
    make_run(data, tmp_path / "run", **sections)
    export(tmp_path / "run", tmp_path / "out", shard_size="5GB")
    native = load_model(find_target(tmp_path / "run"))
    model = load(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    tokens = some_tokens()
    expected = native(tokens).logits
    # The attention scale in q_norm's weight is rounded once more, by 2^-9.
    assert (model(tokens).logits - expected).abs().max() < 0.05 * expected.std()


@pytest.mark.slow
def test_attention_within_documents_needs_no_document_before(data, tmp_path):
    make_run(data, tmp_path / "run", model=PLAIN, data={"document_mask": True})
    export(tmp_path / "run", tmp_path / "out", shard_size="5GB")
    tokenizer = find_target(tmp_path / "run").tokenizer
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = fast("abcd efgh", return_tensors="pt")
    assert inputs.input_ids[0].tolist() == tokenizer.encode("abcd efgh")
    ours = continued(tmp_path / "run", "abcd efgh", 5)
    theirs = load(tmp_path / "out").generate(**inputs, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(theirs[0].tolist()) == ours
    assert "within documents" in (tmp_path / "out/README.md").read_text()


@pytest.mark.slow
@torch.no_grad()
def test_files_of_a_limited_size_are_one_model(made, tmp_path):
    run_dir, out = made("sqrt_gate_shared")
    written = export(run_dir, tmp_path / "out", shard_size="20kB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == [path.name for path in files]
    assert len(files) == written.files > 3
    # Only the embedding is larger than that.
    assert sum(path.stat().st_size > 22_000 for path in files) == 1
    assert (
        index["metadata"]["total_size"]
        == sum(weight.numel() * 4 for weight in load(out).state_dict().values()) - 300 * 24 * 4
    )  # the tied matrix counts once
    tokens = some_tokens()
    expected = load(out)(tokens).logits
    torch.testing.assert_close(load(tmp_path / "out")(tokens).logits, expected, atol=0, rtol=0)
