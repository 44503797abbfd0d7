"""Packing: every token a target once, documents cut no more than they must be, and an index that
is a function of shards and context."""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.config import Config
from archscale.config.batch import BatchSchedule
from archscale.config.sections import DataConfig
from archscale.data import packing_index
from archscale.data.foreign.split import ForeignSplit
from archscale.data.loader import Batch, Loader
from archscale.data.mixture import Order
from archscale.data.packed import PackedSplit, open_packing
from archscale.data.packing import best_fit, cut, pack
from archscale.data.packing_index import PackingIndex
from archscale.data.split import TokenSplit
from archscale.data.training_data import TrainingData, open_training_data
from archscale.data.windows import IGNORE, Windows
from archscale.errors import ConfigError, DataError
from archscale.plan.preflight import plan_config
from archscale.plan.text import render
from tests.data.conftest import write_dataset
from tests.data.foreign_files import write_llmc

EOS, CONTEXT = 1, 16
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=60)


def text(lengths: list[int], first: int = 2) -> np.ndarray:
    """Documents of so many tokens, the end among them; the others count up, so that each stands for
    its place."""
    ids = first + np.arange(sum(lengths)) % 490
    ids[np.cumsum(lengths) - 1] = EOS
    return ids


def packed(path: Path, context: int = CONTEXT, mask: bool = True) -> TrainingData:
    data = DataConfig(train=str(path), packing="best_fit", document_mask=mask)
    return open_training_data(data, context, 0)


def reader(data: TrainingData) -> PackedSplit:
    (only,) = data.readers
    assert isinstance(only, PackedSplit)
    return only


def made(folder: Path, *shards: list[int]) -> Path:
    return write_dataset(folder, [text(lengths) for lengths in shards], [text([30])])


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,100 tokens in three shards; some documents are longer than a window."""
    lengths = np.random.default_rng(0).integers(1, 45, 200).tolist()
    folder = tmp_path_factory.mktemp("packed")
    return made(folder / "web", lengths[:80], lengths[80:150], lengths[150:])


# --- the packer


@given(LENGTHS, st.integers(1, 24), st.booleans())
@settings(max_examples=100, deadline=None)
def test_every_target_is_in_one_piece_of_one_document(
    lengths: list[int], context: int, ended: bool
) -> None:
    """Pieces are as few as they can be: all of a document but its last are whole windows."""
    ends = np.cumsum(lengths) - 1
    tokens = sum(lengths)
    starts, sizes = cut(ends if ended else ends[:-1], tokens, context)
    assert np.array_equal(np.cumsum(sizes) - sizes, starts)
    assert sizes.sum() == tokens
    assert (sizes >= 1).all()
    expected = [
        size
        for length in lengths
        for size in [context] * (length // context) + [length % context] * bool(length % context)
    ]
    assert sizes.tolist() == expected


def naive(lengths: list[int], context: int) -> list[int]:
    """Room left in each window by best-fit decreasing, piece by piece."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if fitting:
            best = min(fitting, key=lambda number: rooms[number])
            rooms[best] -= length
        else:
            rooms.append(context - length)
    return rooms


@given(st.lists(st.integers(1, 24), max_size=200))
@settings(max_examples=150, deadline=None)
def test_pieces_go_where_they_leave_the_least_room(lengths: list[int]) -> None:
    """As piece by piece. So no two windows could be one, and at most one is not half full."""
    context = 24
    window = best_fit(np.array(lengths, np.int64), context)
    filled = np.bincount(window, weights=lengths)
    rooms = naive(lengths, context)
    assert Counter(context - filled) == Counter(rooms)
    fullest_last = np.sort(filled)
    if len(filled) > 1:
        assert fullest_last[0] + fullest_last[1] > context
        assert (filled < context / 2).sum() <= 1


def test_an_empty_stretch_has_no_window() -> None:
    assert len(pack(np.empty(0, np.int64), 0, 8).offsets) == 1


# --- windows


