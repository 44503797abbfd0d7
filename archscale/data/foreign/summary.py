"""What `archscale data inspect` and `archscale data verify` say of another project's files."""

from typing import Any

from archscale.data.foreign.files import ForeignFile
from archscale.data.foreign.sets import find_files, read_files, sort_into_splits
from archscale.data.foreign.split import known_vocabulary
from archscale.data.places import Place
from archscale.data.tokenizer import Tokenizer
from archscale.errors import DataError

_EXCERPT_TOKENS = 100


def inspect_foreign(place: Place, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """A summary as of a prepared data set: format, dtype, tokenizer, vocabulary and excerpt, which
    is text where the tokenizer is known and ids otherwise; per split tokens, documents, shards.

    Raises:
        DataError: a file is wrong, or not of this tokenizer.
    """
    splits = {
        split: read_files(files) for split, files in sort_into_splits(find_files(place)).items()
    }
    first = next(iter(splits.values()))[0]
    name = first.tokenizer if tokenizer is None else tokenizer.fingerprint[:12]
    excerpt = first.open()[: min(_EXCERPT_TOKENS, first.tokens)]
    if tokenizer is not None and len(excerpt):
        first.check_some(excerpt, tokenizer.vocab_size)
    ids = excerpt.tolist()
    return {
        "output": str(place),
        "format": first.kind,
        "dtype": first.dtype.name,
        "tokenizer": name,
        "vocab_size": known_vocabulary(first, tokenizer),
        **{split: _split(files) for split, files in splits.items()},
        "excerpt": " ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids),
    }


def _split(files: list[ForeignFile]) -> dict[str, int | None]:
    documents = [file.documents for file in files]
    return {
        "tokens": sum(file.tokens for file in files),
        "documents": None if None in documents else sum(count or 0 for count in documents),
        "shards": len(files),
    }


def verify_foreign(place: Place, tokenizer: Tokenizer | None) -> list[str]:
    """Reads every id. One line for each problem, naming the file."""
    problems = []
    for file in find_files(place):
        try:
            (read,) = read_files([file])
            if read.verify is not None:
                read.verify()
            read.check_ids(known_vocabulary(read, tokenizer))
        except DataError as error:
            problems.append(str(error))
    if not problems:
        try:
            for files in sort_into_splits(find_files(place)).values():
                read_files(files)
        except DataError as error:
            problems.append(str(error))
    return problems
