"""A tokenizer goes out with equal ids, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from archscale.data.huggingface_tokenizer import HuggingFaceTokenizer
from archscale.export.fast_tokenizer import HARD_TEXTS, TokenizerFiles, merges, tokenizer_files
from tests.data import made_tokenizers
from tests.data.made_tokenizers import TEXTS, sentencepiece_file

tokenizers = pytest.importorskip("tokenizers")

CONVERTED = ["trained_here", "llama2_model", "without_bytes"]
COPIED = ["gpt2", "llama2_json", "metaspace", "wordpiece"]


def backend_of(files: TokenizerFiles):
    assert not files.problem
    backend = tokenizers.Tokenizer.from_str(files.files["tokenizer.json"].decode())
    backend.encode_special_tokens = True  # as `split_special_tokens` sets it
    return backend


@pytest.mark.parametrize(
    "name",
    ["trained_here", *(pytest.param(n, marks=pytest.mark.slow) for n in CONVERTED[1:] + COPIED)],
)
def test_ids_are_equal_and_start_with_the_end_of_a_document(name, tmp_path):
    tokenizer = getattr(made_tokenizers, name)(tmp_path)
    files = tokenizer_files(tokenizer, 128, True, "here")
    backend = backend_of(files)
    for text in [*HARD_TEXTS, *TEXTS]:
        first, *ids = backend.encode(text).ids
        assert first == tokenizer.eos_id
        # Ours cuts a text inside a name of that token; it may be cut elsewhere here.
        named = name in COPIED and tokenizer.eos_text in text
        assert tokenizer.eos_id not in ids if named else ids == tokenizer.encode(text), text
    assert files.bos_id == files.eos_id == tokenizer.eos_id
    assert ("tokenizer.model" in files.files) == (name in CONVERTED)
    without = backend_of(tokenizer_files(tokenizer, 128, False, "here"))
    assert without.encode("a b").ids == tokenizer.encode("a b")


def ends_with_line_breaks(folder: Path, eos: str = "\u010a") -> HuggingFaceTokenizer:
    """A tokenizer of bytes whose end of a document is an ordinary piece of its vocabulary."""
    content = made_tokenizers.gpt2(folder).content
    return HuggingFaceTokenizer(content, "here", eos=eos)


def test_an_ordinary_piece_that_ends_documents_keeps_its_id(tmp_path):
    tokenizer = ends_with_line_breaks(tmp_path)
    assert tokenizer.eos_text == "\n"
    files = tokenizer_files(tokenizer, 128, True, "here")
    backend = backend_of(files)
    settings = json.loads(files.files["tokenizer_config.json"])
    assert settings["eos_token"] == settings["bos_token"] == "\u010a"
    assert backend.token_to_id("\u010a") == tokenizer.eos_id
    text = "def \u010a a line, \u00e9 of 3"  # its name is text
    assert backend.encode(text).ids == [tokenizer.eos_id, *tokenizer.encode(text)]
    assert backend.decode(backend.encode(text).ids) == text
    assert backend.get_vocab_size() == tokenizer.vocab_size


@pytest.mark.slow
def test_transformers_gives_an_ordinary_end_its_own_id(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = ends_with_line_breaks(tmp_path)
    (tmp_path / "out").mkdir()
    for name, content in tokenizer_files(tokenizer, 128, True, "here").files.items():
        (tmp_path / "out" / name).write_bytes(content)
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert fast.eos_token_id == fast.bos_token_id == tokenizer.eos_id
    assert len(fast) == tokenizer.vocab_size
    assert fast("def f").input_ids == [tokenizer.eos_id, *tokenizer.encode("def f")]


def test_a_copy_with_other_ids_does_not_go_out(tmp_path, monkeypatch):
    tokenizer = made_tokenizers.gpt2(tmp_path)
    monkeypatch.setattr(tokenizer, "_encode_texts", lambda texts: [[5] for _ in texts])
    files = tokenizer_files(tokenizer, 128, True, "here")
    assert files.warning.startswith("no tokenizer goes out: ids differ for ")
    assert not files.files


def test_text_comes_back(tmp_path):
    tokenizer = made_tokenizers.trained_here(tmp_path)
    backend = backend_of(tokenizer_files(tokenizer, 128, False, "here"))
    for text in [*HARD_TEXTS, *TEXTS]:
        assert backend.decode(tokenizer.encode(text)) == text


def test_a_token_that_no_text_has_fills_batches(tmp_path):
    files = tokenizer_files(made_tokenizers.trained_here(tmp_path), 128, True, "here")
    assert files.pad_id == 0 != files.eos_id
    assert json.loads(files.files["tokenizer_config.json"])["pad_token"] == "<unk>"


def test_one_that_does_more_than_join_goes_out_as_it_is(tmp_path):
    files = tokenizer_files(made_tokenizers.nfkc_unigram(tmp_path), 128, True, "here")
    assert files.problem == "the model does more than join pieces of its vocabulary"
    assert list(files.files) == ["tokenizer.model"]
    assert files.warning.startswith("the tokenizer goes out as a SentencePiece model only: the ")


def test_pieces_that_a_user_has_defined_are_cut_out_of_a_text(tmp_path):
    options = {**made_tokenizers.IDENTITY, "user_defined_symbols": ["hed", "<tool>"]}
    tokenizer = sentencepiece_file(tmp_path, **options)
    # The space before a text would stand before every part of it.
    assert "ids differ" in tokenizer_files(tokenizer, 128, False, "here").problem
    tokenizer = sentencepiece_file(tmp_path, **options, add_dummy_prefix=False)
    backend = backend_of(tokenizer_files(tokenizer, 128, False, "here"))
    for text in ("the hedge, thed hehed", "a <tool>hedhed</tool>", "<tool> ", *HARD_TEXTS):
        assert backend.encode(text).ids == tokenizer.encode(text), text


def test_a_difference_is_found(tmp_path, monkeypatch):
    tokenizer = made_tokenizers.trained_here(tmp_path)
    reverse = lambda scores: list(merges(scores))[::-1]  # noqa: E731
    monkeypatch.setattr("archscale.export.fast_tokenizer.merges", reverse)
    files = tokenizer_files(tokenizer, 128, True, "here")
    assert files.problem.startswith("ids differ for ")
    assert list(files.files) == ["tokenizer.model"]


def test_neighbours_join_by_the_score_of_what_they_make():
    scores = {"a": -9.0, "b": -9.0, "ab": -2.0, "ba": -1.0, "aba": -3.0}
    assert list(merges(scores)) == [("b", "a"), ("a", "b"), ("a", "ba"), ("ab", "a")]
