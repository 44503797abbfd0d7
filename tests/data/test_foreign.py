"""Other projects' files are read as they were written, and every way in which one can be wrong is
named."""

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest

from archscale.config import Config
from archscale.config.sections import DataConfig, MixtureEntry
from archscale.data.foreign.sets import find_files, sort_into_splits
from archscale.data.preparing.prepare import inspect, verify
from archscale.data.shards import SPLITS
from archscale.data.split import TokenSplit
from archscale.data.stored import check_document_mask, describe, run_tokenizer
from archscale.data.summary_text import render
from archscale.data.tokenizer import train_sentencepiece
from archscale.data.training_data import open_training_data
from archscale.data.validation import validation_batches, validation_sets
from archscale.data.windows import read_windows
from archscale.errors import ConfigError, DataError
from archscale.plan.plan import Plan
from archscale.plan.preflight import plan_config
from tests.data.conftest import FINGERPRINT, write_dataset
from tests.data.foreign_files import write_datatrove, write_llmc, write_megatron

IDS = np.random.default_rng(0).integers(0, 250, 1001)
DOCUMENTS = np.split(IDS[:700], [10, 10, 300])  # one of them empty


def all_tokens(path: Path, split: str = "train", vocab_size: int | None = 256) -> list[int]:
    opened = TokenSplit(path, split, 8, vocab_size=vocab_size)
    opened.check(opened.vocab_size)
    return opened.tokens(0, opened.num_tokens).tolist()


def fineweb(directory: Path) -> Path:
    directory.mkdir()
    write_llmc(directory / "fineweb_train_000001.bin", IDS[:400])
    write_llmc(directory / "fineweb_train_000002.bin", IDS[400:700])
    write_llmc(directory / "fineweb_val_000000.bin", IDS[700:])
    return directory


def test_llmc_directory_has_both_splits_by_name(tmp_path: Path) -> None:
    directory = fineweb(tmp_path / "fw")
    (directory / "README.txt").write_text("no tokens")
    assert all_tokens(directory) == IDS[:700].tolist()
    assert all_tokens(directory, "validation") == IDS[700:].tolist()
    pattern = directory / "*val*.bin"
    assert all_tokens(pattern, "train") == all_tokens(pattern, "validation")
    one = directory / "fineweb_train_000002.bin"
    assert all_tokens(one, "validation") == IDS[400:700].tolist()


def test_llama_3_kind(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "a.bin", IDS + 100_000, 20240801, 7, "<u4")
    assert all_tokens(path, vocab_size=128_256) == (IDS + 100_000).tolist()


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "i8", "u2"])
@pytest.mark.parametrize("name", ["corpus_text_document", "corpus.bin", "corpus.idx"])
def test_megatron_by_prefix_ids_or_index(tmp_path: Path, dtype: str, name: str) -> None:
    prefix = name.removesuffix(".bin").removesuffix(".idx")
    write_megatron(tmp_path / prefix, DOCUMENTS, dtype)
    assert all_tokens(tmp_path / name) == IDS[:700].tolist()


@pytest.mark.parametrize(("dtype", "name"), [("<u2", "a|2"), ("<u4", "b|4"), ("<u2", "old")])
def test_datatrove(tmp_path: Path, dtype: str, name: str) -> None:
    path = write_datatrove(tmp_path / "00000_shuffled.ds", DOCUMENTS, name, dtype)
    assert all_tokens(path) == IDS[:700].tolist()
    assert all_tokens(tmp_path / "00000_shuffled.ds.index") == IDS[:700].tolist()
    # Without the metadata the index says how large an id is.
    (tmp_path / "00000_shuffled.ds.metadata").unlink()
    assert all_tokens(path) == IDS[:700].tolist()


