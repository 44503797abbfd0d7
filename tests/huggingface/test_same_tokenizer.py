"""Whether the tokenizer beside weights gives the ids of the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archscale.data.tokenizer import Tokenizer, load_tokenizer
from archscale.errors import DataError
from archscale.export.fast_tokenizer import tokenizer_files
from archscale.huggingface.same_tokenizer import Unknown, other_tokenizer
from tests.train.tiny import tiny_data

pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tiny_data(tmp_path_factory.mktemp("data")))


@pytest.fixture
def beside(data: Tokenizer, tmp_path: Path) -> Path:
    """A directory with the files that an export has for it."""
    for name, content in tokenizer_files(data, 16, True, "here").files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def unknown() -> Tokenizer:
    raise DataError("the data do not say", "data.train", "give data.tokenizer")


def test_the_same_file_is_the_same(data, beside):
    assert other_tokenizer(beside, {data.fingerprint}, unknown) is None


def test_equal_ids_are_the_same(data, beside):
    (beside / "tokenizer.model").unlink()
    assert other_tokenizer(beside, {data.fingerprint}, lambda: data) is None


def test_two_ids_that_are_exchanged_are_seen(data, beside):
    (beside / "tokenizer.model").unlink()
    path = beside / "tokenizer.json"
    structure = json.loads(path.read_text())
    vocabulary = structure["model"]["vocab"]
    first, second = [piece for piece in vocabulary if len(piece) > 2 and piece[0] != "<"][:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(structure))
    problem = other_tokenizer(beside, {data.fingerprint}, lambda: data)
    assert problem is not None
    assert repr(first) in problem or repr(second) in problem


def test_what_cannot_be_known_is_neither(data, beside):
    for tokenizer, gone in ((unknown, "tokenizer.model"), (lambda: data, "tokenizer.json")):
        (beside / gone).unlink()
        with pytest.raises(Unknown):
            other_tokenizer(beside, {data.fingerprint}, tokenizer)
