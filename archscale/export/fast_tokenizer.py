"""A run's tokenizer as the files that transformers reads, with equal ids or not at all."""

from __future__ import annotations

import importlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from archscale.data.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer
from archscale.data.tokenizer_base import Tokenizer
from archscale.errors import DataError
from archscale.huggingface.safetensors_reader import PACKAGES

# What tokenizers disagree about: normalization, white space, bytes, and names of special tokens.
HARD_TEXTS = (
    "",
    " ",
    "a",
    " leading and trailing ",
    "two  spaces, three   spaces" + " " * 70 + "and seventy",
    "\t\ttabs\tand\n\nlines\r\nof DOS\r and of old\x0b\x0c\x85\u2028\u2029ends",
    "no-break\u00a0space, thin\u2009space, ideographic\u3000space, zero\u200bwidth, \ufeffmark",
    "e\u0301 is not \u00e9, A\u030a is not \u00c5 nor \u212b; \u1100\u1161\u11a8 \uac01",
    "\ufb01 \u00bd \u1e9b\u0323",
    "o\u0302\u0323\u0330\u0334\u0361x\u0489",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308"
    " \U0001f44d\U0001f3fd \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\u05e9\u05dc\u05d5\u05dd \u202b\u0645\u0631\u062d\u0628\u0627\u202c \u0627\u064e\u0644\u0652",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u6f22\u5b57\u304b\u306a\u30ab\u30ca",
    "\ud55c\uad6d\uc5b4 \U00020000",
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22 \u10e5\u10d0\u10e0\u10d7",
    "\x00\x01\x02 zero\x00inside \x1b[31m \x7f \x80 \x9f",
    "\ufffd replaced \ufffd\ufffd, \ufffe, \uffff, \U0010ffff, \ue000",
    "the mark \u2581 itself, \u2581\u2581twice, \u2581",
    "<s></s><unk><pad><eos><bos><|endoftext|> <0x41><0xE2><0x96><0x81> [INST]",
    "0123456789 3.14159 1e-05 0x7FFF 12,345 \u0661\u0662\u0663 \u00b2\u2075",
    "It's what's-its-name's \u201cquoted\u201d \u2014 don't; we'll I'M",
    'def f(x: int) -> str:\n    if x:\n        return f"{x!r}\\n"  # why?\n',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaabababababababababa abcabcabcabcab",
    "============================================================\n\n\n\n\n\n\n\n",
    "https://example.org/a_b?c=d&e=%20#f <html><body class='x'>&amp;</body></html>",
)
MADE_TEXTS = 300  # of pieces of the vocabulary, one after another
PIECES = 12  # in each of them


@dataclass(frozen=True)
class TokenizerFiles:
    """What to write for a tokenizer.

    Attributes:
        files: content by name.
        bos_id: the token that every text starts with; None: none does.
        eos_id: ends a text. pad_id: fills batches.
        problem: why there is no fast tokenizer among the files; "": there is one.
    """

    files: dict[str, bytes]
    bos_id: int | None
    eos_id: int
    pad_id: int
    problem: str = ""

    @property
    def warning(self) -> str:
        """What goes out in place of a fast tokenizer, and why; "": there is one."""
        if not self.problem:
            return ""
        left = "the tokenizer goes out as a SentencePiece model only" if self.files else ""
        return f"{left or 'no tokenizer goes out'}: {self.problem}"