def test_vocabulary_by_the_name_of_a_tokenizer_or_given(tmp_path: Path) -> None:
    known = write_datatrove(tmp_path / "known.ds", DOCUMENTS)
    assert TokenSplit(known, "train", 8).vocab_size == 50257
    other = write_datatrove(tmp_path / "other.ds", DOCUMENTS, "my/own|2")
    with pytest.raises(
        DataError, match=r"vocabulary of my/own.*model\.vocab_size.*data\.tokenizer"
    ):
        TokenSplit(other, "train", 8)
    with pytest.raises(DataError, match=r"mixed files: the tokenizer of known\.ds is gpt2"):
        TokenSplit(tmp_path, "train", 8)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_sentencepiece(["a few words, and a few more"] * 50, 270, directory)
    return str(directory / "tokenizer.model")


def test_a_tokenizer_gives_what_the_files_lack(tmp_path: Path, tokenizer: str) -> None:
    path = fineweb(tmp_path / "fw")
    without = TokenSplit(path, "train", 8, vocab_size=300)
    assert (without.eos_id, without.fingerprint, without.token_bytes) == (None, "", None)
    split = TokenSplit(path, "train", 8, tokenizer)
    assert (split.vocab_size, split.eos_id) == (270, 1)
    assert split.token_bytes is not None
    assert split.token_bytes.shape == (270,)
    assert len(split.fingerprint) == 64
    masked = DataConfig(train=str(path), document_mask=True)
    check_document_mask(masked, split.eos_id)
    with pytest.raises(ConfigError, match=r"which token ends.*data\.tokenizer"):
        check_document_mask(masked, without.eos_id)


def test_prepared_data_have_their_own_tokenizer(dataset: Path, tokenizer: str) -> None:
    with pytest.raises(DataError, match=r"not the one that the data set was made with.*null"):
        TokenSplit(dataset, "train", 8, tokenizer)


def test_validation_needs_no_end_of_document(tmp_path: Path) -> None:
    data = DataConfig(train=str(fineweb(tmp_path / "fw")), val=str(tmp_path / "fw"))
    training = open_training_data(data, 8, 0, 256)
    (held,) = validation_sets(data, training)
    batches = list(validation_batches(held.split, 100, 16))
    assert sum(int((batch.targets >= 0).sum()) for batch in batches) == 37 * 8
    assert int(batches[-1].inputs[-1].sum()) == 0


def test_files_of_an_unknown_tokenizer_go_with_prepared_data(tmp_path: Path, dataset: Path) -> None:
    """Whatever the padding of the model: their ids must be those of the known tokenizer."""
    files = write_llmc(tmp_path / "a.bin", np.append(IDS, 499))
    for names in ("fp", "pf"):
        paths = dict(zip(names, (str(files), str(dataset))))
        mixture = [MixtureEntry(name=name, path=paths[name], weight=1) for name in paths]
        data = DataConfig(mixture=mixture, val=str(dataset))
        training = open_training_data(data, 8, 0, 512)
        assert (training.vocab_size, training.vocabulary.fingerprint) == (500, FINGERPRINT)
        training.check()
        assert {held.split.vocab_size for held in validation_sets(data, training)} == {500}
        # Not a tokenizer, but that of the data set.
        with pytest.raises(DataError, match=r"set/tokenizer/tokenizer\.model"):
            run_tokenizer(data)
    write_llmc(files, np.append(IDS, 500))
    with pytest.raises(DataError, match=r"token id 500 does not fit a vocabulary of 500"):
        open_training_data(data, 8, 0, 512).check()
    alone = DataConfig(train=str(files))
    with pytest.raises(DataError, match=r"do not say which tokenizer .*data\.tokenizer$"):
        run_tokenizer(alone)


def test_a_plan_says_what_the_files_lack(tmp_path: Path, tokenizer: str) -> None:
    data = {"train": str(fineweb(tmp_path / "fw")), "document_mask": True}

    def problems(vocab_size: int | None, **more: str) -> str:
        model = {"depth": 2, "width": 32, "head_dim": 16, "vocab_size": vocab_size}
        training = {"tokens": 65536, "batch_tokens": 32768, "micro_batch": 1}
        config = {"name": "x", "model": model, "data": data | more, "training": training}
        return "\n".join(map(str, plan_config(Config.from_dict(config)).problems))

    assert "give model.vocab_size, or data.tokenizer" in problems(None)
    assert "which token ends a document" in problems(256)
    assert problems(None, tokenizer=tokenizer) == ""


