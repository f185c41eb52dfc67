"""The second half of a TritOptimizer's step: momenta become directions, and directions move registers and scales."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tritwise import ops
from tritwise.nn import TritModule
from tritwise.ops import gpu
from tritwise.optim.book import NO_STEP, Book
from tritwise.optim.groups import reach
from tritwise.optim.scales import ScaleMoves
from tritwise.registers import Key, make_key

# Streams of randomness of one tensor at one step, of which gradients have others (consuming.py).
_MOVE, _MOVE_SCALE, _MOVE_COLUMN = 0, 1, -1

# Weights that move in one call on a GPU: their directions are held at once, about 10 bytes each.
_TOGETHER = 1 << 25


class Moving(Book):
    """Moves layers, on a GPU as many in one call as there is memory for."""

    def _move_all(self, go: Tensor | None) -> dict[TritModule, Tensor]:
        """Move every layer whose turn it is; returns the flips of each."""
        flips: dict[TritModule, Tensor] = {}
        lots = [(index, lot) for index, group in enumerate(self.param_groups) for lot in self._batches(group)]
        places = [self._place(layer, _MOVE) for index, lot in lots if not self._is_compact(index) for layer in lot]
        keys, scales = self._keys(places) if places else [], ScaleMoves()
        for index, lot in lots:
            if self._is_compact(index):
                flips |= self._move(index, lot, scales, [], go)
            else:
                flips |= self._move(index, lot, scales, keys[: len(lot)], go)
                keys = keys[len(lot) :]
        if scales.groups:
            if self._live is not None and self._records:
                groups = gpu.upload([scales.groups], self._live.device)[0]
                octaves = self._live.rates[:, 1].index_select(0, groups)
            else:
                octaves = [reach(self.param_groups[index])[1] for index in scales.groups]
            scales.make(octaves, self._keys(scales.places), go)
        return flips

    def _batches(self, group: dict[str, Any]) -> Iterator[list[TritModule]]:
        """The layers of a group that move at this step, in lots that move in one call."""
        batch: list[TritModule] = []
        for register in group["params"]:
            if register not in self._received or (group["step"] + self._number[register]) % group["interval"]:
                continue
            layer = self._layers[register]
            if layer.sparse or not register.is_cuda:
                yield [layer]
                continue
            if batch and sum(other.register.numel() for other in batch) + register.numel() > _TOGETHER:
                yield batch
                batch = []
            batch.append(layer)
        if batch:
            yield batch

    def _move(
        self,
        index: int,
        layers: list[TritModule],
        scales: ScaleMoves,
        keys: Sequence[Key] | Tensor,
        go: Tensor | None,
    ) -> dict[TritModule, Tensor]:
        """Move the registers of layers of a group that are all dense, or of one sparse layer; their scales go into
        `scales`. keys: one for each, unless the group is compact. Returns the flips."""
        group, registers = self.param_groups[index], [layer.register for layer in layers]
        states = [self._state_of(layer, scales=False) for layer in layers]
        exponents, rows = [s["row_exponent"] for s in states], None
        levels = [s["row_level"] for s in states] if group["row_memory"] else []
        if group["compact"]:
            # Without the exponents of rows, which the direction takes by themselves, nothing can under- or overflow.
            level = [torch.zeros_like(e) for e in exponents]
            momenta = ops.momentum_of_many(registers, level, [s["group_exponent"] for s in states])
        else:
            momenta = [s["momentum"] for s in states]
        if layers[0].sparse:
            rows = self._touched[registers[0]].nonzero()[:, 0]
            if not rows.numel():
                return {}
            registers, momenta, exponents = [registers[0][rows]], [momenta[0][rows]], [exponents[0][rows]]
            levels = [level[rows] for level in levels]
        blocks, how = [layer.blocks for layer in layers], (group["direction"], group["steps"])
        directions = ops.direction_many(momenta, exponents, *how, blocks, levels, group["row_memory"], go)
        if self._live is not None and self._records:
            rates: Sequence[float] | Tensor = self._live.rates[index, 0].expand(len(layers))
        else:
            rates = [reach(group)[0]] * len(layers)
        if group["compact"]:
            phase = self._phase(group["step"]) // group["interval"]
            keys = [make_key(group["seed"], NO_STEP, self._number[layer.register], _MOVE) for layer in layers]
            flips = ops.move_nibbles_many(registers, directions, rates, keys, phase, go)
        else:
            flips = ops.move_registers_many(registers, directions, rates, keys, go=go)
        if rows is not None:
            layers[0].register[rows] = registers[0]
            for state, level in zip(states, levels, strict=False):
                state["row_level"][rows] = level
        for layer in layers:
            if self._learns_scale(layer):
                places = [self._place(layer, stream) for stream in (_MOVE_SCALE, _MOVE_COLUMN)]
                scales.add(layer, self.state[layer.register], index, places, rows)
        return dict(zip(layers, flips, strict=True))
