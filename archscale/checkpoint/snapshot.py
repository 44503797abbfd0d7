"""A private copy of the state, which training may change the moment after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from archscale.checkpoint.fragments import Stored


class Snapshot:
    """Copies tensors into host memory that is kept and used again: the first touch of fresh memory
    costs several times what the copy itself does.

    From a GPU they are copied into pinned memory on a stream of their own, beside whatever the GPU
    does; `before_changes` makes the next change wait.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._stream: Any = None  # of the GPU, once there was a tensor on one
        self._copied: Any = None  # its event after the last copy
        self._awaited = True  # by the stream that changes the tensors

    def take(self, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies by the same names, on the CPU, valid until the next call. Those of a GPU are
        complete after `wait`."""
        used: set[str] = set()

        def copy(name: str, tensor: Tensor) -> Tensor:
            used.add(name)
            return self._copy(name, tensor)

        copies = {
            name: value.copied(lambda box, piece, name=name: copy(f"{name} {box}", piece))  # type: ignore[misc]
            if isinstance(value, Stored)
            else copy(name, value)
            for name, value in content.items()
        }
        self._buffers = {name: self._buffers[name] for name in used}
        if self._stream is not None:
            self._copied, self._awaited = self._stream.record_event(), False
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        if not tensor.is_cuda:
            return buffer.copy_(tensor)
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            buffer.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # it may be freed before it is copied
        return buffer

    @property
    def from_gpu(self) -> bool:
        return self._stream is not None

    def before_changes(self) -> None:
        """The GPU changes what was copied only after it has been copied; the host does not wait."""
        if not self._awaited:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)
            self._awaited = True

    def wait(self) -> None:
        """Until the last copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()