def check_windows(windows: Windows, ids: np.ndarray, context: int) -> None:
    """All windows of a split hold each of its tokens once, as a target after the one before it."""
    inputs, targets, documents = windows
    assert documents is not None
    assert documents.dtype == np.int32
    real = targets != IGNORE
    assert Counter(targets[real].tolist()) == Counter(ids.tolist())
    assert (np.diff(real.astype(int), axis=1) <= 0).all()  # padding at the end
    assert (inputs[~real] == EOS).all()
    steps = np.diff(documents, axis=1)
    assert ((steps == 0) | (steps == 1)).all()
    assert (documents[:, 0] == 0).all()
    # Within a piece the input is the target before it, and no piece goes on after an end.
    same = (steps == 0) & real[:, 1:]
    assert (inputs[:, 1:][same] == targets[:, :-1][same]).all()
    assert (targets[:, :-1][same] != EOS).all()
    # Padding is a document of its own.
    assert (steps[real[:, :-1] & ~real[:, 1:]] == 1).all()


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.integers(2, 24))
@settings(max_examples=30, deadline=None)
def test_every_token_is_a_target_once(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], context: int
) -> None:
    folder = tmp_path_factory.mktemp("any")
    shards = [[*shards[0], 25], *shards[1:]]  # as much as a window
    data = packed(made(folder / "set", *shards), context)
    (split,) = data.splits
    read, ids = reader(data), split.tokens(0, split.num_tokens)
    everything = read.windows(np.arange(read.num_samples))
    check_windows(everything, ids, context)
    assert read.size.targets == len(ids)
    assert read.size.padding == pytest.approx((everything.targets == IGNORE).mean())
    # Whatever is not longer than a window is whole.
    pieces = [piece for index in range(read.num_samples) for piece in read.pieces(index)]
    stops = np.cumsum([length for lengths in shards for length in lengths])
    for stop, length in zip(stops, (length for lengths in shards for length in lengths)):
        assert length > context or (stop - length, stop) in pieces


def test_inputs_are_the_tokens_before(web: Path) -> None:
    """Across shards, too; of the first token, which has none before it, an end of document."""
    data = packed(web)
    (split,) = data.splits
    read = reader(data)
    stream = np.concatenate([[EOS], split.tokens(0, split.num_tokens)])
    for index in range(read.num_samples):
        inputs, targets, documents = read.windows(np.array([index]))
        assert documents is not None
        at, groups = 0, []
        for start, stop in read.pieces(index):
            assert inputs[0, at : at + stop - start].tolist() == stream[start:stop].tolist()
            at += stop - start
            assert targets[0, at - 1] == stream[stop]
            # The end of the document before, if the piece begins one, and the piece.
            alone = stream[start] == EOS
            groups += [1, stop - start - 1] if alone else [stop - start]
        assert (targets[0, at:] == IGNORE).all()
        assert at == sum(groups)
        groups = [size for size in (*groups, CONTEXT - at) if size]
        assert documents[0].tolist() == np.repeat(np.arange(len(groups)), groups).tolist()


def test_documents_that_a_shard_cuts_are_two_pieces(tmp_path: Path) -> None:
    ids = text([10, 12, 14])
    write_dataset(tmp_path / "set", np.split(ids, [15]), [ids])
    read = reader(packed(tmp_path / "set"))
    pieces = sorted(piece for i in range(read.num_samples) for piece in read.pieces(i))
    assert pieces == [(0, 10), (10, 15), (15, 22), (22, 36)]
    assert read.windows(np.arange(read.num_samples)).inputs.max() == ids.max()


def test_documents_are_numbered_only_where_they_are_asked_for(web: Path) -> None:
    data = packed(web, mask=False)
    masked = packed(web)
    numbers = np.arange(50)
    assert data.windows(numbers).documents is None
    assert np.array_equal(data.windows(numbers).targets, masked.windows(numbers).targets)


