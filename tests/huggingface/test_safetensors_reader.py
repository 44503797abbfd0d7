"""What is read of a directory of safetensors files, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from archscale.config import ModelConfig
from archscale.errors import CheckpointError
from archscale.huggingface.architecture import choose
from archscale.huggingface.safetensors_reader import StoredTensors
from archscale.huggingface.weights import factors, sources
from tests.huggingface.stock import write_directory

save_file = pytest.importorskip("safetensors.torch").save_file
MODEL = ModelConfig(depth=2, width=24, head_dim=8, vocab_size=30, tied_embeddings=True)
NORM = "model.layers.0.post_attention_layernorm.weight"


def checked(directory: Path) -> StoredTensors:
    stored = StoredTensors(directory)
    parts = [*sources(MODEL, choose(MODEL).model_type, factors(MODEL, 1.0, 1.0))]
    stored.check(parts, MODEL.tied_embeddings)
    return stored


def test_any_interval_is_that_of_the_flattened_weight(tmp_path):
    weights = {"a": torch.randn(7, 5).bfloat16(), "b": torch.arange(9.0)}
    save_file(weights, tmp_path / "model.safetensors")
    stored = StoredTensors(tmp_path)
    for name, weight in weights.items():
        for lo, hi in ((0, 1), (3, 8), (4, weight.numel()), (0, weight.numel()), (8, 9)):
            assert torch.equal(stored.read(name, lo, hi), weight.flatten()[lo:hi])


def test_what_is_not_used_is_not_in_the_way(tmp_path):
    """What old versions saved beside the weights, and a head that is the embedding."""
    unused = {
        "lm_head.weight": torch.ones(30, 24),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    checked(write_directory(MODEL, tmp_path / "in", **unused))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({NORM: None}, f"weight {NORM}: missing in the files"),
        ({NORM: torch.ones(25)}, f"weight {NORM}: (25,) in the files, (24,) by config.json"),
        ({"model.bias": torch.ones(2)}, "weight model.bias: (2,) in the files, none by"),
        ({NORM: torch.ones(24, dtype=torch.int8)}, "is stored as I8"),
    ],
)
def test_other_weights_are_refused(change, said, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(said)):
        checked(write_directory(MODEL, tmp_path / "in", **change))


def test_damaged_files_are_a_line(tmp_path):
    directory = write_directory(MODEL, tmp_path / "in")
    weights, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    shutil.copy(weights, directory / "other.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    cases: list[tuple[object, str]] = [
        (None, "the file is damaged"),
        ("{", "no index of safetensors files"),
        ({"weight_map": {"a": "../x.safetensors"}}, "no index of safetensors files"),
        ({"weight_map": {"a": 1}}, "no index of safetensors files"),
        ({"weight_map": {"a": "x.safetensors"}}, "cannot read the weights: No such file"),
        ({"weight_map": {"a": "other.safetensors"}}, "weight a is not in its file"),
    ]
    for content, said in cases:
        if content is not None:
            index.write_text(content if isinstance(content, str) else json.dumps(content))
        with pytest.raises(CheckpointError, match=said) as refused:
            checked(directory)
        assert "\n" not in str(refused.value)
    index.unlink()
    weights.unlink()
    with pytest.raises(CheckpointError, match="there are no weights"):
        checked(directory)
