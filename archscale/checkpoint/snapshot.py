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

    @torch.no_grad()
    def take(self, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies by the same names, on the CPU, valid until the next call. Those of a GPU are
        complete after `wait`."""
        sources: dict[str, Tensor] = {}
        buffers: dict[str, Tensor] = {}

        def copy(name: str, tensor: Tensor) -> Tensor:
            sources[name], buffers[name] = tensor, self._buffer(name, tensor)
            return buffers[name]

        copies = {
            name: value.copied(lambda box, piece, name=name: copy(f"{name} {box}", piece))  # type: ignore[misc]
            if isinstance(value, Stored)
            else copy(name, value)
            for name, value in content.items()
        }
        self._buffers = buffers
        self._copy(sources)
        return copies

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        """Memory for a copy: that of the last copy of this name, if it fits."""
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        return buffer

    def _copy(self, sources: Mapping[str, Tensor]) -> None:
        """Into the buffers of the same names; in few calls, since the host's part of it holds
        training up."""
        on_host = [name for name, tensor in sources.items() if not tensor.is_cuda]
        on_gpu = [name for name, tensor in sources.items() if tensor.is_cuda]
        if on_gpu:
            device = sources[on_gpu[0]].device
            self._stream = self._stream or torch.cuda.Stream(device)
            self._stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(self._stream):
                for name in on_gpu:
                    self._buffers[name].copy_(sources[name], non_blocking=True)
                    sources[name].record_stream(self._stream)  # it may be freed before that
            self._copied, self._awaited = self._stream.record_event(), False
        if on_host:
            torch._foreach_copy_(
                [self._buffers[name] for name in on_host], [sources[name] for name in on_host]
            )

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
