"""The passes of a step on a GPU: one kernel over all tensors for each, which reads and writes each
number once.

    M ← μ M + G, and M̂ = μ M + G to what travels                   `momentum_kernel`
    Q from what comes back, with ‖W‖², ‖Q‖² and ⟨W, Q⟩              `return_kernel`, `sum_kernel`
    W ← keep · W − apply · Q, or M ← 0 where M̂ was not finite       `update_kernel`
    Adam's moments, and W ← keep · W − η Q                          `adam_kernel`

M̂ is nowhere stored but in what travels. Q lies in the memory of the gradient that it came from, in
the dtype in which it travelled: row by row where the gradient's rows begin, so that it never covers
a gradient that is still to be read. The kernels (`pass_kernels.py`) are written in Triton; where
they do not run, or tensors have dtypes that they do not take, the passes are those of `passes.py`.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from archscale.optim.coefficients import InnerProducts
from archscale.optim.exchange import Block, Moves, Part
from archscale.optim.layout import Group, Layout, StepPlan
from archscale.optim.pass_check import wrong_kernel
from archscale.optim.pass_tables import Table, Tables, make_table, make_tables
from archscale.optim.passes import Passes, Shards, flat_moments
from archscale.optim.state import State

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of weights, gradients and moments


class FusedPasses(Passes):
    """Passes of one kernel each; those that have none here are `Passes`'s."""

    def __init__(
        self,
        layout: Layout,
        state: State,
        plan: StepPlan,
        shards: Shards,
        kernels: Any,
    ):
        super().__init__(layout, state, plan, shards)
        self.updated: set[int] = set()  # parameters whose weights are up to date already
        self.kernels = kernels
        self.ends: Any = self
        if plan.tables is None:
            plan.tables = make_tables(layout, plan)
        self.tables: Tables = plan.tables
        self.pointers, self.aligned = self._pointers()
        self.partial = torch.empty(self.tables.slots, 3, device=layout.device)
        self.coefficients = self._coefficients()

    def _pointers(self) -> tuple[Tensor, bool]:
        """Addresses by parameter, (parameters, 6) int64, and whether all are multiples of 16."""
        rows = [[0] * 6 for _ in self.layout.params]
        for i in self.shards.weights:
            W, G, *moments = (tensor.data_ptr() for tensor in self._tensors(i))
            stored = [tensor.data_ptr() for tensor in self._stored_moments(i)]
            rows[i] = [W, G, *[*moments, 0][:2], *[*stored, 0][:2]]
        aligned = not any(pointer % 16 for row in rows for pointer in row)
        return self.layout.on_device("pointers", rows, torch.int64), aligned

    def _coefficients(self) -> Tensor:
        """(μ, 1 for Nesterov) by parameter."""
        options = [group.options for group in self.layout.group_of]
        rows = [[own["momentum"], float(own["nesterov"])] for own in options]
        return self.layout.on_device("momentum", rows, torch.float32)

    # --- M̂, and Q of the elementwise rules

    def directions(self) -> None:
        """Moments and Q of the elementwise rules. Of the others only the momentum that another rank
        sends, too: `pack` comes to the rest."""
        for table in self.tables.unsent:
            self.move_momentum(table, None)
        for group in self.layout.groups:
            if group.rule.elementwise:
                self.elementwise_directions(group, self.members(group))

    def pack(self, moves: Moves, buffer: Tensor) -> None:
        """M ← μ M + G, and M̂ into the wire or the stage."""
        self.move_momentum(self.tables.of_moves[id(moves)], buffer)

    def elementwise_directions(self, group: Group, members: Sequence[int]) -> None:
        shards, lr = self.shards, group.options["lr"]
        present = [i for i in members if i not in shards.absent]
        plain = isinstance(lr, Tensor) or group.rule.direction != "adam" or not present
        if plain or not _take(*(self._tensors(i) for i in present)):
            super().elementwise_directions(group, members)
            return
        super().elementwise_directions(group, [i for i in members if i in shards.absent])
        beta1, beta2 = group.options["betas"]
        counts = self.count_steps(present)
        steps = torch.stack([counts[i] for i in present])
        corrections = torch.empty(len(self.layout.params), 2, device=steps.device)
        corrections[self.layout.indices(present)] = torch.stack(
            [1 - beta1**steps, (1 - beta2**steps).sqrt()], dim=1
        )
        self.adam(group, self._whole(present), corrections)
        if not group.has_views:
            self.updated.update(present)

    def members(self, group: Group) -> list[int]:
        """Those that are not up to date yet."""
        return [i for i in super().members(group) if i not in self.updated]

    def _tensors(self, param: int) -> list[Tensor]:
        shards = self.shards
        moments = shards.moments[param].values()
        return [shards.weights[param], shards.directions[param], *moments]

    def _stored_moments(self, param: int) -> list[Tensor]:
        """The moments in the state, also where a step goes on with copies."""
        if param in self.shards.absent:
            return list(flat_moments(self.layout, self.state, param).values())
        return list(self.shards.moments[param].values())

    def _whole(self, params: Sequence[int]) -> Table:
        """A table of all elements of some parameters; kept with the plan."""
        key = tuple(params)
        if key not in self.tables.whole:
            sizes = [(i, self.shards.weights[i].numel()) for i in params]
            blocks = [(i, Block(0, 1, size, size)) for i, size in sizes if size]
            table, _ = make_table([Part(i, block, block, 0, False) for i, block in blocks])
            table.chunks = table.chunks.to(self.layout.device)
            self.tables.whole[key] = table
        return self.tables.whole[key]

    # --- after the orthogonalization

    def unpack(self, moves: Moves, buffer: Tensor) -> None:
        """Q into the memory of the gradients, and its partial inner products."""
        self.take_direction(self.tables.of_moves[id(moves)], buffer)

    def inner_products(self, products: InnerProducts) -> None:
        """Add up what `unpack` has measured, and measure what did not travel."""
        assert self.tables.staying is not None
        self.take_direction(self.tables.staying, None)
        self.sum_products(products)

    def update(self, keep: Tensor, apply: Tensor, bad: Tensor) -> None:
        assert self.tables.staying is not None
        for part, table in zip(self.plan.orthogonalizations, self.tables.returned):
            self.move_weights(table, keep, apply, bad, part.method.wire_dtype)
        self.move_weights(self.tables.staying, keep, apply, bad, None)

    # --- launches

    def move_momentum(self, table: Table, buffer: Tensor | None) -> None:
        """See `momentum_kernel`; without a buffer M̂ goes nowhere."""
        if not len(table.chunks):
            return
        _, G, M = self._tensors(table.parts[0].param)
        self._launch(
            "momentum_kernel",
            len(table.chunks),
            table.chunks,
            self.pointers,
            self.coefficients,
            self.coefficients if buffer is None else buffer,
            G_TYPE=self._type(G.dtype),
            M_TYPE=self._type(M.dtype),
            PACK=buffer is not None,
            ROWS=table.apart,
            **self._common(table),
        )

    def take_direction(self, table: Table, buffer: Tensor | None) -> None:
        """See `return_kernel`; without a buffer Q is where the gradient was already."""
        if not len(table.chunks):
            return
        W, G = self._tensors(table.parts[0].param)[:2]
        Q = direction_dtype(G.dtype, None if buffer is None else buffer.dtype)
        self._launch(
            "return_kernel",
            len(table.chunks),
            table.chunks,
            self.pointers,
            self.partial if buffer is None else buffer,
            self.partial,
            W_TYPE=self._type(W.dtype),
            Q_TYPE=self._type(Q),
            RATIO=G.dtype.itemsize // Q.itemsize,
            UNPACK=buffer is not None,
            ROWS=table.apart,
            **self._common(table),
        )

    def sum_products(self, products: InnerProducts) -> None:
        """See `sum_kernel`."""
        ranges = self.tables.ranges
        assert ranges is not None
        if len(ranges):
            sums = products.w, products.q, products.p
            self._launch("sum_kernel", len(ranges), ranges, self.partial, *sums, BLOCK=256)

    def move_weights(
        self, table: Table, keep: Tensor, apply: Tensor, bad: Tensor, wire: torch.dtype | None
    ) -> None:
        """See `update_kernel`. wire: dtype in which Q travelled; None: it did not."""
        if not len(table.chunks):
            return
        W, G, *moments = self._tensors(table.parts[0].param)
        Q = direction_dtype(G.dtype, wire)
        self._launch(
            "update_kernel",
            len(table.chunks),
            table.chunks,
            self.pointers,
            keep,
            apply,
            bad.to(torch.uint8),
            W_TYPE=self._type(W.dtype),
            Q_TYPE=self._type(Q),
            FIRST_TYPE=self._type(moments[0].dtype),
            SECOND_TYPE=self._type(moments[-1].dtype),
            SECOND=len(moments) > 1,
            RATIO=G.dtype.itemsize // Q.itemsize,
            ROWS=table.apart,
            **self._common(table),
        )

    def adam(self, group: Group, table: Table, corrections: Tensor) -> None:
        """See `adam_kernel`."""
        if not len(table.chunks):
            return
        options, types = group.options, self._tensors(table.parts[0].param)
        beta1, beta2 = options["betas"]
        W, G, M, V = (self._type(tensor.dtype) for tensor in types)
        decay = options["weight_decay"] if group.rule.decay == "decoupled" else 0.0
        self._launch(
            "adam_kernel",
            len(table.chunks),
            table.chunks,
            self.pointers,
            corrections,
            # Triton would compile anew for a whole number.
            *map(float, (options["lr"], 1 - options["lr"] * decay)),
            *map(float, (1 - beta1, beta2, 1 - beta2, options["adam_eps"])),
            W_TYPE=W,
            G_TYPE=G,
            M_TYPE=M,
            V_TYPE=V,
            UPDATE=not group.has_views,
            **self._common(table),
        )

    def _launch(self, name: str, programs: int, *args: Any, **constants: Any) -> None:
        with torch.cuda.device_of(self.partial):  # Triton launches on the current device
            getattr(self.kernels, name)[(programs,)](*args, **constants)

    def _common(self, table: Table) -> dict[str, Any]:
        return {"ALIGN": 16 if table.aligned and self.aligned else 1, "BLOCK": self.kernels.BLOCK}

    def _type(self, dtype: torch.dtype) -> Any:
        return getattr(self.kernels.tl, str(dtype).removeprefix("torch."))


