"""Tokenizers of many makes, trained in a moment, as users bring them from elsewhere."""

import io
import json
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from archscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece

TEXTS = [
    (Path(sysconfig.get_path("stdlib")) / name).read_text(encoding="utf-8")
    for name in ("argparse.py", "heapq.py", "textwrap.py")
]
EOS = "<|endoftext|>"
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
# The published pre-tokenizer of Llama 3.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def sentencepiece(**options) -> bytes:
    """A model file, by default as SentencePiece itself trains one, with bytes."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    lines = [line for text in TEXTS for line in text.splitlines() if line]
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 700} | options
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=written, minloglevel=2, **options
    )
    return written.getvalue()


def sentencepiece_file(folder: Path, **options) -> Tokenizer:
    (folder / "x.model").write_bytes(sentencepiece(**options))
    return load_tokenizer(folder / "x.model")


def trained_here(folder: Path) -> Tokenizer:
    return train_sentencepiece(TEXTS, 700, folder)


def llama2_model(folder: Path) -> Tokenizer:
    return sentencepiece_file(folder, **IDENTITY)


def without_bytes(folder: Path) -> Tokenizer:
    return sentencepiece_file(folder, **IDENTITY, byte_fallback=False)


def nfkc_unigram(folder: Path) -> Tokenizer:
    return sentencepiece_file(folder, model_type="unigram")


def hugging_face(folder: Path, build: Callable) -> Tokenizer:
    """Trained and saved with the end of a document as an added token that is not special.

    Args:
        build: a function of the `tokenizers` package that gives an untrained tokenizer.
    """
    package = pytest.importorskip("tokenizers")
    backend = build(package)
    model = json.loads(backend.to_str())["model"]
    special = ["<unk>"]
    if model.get("byte_fallback"):
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    options = {"vocab_size": 900, "special_tokens": special, "show_progress": False}
    if model["type"] == "WordPiece":
        trainer = package.trainers.WordPieceTrainer(**options)
    else:
        alphabet = [] if model["byte_fallback"] else package.pre_tokenizers.ByteLevel.alphabet()
        trainer = package.trainers.BpeTrainer(**options, initial_alphabet=alphabet)
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens([package.AddedToken(EOS, special=False, normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json")


def gpt2(folder: Path, prefix: bool = False, normalizer: str | None = None) -> Tokenizer:
    def build(package):
        backend = package.Tokenizer(package.models.BPE())
        backend.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        backend.decoder = package.decoders.ByteLevel()
        if normalizer:
            backend.normalizer = getattr(package.normalizers, normalizer)()
        return backend

    return hugging_face(folder, build)


def gpt2_prefixed(folder: Path) -> Tokenizer:
    return gpt2(folder, prefix=True)


def gpt2_lower(folder: Path) -> Tokenizer:
    return gpt2(folder, normalizer="Lowercase")


def gpt2_joined(folder: Path) -> Tokenizer:
    """Every line break and tab comes back as a space."""
    content = gpt2(folder).content
    backend = pytest.importorskip("tokenizers")
    tokenizer = backend.Tokenizer.from_str(content.decode())
    tokenizer.normalizer = backend.normalizers.Replace(backend.Regex(r"[\n\t]"), " ")
    (folder / "joined.json").write_text(tokenizer.to_str())
    return load_tokenizer(folder / "joined.json")


def llama3(folder: Path) -> Tokenizer:
    """Under NFC, as Qwen."""

    def build(package):
        split = package.pre_tokenizers.Split(package.Regex(LLAMA3), "isolated")
        to_bytes = package.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend = package.Tokenizer(package.models.BPE())
        backend.normalizer = package.normalizers.NFC()
        backend.pre_tokenizer = package.pre_tokenizers.Sequence([split, to_bytes])
        backend.decoder = package.decoders.ByteLevel()
        return backend

    return hugging_face(folder, build)


def metaspace(folder: Path) -> Tokenizer:
    def build(package):
        backend = package.Tokenizer(package.models.BPE(byte_fallback=True, unk_token="<unk>"))
        backend.pre_tokenizer = package.pre_tokenizers.Metaspace(prepend_scheme="first")
        backend.decoder = package.decoders.Sequence(
            [
                package.decoders.ByteFallback(),
                package.decoders.Metaspace(prepend_scheme="first"),
                package.decoders.Fuse(),
            ]
        )
        return backend

    return hugging_face(folder, build)


def llama2_json(folder: Path) -> Tokenizer:
    """Without a pre-tokenizer, as Llama 2 and Mistral: trained with one, then taken out."""
    metaspace(folder)
    path = folder / "tokenizer.json"
    structure = json.loads(path.read_text())
    structure["pre_tokenizer"] = None
    structure["normalizer"] = {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "\u2581"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        ],
    }
    structure["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    path.write_text(json.dumps(structure))
    return load_tokenizer(path)


def wordpiece(folder: Path) -> Tokenizer:
    def build(package):
        backend = package.Tokenizer(package.models.WordPiece(unk_token="<unk>"))
        backend.normalizer = package.normalizers.BertNormalizer(lowercase=True)
        backend.pre_tokenizer = package.pre_tokenizers.BertPreTokenizer()
        backend.decoder = package.decoders.WordPiece()
        return backend

    return hugging_face(folder, build)


MAKES: dict[str, Callable[[Path], Tokenizer]] = {
    make.__name__: make
    for make in (
        trained_here,
        llama2_model,
        without_bytes,
        nfkc_unigram,
        gpt2,
        gpt2_prefixed,
        gpt2_lower,
        llama3,
        metaspace,
        llama2_json,
        wordpiece,
    )
}
