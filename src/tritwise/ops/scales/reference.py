"""The oracle of moving scales, in torch: all sets as one vector, for they are few."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops.direction.reference import TINY
from tritwise.registers import Key, move_exponents, random_bits16_many

FAR = 8.0
"""The most that u is. Few rows of a large table have most of its gradient, and u of theirs would be up to the root of
the number of scales; a scale that moves by an octave a step runs away (docs/LOG.md, 2026-11-29)."""


def move_scales_many(
    exponents: Sequence[Tensor],
    evidences: Sequence[Tensor],
    momenta: Sequence[Tensor],
    octaves: Sequence[float],
    keys: Sequence[Key],
    still: Tensor | None,
    go: Tensor | None,
    live_octaves: Tensor | None = None,
    live_keys: Tensor | None = None,
) -> None:
    """See `tritwise.ops.scales.move_scales_many`."""
    device, counts = exponents[0].device, [exponent.numel() for exponent in exponents]
    u_N = torch.cat([_unit_rms(momentum.reshape(-1)) for momentum in momenta])
    if still is not None:
        u_N = u_N.masked_fill(still, 0.0)
    if go is not None:
        u_N = torch.where(go, u_N, 0.0)
    octaves_T = torch.tensor(octaves, dtype=torch.float64, device=device) if live_octaves is None else live_octaves
    octaves_N = torch.cat([one.expand(count) for one, count in zip(octaves_T.unbind(), counts, strict=True)])
    exponent_N = torch.cat([exponent.reshape(-1) for exponent in exponents])
    evidence_N = torch.cat([evidence.reshape(-1) for evidence in evidences])
    bits_N = random_bits16_many(counts, keys if live_keys is None else live_keys, device)
    moved = move_exponents(exponent_N, evidence_N, u_N, -octaves_N, bits_N)
    for tensors, values in zip((exponents, evidences), moved, strict=True):
        views = [part.view(tensor.shape) for tensor, part in zip(tensors, values.split(counts), strict=True)]
        torch._foreach_copy_(list(tensors), views)  # pyright: ignore[reportPrivateImportUsage]


def _unit_rms(momentum_N: Tensor) -> Tensor:
    """int8 [N] over the root of its mean square, float32, at most FAR. The sum is one of integers, so every backend has
    its bits."""
    total = momentum_N.to(torch.int64).square().sum().to(torch.float32)
    # The divisor is a tensor: CUDA multiplies by the reciprocal of a plain number, which is not the same float.
    mean = total / torch.full_like(total, momentum_N.numel())
    return (momentum_N.to(torch.float32) / (mean.sqrt() + TINY)).clamp_(-FAR, FAR)