def direction_dtype(gradient: torch.dtype, wire: torch.dtype | None) -> torch.dtype:
    """In which Q lies in the memory of a gradient: that in which it travelled, where it has
    room."""
    return gradient if wire is None or wire.itemsize > gradient.itemsize else wire


def _take(*tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel takes these tensors of some parameters: one set of dtypes, known ones."""
    kinds = {tuple(tensor.dtype for tensor in own) for own in tensors}
    return len(kinds) == 1 and all(dtype in DTYPES for dtype in next(iter(kinds)))


def choose_passes(layout: Layout, state: State, plan: StepPlan, shards: Shards) -> Passes:
    """The passes of a step: fused ones where their kernels run and take the tensors."""
    found = kernels() if layout.device.type == "cuda" else None
    if found is not None and takes(layout, shards):
        return FusedPasses(layout, state, plan, shards, found)
    return Passes(layout, state, plan, shards)


def takes(layout: Layout, shards: Shards) -> bool:
    """Whether all matrices of each kind of rule have one set of dtypes that the kernels take."""
    if layout.dtype != torch.float32:
        return False
    for elementwise in (False, True):
        own = [i for i in shards.weights if layout.group_of[i].has_views]
        own = [i for i in own if layout.group_of[i].rule.elementwise == elementwise]
        rows = [(shards.weights[i], shards.directions[i], *shards.moments[i].values()) for i in own]
        if own and not _take(*rows):
            return False
    return True


@functools.cache
def kernels() -> ModuleType | None:
    """The module of kernels, where they run and give what PyTorch gives; tried once."""
    if torch.version.cuda is None:
        return None
    try:
        from archscale.optim import pass_kernels
    except ImportError:  # Triton comes with PyTorch's CUDA wheels for Linux, not with others
        return None
    try:
        reason = wrong_kernel(pass_kernels, torch.device("cuda", torch.cuda.current_device()))
    except Exception as error:  # no C compiler, say: PyTorch's operators are slower, not different
        reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return pass_kernels
    warnings.warn(
        f"the optimizer's kernels do not run here, PyTorch's operators take their place: {reason}",
        stacklevel=2,
    )
    return None
