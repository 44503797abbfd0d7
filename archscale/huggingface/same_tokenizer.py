"""Whether the tokenizer beside imported weights gives the ids that the training data have."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Set
from pathlib import Path

from archscale.data.huggingface_tokenizer import JSON_FILE, HuggingFaceTokenizer
from archscale.data.tokenizer_base import Tokenizer
from archscale.errors import DataError

SENTENCEPIECE_FILE = "tokenizer.model"
MADE_TEXTS, PIECES = 200, 12  # texts of pieces one after another, and pieces in each


class Unknown(Exception):
    """It cannot be known, for the reason that the text says."""


def other_tokenizer(
    directory: Path, fingerprints: Set[str], load_ours: Callable[[], Tokenizer]
) -> str | None:
    """What shows that the data were made with another tokenizer than that of a Hugging Face
    directory; None where they were made with the same, or one of equal ids.

    Args:
        fingerprints: of the data's tokenizer, as data sets record it.
        load_ours: loads it; DataError where it is not known.

    Raises:
        Unknown: one of the two is not there.
    """
    contents = {}
    for name in (SENTENCEPIECE_FILE, JSON_FILE):
        try:
            contents[name] = (directory / name).read_bytes()
        except OSError:
            continue
    if {hashlib.sha256(content).hexdigest() for content in contents.values()} & fingerprints:
        return None
    if JSON_FILE not in contents:
        raise Unknown(f"no {JSON_FILE} lies beside the weights")
    try:
        ours = load_ours()
        theirs = HuggingFaceTokenizer(
            contents[JSON_FILE], str(directory / JSON_FILE), eos_id=ours.eos_id
        )
    except DataError as error:
        raise Unknown(error.what) from error
    return difference(theirs, ours)


def difference(theirs: Tokenizer, ours: Tokenizer) -> str | None:
    """A text that gets other ids by the two tokenizers, in words: every piece of their vocabulary
    is tried, and pieces one after another; None where all ids agree."""
    pieces = [piece for token in range(theirs.vocab_size) if (piece := theirs.decode([token]))]
    generator = random.Random(0)
    texts = pieces + [
        "".join(generator.choices(pieces, k=PIECES)) for _ in range(MADE_TEXTS if pieces else 0)
    ]
    for text, theirs_ids, our_ids in zip(
        texts, theirs.encode_batch(texts), ours.encode_batch(texts), strict=True
    ):
        if theirs_ids != our_ids:
            return f"{text[:40]!a} is {_ids(theirs_ids)} there and {_ids(our_ids)} in the data"
    return None


def _ids(ids: list[int]) -> str:
    return f"{ids[:4]}" if len(ids) <= 4 else f"{str(ids[:4])[:-1]}, …]"
