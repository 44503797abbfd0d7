"""A long document encoded in pieces has the tokens of the whole, for tokenizers of every make; and
no text ends a document."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import archscale.data.tokenizer_base as base
from archscale.data.tokenizer import Tokenizer, load_tokenizer
from archscale.errors import DataError
from tests.data.made_tokenizers import (
    EOS,
    IDENTITY,
    MAKES,
    TEXTS,
    gpt2,
    gpt2_prefixed,
    llama2_json,
    llama3,
    metaspace,
    sentencepiece,
    trained_here,
)

WHOLE = {"nfkc_unigram"}  # cannot be cut


@pytest.fixture(scope="module", params=list(MAKES))
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    made = MAKES[request.param](tmp_path_factory.mktemp(request.param))
    made.name = request.param  # type: ignore
    return made


WORDS = st.sampled_from(
    [
        *("def", " self", ".", "\n", "\n\n", "    ", " ", "  ", "\t", "'s", "123", "x", "(", ") :"),
        *("é", "e\u0301", "漢字", "。", "\u2581", "\u0303", "🎉", "\r\n", "ﬁ", "<|", EOS, "Σ"),
    ]
)


@given(words=st.lists(WORDS, min_size=20, max_size=120), size=st.integers(1, 30))
@settings(max_examples=60, deadline=None)
def test_pieces_give_the_tokens_of_the_whole(
    tokenizer: Tokenizer, words: list[str], size: int
) -> None:
    text = "".join(words)
    whole = tokenizer.encode_batch([text])[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "PIECE_CHARS", size)
        pieced = tokenizer.encode_document(text)
    assert pieced.dtype == np.uint32
    assert pieced.tolist() == whole
    assert tokenizer.eos_id not in pieced


def test_ordinary_text_is_cut(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else nothing would show that pieces are made at all."""
    text = TEXTS[0][:20_000]
    monkeypatch.setattr(base, "PIECE_CHARS", 1_000)
    longest = max(stop - start for start, stop in tokenizer._pieces(text))
    assert (longest < 1_500) == (tokenizer.name not in WHOLE)  # type: ignore
    assert tokenizer.encode_document(text).tolist() == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("make", [trained_here, gpt2])
def test_text_without_a_border_stays_whole(
    make: Callable[[Path], Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make(tmp_path)
    text = "=" * 5_000  # where tokens join depends on where the run of them began
    monkeypatch.setattr(base, "PIECE_CHARS", 101)
    assert tokenizer.encode_document(text).tolist() == tokenizer.encode_batch([text])[0]


@pytest.mark.parametrize("eos", ["<|im_end|>", "self", "ab"])
@pytest.mark.parametrize("options", [IDENTITY, {**IDENTITY, "add_dummy_prefix": False}, {}])
def test_no_text_ends_a_document_of_sentencepiece(tmp_path: Path, eos: str, options: dict) -> None:
    (tmp_path / "x.model").write_bytes(sentencepiece(user_defined_symbols=[eos], **options))
    tokenizer = load_tokenizer(tmp_path / "x.model", eos=eos)
    assert tokenizer.token_bytes()[tokenizer.eos_id] == 0
    for text in (eos, f"x{eos}", f"{eos * 3} b {eos}", f"ab a{eos}b self"):
        for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
            assert tokenizer.eos_id not in ids
            assert tokenizer.decode([*ids, tokenizer.eos_id]) == text


def test_no_text_ends_a_document_of_hugging_face(tmp_path: Path) -> None:
    for number, make in enumerate((gpt2, gpt2_prefixed, llama3, metaspace, llama2_json)):
        (tmp_path / str(number)).mkdir()
        tokenizer = make(tmp_path / str(number))
        assert tokenizer.eos_text == EOS
        assert tokenizer.token_bytes()[tokenizer.eos_id] == 0
        for text in (EOS, f"x{EOS}", f"{EOS * 3} b {EOS}", f"{EOS[:4]}{EOS}{EOS[4:]}"):
            for ids in (tokenizer.encode(text), *tokenizer.encode_batch([text])):
                assert tokenizer.eos_id not in ids
                assert tokenizer.decode([*ids, tokenizer.eos_id]).lstrip() == text


def test_a_single_character_cannot_be_spelled_otherwise(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(sentencepiece(user_defined_symbols=["@"], **IDENTITY))
    tokenizer = load_tokenizer(tmp_path / "x.model", eos="@")
    assert tokenizer.decode(tokenizer.encode("plain")) == "plain"
    with pytest.raises(DataError, match=r"has the text '@'.*tokenizer\.eos"):
        tokenizer.encode_document("me@here")


def test_a_dataset_has_recorded_its_eos(dataset: Path) -> None:
    content = sentencepiece(control_symbols=["<|im_end|>"], **IDENTITY)
    (dataset / "tokenizer/tokenizer.model").write_bytes(content)
    manifest = json.loads((dataset / "dataset.json").read_text())
    own = load_tokenizer(dataset / "tokenizer/tokenizer.model", eos="<|im_end|>")
    manifest["tokenizer"] |= {"fingerprint": own.fingerprint, "eos_id": own.eos_id}
    (dataset / "dataset.json").write_text(json.dumps(manifest))
    assert load_tokenizer(dataset).eos_text == "<|im_end|>"
    assert load_tokenizer(dataset, eos="</s>").eos_text == "</s>"


def test_eos_is_used_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.model"
    path.write_bytes(sentencepiece(eos_id=-1, control_symbols=["<|im_end|>"]))
    with pytest.raises(DataError, match=r"no end-of-document token .*tokenizer\.eos"):
        load_tokenizer(path)
    with pytest.raises(DataError, match=r"'nonsense' is not a piece .*tokenizer\.eos"):
        load_tokenizer(path, eos="nonsense")
    tokenizer = load_tokenizer(path, eos="<|im_end|>")
    assert tokenizer.eos_text == "<|im_end|>"
    assert tokenizer.eos_id not in tokenizer.encode("<|im_end|>")
