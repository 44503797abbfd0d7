"""Shards and splits: what is written is what is read, and every damage is named."""

import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archscale.data.shards import (
    HEADER_BYTES,
    MANIFEST,
    TOKEN_BYTES,
    ShardWriter,
    open_shard,
    read_header,
    verify_shard,
)
from archscale.data.split import TokenSplit
from archscale.errors import DataError

from .conftest import FINGERPRINT, VOCAB, write_dataset


@given(
    parts=st.lists(st.lists(st.integers(0, 70_000), max_size=50), max_size=5), wide=st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_shard_round_trip(parts: list[list[int]], wide: bool) -> None:
    vocab = 70_001 if wide else 65_536
    parts = [[i % vocab for i in part] for part in parts]
    whole = [i for part in parts for i in part]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.bin"
        with ShardWriter(path, vocab, FINGERPRINT) as writer:
            for part in parts:
                writer.write(np.array(part, np.int64))
        header = verify_shard(path)
        assert open_shard(path).tolist() == whole
        assert (header.tokens, header.max_id) == (len(whole), max(whole, default=0))
        assert header.fingerprint == FINGERPRINT
        assert path.stat().st_size == HEADER_BYTES + len(whole) * (4 if wide else 2)


def test_header_is_128_bytes() -> None:
    assert HEADER_BYTES == 128


def test_writer_leaves_nothing_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"token id 10 is outside the vocabulary of 10 .*x\.bin"):  # noqa: SIM117
        with ShardWriter(tmp_path / "x.bin", 10, FINGERPRINT) as writer:
            writer.write(np.array([3, 10]))
    assert list(tmp_path.iterdir()) == []