def test_a_plan_says_what_training_refuses_of_the_data(tmp_path: Path, dataset: Path) -> None:
    """Damaged, other or repeated data; what is not here at all may be where training runs."""
    files = str(write_llmc(tmp_path / "a.bin", IDS))
    held_out = str(fineweb(tmp_path / "fw") / "*val*.bin")
    other = write_dataset(tmp_path / "other", [IDS], [IDS], 300)
    cut = write_llmc(tmp_path / "cut.bin", IDS)
    _cut(cut)

    def plan(vocab_size: int | None, *sources: object, **data: object) -> Plan:
        mixture = [
            {"name": f"s{number}", "path": str(path), "weight": 1}
            for number, path in enumerate(sources)
        ]
        model = {"depth": 2, "width": 32, "head_dim": 16, "context": 8, "vocab_size": vocab_size}
        training = {"tokens": 65536, "batch_tokens": 32768, "micro_batch": 1}
        config = {"name": "x", "model": model, "training": training}
        return plan_config(Config.from_dict(config | {"data": {"mixture": mixture, **data}}))

    for made, problem in (
        (plan(512, dataset, val="nowhere"), "no data set"),
        (plan(512, dataset, val=str(other)), "data.val was made with another tokenizer than"),
        (plan(512, files, val=files), "data.val holds out a file that is trained on"),
        (plan(512, held_out), "source s0 of data.mixture holds out a file that is trained on"),
        (plan(512, files, cut), "truncated"),
        (plan(None, dataset, files), "llm.c files do not say how large"),
    ):
        (found,) = made.problems
        assert found.what.startswith(problem)
    assert plan(512, dataset, files).problems == []
    away = plan(512, "nowhere", val="there")
    assert (away.problems, [advice.where for advice in away.advice][:2]) == (
        [],
        ["nowhere", "there"],
    )
    weights = [{"name": "a", "path": "a", "weight": 1}, {"name": "b", "path": "b", "weight": 1e-9}]
    (found,) = plan(None, mixture=weights).problems
    assert found.what.startswith("weight 1e-09 of source b")


def test_files_are_not_both_trained_on_and_held_out(tmp_path: Path) -> None:
    path = str(write_llmc(tmp_path / "tokens.bin", IDS))
    data = DataConfig(train=path, val=path)
    with pytest.raises(ConfigError, match=r"a file that is trained on"):
        validation_sets(data, open_training_data(data, 8, 0, 256))
    assert describe(path, None, 256).tokens == {"train": 1001}


def test_a_file_is_the_same_under_other_names(tmp_path: Path, monkeypatch) -> None:
    path = write_llmc(tmp_path / "tokens.bin", IDS)
    (tmp_path / "link.bin").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    for name in ("tokens.bin", "link.bin"):
        data = DataConfig(train=name, val=str(path))
        with pytest.raises(ConfigError, match=r"^data\.val holds out a file that is trained on"):
            validation_sets(data, open_training_data(data, 8, 0, 256))


def test_a_source_of_validation_files_alone_is_not_held_out_too(tmp_path: Path) -> None:
    path = str(fineweb(tmp_path / "fw") / "*val*.bin")
    data = DataConfig(mixture=[MixtureEntry(name="v", path=path, weight=1)])
    assert describe(path, None, 256).tokens == {"train": 301, "validation": 301}
    with pytest.raises(ConfigError, match=r"^source v of data\.mixture holds out a file that is"):
        validation_sets(data, open_training_data(data, 8, 0, 256))


