"""The second half of a TritOptimizer's step: momenta become directions, and directions move registers and scales."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tritwise import ops
from tritwise.nn import TritModule
from tritwise.ops import gpu
from tritwise.ops.update.reference import EXPONENT_FLOOR
from tritwise.optim.book import NO_STEP, Book
from tritwise.optim.groups import reach
from tritwise.optim.rows import Rows, in_front
from tritwise.optim.scales import ScaleMoves
from tritwise.registers import Key, make_key

# Streams of randomness of one tensor at one step, of which gradients have others (consuming.py).
_MOVE, _MOVE_SCALE, _MOVE_COLUMN = 0, 1, -1

# Weights that move in one call on a GPU: their directions are held at once, about 10 bytes each.
_TOGETHER = 1 << 25

# What layers must have in common to move in one call; each has its own rate.
_ALIKE = ("direction", "steps", "row_memory", "compact", "interval", "seed", "step")


class Moving(Book):
    """Moves layers, on a GPU as many in one call as there is memory for."""

    def _move_all(self, go: Tensor | None) -> dict[TritModule, Tensor]:
        """Move every layer whose turn it is; returns the flips of each."""
        flips: dict[TritModule, Tensor] = {}
        lots = list(self._lots())
        keyed = [layer for lot in lots for layer in lot if not self._settings_of(layer.register)["compact"]]
        places = [self._place(layer, _MOVE) for layer in keyed]
        keys, scales = self._keys(places) if places else [], ScaleMoves()
        for lot in lots:
            own = 0 if self._settings_of(lot[0].register)["compact"] else len(lot)
            flips |= self._move(lot, scales, keys[:own], go)
            keys = keys[own:]
        if scales.groups:
            if self._live is not None and self._records:
                octaves: Sequence[float] | Tensor = self._live_rates(scales.groups, 1)
            else:
                octaves = [reach(self.param_groups[index])[1] for index in scales.groups]
            scales.make(octaves, self._keys(scales.places), go)
        return flips

    def _lots(self) -> Iterator[list[TritModule]]:
        """The layers that move at this step, in lots that move in one call: those of groups with like settings."""
        waiting: dict[tuple[Any, ...], list[TritModule]] = {}
        for group in self.param_groups:
            alike = tuple(group[name] for name in _ALIKE)
            for register in group["params"]:
                if register not in self._received or not self._moves_now(register):
                    continue
                layer = self._layers[register]
                if (layer.sparse and not self._in_place(layer)) or self._moves_alone(register):
                    yield [layer]
                    continue
                lot = waiting.setdefault(alike, [])
                if lot and sum(other.register.numel() for other in lot) + register.numel() > _TOGETHER:
                    yield lot
                    lot = waiting[alike] = []
                lot.append(layer)
        yield from waiting.values()

    @staticmethod
    def _moves_alone(register: Tensor) -> bool:
        return not register.is_cuda

    def _live_rates(self, groups: Sequence[int], which: int) -> Tensor:
        """The rates of these groups on the device, of registers (0) or of scales (1)."""
        assert self._live is not None
        rates = self._live.rates[:, which]
        if len(set(groups)) == 1:
            return rates[groups[0]].expand(len(groups))
        return rates.index_select(0, gpu.upload([groups], self._live.device)[0])

    def _move(
        self, layers: list[TritModule], scales: ScaleMoves, keys: Sequence[Key] | Tensor, go: Tensor | None
    ) -> dict[TritModule, Tensor]:
        """Move the registers of layers of like settings, or of one sparse layer whose rows are gathered; their scales
        go into `scales`. keys: one for each, unless they are compact. Returns the flips."""
        indices = [self._group_of[layer.register] for layer in layers]
        group, registers = self.param_groups[indices[0]], [layer.register for layer in layers]
        states = [self._state_of(layer, scales=False) for layer in layers]
        exponents = [s["row_exponent"] for s in states]
        levels = [s["row_level"] for s in states] if group["row_memory"] else []
        if group["compact"]:
            # Without the exponents of rows, which the direction takes by themselves, nothing can under- or overflow.
            level = [torch.zeros_like(e) for e in exponents]
            momenta = ops.momentum_of_many(registers, level, [s["group_exponent"] for s in states])
        else:
            momenta = [s["momentum"] for s in states]
            if group["nesterov"]:
                momenta, exponents = (list(part) for part in zip(*(self._lookahead[r] for r in registers), strict=True))
        rows: dict[int, Rows] = {}  # of sparse layers, by their number here
        for number, layer in enumerate(layers):
            if layer.sparse:
                if (used := self._rows(layer, self._touched[layer.register])) is None:
                    return {}  # it came alone
                rows[number] = used
        tables = registers, levels
        registers, momenta, exponents, levels = in_front(rows, registers, momenta, exponents, levels)
        for number, used in rows.items():  # rows that are not in use have no direction, and no say
            used.blank(momenta[number], 0)
            used.blank(exponents[number], EXPONENT_FLOOR)
        blocks, how = [layer.blocks for layer in layers], (group["direction"], group["steps"])
        directions = ops.direction_many(momenta, exponents, *how, blocks, levels, group["row_memory"], go)
        for number, used in rows.items():
            used.scale(directions[number])
        if self._live is not None and self._records:
            rates: Sequence[float] | Tensor = self._live_rates(indices, 0)
        else:
            rates = [reach(self.param_groups[index])[0] for index in indices]
        if group["compact"]:
            phase = self._phase(group["step"]) // group["interval"]
            keys = [make_key(group["seed"], NO_STEP, self._number[layer.register], _MOVE) for layer in layers]
            flips = ops.move_nibbles_many(registers, directions, rates, keys, phase, go)
        else:
            flips = ops.move_registers_many(registers, directions, rates, keys, go=go)
        for changed, own in zip((registers, levels), tables, strict=True):
            for number, used in rows.items() if changed else ():
                used.put_back(changed[number], own[number])
        for layer, index in zip(layers, indices, strict=True):
            if self._learns_scale(layer):
                places = [self._place(layer, stream) for stream in (_MOVE_SCALE, _MOVE_COLUMN)]
                scales.add(layer, self.state[layer.register], index, places, self._touched.get(layer.register))
        return dict(zip(layers, flips, strict=True))