def test_shard_has_no_name_before_it_is_whole(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.bin", 10, FINGERPRINT)
    writer.write(np.arange(10))
    assert not (tmp_path / "x.bin").exists()
    writer.close()
    assert read_header(tmp_path / "x.bin").tokens == 10


@given(cuts=st.sets(st.integers(1, 199), max_size=8), context=st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_windows_do_not_see_shard_borders(cuts: set[int], context: int) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 200)
    with tempfile.TemporaryDirectory() as folder:
        path = write_dataset(Path(folder) / "set", np.split(ids, sorted(cuts)), [ids])
        split = TokenSplit(path, "train", context)
        assert split.num_tokens == 200
        assert split.num_samples == 199 // context
        for i in range(split.num_samples):
            window = split.sample(i)
            assert window.dtype == np.int64
            np.testing.assert_array_equal(window, ids[i * context : i * context + context + 1])
        targets = np.concatenate([split.sample(i)[1:] for i in range(split.num_samples)])
        np.testing.assert_array_equal(targets, ids[1 : 1 + len(targets)])


def test_samples_outside_are_refused(dataset: Path) -> None:
    split = TokenSplit(dataset, "train", 10)
    for index in (-1, split.num_samples):
        with pytest.raises(IndexError):
            split.sample(index)


def test_a_whole_dataset_passes(dataset: Path) -> None:
    split = TokenSplit(dataset, "train", 16)
    split.check(VOCAB)
    assert (split.vocab_size, split.eos_id, split.fingerprint) == (VOCAB, 1, FINGERPRINT)
    assert split.token_bytes.shape == (VOCAB,)


def test_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no data set .*nowhere.*archscale data prepare"):
        TokenSplit(tmp_path / "nowhere", "train", 8)


def test_half_prepared_directory(dataset: Path) -> None:
    (dataset / MANIFEST).unlink()
    with pytest.raises(DataError, match=r"not a prepared data set.*set.*archscale data prepare"):
        TokenSplit(dataset, "train", 8)


@pytest.mark.parametrize("content", ["{", "[]", '{"format_version": 99}', '{"format_version": 1}'])
def test_foreign_manifest(dataset: Path, content: str) -> None:
    (dataset / MANIFEST).write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json"):
        TokenSplit(dataset, "train", 8)


def test_unknown_split_and_too_small_a_split(dataset: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test' .*train, validation"):
        TokenSplit(dataset, "test", 8)
    assert TokenSplit(dataset, "validation", 204).num_samples == 1
    with pytest.raises(DataError, match="205 tokens, less than one window of 205"):
        TokenSplit(dataset, "validation", 205)


def _use(dataset: Path) -> TokenSplit:
    split = TokenSplit(dataset, "train", 16)
    split.check(VOCAB)
    return split


@pytest.mark.parametrize("keep", [0, 4, 100, HEADER_BYTES + 599])
def test_truncated_shard(dataset: Path, keep: int) -> None:
    shard = dataset / "train_00001.bin"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"(truncated|foreign).*train_00001\.bin"):
        _use(dataset)
    with pytest.raises(DataError, match=r"train_00001\.bin"):  # also where nobody called check()
        TokenSplit(dataset, "train", 16).sample(25)


def test_overlong_and_missing_shard(dataset: Path) -> None:
    shard = dataset / "train_00001.bin"
    content = shard.read_bytes()
    shard.write_bytes(content + b"xx")
    with pytest.raises(DataError, match=r"foreign bytes.*train_00001\.bin"):
        _use(dataset)
    shard.unlink()
    with pytest.raises(DataError, match=r"cannot read the shard.*train_00001\.bin"):
        _use(dataset)


@pytest.mark.parametrize(
    "offset", [0, 8, 12, 16, 24, 32, 64, 100, 127, HEADER_BYTES, HEADER_BYTES + 599]
)
def test_flipped_byte(dataset: Path, flip, offset: int) -> None:
    flip(dataset / "train_00002.bin", offset)
    with pytest.raises(DataError, match=r"train_00002\.bin"):
        _use(dataset)


def test_large_splits_are_not_read_whole(dataset: Path, flip) -> None:
    flip(dataset / "train_00002.bin", HEADER_BYTES + 5)
    split = TokenSplit(dataset, "train", 16)
    split.check(VOCAB, verify_up_to_bytes=1999)
    with pytest.raises(DataError, match="checksum"):
        split.check(VOCAB, verify_up_to_bytes=2000)


def test_foreign_file(dataset: Path) -> None:
    (dataset / "train_00000.bin").write_bytes(b"PK" + bytes(726))
    with pytest.raises(DataError, match=r"foreign file.*train_00000\.bin"):
        _use(dataset)


def test_id_outside_the_models_vocabulary(dataset: Path) -> None:
    with pytest.raises(
        DataError, match=r"token id 499 does not fit a vocabulary of 499 .*train_00001\.bin"
    ):
        TokenSplit(dataset, "train", 16).check(499)


def test_shard_of_another_tokenizer(dataset: Path) -> None:
    with ShardWriter(dataset / "train_00003.bin", VOCAB, "ab" * 32) as writer:
        writer.write(np.arange(100))
    with pytest.raises(DataError, match=r"another tokenizer, abababababab.*train_00003\.bin"):
        _use(dataset)


def test_shard_of_another_length(dataset: Path) -> None:
    with ShardWriter(dataset / "train_00003.bin", VOCAB, FINGERPRINT) as writer:
        writer.write(np.arange(99))
    with pytest.raises(DataError, match=r"99 tokens, dataset\.json says 100 .*train_00003\.bin"):
        _use(dataset)


def test_whole_shards_in_each_others_places(dataset: Path) -> None:
    """The tokens of each are sound, and their number is right."""
    first, second = dataset / "train_00000.bin", dataset / "train_00001.bin"
    before = TokenSplit(dataset, "train", 16).origin
    first.rename(dataset / "other")
    second.rename(first)
    (dataset / "other").rename(second)
    for use in (_use, lambda path: TokenSplit(path, "train", 16).sample(0)):
        with pytest.raises(DataError, match=r"other tokens than .* lists .*train_00000\.bin"):
            use(dataset)
    # Data sets that were made before checksums stood in the manifest.
    manifest = json.loads((dataset / MANIFEST).read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            del shard["checksum"]
    (dataset / MANIFEST).write_text(json.dumps(manifest))
    _use(dataset)
    assert TokenSplit(dataset, "train", 16).origin == manifest["origin"] != before


def test_token_bytes_of_another_vocabulary(dataset: Path) -> None:
    np.save(dataset / TOKEN_BYTES, np.ones(3, np.int32))
    with pytest.raises(DataError, match=r"token_bytes\.npy"):
        _ = _use(dataset).token_bytes


def test_many_shards_need_few_descriptors(tmp_path: Path) -> None:
    ids = np.arange(1200) % VOCAB
    split = TokenSplit(write_dataset(tmp_path / "set", np.split(ids, 400), [ids]), "train", 3)
    for i in range(split.num_samples):
        split.sample(i)
    assert (
        sum(1 for _ in Path("/proc/self/fd").iterdir()) < 350
        if Path("/proc/self/fd").is_dir()
        else True
    )


def test_manifest_is_plain_json(dataset: Path) -> None:
    manifest = json.loads((dataset / MANIFEST).read_text())
    assert manifest["splits"]["train"]["tokens"] == 1000
