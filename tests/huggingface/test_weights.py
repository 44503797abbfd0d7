"""Stock models made with transformers, imported: the same model, and the same files when they go
out again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from archscale.checkpoint.target import find_target
from archscale.config import Config
from archscale.distributed import Fragment, fragment
from archscale.export.export import export
from archscale.huggingface import weights as weights_module
from archscale.huggingface.model_section import read_model
from archscale.huggingface.safetensors_reader import StoredTensors
from archscale.huggingface.weights import divide_out, factors, sources, take_back
from archscale.model import Transformer
from archscale.plan.transfer import transfer_of
from archscale.train.loading import load_model
from tests.export.runs import MUP, make_run
from tests.huggingface.stock import STOCK, make_stock
from tests.train.tiny import tiny_data

pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
FIRST = ("qwen3_moe", "llama")
SLOW = [name for name in STOCK if name not in FIRST]
NAMES = [*FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_data(tmp_path_factory.mktemp("data"))


def filling(directory: Path) -> Callable[[Transformer, Config], None]:
    def fill(model: Transformer, config: Config) -> None:
        transfer = transfer_of(config)
        by = factors(config.model, transfer.logit_scale, transfer.router_logit_scale)
        parts = [*sources(config.model, read_model(directory).model_type, by)]
        stored = StoredTensors(directory)
        stored.check(parts, config.model.tied_embeddings)
        weights = {name: fragment(parameter) for name, parameter in model.named_parameters()}
        take_back(weights, parts, stored.read)

    return fill


def imported_run(data: str, directory: Path, run_dir: Path) -> Path:
    """A run of these weights, with Depth-μP and the scales of μP: every factor is another than
    1."""
    section = {**read_model(directory).section, "depth_mup": True, "attention_scale": "mup"}
    return make_run(data, run_dir, "adamw", fill=filling(directory), model=section, **MUP)


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    files = sorted(directory.glob("*.safetensors"))
    return {name: weight for file in files for name, weight in load_file(file).items()}


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How many float32 numbers of one sign lie between, counting one end."""
    return (a.view(torch.int32).long() - b.view(torch.int32).long()).abs()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_an_imported_model_is_the_same_and_goes_out_as_it_came(name, data, tmp_path):
    """Several files in float32; bitwise in bfloat16."""
    theirs = make_stock(name, tmp_path / "in", torch.float32, "20kB")
    run_dir = imported_run(data, tmp_path / "in", tmp_path / "run")
    native = load_model(find_target(run_dir))
    tokens = torch.randint(2, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    logits = theirs(tokens).logits
    assert logits.std() > 0.2
    # As the export's: sums of a hundred float32 terms in two orders, through two blocks.
    torch.testing.assert_close(native(tokens).logits, logits, atol=2e-5, rtol=0)

    export(run_dir, tmp_path / "out", shard_size="5GB")
    stored, back = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert stored.keys() == back.keys()
    for key, weight in stored.items():
        assert steps_apart(weight, back[key]).max() <= 1

    make_stock(name, tmp_path / "bf16", torch.bfloat16)
    run_dir = imported_run(data, tmp_path / "bf16", tmp_path / "run_bf16")
    export(run_dir, tmp_path / "out_bf16", dtype="bfloat16", shard_size="5GB")
    stored, back = tensors(tmp_path / "bf16"), tensors(tmp_path / "out_bf16")
    assert all(torch.equal(weight, back[key]) for key, weight in stored.items())


def test_a_config_made_from_a_model_has_no_factors(data, tmp_path):
    """Its weights go out as they came, bitwise in float32 too."""
    make_stock("qwen3", tmp_path / "in", torch.float32)
    section = read_model(tmp_path / "in").section
    run_dir = make_run(
        data, tmp_path / "run", "adamw", fill=filling(tmp_path / "in"), model=section
    )
    export(run_dir, tmp_path / "out", shard_size="5GB")
    stored, back = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    assert stored.keys() == back.keys()
    assert all(torch.equal(weight, back[key]) for key, weight in stored.items())


# The factors that occur, and others on both sides of a power of two.
FACTORS = [0.5**0.5, 1 / 6**0.5, (128 / 16) ** 0.5, 1 / 12**0.5, 0.1, 1.7, 0.999, 3.0]


@pytest.mark.parametrize("factor", FACTORS)
def test_a_weight_folds_back_wherever_a_number_does(factor):
    """Against all numbers near the quotient; and what an export has folded comes back to within one
    unit in its last place."""
    generator = torch.Generator().manual_seed(2)
    wanted = torch.randn(20_000, generator=generator)
    wanted[:9] = 2.0 ** torch.arange(-4, 5)  # where the spacing of numbers changes
    x = divide_out(wanted, factor)
    near = wanted / factor
    for _ in range(4):
        near = torch.nextafter(near, torch.tensor(-torch.inf))
    exists = torch.zeros(len(wanted), dtype=torch.bool)
    for _ in range(9):
        exists |= near * factor == wanted
        near = torch.nextafter(near, torch.tensor(torch.inf))
    again = x * factor
    assert torch.equal(again[exists], wanted[exists])
    assert steps_apart(again, wanted).max() <= 1
    half = wanted.bfloat16()
    assert torch.equal((divide_out(half, factor) * factor).bfloat16(), half)
    assert steps_apart(divide_out(wanted * factor, factor), wanted).max() <= 1


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_each_rank_takes_the_part_that_it_holds(ranks, tmp_path, monkeypatch):
    """Intervals that cut matrices anywhere, as ZeRO's do, are together the whole, also where they
    are read in several parts."""
    make_stock("mixtral", tmp_path, torch.float32)
    model = read_model(tmp_path)
    by = factors(model.config.model_copy(update={"depth_mup": True}), 0.5, 0.25)
    parts = [*sources(model.config, "mixtral", by)]
    stored = StoredTensors(tmp_path)

    def part(rank: int, of: int) -> dict[str, torch.Tensor]:
        weights: dict[str, Any] = {}
        for source in parts:
            size = torch.Size(source.shape).numel()
            lo, hi = rank * size // of, (rank + 1) * size // of
            weights[source.name] = Fragment(source.shape, lo, torch.full((hi - lo,), torch.nan))
        take_back(weights, parts, stored.read)
        return {name: held.data for name, held in weights.items()}

    whole = part(0, 1)
    monkeypatch.setattr(weights_module, "CHUNK", 50)
    pieces = [part(rank, ranks) for rank in range(ranks)]
    for name, weight in whole.items():
        assert weight.isfinite().all()
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), weight)
