"""What a dataset directory, or another project's files, hold, and whether they are whole."""

import io
from typing import Any

import numpy as np

from archscale.data.places import Place, locate
from archscale.data.preparing.fidelity import Fidelity
from archscale.data.shards import (
    DAMAGED,
    MANIFEST,
    SPLITS,
    TOKEN_BYTES,
    Manifest,
    disagreements,
    open_shard,
    read_manifest,
    verify_shard,
)
from archscale.data.stored import inspect_stored, verify_stored
from archscale.data.tokenizer import load_tokenizer
from archscale.errors import DataError

_EXCERPT_TOKENS = 100


def summarize(
    output: Place, manifest: Manifest, already_there: bool | None = None
) -> dict[str, Any]:
    """What the manifest of a dataset says. `already_there` is in it where it is given, `skipped`
    where documents could not be read, `fidelity` where tokens and text differ."""
    fidelity = _fidelity(output, manifest)
    skipped = manifest.skipped
    return {
        "name": manifest.name,
        "output": str(output),
        **({} if already_there is None else {"already_there": already_there}),
        "vocab_size": manifest.tokenizer.vocab_size,
        "fingerprint": manifest.tokenizer.fingerprint,
        "dropped": manifest.dropped,
        **({"skipped": skipped.model_dump()} if skipped and skipped.counts else {}),
        **({"fidelity": fidelity} if fidelity else {}),
        **{
            split: {
                "tokens": entry.tokens,
                "documents": entry.documents,
                "bytes": entry.bytes,
                "bytes_per_token": round(entry.bytes / entry.tokens, 3),
                "shards": len(entry.shards),
            }
            for split, entry in manifest.splits.items()
        },
    }


def _fidelity(output: Place, manifest: Manifest) -> str | None:
    if not manifest.fidelity:
        return None
    try:
        return Fidelity.from_json(manifest.fidelity).report()
    except TypeError as error:
        problem = "foreign manifest: fidelity has not the counts that belong there"
        raise DataError(problem, str(output / MANIFEST), DAMAGED) from error


def inspect(directory: str | Place, tokenizer: str | None = None) -> dict[str, Any]:
    """A summary as `prepare` returns it, without `already_there`; and tokenizer, recipe, and a
    decoded `excerpt`. Of another project's files as `inspect_foreign`.

    Args:
        tokenizer: of such files, as `data.tokenizer`.
    """
    if (foreign := inspect_stored(directory, tokenizer)) is not None:
        return foreign
    directory = locate(directory)
    manifest = read_manifest(directory)
    shard = directory / manifest.splits[SPLITS[0]].shards[0].file
    ids = open_shard(shard)[:_EXCERPT_TOKENS].tolist()
    if ids and max(ids) >= manifest.tokenizer.vocab_size:
        problem = f"token id {max(ids)} is outside the vocabulary"
        raise DataError(problem, str(shard), DAMAGED)
    excerpt = load_tokenizer(directory).decode(ids)
    return summarize(directory, manifest) | {
        "tokenizer": manifest.tokenizer.kind,
        "recipe": manifest.recipe,
        "excerpt": excerpt,
    }


def verify(directory: str | Place, tokenizer: str | None = None) -> list[str]:
    """Reads every byte of a dataset, or of another project's files. One line for each problem,
    naming the file; none means that it is whole. Arguments as for `inspect`."""
    if (foreign := verify_stored(directory, tokenizer)) is not None:
        return foreign
    directory, problems = locate(directory), []
    try:
        manifest = read_manifest(directory)
        _fidelity(directory, manifest)
    except DataError as error:
        return [str(error)]
    try:
        table = load_tokenizer(directory).token_bytes()
        if not _has_lengths(directory / TOKEN_BYTES, table):
            where = directory / TOKEN_BYTES
            problems.append(f"token lengths are missing or not those of the tokenizer ({where})")
    except (DataError, OSError) as error:
        problems.append(str(error))
    for entry in manifest.splits.values():
        if sum(shard.tokens for shard in entry.shards) != entry.tokens:
            problems.append(
                f"shards and split disagree on the number of tokens ({directory / MANIFEST})"
            )
        for shard in entry.shards:
            path = directory / shard.file
            try:
                header = verify_shard(path)
                differences = disagreements(header, shard, manifest.tokenizer)
                problems.extend(f"{difference} ({path})" for difference in differences)
                if header.max_id >= manifest.tokenizer.vocab_size:
                    problems.append(f"token id {header.max_id} is outside the vocabulary ({path})")
            except DataError as error:
                problems.append(str(error))
    return problems


def _has_lengths(path: Place, lengths: np.ndarray) -> bool:
    """Whether a .npy file has these token lengths."""
    try:
        return path.is_file() and np.array_equal(np.load(io.BytesIO(path.read_bytes())), lengths)
    except (ValueError, EOFError):  # not such a file
        return False
