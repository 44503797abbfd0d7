"""Tokenizers lose nothing, are the same for the same text, and never read special tokens out of
text."""

import json
import random
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import archscale.data.train_tokenizer as module
from archscale.data.preparing.sample import TrainingSample
from archscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from archscale.errors import DataError

STDLIB = Path(sysconfig.get_path("stdlib"))
TEXTS = [
    (STDLIB / name).read_text(encoding="utf-8")
    for name in ("argparse.py", "heapq.py", "textwrap.py")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(sampled(TEXTS), 700, tmp_path_factory.mktemp("tokenizer"))


def sampled(texts: Iterable[str]) -> list[str]:
    sample = TrainingSample()
    for text in texts:
        sample.add(text)
    return sample.texts()


# Letters of code, whitespace of every kind, and what SentencePiece itself uses for spaces and
# unknowns.
CODE = st.text(
    st.sampled_from("def x(=):\n\r\t   #\"'\\\u2581\u2585\u2047\u00a0\u3000\ufeff\u200b\x00é漢🎉")
)
ANY = st.text(st.characters(exclude_categories=["Cs"]))


@given(text=CODE | ANY)
@example("\tif x:\n\t\tpass\n\n\n    y  =  1\r\n")
@example("   leading, trailing   ")
@example("a\u2581b \u2581\u2581 c")
@example("<eos><unk><0x41></s>")
@example("e\u0301 ﬁ Å")  # combining characters and compatibility forms stay as they are
@settings(max_examples=300, deadline=None)
def test_round_trip(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.eos_id not in ids
    assert trained.token_bytes()[ids].sum() == len(text.encode())


_RANDOM = random.Random(0)
CORPORA = {
    "english": ["How to open a window in the garden. " * 9 + str(i) for i in range(30)],
    "tabs": ["\t\tif x[0] == 9:\r\n" * 9 + str(i) for i in range(30)],
    "han": ["".join(chr(0x4E00 + int(_RANDOM.expovariate(1 / 40))) for _ in range(900)) + "。"] * 9,
    "one blank": ["window_garden_" * 9_000, "a b"],  # rarer than character coverage
    "bytes": ["".join(map(chr, range(256))) * 4 + "\u2581\0 ⁇<eos>\ufffe" * i for i in range(9)],
}


@pytest.fixture(scope="module", params=list(CORPORA))
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Trained on text that has little in common with what is encoded."""
    texts = CORPORA[request.param]
    vocab = 260 + len(set("".join(texts)) | {"_"})
    return train_sentencepiece(texts, vocab, tmp_path_factory.mktemp("tokenizer"))


@given(text=CODE | ANY)
@example("see you")
@example(" ")
@example(" \u2581 " * 9)
@example("漢 字\tx \0")
@settings(max_examples=60, deadline=None)
def test_round_trip_whatever_the_corpus(foreign: Tokenizer, text: str) -> None:
    ids = foreign.encode(text)
    assert foreign.decode(ids) == text
    assert foreign.eos_id not in ids
    assert foreign.token_bytes()[ids].sum() == len(text.encode())


def test_no_word_is_too_long_for_training(tmp_path: Path) -> None:
    """SentencePiece 0.2.0 counts the characters of a word in 16 bits, and ends the process."""
    texts = ["ab3_" * 40_000, "x " * 1_200_000 + "y\nz", "a\n", "=" * 65_000]
    sentences = list(module._sentences(texts))
    assert "".join(sentences) == "".join(texts)
    assert max(len(word) for sentence in sentences for word in sentence.split(" ")) < 2**16
    assert max(len(sentence.encode()) for sentence in sentences) <= 4_000_000
    tokenizer = train_sentencepiece([*texts, *TEXTS], 400, tmp_path)
    assert tokenizer.decode(tokenizer.encode(texts[0])) == texts[0]


def test_the_end_of_a_document_has_any_name(tmp_path: Path) -> None:
    tokenizer = train_sentencepiece(TEXTS, 400, tmp_path, eos="<|endoftext|>")
    assert tokenizer.eos_text == "<|endoftext|>"
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")


@pytest.mark.parametrize("name", ["tokenize.py", "inspect.py", "_pydecimal.py"])
def test_round_trip_of_source_files(trained: Tokenizer, name: str) -> None:
    text = (STDLIB / name).read_bytes().decode()
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert len(text) / len(ids) > 2  # it does compress what it was not trained on


def test_batches_equal_single_texts(trained: Tokenizer) -> None:
    texts = ["", "x", "a\u2581b", TEXTS[1][:5000]]
    assert trained.encode_batch(texts) == [trained.encode(text) for text in texts]


def test_decode_of_broken_bytes_and_special_tokens(trained: Tokenizer) -> None:
    assert trained.decode([*trained.encode("a"), trained.eos_id, *trained.encode("b")]) == "ab"
    assert trained.decode(trained.encode("é漢"[:1])[:1]) in ("\ufffd", "é")


def test_same_text_same_file_in_any_order(trained: Tokenizer, tmp_path: Path) -> None:
    again = train_sentencepiece(sampled(reversed(TEXTS)), 700, tmp_path)
    assert again.content == trained.content
    assert (tmp_path / "tokenizer.model").read_bytes() == trained.content
    assert load_tokenizer(tmp_path / "tokenizer.model").fingerprint == trained.fingerprint
    assert again.vocab_size == 700


@pytest.mark.parametrize(
    ("texts", "vocab"),
    [(["hello world"], 4096), (["hello world"] * 9, 260), ([""], 300), ([], 300)],
)
def test_untrainable_text_is_one_line(tmp_path: Path, texts: list[str], vocab: int) -> None:
    with pytest.raises(DataError, match=r"^[^\n]*tokenizer\.train[^\n]*$"):
        train_sentencepiece(texts, vocab, tmp_path)


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"not a SentencePiece model .*x\.model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(DataError, match=r"cannot read the tokenizer.*y\.model"):
        load_tokenizer(tmp_path / "y.model")
    with pytest.raises(DataError, match=r"no tokenizer there .*z"):
        load_tokenizer(tmp_path / "z")


@pytest.mark.parametrize("package", ["transformers", "tokenizers"])
def test_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    name = "gpt2"
    if package == "tokenizers":
        name = str(tmp_path / "tokenizer.json")
        Path(name).write_text("{}")
    with pytest.raises(
        DataError, match=rf"'{package}' is not installed .*pip install archscale\[hf\]"
    ):
        load_tokenizer(name, kind="huggingface")


@pytest.fixture
def hugging_face(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_hugging_face_tokenizer(hugging_face: Path) -> None:
    tokenizer = load_tokenizer(hugging_face)
    text = "def f():\n\treturn 'é漢 <|endoftext|>  '\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.kind, tokenizer.eos_id) == ("huggingface", 0)
    assert tokenizer.eos_id not in ids
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes()[0] == 0
    with pytest.raises(DataError, match=r"none of </end> .*tokenizer\.eos"):
        load_tokenizer(hugging_face, eos="</end>")


@pytest.mark.parametrize("config", [None, {"tokenizer_class": "PreTrainedTokenizerFast"}])
def test_hugging_face_directory(hugging_face: Path, config: dict | None) -> None:
    """With a configuration, as `transformers` reads it; without one, the file alone."""
    if config:
        pytest.importorskip("transformers")
        path = hugging_face.parent / "tokenizer_config.json"
        path.write_text(json.dumps(config | {"eos_token": "<|endoftext|>"}))
    text = "    x = 1\n"
    tokenizer = load_tokenizer(hugging_face.parent)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_token_bytes_type(trained: Tokenizer) -> None:
    table = trained.token_bytes()
    assert (table.dtype, table.shape) == (np.int32, (700,))
    assert table[trained.eos_id] == 0
