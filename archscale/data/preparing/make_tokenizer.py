"""The recipe's tokenizer: the given one, or one trained on the training documents.

Not on the validation documents: their compression is part of what validation measures.
"""

import functools
import json
import shutil
import uuid
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from archscale.data.preparing.arrays import write_array
from archscale.data.preparing.division import Spread, empty_split, validation_share
from archscale.data.preparing.documents import UnitJob
from archscale.data.preparing.jobs import Report
from archscale.data.preparing.preparation import Preparation
from archscale.data.preparing.sample import TrainingSample
from archscale.data.preparing.trouble import Trouble
from archscale.data.preparing.work import key
from archscale.data.shards import TokenizerEntry
from archscale.data.tokenizer import Tokenizer, load_tokenizer, train_sentencepiece
from archscale.errors import DataError
from archscale.files import write_atomically

_IDENTITY = "S16"  # of a document; see Document.identity


@dataclass(frozen=True)
class IdentifyUnit(UnitJob):
    """A job: the identities of the documents of a validation unit, as a sorted .npy."""

    result: Path

    def run(self, report: Report) -> None:
        identities = bytearray()
        for document in self.unit.documents(Trouble(self.unit.on_error), Counter()):
            identities += document.identity
            report(document.size)
        _save_identities(self.result, np.frombuffer(identities, _IDENTITY))


def _save_identities(path: Path, identities: np.ndarray) -> None:
    temporary = path.with_name(f"{uuid.uuid4().hex}.tmp.npy")
    with open(temporary, "wb") as file:
        write_array(file, np.unique(identities))
    temporary.replace(path)


@functools.lru_cache(maxsize=1)
def _identities(path: Path) -> np.ndarray:
    return np.load(path)


def _is_among(identity: bytes, path: Path | None) -> bool:
    if path is None:
        return False
    identities = _identities(path)
    place = int(np.searchsorted(identities, np.bytes_(identity)))
    # NumPy takes zeros at the end for padding.
    return place < len(identities) and bool(identities[place] == identity.rstrip(b"\0"))


@dataclass(frozen=True)
class SampleUnit(UnitJob):
    """A job: what of a unit a tokenizer would be trained on, and what has to be known before the
    documents are divided.

    Attributes:
        seed, deduplicate: of the sample.
        validation: training documents have at least this share.
        held_out: identities of documents that are for validation.
    """

    seed: int
    deduplicate: bool
    validation: float
    held_out: Path | None
    result: Path

    def run(self, report: Report) -> None:
        sample, spread = TrainingSample(self.seed, self.deduplicate), Spread()
        for document in self.unit.documents(Trouble(self.unit.on_error), Counter()):
            if not _is_among(document.identity, self.held_out):
                spread.add(document.share)
                if document.share >= self.validation:
                    sample.add(document.text)
            report(document.size)
        content = {"spread": asdict(spread), "texts": sample.texts()}
        write_atomically(self.result, json.dumps(content, ensure_ascii=False))


def make_tokenizer(preparation: Preparation, may_train: bool) -> tuple[Tokenizer, TokenizerEntry]:
    """The tokenizer of the recipe, and where it lies in the work directory.

    Raises:
        DataError: it cannot be loaded or trained, or there is nothing to train it on; or it is yet
            to be trained, and may not.
    """
    spec = preparation.recipe.tokenizer
    if spec.train is None:
        tokenizer = load_tokenizer(str(spec.path), spec.kind, spec.eos)
        folder = preparation.work.folder(f"given-{tokenizer.fingerprint[:32]}")
        if not (folder / tokenizer.file).exists():
            write_atomically(folder / tokenizer.file, tokenizer.content)
        return tokenizer, _entry(tokenizer, folder)
    units = [unit.key() for unit in preparation.units]
    recipe = preparation.recipe
    validation = "own" if isinstance(recipe.validation, list) else recipe.validation
    decides = [spec.model_dump(mode="json"), recipe.deduplicate, validation, units]
    folder = preparation.work.path / f"trained-{key(*decides)}"
    if not folder.exists():
        if not may_train:
            remedy = "encode the parts first, each with --part"
            raise DataError("no part has trained the tokenizer", str(folder.parent), remedy)
        _train(preparation, folder)
    tokenizer = load_tokenizer(folder / "tokenizer.model", spec.kind, spec.eos)
    return tokenizer, _entry(tokenizer, folder)


def _entry(tokenizer: Tokenizer, folder: Path) -> TokenizerEntry:
    return TokenizerEntry(
        kind=tokenizer.kind,
        file=str(folder / tokenizer.file),
        fingerprint=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )


def _train(preparation: Preparation, folder: Path) -> None:
    spec = preparation.recipe.tokenizer
    assert spec.train is not None
    held_out = _held_out(preparation)
    own = 0.0 if isinstance(preparation.recipe.validation, list) else preparation.recipe.validation
    sample, spread = _sample(preparation, own, held_out)
    if held_out is not None and spread.documents == 0:
        raise empty_split("train", "its documents are in validation too", preparation.recipe.name)
    held_out_spread = Spread(0 if held_out is None else len(_identities(held_out)))
    share = validation_share(preparation.recipe, spread, held_out_spread)
    if share != own:
        sample, _ = _sample(preparation, share, held_out)
    preparation.say(f"training a tokenizer of {spec.train.vocab_size} pieces")
    temporary = preparation.work.folder("samples") / uuid.uuid4().hex
    temporary.mkdir()
    eos = spec.eos or "<eos>"
    train_sentencepiece(sample.texts(), spec.train.vocab_size, temporary, eos)
    try:
        temporary.rename(folder)
    except OSError:  # another part was faster, with the same result
        if not folder.is_dir():
            raise
    if preparation.part is None:
        shutil.rmtree(preparation.work.folder("samples"))


def _held_out(preparation: Preparation) -> Path | None:
    """The identities of all documents of validation sources, in one file."""
    units = [unit for unit in preparation.units if unit.held_out]
    if not units:
        return None
    folder = preparation.work.folder("samples")
    jobs = [IdentifyUnit(unit, folder / f"{unit.key('identities')}.npy") for unit in units]
    preparation.run_shared("looked through for validation", jobs)
    path = folder / f"{key('held out', [job.result.name for job in jobs])}.npy"
    _save_identities(path, np.concatenate([np.load(job.result) for job in jobs]))
    return path


def _sample(
    preparation: Preparation, validation: float, held_out: Path | None
) -> tuple[TrainingSample, Spread]:
    recipe, folder = preparation.recipe, preparation.work.folder("samples")
    assert recipe.tokenizer.train is not None
    seed = recipe.tokenizer.train.seed
    decides = [seed, recipe.deduplicate, validation, held_out and held_out.name]
    jobs = [
        SampleUnit(
            unit,
            seed,
            recipe.deduplicate,
            validation,
            held_out,
            folder / f"{unit.key('sample', *decides)}.json",
        )
        for unit in preparation.units
        if not unit.held_out
    ]
    preparation.run_shared("sampled", jobs)
    sample, spread = TrainingSample(seed, recipe.deduplicate), Spread()
    for job in jobs:
        content = json.loads(job.result.read_bytes())
        spread.merge(Spread(**content["spread"]))
        for text in content["texts"]:
            sample.add(text)
    return sample, spread