def tokenizer_files(
    tokenizer: Tokenizer, context: int, starts_with_eos: bool, where: str
) -> TokenizerFiles:
    """The files of a tokenizer whose ids are those that the run was trained on.

    Args:
        context: longest text in tokens that the model was trained on.
        starts_with_eos: whether a text starts with the end of the document before it, as in
            training.
        where: place of the tokenizer, for messages.

    Raises:
        DataError: the package `tokenizers` is missing.
    """
    package = _tokenizers(where)
    unknown, files = None, {}
    silent = False  # whether the unknown token occurs in no text
    if isinstance(tokenizer, SentencePieceTokenizer):
        files[tokenizer.file] = tokenizer.content
        structure, unknown, eos = _from_sentencepiece(package, tokenizer)
        silent = unknown is not None and tokenizer.has_bytes
    else:
        structure, eos = _copied(package, tokenizer)
    problem = ""
    if structure is None:
        problem = "the model does more than join pieces of its vocabulary"
    elif _loaded(package, structure).token_to_id(eos) != tokenizer.eos_id:
        problem = f"{eos!a}, which ends a document, has another id"
    elif (text := first_difference(package, structure, tokenizer)) is not None:
        problem = f"ids differ for {text[:40]!a}"
    bos_id = tokenizer.eos_id if starts_with_eos else None
    # A token that no text has: batches padded with the end of a document would teach a model that
    # is trained further never to end one.
    pad_id, pad = unknown if silent and unknown is not None else (tokenizer.eos_id, eos)
    if problem:
        return TokenizerFiles(files, bos_id, tokenizer.eos_id, pad_id, problem)
    assert structure is not None
    structure |= {"truncation": None, "padding": None}
    structure["post_processor"] = _template(eos, tokenizer.eos_id) if starts_with_eos else None
    files["tokenizer.json"] = json.dumps(structure, ensure_ascii=False).encode()
    configuration = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": context,
        "model_input_names": ["input_ids", "attention_mask"],  # no types of tokens
        "clean_up_tokenization_spaces": False,
        # For converters that read no post-processor: some add one unless they are told.
        "add_bos_token": starts_with_eos,
        "add_eos_token": False,
        "split_special_tokens": True,  # text that spells the end of a document is text
    }
    if starts_with_eos:
        configuration["bos_token"] = eos
    if unknown is not None:
        configuration["unk_token"] = unknown[1]
    files["tokenizer_config.json"] = json.dumps(configuration, indent=2).encode()
    return TokenizerFiles(files, bos_id, tokenizer.eos_id, pad_id)


def _tokenizers(where: str) -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise DataError("the package 'tokenizers' is not installed", where, PACKAGES) from error


def _loaded(package: Any, structure: dict[str, Any]) -> Any:
    """The tokenizer of a tokenizer.json, as `split_special_tokens` has it: text that spells a
    special token is text."""
    backend = package.Tokenizer.from_str(json.dumps(structure))
    backend.encode_special_tokens = True
    backend.no_truncation()
    backend.no_padding()
    return backend


def _copied(package: Any, tokenizer: Tokenizer) -> tuple[dict[str, Any], str]:
    """(tokenizer.json, name of the end of a document) of a Hugging Face tokenizer, in which that
    token is a special one: a text would otherwise end itself."""
    structure = json.loads(tokenizer.content)
    # Its name is how the vocabulary spells it: that of a line break may be "\u010a".
    eos = _loaded(package, structure).id_to_token(tokenizer.eos_id)
    added = [token for token in structure["added_tokens"] if token["id"] == tokenizer.eos_id]
    for token in added:
        token["special"] = True
    if not added:  # an ordinary piece of the vocabulary, which keeps its id
        whole = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        token = {"id": tokenizer.eos_id, "content": eos, **whole, "special": True}
        structure["added_tokens"].append(token)
    return structure, eos


