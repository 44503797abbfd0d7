"""A directory of Hugging Face files that continues texts as a run does.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archscale.data.huggingface_tokenizer import JSON_FILE, HuggingFaceTokenizer
from archscale.data.sentencepiece_tokenizer import MODEL_FILE, SentencePieceTokenizer
from archscale.data.tokenizer_base import Tokenizer
from archscale.errors import CheckpointError, DataError, explain_os_error
from archscale.inference.text_model import TextModel

CONFIG_JSON = "config.json"
OUR_CODE = Path(__file__).parents[1] / "export"  # what an export copies beside its weights


class ReadRows:
    """The caches of several texts, one for each: transformers' own cannot join rows of different
    lengths."""

    def __init__(self, caches: list[Any]):
        self.caches = caches

    def keep(self, rows: Sequence[int]) -> None:
        self.caches = [self.caches[row] for row in rows]

    def join(self, other: ReadRows) -> None:
        self.caches += other.caches


class TransformersModel:
    """`inference.generate.LanguageModel` of a causal language model of transformers; rows are read
    one after another.

    Attributes:
        model: on its device, in evaluation mode.
        context: tokens that it reads at most.
    """

    def __init__(self, model: Any, context: int):
        self.context = context
        self.model = model
        # Without this, the logits of all positions of a prompt would be computed.
        self._options = {"logits_to_keep": 1} if model._supports_logits_to_keep() else {}
        # Newer versions of transformers call it by another name.
        parameters = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"

    def read(self, rows: Sequence[Sequence[int]], capacity: int) -> tuple[Tensor, ReadRows]:
        from transformers import DynamicCache

        read = ReadRows([DynamicCache() for _ in rows])
        return self._pass(rows, read), read

    def step(self, tokens: Sequence[int], rows: ReadRows) -> Tensor:
        return self._pass([[token] for token in tokens], rows)

    @torch.no_grad()
    def _pass(self, rows: Sequence[Sequence[int]], read: ReadRows) -> Tensor:
        logits = []
        for tokens, cache in zip(rows, read.caches, strict=True):
            ids = torch.tensor([tokens], device=self.model.device)
            output = self.model(input_ids=ids, **{self._cache_name: cache}, **self._options)
            logits.append(output.logits[:, -1].float())
        return torch.cat(logits)


def is_exported(directory: Path) -> bool:
    """Whether a directory has the files of a model of transformers."""
    return (directory / CONFIG_JSON).is_file()


def load_exported(directory: Path, device: torch.device | None = None) -> TextModel:
    """The model and tokenizer of a directory.

    Args:
        device: None: a GPU where there is one.

    Raises:
        CheckpointError: transformers is missing or cannot load it, or it has code of its own that
            is not that of an export of this version.
        DataError: its tokenizer is missing or damaged.
    """
    config = _json(directory / CONFIG_JSON)
    generation = _json(directory / "generation_config.json")
    trusted = _has_our_code(directory, config)
    model = _load(directory, trusted)
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    context = _context(model, directory)
    ends = _special("eos_token_id", generation, config)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    tokenizer, before = _tokenizer(directory, ends)
    first = _special("bos_token_id", generation, config)
    return TextModel(
        TransformersModel(model.to(device).eval(), context),
        tokenizer,
        before=before,
        empty=before or (tokenizer.eos_id if first is None else int(first),),
        ends=frozenset({tokenizer.eos_id, *ends}),
        name=str(directory),
    )


def _special(name: str, generation: dict[str, Any], config: dict[str, Any]) -> Any:
    """A special token's id, or several, from the first that says one; null says none. A model of
    texts and more has a config of its texts inside."""
    inner = config.get("text_config")
    places = (generation, config, inner if isinstance(inner, dict) else {})
    return next((place[name] for place in places if place.get(name) is not None), None)


def _context(model: Any, directory: Path) -> int:
    """Tokens that a model reads at most, by whatever name its config has them.

    Raises:
        CheckpointError: it has none.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(context, int):
        raise CheckpointError(
            "the model does not say how many tokens it reads at most",
            str(directory / CONFIG_JSON),
            "give it max_position_embeddings",
        )
    return context


def _has_our_code(directory: Path, config: dict[str, Any]) -> bool:
    """Whether the model needs code that lies beside it.

    Raises:
        CheckpointError: it does, and that is not the code of an export.
    """
    mapped = config.get("auto_map") or {}
    # A name may lead to another repository, and code that is not there to a copy of earlier days.
    named = {f"{str(name).rpartition('.')[0]}.py" for name in mapped.values()}
    for name in sorted(named | {path.name for path in directory.glob("*.py")} if named else ()):
        path, ours = directory / name, OUR_CODE / Path(name).name
        if not (path.is_file() and ours.is_file() and path.read_bytes() == ours.read_bytes()):
            raise CheckpointError(
                "the model needs code of its own, and that is not what this version exports",
                str(path),
                "export the run anew, or use it with transformers if you trust that code",
            )
    return bool(named)


def _load(directory: Path, trusted: bool) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "the package 'transformers' is not installed",
            str(directory),
            "pip install archscale[export]",
        ) from error
    shown = io.StringIO()
    auto: Any = transformers.AutoModelForCausalLM
    try:
        # A bar of progress, on standard error.
        with contextlib.redirect_stderr(shown):
            model, info = auto.from_pretrained(
                directory,
                trust_remote_code=trusted,
                local_files_only=True,
                dtype="auto",
                output_loading_info=True,
            )
        # transformers draws weights that are missing, and only warns.
        if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ValueError(f"no weight fits {wrong[0]}")
        return model
    except Exception as error:  # damaged files, unknown classes: all the same to the user
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"transformers cannot load the model: {first}",
            str(directory),
            "name a directory that `archscale export` has written, or export anew",
        ) from error


def _tokenizer(directory: Path, ends: list[int]) -> tuple[Tokenizer, tuple[int, ...]]:
    """The tokenizer of a directory, and the tokens that it puts before every text."""
    eos_id = ends[0] if ends else None
    path = directory / JSON_FILE
    if path.is_file():
        content = _bytes(path)
        tokenizer = HuggingFaceTokenizer(content, str(path), eos_id=eos_id)
        from tokenizers import Tokenizer as Backend

        backend = Backend.from_buffer(content)
        backend.no_padding()
        backend.no_truncation()
        return tokenizer, tuple(backend.encode("").ids)
    path = directory / MODEL_FILE
    if not path.is_file():
        raise DataError(
            f"no tokenizer there: neither {JSON_FILE} nor {MODEL_FILE}",
            str(directory),
            "copy the model's tokenizer beside it",
        )
    alone = SentencePieceTokenizer(_bytes(path), str(path), eos_id=eos_id)
    return alone, (alone.eos_id,)


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(_bytes(path))
    except ValueError as error:
        raise CheckpointError("not JSON", str(path), "export anew") from error
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", str(path), "export anew")
    return content


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        cause, remedy = explain_os_error(error, "name another directory")
        raise CheckpointError(f"cannot read it: {cause}", str(path), remedy) from error
