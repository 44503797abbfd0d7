"""Small datasets, made without a tokenizer where none is needed."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from archscale.data.shards import (
    MANIFEST,
    TOKEN_BYTES,
    Manifest,
    ShardEntry,
    ShardWriter,
    SplitEntry,
    TokenizerEntry,
    read_header,
)
from archscale.files import write_atomically

FINGERPRINT = hashlib.sha256(b"a tokenizer").hexdigest()
VOCAB = 500


def write_dataset(
    path: Path, train: list[np.ndarray], validation: list[np.ndarray], vocab: int = VOCAB
) -> Path:
    """A dataset whose shards hold exactly these arrays; its tokenizer file is not a tokenizer."""
    (path / "tokenizer").mkdir(parents=True)
    (path / "tokenizer" / "tokenizer.model").write_bytes(b"a tokenizer")
    np.save(path / TOKEN_BYTES, np.ones(vocab, np.int32))
    splits = {}
    for split, arrays in (("train", train), ("validation", validation)):
        shards = []
        for number, ids in enumerate(arrays):
            name = f"{split}_{number:05d}.bin"
            with ShardWriter(path / name, vocab, FINGERPRINT) as writer:
                writer.write(ids)
            checksum = read_header(path / name).checksum
            shards.append(ShardEntry(file=name, tokens=len(ids), checksum=checksum))
        tokens = sum(map(len, arrays))
        splits[split] = SplitEntry(shards=shards, tokens=tokens, documents=1, bytes=tokens)
    manifest = Manifest(
        format_version=1,
        name="made",
        tokenizer=TokenizerEntry(
            kind="sentencepiece",
            file="tokenizer/tokenizer.model",
            fingerprint=FINGERPRINT,
            vocab_size=vocab,
            eos_id=1,
        ),
        splits=splits,
        recipe={},
        origin="",
        dropped={},
    )
    write_atomically(path / MANIFEST, manifest.model_dump_json().encode())
    return path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Token i is i mod VOCAB: 1,000 for training in shards of 300, 300, 300 and 100; 205 for
    validation."""
    ids = np.arange(1000) % VOCAB
    return write_dataset(tmp_path / "set", np.split(ids, [300, 600, 900]), [ids[:205]])


@pytest.fixture
def flip() -> Callable[[Path, int], None]:
    """Flips the lowest bit of one byte of a file."""

    def flip_byte(path: Path, offset: int) -> None:
        content = bytearray(path.read_bytes())
        content[offset] ^= 1
        path.write_bytes(content)

    return flip_byte
