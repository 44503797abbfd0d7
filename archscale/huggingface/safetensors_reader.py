"""The weights of a directory of safetensors files, a few rows at a time."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor

from archscale.errors import CheckpointError, ConfigError, explain_os_error
from archscale.huggingface.weights import Source

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PACKAGES = "pip install archscale[export]"
READABLE = ("F32", "BF16", "F16")  # dtypes, as safetensors names them
# Tables of rotary positions that old versions of transformers have saved beside the weights.
UNUSED = ".rotary_emb.inv_freq"


def import_safetensors(needed_by: str) -> Any:
    """The package; ConfigError if it is not installed."""
    try:
        return importlib.import_module("safetensors")
    except ImportError as error:
        problem = "the package 'safetensors' is not installed"
        raise ConfigError(problem, needed_by, PACKAGES) from error


class StoredTensors:
    """The weights of a directory: one file `model.safetensors`, or several with their index.

    Attributes:
        shapes: of every weight, by name.

    Raises:
        CheckpointError: there are none, a file is damaged, or a weight is no plain float.
    """

    def __init__(self, directory: Path):
        self.directory = directory
        self._safetensors = import_safetensors("training.init_from")
        self._opened: tuple[str, Any] = ("", None)
        self._file_of = self._files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in self._file_of.items():
            stored = self._slice(name)
            self.shapes[name] = tuple(stored.get_shape())
            if (dtype := stored.get_dtype()) not in READABLE:
                raise CheckpointError(
                    f"weight {name} is stored as {dtype}, not as a plain float",
                    str(directory / file),
                    "convert it to bfloat16 or float32",
                )

    def _files(self) -> dict[str, str]:
        """Name of every weight → its file."""
        index = self.directory / INDEX
        if index.is_file():
            try:
                files = json.loads(index.read_text())["weight_map"]
                plain = all(Path(file).name == file for file in files.values())
            except (ValueError, KeyError, TypeError, AttributeError, OSError):
                plain = False
            if not plain:
                raise CheckpointError(
                    "it is no index of safetensors files", str(index), "copy the directory again"
                )
            for file in sorted(set(files.values())):
                if missing := {name for name in files if files[name] == file} - set(
                    self._open(file).keys()
                ):
                    raise CheckpointError(
                        f"weight {min(missing)} is not in its file",
                        str(self.directory / file),
                        "copy the directory again",
                    )
            return dict(files)
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise CheckpointError(
            f"there are no weights: neither {SINGLE} nor {INDEX}",
            str(self.directory),
            "give a directory that holds them, as `save_pretrained` of transformers writes it",
        )

    def _open(self, file: str) -> Any:
        if self._opened[0] != file:  # one at a time: what is mapped counts as memory
            path = self.directory / file
            try:
                self._opened = file, self._safetensors.safe_open(path, framework="pt")
            except OSError as error:
                cause, remedy = explain_os_error(error, "copy the directory again")
                raise CheckpointError(
                    f"cannot read the weights: {cause}", str(path), remedy
                ) from error
            except self._safetensors.SafetensorError as error:
                cause = " ".join(str(error).split())
                raise CheckpointError(
                    f"the file is damaged: {cause}", str(path), "copy the directory again"
                ) from error
        return self._opened[1]

    def _slice(self, name: str) -> Any:
        return self._open(self._file_of[name]).get_slice(name)

    def check(self, parts: list[Source], tied: bool) -> None:
        """Whether these are exactly the pieces of our parameters.

        Args:
            tied: whether the output matrix is the embedding; one that is stored all the same is not
                read, by transformers neither.

        Raises:
            CheckpointError: the first that is missing, too many, or of another shape.
        """
        expected = {piece.name: piece.shape(part.shape) for part in parts for piece in part.pieces}
        for name in sorted(expected.keys() | self.shapes.keys()):
            unused = name.endswith(UNUSED) or (tied and name == "lm_head.weight")
            if expected.get(name) == self.shapes.get(name) or (name not in expected and unused):
                continue
            raise CheckpointError(
                f"weight {name}: {self.shapes.get(name, 'missing')} in the files,"
                f" {expected.get(name, 'none')} by config.json",
                str(self.directory),
                "give a directory whose weights are those of its config.json",
            )

    def read(self, name: str, lo: int, hi: int) -> Tensor:
        """Elements [lo, hi) of the row-major flattened weight, as they are stored, on the CPU."""
        row = math.prod(self.shapes[name][1:])
        first, last = lo // row, -(-hi // row)
        rows: Tensor = self._slice(name)[first:last]
        return rows.flatten()[lo - first * row : hi - first * row]
