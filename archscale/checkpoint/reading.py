"""The weights of a checkpoint one at a time, whatever layout wrote it: what converts a model too
large for this machine's memory needs no more of it than one tensor."""

from __future__ import annotations

import warnings

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from archscale.checkpoint.place import Place
from archscale.checkpoint.reasons import why_not_read
from archscale.checkpoint.writer import reader_of
from archscale.errors import CheckpointError

# What is unpickled from damaged bytes may raise anything; DCP wraps it in what is no Exception.
UNREADABLE = (CheckpointException, Exception)
WEIGHTS, EMA = "model.", "ema."  # how `saving` begins the names of weights and of their average


class StoredWeights:
    """The weights of a checkpoint directory.

    Args:
        ema: their running average (`training.ema`) in place of them.

    Attributes:
        shapes: of every weight, by parameter name.

    Raises:
        CheckpointError: no checkpoint of this format, a damaged one, or one without the average.
    """

    def __init__(self, path: Place, *, ema: bool = False):
        self._path, self._prefix = path, EMA if ema else WEIGHTS
        try:
            self._reader = reader_of(path)
            metadata = self._reader.read_metadata()
            # Read once, not for every tensor.
            self._reader.read_metadata = lambda *_, **__: metadata  # type: ignore[method-assign]
            self._stored = {
                name.removeprefix(self._prefix): tensor
                for name, tensor in metadata.state_dict_metadata.items()
                if name.startswith(self._prefix) and isinstance(tensor, TensorStorageMetadata)
            }
            self.shapes = {name: tuple(tensor.size) for name, tensor in self._stored.items()}
        except UNREADABLE as error:
            raise self._unreadable(error) from error
        if ema and not self.shapes:
            raise CheckpointError(
                "it has no running average of the weights (training.ema)",
                str(path),
                "leave out --ema, or name a checkpoint of a run that keeps one",
            )

    def read(self, name: str) -> Tensor:
        """The whole weight, on the CPU.

        Raises:
            CheckpointError: damaged.
        """
        stored = self._stored[name]
        try:
            weight = torch.empty(stored.size, dtype=stored.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is ")
                content = {f"{self._prefix}{name}": weight}
                dcp.load(content, storage_reader=self._reader, no_dist=True)
        except UNREADABLE as error:
            raise self._unreadable(error) from error
        return weight

    def _unreadable(self, error: BaseException) -> CheckpointError:
        cause, remedy = why_not_read(error, "name another checkpoint")
        return CheckpointError(f"cannot read the weights: {cause}", str(self._path), remedy)
