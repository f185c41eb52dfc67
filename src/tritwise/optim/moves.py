"""The moves of a step as CUDA graphs: what follows the last gradient, with no launch left to Python but the graph's.

Moving a model of a hundred million weights is some thousand short kernels. Asked for one by one they take ten times as
long as they run, whatever forward and backward are made of. A recording serves every step at which the same layers
move; what changes from step to step lies on the device (`Live`).
"""

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from tritwise.nn import TritModule
from tritwise.ops import gpu

Flips = dict[TritModule, Tensor]


class RecordedMoves:
    """Makes the moves of a step, and from the second time on out of a recording.

    `flips` of what was recorded are written anew by every replay. What is computed in between stays allocated, about 10
    bytes for each weight that moves in one call; recordings of one version share that memory.
    """

    def __init__(self, device: torch.device) -> None:
        self._side = torch.cuda.Stream(device)
        self._go = torch.zeros((), dtype=torch.bool, device=device)
        self._made: dict[Hashable, tuple[torch.cuda.CUDAGraph, gpu.Shelf, Flips] | None] = {}
        self._version, self._pool = -1, None

    def make(
        self,
        key: Hashable,
        version: int,
        go: Tensor,
        move: Callable[[Tensor], Flips],
        recording: Callable[[], AbstractContextManager[None]],
        tell: Callable[[], None],
    ) -> Flips:
        """The flips of each layer.

        key: moves of one key launch the same kernels on the same tensors. version: all recordings are of one. go: bool
        0-d, whether anything moves. move: makes the moves; within `recording()` it reads from the device what changes
        from step to step, and `tell()` writes it there.
        """
        if version != self._version:
            self._made.clear()
            self._version, self._pool = version, None
        if key not in self._made:
            # The first time kernels are compiled and state is made; on the stream that records, so that libraries have
            # what they need there, and reading what a recording reads: no kernel is loaded during one.
            self._made[key] = None
            with self._aside():
                tell()
                with recording():
                    return move(go)
        self._go.copy_(go)
        if (made := self._made[key]) is None:
            graph, shelf = torch.cuda.CUDAGraph(), gpu.Shelf(self._go.device)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            with self._aside(), recording(), shelf, gpu.recorded(graph, self._pool, self._side):
                flips = move(self._go)
            shelf.fill()
            made = self._made[key] = graph, shelf, flips
        tell()
        made[0].replay()
        return dict(made[2])

    @contextmanager
    def _aside(self) -> Iterator[None]:
        here = torch.cuda.current_stream(self._go.device)
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            yield
        here.wait_stream(self._side)
