"""A micro-batch on its way from the host to the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from archscale.data.loader import Batch
from archscale.model.segments import Segments


class Placed(NamedTuple):
    """What a model's forward pass is given, on the device: inputs and targets (B, T) int64, and
    what tells documents apart, as of `Transformer.forward`."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor | Segments | None


def place(batch: Batch, module: nn.Module | None, device: torch.device) -> Placed:
    """Move a micro-batch; from pinned memory on CUDA, because a copy from pageable memory waits.

    Where documents lie is read on the host, where nothing has to be waited for.

    Args:
        module: the model, where it is at hand; its method `separate` says how it wants documents.
    """

    def moved(tensor: Tensor) -> Tensor:
        if device.type != "cuda":
            return tensor.to(device)
        return tensor.pin_memory().to(device, non_blocking=True)

    documents: Tensor | Segments | None = batch.documents
    separate = getattr(module, "separate", None)
    if separate is not None:
        documents = separate(batch.inputs, batch.documents, device)
    if isinstance(documents, Segments):
        documents = documents._replace(bounds=moved(documents.bounds))
    elif documents is not None:
        documents = moved(documents)
    return Placed(moved(batch.inputs), moved(batch.targets), documents)