def test_names_say_splits_only_as_words(tmp_path: Path) -> None:
    def splits(*names: str) -> dict[str, list[str]]:
        files = sort_into_splits([tmp_path / name for name in names])
        return {split: [file.name for file in members] for split, members in files.items()}

    train, validation = SPLITS
    assert splits("constrained.bin", "interval.bin") == {train: ["constrained.bin", "interval.bin"]}
    assert splits("Train-1.bin", "valid_1.bin", "test.bin") == {
        train: ["Train-1.bin"],
        validation: ["valid_1.bin"],
    }
    assert splits("a_val_0.bin") == {validation: ["a_val_0.bin"]}
    with pytest.raises(DataError, match=r"some names say train or val and 1 do not"):
        splits("x_train.bin", "x_val.bin", "y.bin")
    with pytest.raises(DataError, match=r"the name says test and val, .*test_val_0\.bin\): rename"):
        splits("train_train_0.bin", "test_val_0.bin")


@pytest.mark.parametrize("position", [0, 500, 1000])
@pytest.mark.parametrize("kind", ["llmc", "megatron", "datatrove"])
def test_other_ids_of_the_same_length_have_another_identity(
    tmp_path: Path, kind: str, position: int
) -> None:
    def write(ids: np.ndarray) -> Path:
        if kind == "llmc":
            return write_llmc(tmp_path / "tokens.bin", ids)
        if kind == "megatron":
            return write_megatron(tmp_path / "tokens", [ids])
        return write_datatrove(tmp_path / "tokens.ds", [ids])

    before = TokenSplit(write(IDS), "train", 8, vocab_size=256).origin
    other = IDS.copy()
    other[position] += 1
    assert TokenSplit(write(other), "train", 8, vocab_size=256).origin != before


