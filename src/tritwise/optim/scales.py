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
from tritwise.registers import Key, move_exponents, random_bits16_many

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


def scale_grads(layer: TritModule, grad: Tensor) -> list[Tensor]:
    """Gradients by the logarithms of the scales, in the order of `scale_sets`: float32 [1, N] each.

    grad: dL/dW float32 [rows, columns].
    """
    how = (ops.linear_scale_grad, ops.linear_column_grad)
    given = (grad, layer.register, layer.exponent, layer.group)
    return [run(*given).view(1, -1) for run, _ in zip(how, layer.exponents(), strict=False)]


def move_scales(
    sets: Sequence[ScaleSet],
    octaves: float | Tensor,
    keys: Sequence[Key] | Tensor,
    *,
    still: Tensor | None = None,
    go: Tensor | None = None,
) -> None:
    """exponent <- exponent - 8 * octaves * u for every set in place, u being its momentum over that one's RMS.

    All are moved as one vector, for they are few. octaves: of a step, or a float64 0-d tensor. keys: one for each set.
    still: bool [N] over all sets, who stays; go: bool 0-d on the device, False if nothing moves.
    """
    u_N = torch.cat(
        [u.view(-1) for u in ops.direction_many([s.momentum for s in sets], [s.row_exponent for s in sets], "rms")]
    )
    if still is not None:
        u_N = u_N.masked_fill(still, 0.0)
    if go is not None:
        u_N = torch.where(go, u_N, 0.0)
    exponent_N = torch.cat([s.exponent.view(-1) for s in sets])
    evidence_N = torch.cat([s.evidence.view(-1) for s in sets])
    bits_N = random_bits16_many([s.exponent.numel() for s in sets], keys, u_N.device)
    moved = move_exponents(exponent_N, evidence_N, u_N, -octaves, bits_N)
    for tensors, values in zip(([s.exponent for s in sets], [s.evidence for s in sets]), moved, strict=True):
        parts = values.split([tensor.numel() for tensor in tensors])
        views = [part.view(tensor.shape) for tensor, part in zip(tensors, parts, strict=True)]
        torch._foreach_copy_(tensors, views)  # pyright: ignore[reportPrivateImportUsage]