def _from_sentencepiece(
    package: Any, tokenizer: SentencePieceTokenizer
) -> tuple[dict[str, Any] | None, tuple[int, str] | None, str]:
    """(tokenizer.json, id and name of the unknown token, name of the end of a document); the first
    is None of a model that is no plain BPE.

    Its vocabulary is spelled with spaces instead of SentencePiece's mark for them: the mark itself
    is then a character that no piece has, and goes out in bytes, as ours does.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_proto=tokenizer.content)
    ids = range(model.vocab_size())
    names = [model.id_to_piece(token) for token in ids]
    unknown = next(((token, names[token]) for token in ids if model.is_unknown(token)), None)
    eos = names[tokenizer.eos_id]
    special = {token for token in ids if model.is_control(token) or model.is_unknown(token)}
    special.add(tokenizer.eos_id)
    # Names of special tokens and bytes are not text.
    written = {
        token: names[token].replace(SPACE, " ")
        for token in ids
        if token not in special and not model.is_byte(token)
    }
    vocabulary = {written.get(token, names[token]): token for token in ids}
    unused = any(map(model.is_unused, ids))  # joined, and then taken apart again
    if not tokenizer.only_joins or unused or len(vocabulary) < len(names):
        return None, unknown, eos
    cut_out = tokenizer.user_defined
    scores = {
        text: model.get_score(token) for token, text in written.items() if token not in cut_out
    }
    bpe = package.models.BPE(
        vocab=vocabulary,
        merges=list(merges(scores)),
        unk_token=None if unknown is None else unknown[1],
        fuse_unk=True,
        byte_fallback=tokenizer.has_bytes,
    )
    backend = package.Tokenizer(bpe)
    backend.add_special_tokens(
        [package.AddedToken(names[token], special=True) for token in sorted(special)]
    )
    backend.add_tokens(
        [package.AddedToken(written[token], normalized=False) for token in sorted(cut_out)]
    )
    decoders = [package.decoders.ByteFallback(), package.decoders.Fuse()]
    normalizers = []
    if tokenizer.prefixed or not tokenizer.has_bytes:
        normalizers.append(package.normalizers.Replace(SPACE, " "))
    if tokenizer.prefixed:
        normalizers.append(package.normalizers.Prepend(" "))
        decoders.append(package.decoders.Strip(" ", 1, 0))
    if normalizers:
        backend.normalizer = package.normalizers.Sequence(normalizers)
    backend.decoder = package.decoders.Sequence(decoders)
    return json.loads(backend.to_str()), unknown, eos


def merges(scores: dict[str, float]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces that join to a piece, the first to be joined first: SentencePiece joins
    whatever two neighbours make the piece of the highest score."""
    for piece in sorted(scores, key=lambda piece: -scores[piece]):
        for cut in range(1, len(piece)):
            if piece[:cut] in scores and piece[cut:] in scores:
                yield piece[:cut], piece[cut:]


def first_difference(package: Any, structure: dict[str, Any], tokenizer: Tokenizer) -> str | None:
    """A text to which the tokenizer.json gives other ids than the run's tokenizer; None: none of
    those tried. A text that spells the end of a document is cut there, in one place or another: of
    a copied tokenizer such texts are not compared."""
    backend = _loaded(package, structure)
    texts = [*HARD_TEXTS, *_made_texts(backend)]
    given = [backend.encode(text, add_special_tokens=False).ids for text in texts]
    if not isinstance(tokenizer, SentencePieceTokenizer):
        end, end_id = tokenizer.eos_text, tokenizer.eos_id
        pairs = [(t, ids) for t, ids in zip(texts, given) if end not in t and end_id not in ids]
        texts, given = [text for text, _ in pairs], [ids for _, ids in pairs]
    expected = tokenizer.encode_batch(texts)
    differing = (text for text, ids, ours in zip(texts, given, expected) if ids != ours)
    return next(differing, None)


def _made_texts(backend: Any) -> Iterator[str]:
    """Every piece alone, and many pieces one after another."""
    pieces = sorted(backend.decode([token]) for token in range(backend.get_vocab_size()))
    pieces = [piece for piece in pieces if piece]
    yield from pieces
    generator = random.Random(0)
    for _ in range(MADE_TEXTS if pieces else 0):
        yield "".join(generator.choices(pieces, k=PIECES))


def _template(eos: str, eos_id: int) -> dict[str, Any]:
    """The post-processor that puts the end of the document before in front of a text."""
    first = {"SpecialToken": {"id": eos, "type_id": 0}}
    parts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    return {
        "type": "TemplateProcessing",
        "single": [first, parts[0]],
        "pair": [first, *parts],
        "special_tokens": {eos: {"id": eos, "ids": [eos_id], "tokens": [eos]}},
    }
