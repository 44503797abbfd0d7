"""Training on packed documents: one trajectory however ragged the padding is, and documents that
do not see each other."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from archscale.config import MoEConfig
from archscale.data.loader import Batch
from archscale.data.training_data import open_training_data
from archscale.data.windows import IGNORE
from archscale.errors import ConfigError
from archscale.model import Transformer, initialize, transformer
from archscale.model.moe import Routing
from archscale.train.balance import StepBalance
from tests.data.conftest import write_dataset
from tests.train.tiny import LAYOUTS, config, crash_after, run

STEPS, CONTEXT = 4, 16
# As in test_parity.py: other orders of summation, amplified by a few steps.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Documents of 5 to 20 tokens, most more than half a window: up to two thirds of a window is
    padding, and micro-batches differ."""
    generator = np.random.default_rng(0)
    lengths = generator.choice([5, 9, 10, 11, 13, 16, 20], 400)
    ids = 2 + generator.zipf(1.3, lengths.sum()) % 200
    ids[np.cumsum(lengths) - 1] = 1
    path = tmp_path_factory.mktemp("packed") / "set"
    return str(write_dataset(path, np.array_split(ids, 3), [ids[:600]], 300))


def packed(data: str, micro_batch: int = 24, steps: int = STEPS, **sections):
    return config(
        data,
        "orscale_lm",
        steps,
        data={"packing": "best_fit", "document_mask": True},
        training={"micro_batch": micro_batch, **sections.pop("training", {})},
        telemetry={"every": 1},
        **sections,
    )


def curve(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines] + [lines[-1]["val_loss"]]


@pytest.fixture(scope="module")
def alone(data: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """On one process, 1 × 24 sequences."""
    return run(packed(data), str(tmp_path_factory.mktemp("alone")))


def test_the_loss_is_the_mean_over_all_targets(
    pool: Callable, data: str, alone: list[dict], tmp_path: Path
) -> None:
    """1 × 24 sequences, 4 × 6, and two ranks: every target counts the same, though every
    micro-batch and rank has another number of them. Recomputed blocks see the same documents."""
    expected = curve(alone)
    assert expected[STEPS - 1] < expected[0]
    recompute = {"activation_checkpoint": "block"}
    several = run(packed(data, 6, training=recompute), str(tmp_path / "four"))
    np.testing.assert_allclose(curve(several), expected, rtol=TOLERANCE)
    for layout in ("ddp2", "fsdp2"):
        world, sections = LAYOUTS[layout]
        for lines in pool(world).run(run, packed(data, 6, **sections), str(tmp_path / layout)):
            np.testing.assert_allclose(curve(lines), expected, rtol=TOLERANCE)


def test_padding_is_counted(data: str, alone: list[dict]) -> None:
    made = packed(data)
    windows = open_training_data(made.data, CONTEXT, made.seed).windows(np.arange(STEPS * 24))
    shares = (windows.targets == IGNORE).reshape(STEPS, -1).mean(1)
    np.testing.assert_allclose([line["data/padding"] for line in alone], shares, atol=1e-6)
    by_sequence = (windows.targets == IGNORE).mean(1)
    assert by_sequence.max() > by_sequence.min() + 0.3  # ragged
    assert "data/padding" not in run(config(data, steps=1), data + "-concatenated")[0]


def test_a_packed_run_resumes_bitwise_and_as_what_it_was(
    data: str, alone: list[dict], tmp_path: Path
) -> None:
    made, folder = packed(data, checkpoint={"every": 2}), str(tmp_path / "r")
    crash_after(made, folder, 3)
    assert curve(run(made, folder)) == curve(alone)
    other = config(data, "orscale_lm", STEPS, data={"document_mask": True})
    with pytest.raises(ConfigError, match=r"^data\.packing is concatenate"):
        run(other, folder)


def test_training_reads_the_documents_and_validation_the_ends(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, original = [], transformer.attention_mask

    def watched(tokens, window, eos_id, dtype, documents=None):
        seen.append((tokens, eos_id, documents))
        return original(tokens, window, eos_id, dtype, documents)

    monkeypatch.setattr(transformer, "attention_mask", watched)
    made = packed(data, steps=1)
    run(made, str(tmp_path / "r"))
    windows = open_training_data(made.data, CONTEXT, made.seed).windows(np.arange(24))
    assert windows.documents is not None
    (tokens, _, documents), *held_out = seen
    assert np.array_equal(tokens, windows.inputs)
    assert np.array_equal(documents, windows.documents)
    assert held_out
    assert all(eos_id == 1 and documents is None for _, eos_id, documents in held_out)


def test_the_counting_pass_sees_the_same_documents() -> None:
    """Where experts are balanced over the whole batch."""
    seen: list[torch.Tensor] = []

    def forward(tokens: torch.Tensor, *, documents: torch.Tensor, head: bool) -> SimpleNamespace:
        seen.append(documents)
        count = torch.ones(1, 1, 4, dtype=torch.int64)
        return SimpleNamespace(routing=Routing(count, count.float()))

    tokens = torch.zeros(1, 4, dtype=torch.int64)
    batch = Batch(tokens, tokens, torch.arange(4).reshape(1, 4))
    balance = StepBalance(MoEConfig(balance="global"), torch.tensor(4.0))
    balance.count(SimpleNamespace(forward=forward), [batch])  # type: ignore[arg-type]
    assert seen == [batch.documents]


# --- what a document sees


@pytest.fixture(scope="module")
def model(data: str) -> Transformer:
    made = Transformer(config(data).with_vocab(300).model)
    initialize(made, 0)
    return made


@pytest.fixture(scope="module")
def batch(data: str) -> Batch:
    """Windows of 64 positions, with several documents in each."""
    made = packed(data)
    windows = open_training_data(made.data, 64, 0).windows(np.arange(2))
    return Batch.of_windows(windows)


def groups(documents: torch.Tensor) -> list[torch.Tensor]:
    """Positions of each document of a window."""
    return [torch.nonzero(documents == number)[:, 0] for number in documents.unique()]


def test_a_document_changes_no_other(model: Transformer, batch: Batch) -> None:
    """Not by a bit: what is masked is multiplied by exactly 0, and the rest is computed alike."""
    assert batch.documents is not None
    before = model(batch.inputs, documents=batch.documents).logits
    for row in range(len(batch.inputs)):
        for positions in groups(batch.documents[row]):
            changed = batch.inputs.clone()
            changed[row, positions] = (changed[row, positions] + 7) % 200
            after = model(changed, documents=batch.documents).logits
            same = (after == before).all(-1)
            assert not same[row, positions].any()
            same[row, positions] = True
            assert same.all()
    # Without the mask, everything that comes after it.
    assert not torch.equal(model(changed).logits[row], model(batch.inputs).logits[row])


def test_a_document_is_read_as_if_it_stood_alone(model: Transformer, batch: Batch) -> None:
    """At the beginning of a window: rotary positions count by their differences."""
    assert batch.documents is not None
    count = 0
    packed = model(batch.inputs, documents=batch.documents).logits
    for row in range(len(batch.inputs)):
        for positions in groups(batch.documents[row]):
            own = model(batch.inputs[row, positions][None]).logits[0]
            # Two angles of float32, each off by at most 64 · 2^-24 at position 64; so are q and k,
            # relatively, and the logits, which are below 1.
            torch.testing.assert_close(packed[row, positions], own, rtol=0, atol=64 * 2**-23)
            count += len(positions) > 1
    assert packed.abs().max() < 1
    assert count > 8
