"""A look at the beginning of each source before the long work: a tokenizer that loses text, and a
corpus that cannot be divided, are known within seconds."""

import math
from collections import Counter
from collections.abc import Iterable

from archscale.data.preparing.division import Spread, validation_share
from archscale.data.preparing.documents import Document, RecipeUnit
from archscale.data.preparing.fidelity import Fidelity
from archscale.data.preparing.progress import Say
from archscale.data.preparing.recipe import Recipe
from archscale.data.preparing.trouble import Trouble
from archscale.data.tokenizer import Tokenizer

_TEXT_CHARS = 1_000_000  # of each source with a weight of 1


def first_texts(recipe: Recipe, units: Iterable[RecipeUnit]) -> list[str]:
    """The first text of each source, about 1 MB; less where the weight is small.

    Raises:
        DataError: all documents are equal, so that a split stays empty; or one of them cannot be
            read.
    """
    by_source: dict[int, list[RecipeUnit]] = {}
    for unit in units:
        by_source.setdefault(id(unit.source), []).append(unit)
    spreads = {True: Spread(), False: Spread()}  # of validation sources, and of the others
    texts = []
    for source_units in by_source.values():
        source, held_out = source_units[0].source, source_units[0].held_out
        spread, size = spreads[held_out], 0
        # 1 / weight times as much is read.
        enough = math.ceil(_TEXT_CHARS * math.sqrt(source.weight))
        for document in _documents(source_units):
            spread.add(document.share)
            if size < enough:
                texts.append(document.text[: enough - size])
                size += len(texts[-1])
            different = spread.lowest < spread.highest
            if size >= enough and (different or isinstance(recipe.validation, list)):
                break
    validation_share(recipe, spreads[False], spreads[True])
    return texts


def _documents(units: Iterable[RecipeUnit]) -> Iterable[Document]:
    for unit in units:
        yield from unit.documents(Trouble(unit.on_error), Counter())


def refuse_lossy(texts: Iterable[str], tokenizer: Tokenizer, lossy: bool, say: Say) -> None:
    """Says what a tokenizer loses of the texts, and refuses one that loses too much.

    Raises:
        DataError: it does, and that is not wanted.
    """
    fidelity = Fidelity()
    for text in texts:
        ids = tokenizer.encode_document(text)
        fidelity.add(text, len(text.encode()), ids, tokenizer)
    fidelity.refuse(lossy)
    if report := fidelity.report():
        say(f"warning: of the first text of each source, {report}")