@pytest.mark.parametrize("context", [1000, 3000])
def test_windows_longer_than_shards(web: Path, context: int) -> None:
    """One for each shard, and many pieces in it."""
    data = packed(web, context)
    read = reader(data)
    assert read.num_samples == sum(-(-size // context) for size in shard_sizes(web))
    (split,) = data.splits
    everything = read.windows(np.arange(read.num_samples))
    check_windows(everything, split.tokens(0, split.num_tokens), context)


def shard_range(path: Path, number: int) -> tuple[int, int]:
    sizes = shard_sizes(path)
    return sum(sizes[:number]), sum(sizes[: number + 1])


def shard_sizes(path: Path) -> list[int]:
    return [stretch.tokens for stretch in open_packing(MASKED, path, 9, None).stretches]


MASKED = DataConfig(train="anything", packing="best_fit")


# --- order and ranks


@pytest.mark.parametrize(("world", "accumulation"), [(2, 1), (2, 2), (1, 4)])
def test_a_global_batch_is_the_same_however_it_is_spread(
    web: Path, world: int, accumulation: int
) -> None:
    def step(rank: int, world: int, micro: int) -> list[list]:
        with Loader(packed(web), BatchSchedule(8), micro, rank, world, start_step=31) as loader:
            return rows(next(loader))

    def rows(batches: list[Batch]) -> list[list]:
        return [
            [part.tolist() for part in row] for batch in batches for row in zip(*batch, strict=True)
        ]

    parts = [step(rank, world, 8 // world // accumulation) for rank in range(world)]
    assert sorted(itertools.chain(*parts)) == sorted(step(0, 1, 8))


def test_an_epoch_has_every_window_once_in_a_mixture_too(web: Path, tmp_path: Path) -> None:
    made(tmp_path / "code", [5, 30, 9, 17, 3] * 10)
    entries = [
        {"name": name, "path": str(path), "weight": weight}
        for name, path, weight in (("web", web, 3), ("code", tmp_path / "code", 1))
    ]
    data = open_training_data(DataConfig(mixture=entries, packing="best_fit"), CONTEXT, 7)
    code, _ = data.readers
    numbers = np.arange(4 * code.num_samples)
    places, _ = Order({"code": 1, "web": 3}).at(numbers)
    drawn = data.windows(numbers).targets[places == 0]
    own = code.windows(np.arange(code.num_samples)).targets
    assert sorted(drawn.tolist()) == sorted(own.tolist())
    assert data.packed is not None
    assert [size.windows for size in data.packed] == [each.num_samples for each in data.readers]


# --- the index on disk


def test_an_index_is_made_once(web: Path, tmp_path: Path, monkeypatch) -> None:
    """For each shard and context; a damaged or misplaced one is made again, and all are alike."""
    shutil.copytree(web, tmp_path / "set", ignore=shutil.ignore_patterns("packing"))
    calls: list[int] = []
    original = packing_index.pack
    monkeypatch.setattr(
        packing_index, "pack", lambda *given: calls.append(given[-1]) or original(*given)
    )
    first = packed(tmp_path / "set").windows(np.arange(90))
    assert calls == [CONTEXT] * 3
    files = sorted((tmp_path / "set" / "packing").iterdir())
    content = [file.read_bytes() for file in files]
    assert len(files) == 3
    again = packed(tmp_path / "set").windows(np.arange(90))
    assert calls == [CONTEXT] * 3
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    damage = {0: content[0][:-1], 1: content[0], 2: content[2][:-1] + bytes([content[2][-1] ^ 1])}
    for number, bad in damage.items():
        files[number].write_bytes(bad)
    mended = packed(tmp_path / "set").windows(np.arange(90))
    assert all(np.array_equal(a, b) for a, b in zip(first, mended))
    assert calls == [CONTEXT] * 6
    assert [file.read_bytes() for file in files] == content
    packed(tmp_path / "set", CONTEXT + 1)
    assert calls == [CONTEXT] * 6 + [CONTEXT + 1] * 3


def test_what_cannot_be_written_is_kept_in_the_cache(web: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("ARCHSCALE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(web, tmp_path / "set", ignore=shutil.ignore_patterns("packing"))
    (tmp_path / "set" / "packing").write_text("something else")
    numbers = np.arange(90)
    expected = packed(web).windows(numbers)
    assert all(map(np.array_equal, packed(tmp_path / "set").windows(numbers), expected))
    assert len(list((tmp_path / "cache" / "packing").iterdir())) == 3
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("something else")
    with pytest.raises(DataError, match="cannot write how documents are packed") as error:
        packed(tmp_path / "set")
    assert "ARCHSCALE_CACHE" in error.value.remedy


def test_other_projects_and_remote_data_are_packed_alike(
    web: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their indices are in the cache; what they were read from stays as it was."""
    fsspec = pytest.importorskip("fsspec")
    monkeypatch.setenv("ARCHSCALE_CACHE", str(tmp_path / "cache"))
    for file in ("dataset.json", "train_00000.bin", "train_00001.bin", "train_00002.bin"):
        fsspec.filesystem("memory").pipe(f"/packed/{file}", (web / file).read_bytes())
    numbers = np.arange(90)
    expected = packed(web).windows(numbers)
    data = DataConfig(train="memory://packed", packing="best_fit", document_mask=True)
    distant = open_training_data(data, CONTEXT, 0).windows(numbers)
    assert all(map(np.array_equal, distant, expected))
    local = open_packing(MASKED, web, CONTEXT, None)
    (tmp_path / "other").mkdir()
    for number in range(3):
        ids = TokenSplit(web, "train", CONTEXT).tokens(*shard_range(web, number))
        write_llmc(tmp_path / "other" / f"web_train_{number:06d}.bin", ids)
    tokenizer: Any = SimpleNamespace(eos_id=EOS, vocab_size=500, fingerprint="")
    stored = ForeignSplit(tmp_path / "other", "train", tokenizer, None)
    foreign = PackingIndex(stored, CONTEXT)
    assert foreign.make() == local.sizes()
    assert all(
        np.array_equal(*pair) for i in range(3) for pair in zip(foreign.open(i), local.open(i))
    )
    assert len(list((tmp_path / "cache" / "packing").iterdir())) == 6
    assert len(list((tmp_path / "other").iterdir())) == 3


def test_very_long_shards_are_packed_in_parts(web: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(packing_index, "_LONGEST", 500)
    monkeypatch.setattr(packing_index, "_CHUNK", 70)
    shutil.copytree(web, tmp_path / "set", ignore=shutil.ignore_patterns("packing"))
    data = packed(tmp_path / "set")
    (split,) = data.splits
    read = reader(data)
    check_windows(
        read.windows(np.arange(read.num_samples)), split.tokens(0, split.num_tokens), CONTEXT
    )
    assert max(shard_sizes(tmp_path / "set")) == 500


def test_a_damaged_shard_is_not_packed(tmp_path: Path, flip) -> None:
    path = made(tmp_path / "set", [20, 30])
    flip(path / "train_00000.bin", -1)
    with pytest.raises(DataError, match="damaged shard"):
        packed(path)
    assert not (path / "packing").exists()


# --- what people are told


def test_ends_of_documents_must_be_known(tmp_path: Path) -> None:
    write_llmc(tmp_path / "web_train_000001.bin", text([9, 40]))
    data = DataConfig(train=str(tmp_path), packing="best_fit")
    with pytest.raises(ConfigError, match="which token ends a document") as error:
        open_training_data(data, CONTEXT, 0, 500)
    assert error.value.where == "data.packing"


def test_a_plan_says_how_much_is_padding(web: Path) -> None:
    """Once it is known; much of it is advised against."""

    def plan(context: int) -> tuple[str, dict, list[str]]:
        values = {
            "name": "packed",
            "model": {"depth": 1, "width": 128, "context": context},
            "data": {"train": str(web), "packing": "best_fit"},
            "training": {"batch_tokens": 8 * context, "tokens": 32 * context},
        }
        plan = plan_config(Config.from_dict(values))
        (source,) = plan.figures["data"]["sources"]
        return render(plan.as_dict()), source, [advice.where for advice in plan.advice]

    shutil.rmtree(web / "packing", ignore_errors=True)
    before, source, _ = plan(CONTEXT)
    assert source["packed"] is None
    assert "padding" not in before.partition("advice")[0]
    size = reader(packed(web)).size
    after, source, advice = plan(CONTEXT)
    assert f"packed into {size.windows} windows, of whose positions {size.padding:.3%}" in after
    trained = 32 * CONTEXT * (1 - size.padding)
    assert source["passes"] == pytest.approx(trained / size.targets, rel=1e-12)
    assert "data.packing" not in advice
    packed(web, 3000)
    _, source, advice = plan(3000)
    assert source["packed"]["padding"] > 0.2
    assert "data.packing" in advice