def test_identity_of_a_large_file_is_of_blocks_up_to_its_end(tmp_path: Path) -> None:
    """Five blocks of 16 KiB, evenly spaced, of a file of 1 MiB."""
    ids = np.arange(1 << 19) % 250
    path = write_llmc(tmp_path / "tokens.bin", ids)
    before = TokenSplit(path, "train", 8, vocab_size=256).origin
    block, last = 1 << 14, path.stat().st_size - (1 << 14)
    for start in (0, last // 4, last // 2, 3 * last // 4, last):
        other = ids.copy()
        other[(start + block // 2 - 1024) // 2] += 1
        write_llmc(path, other)
        assert TokenSplit(path, "train", 8, vocab_size=256).origin != before


def test_a_link_to_nothing_is_not_left_out(tmp_path: Path) -> None:
    directory = fineweb(tmp_path / "fw")
    shard = directory / "fineweb_train_000002.bin"
    shard.unlink()
    shard.symlink_to(tmp_path / "gone.bin")
    for path in (directory, directory / "*train*.bin"):
        with pytest.raises(DataError, match=r"link to nothing.*fineweb_train_000002\.bin"):
            all_tokens(path)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / os.fsdecode(b"caf\xe9.bin"), IDS)
    assert len(TokenSplit(path, "train", 8, vocab_size=256).origin) == 64


def test_identity_is_of_names_sizes_and_excerpts(tmp_path: Path) -> None:
    path = write_llmc(tmp_path / "tokens.bin", IDS)
    before = TokenSplit(path, "train", 8, vocab_size=256).origin
    moved = fineweb(tmp_path / "fw").rename(tmp_path / "moved")
    write_llmc(moved / "tokens.bin", IDS)
    assert TokenSplit(moved / "tokens.bin", "train", 8, vocab_size=256).origin == before
    write_llmc(path, IDS[:-1])
    assert TokenSplit(path, "train", 8, vocab_size=256).origin != before


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _put(path: Path, offset: int, raw: bytes) -> None:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(raw)] = raw
    path.write_bytes(content)


LLMC_DAMAGES = {
    r"truncated: 3025 bytes where 1001 tokens need 3026": _cut,
    r"foreign bytes after the tokens": lambda p: p.write_bytes(p.read_bytes() + b"\0\0"),
    r"begins with 7, llm\.c's with 20240520": lambda p: _put(p, 0, struct.pack("<i", 7)),
    r"multiple-choice questions": lambda p: _put(p, 0, struct.pack("<i", 20240522)),
    r"version 2 of llm\.c's format": lambda p: _put(p, 4, struct.pack("<i", 2)),
    r"truncated: 5 bytes, less than a header": lambda p: p.write_bytes(b"\0" * 5),
    r"token id 999 does not fit a vocabulary of 256.*data\.tokenizer": lambda p: _put(
        p, 2000, struct.pack("<H", 999)
    ),
    r"a shard of a prepared data set|not a prepared data set": lambda p: _put(p, 0, b"ARCHTOK1"),
}


@pytest.mark.parametrize("message", LLMC_DAMAGES)
def test_damaged_llmc_file(tmp_path: Path, message: str) -> None:
    path = write_llmc(tmp_path / "a.bin", IDS)
    LLMC_DAMAGES[message](path)
    with pytest.raises(DataError, match=message) as caught:
        all_tokens(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    if "does not fit" not in message:  # without a tokenizer any id may be right
        assert len(verify(path)) == 1


MEGATRON_DAMAGES = {
    (".bin", r"truncated: 1399 bytes of ids are no multiple of 2"): _cut,
    (".bin", r"do not belong together: its last sequence ends at byte 1400 of 1398"): (
        lambda p: p.write_bytes(p.read_bytes()[:-2])
    ),
    (".idx", r"truncated: 121 bytes where 4 sequences need 122"): _cut,
    (".idx", r"does not begin with MMIDIDX"): lambda p: _put(p, 0, b"X"),
    (".idx", r"Megatron's old kind"): lambda p: _put(p, 0, b"TNTIDX\0\0\0"),
    (".idx", r"version 2, but"): lambda p: _put(p, 9, b"\2"),
    (".idx", r"its ids are float32"): lambda p: _put(p, 17, b"\7"),
    (".idx", r"its ids are of unknown type 99"): lambda p: _put(p, 17, b"\x63"),
    (".idx", r"sequences have modes"): lambda p: p.write_bytes(p.read_bytes() + b"\0" * 4),
    (".idx", r"sequence 2 is not where the one before it ends"): (
        lambda p: _put(p, 34 + 16 + 16, b"\1")
    ),
    (".idx", r"its documents are not made of its 4 sequences"): (
        lambda p: _put(p, 34 + 48 + 8, b"\7")
    ),
}


@pytest.mark.parametrize(("suffix", "message"), MEGATRON_DAMAGES)
def test_damaged_megatron_files(tmp_path: Path, suffix: str, message: str) -> None:
    path = write_megatron(tmp_path / "a", DOCUMENTS)
    MEGATRON_DAMAGES[suffix, message](path.with_suffix(suffix))
    with pytest.raises(DataError, match=message) as caught:
        all_tokens(path)
    assert str(tmp_path / "a.") in str(caught.value)
    assert len(verify(path)) == 1


DATATROVE_DAMAGES = {
    (".ds", r"truncated: 1399 bytes of ids are no multiple of 2"): _cut,
    (".ds", r"truncated: 1398 bytes where 700 tokens need 1400"): (
        lambda p: p.write_bytes(p.read_bytes()[:-2])
    ),
    (".ds.index", r"truncated: 31 bytes are no multiple of 8"): _cut,
    (".ds.index", r"ends at token 300 of 700"): lambda p: p.write_bytes(p.read_bytes()[:-8]),
    (".ds.index", r"a document ends before the one before it"): lambda p: _put(p, 0, b"\xff"),
    (".ds.metadata", r"ids of 3 bytes"): lambda p: p.write_text("gpt2|3\n700"),
    (".ds.metadata", r"foreign metadata"): lambda p: p.write_text("gpt2"),
    (".ds.loss", r"masks the loss of some tokens"): lambda p: p.write_bytes(b"\1" * 700),
}


@pytest.mark.parametrize(("suffix", "message"), DATATROVE_DAMAGES)
def test_damaged_datatrove_files(tmp_path: Path, suffix: str, message: str) -> None:
    path = write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    DATATROVE_DAMAGES[suffix, message](tmp_path / f"a{suffix}")
    with pytest.raises(DataError, match=message):
        all_tokens(path)
    assert len(verify(path)) == 1


def test_size_of_an_id_is_not_guessed(tmp_path: Path) -> None:
    path = write_datatrove(tmp_path / "a.ds", DOCUMENTS)
    for suffix in (".ds.index", ".ds.metadata"):
        path.with_suffix(suffix).unlink()
    with pytest.raises(DataError, match=r"2 or 4 bytes per id"):
        all_tokens(path)


def test_mixed_kinds_and_dtypes_are_refused(tmp_path: Path) -> None:
    write_llmc(tmp_path / "a.bin", IDS)
    write_megatron(tmp_path / "b", DOCUMENTS)
    with pytest.raises(DataError, match=r"the kind of a\.bin is llm\.c, that of b\.bin Megatron"):
        all_tokens(tmp_path)
    assert len(verify(tmp_path)) == 1
    write_megatron(tmp_path / "a", DOCUMENTS, "i4")
    with pytest.raises(DataError, match=r"the dtype of a\.bin is int32, that of b\.bin uint16"):
        all_tokens(tmp_path)


def test_an_index_without_ids(tmp_path: Path) -> None:
    write_megatron(tmp_path / "a", DOCUMENTS).unlink()
    with pytest.raises(DataError, match=r"index without the ids: there is no a\.bin"):
        all_tokens(tmp_path)


def test_a_path_without_token_files_is_no_data_set(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    assert find_files(tmp_path) == []
    with pytest.raises(DataError, match=r"not a prepared data set"):
        TokenSplit(tmp_path, "train", 8)
    with pytest.raises(DataError, match=r"no data set"):
        TokenSplit(tmp_path / "*.bin", "train", 8)
    with pytest.raises(DataError, match=r"cannot read the data set: File name too long"):
        TokenSplit(tmp_path / ("x" * 300), "train", 8)


def test_negative_ids_are_refused_in_every_batch(tmp_path: Path) -> None:
    ids = IDS.copy()
    ids[5] = -3
    split = TokenSplit(write_megatron(tmp_path / "a", [ids], "i8"), "train", 8, vocab_size=256)
    with pytest.raises(DataError, match=r"token id -3 in split 'train' is outside"):
        read_windows(split, np.array([0]))
    read_windows(split, np.array([1]))
    with pytest.raises(DataError, match=r"token id -3 is negative"):
        split.check(256)


def test_inspect_says_what_there_is(tmp_path: Path, tokenizer: str) -> None:
    path = write_datatrove(tmp_path / "train.ds", DOCUMENTS)
    write_datatrove(tmp_path / "val.ds", [IDS[700:]])
    summary = inspect(tmp_path)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["train"] == {"tokens": 700, "documents": 4, "shards": 1}
    assert (summary["format"], summary["dtype"], summary["tokenizer"]) == (
        "datatrove",
        "uint16",
        "gpt2",
    )
    text = render(summary)
    assert "validation" in text
    assert " ".join(map(str, IDS[:5])) in text
    # Ids of the trained tokenizer's bytes and pieces come out as text.
    assert inspect(path, tokenizer)["excerpt"] != summary["excerpt"]
    assert verify(tmp_path) == []


def test_inspect_and_verify_refuse_another_tokenizer(
    tmp_path: Path, tokenizer: str, dataset: Path
) -> None:
    files = write_megatron(tmp_path / "a", [IDS + 270], "i4")
    with pytest.raises(DataError, match=r"token id \d+ does not fit a vocabulary of 270"):
        inspect(files, tokenizer)
    for examine in (inspect, verify):
        with pytest.raises(DataError, match=r"is not the one that the data set was made with"):
            examine(dataset, tokenizer)
    assert verify(files) == []
    write_megatron(tmp_path / "a", [np.array([1, -5])], "i4")
    assert [line.partition(" (")[0] for line in verify(files)] == ["token id -5 is negative"]
    (tmp_path / "b.bin").write_bytes(np.array([20240520, 1, -5, *[0] * 253], "<i4").tobytes())
    with pytest.raises(DataError, match=r"^damaged: it announces -5 tokens"):
        inspect(tmp_path / "b.bin")
