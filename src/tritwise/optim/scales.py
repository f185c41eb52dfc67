"""How scale exponents learn, those of rows and those of columns: momentum like a weight's, directions of unit RMS.

The gradient of a scale is a sum over the gradient of the weights that share it, so it is there as soon as that is, and
autograd knows nothing of scales. A step of an exponent is 9 %; what is less is kept as evidence, in 1/256 steps.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tritwise import ops
from tritwise.nn import TritModule
from tritwise.ops.update.reference import EXPONENT_FLOOR
from tritwise.registers import Key, Place

KINDS = ("scale", "column")
"""Scales of rows (or groups in them) and of columns, in the order of `TritModule.exponents`: also the state's names."""

State = dict[str, Tensor]


class ScaleSet(NamedTuple):
    """Scale exponents that one direction moves, int8 [N] seen flat, and what the optimizer keeps of them."""

    exponent: Tensor
    momentum: Tensor
    row_exponent: Tensor
    evidence: Tensor


def make_scale_state(layer: TritModule, state: State) -> None:
    """Put what the scales of `layer` need into its state, where it is missing: all zeros."""
    for kind, exponent in zip(KINDS, layer.exponents(), strict=False):
        if f"{kind}_momentum" not in state:
            flat = exponent.reshape(1, -1)
            state[f"{kind}_momentum"], state[f"{kind}_evidence"] = torch.zeros_like(flat), torch.zeros_like(flat)
            state[f"{kind}_row_exponent"] = torch.full_like(flat[:, :1], EXPONENT_FLOOR)


def scale_sets(layer: TritModule, state: State) -> list[ScaleSet]:
    """The scales of `layer`: of its rows, then of its columns where they have some."""
    return [
        ScaleSet(exponent, *(state[f"{kind}_{part}"] for part in ("momentum", "row_exponent", "evidence")))
        for kind, exponent in zip(KINDS, layer.exponents(), strict=False)
    ]


def scale_grads(layers: Sequence[TritModule], grads: Sequence[Tensor]) -> list[list[Tensor]]:
    """Gradients by the logarithms of the scales, of each layer in the order of `scale_sets`: float32 [1, N] each.

    grads: dL/dW float32 [rows, columns] of each layer. All layers take a few launches on a GPU.
    """
    found: list[list[Tensor]] = [[] for _ in layers]
    for kind, run in enumerate((ops.linear_scale_grads, ops.linear_column_grads)):
        own = [number for number, layer in enumerate(layers) if len(layer.exponents()) > kind]
        if own:
            learn = [layers[number] for number in own]
            given = [layer.register for layer in learn], [layer.exponent for layer in learn]
            how = [layer.group for layer in learn], [layer.lead for layer in learn]
            parts = run([grads[number] for number in own], *given, *how)
            for number, part in zip(own, parts, strict=True):
                found[number].append(part.view(1, -1))
    return found


class ScaleMoves:
    """The scales that move at a step, gathered layer by layer, to be moved all at once: they are few."""

    def __init__(self) -> None:
        self._sets: list[ScaleSet] = []
        self._still: list[Tensor | None] = []
        self.places: list[Place] = []
        """Of the keys that `make` takes."""
        self.groups: list[int] = []
        """Whose octaves it takes."""

    def add(self, layer: TritModule, state: State, group: int, places: Sequence[Place], used_V: Tensor | None) -> None:
        """The scales of `layer`. places: one for each of `scale_sets`, further ones are left out; used_V: bool, the
        rows of a sparse layer that move, or None for all; columns always do."""
        sets = scale_sets(layer, state)
        self._sets += sets
        self.places += places[: len(sets)]
        self.groups += [group] * len(sets)
        still = None
        if used_V is not None:
            still = (~used_V)[:, None].expand(layer.exponent.shape).reshape(-1)
        self._still += [still, *[None] * (len(sets) - 1)]

    def make(self, octaves: Sequence[float] | Tensor, keys: Sequence[Key] | Tensor, go: Tensor | None) -> None:
        """exponent <- exponent - 8 * octaves * u, u being the momentum over its RMS. octaves, keys: one for each set,
        or on the device: see `tritwise.ops.move_scales_many`."""
        exponents, momenta, _, evidences = zip(*self._sets, strict=True)
        still = None
        if any(part is not None for part in self._still):
            none = [torch.zeros(e.numel(), dtype=torch.bool, device=e.device) for e in exponents]
            parts = [n if part is None else part.view(-1) for n, part in zip(none, self._still, strict=True)]
            still = torch.cat(parts)
        ops.move_scales_many(exponents, evidences, momenta, octaves, keys, still, go)
