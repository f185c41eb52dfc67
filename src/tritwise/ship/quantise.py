"""Float matrices in few bits: one scale a row, its clip searched by least squares.

For every row each clip in QUANTILES of |w| is tried, the scale being clip / (2**(bits-1) - 1), rounded to float16 first
because that is what ships; the one with the least squared error is kept. What is no large matrix stays float16.

Shape suffixes: R rows, C columns.
"""

import torch
from torch import Tensor

QUANTILES = (0.9999, 0.99995, 0.99999, 0.999995, 0.999999)
BASELINE_QUANTILE = 0.9999984  # the one clip of the challenge's baseline recipe
SMALL = 65_536  # numbers in a tensor, up to which it stays float16
_LEAST = 1e-12  # a larger floor would turn the rows of small numbers into zeros


def quantise_rows(w_RC: Tensor, bits: int, quantiles: tuple[float, ...] = QUANTILES) -> tuple[Tensor, Tensor]:
    """float32 [R, C] -> codes int8 [R, C] and scales float16 [R, 1]. bits: 2 … 8."""
    most, w_RC = 2 ** (bits - 1) - 1, w_RC.float()
    ordered_RC = w_RC.abs().sort(dim=1).values
    best = torch.full((w_RC.shape[0], 1), torch.inf, device=w_RC.device)
    codes, scales = torch.zeros_like(w_RC, dtype=torch.int8), torch.zeros_like(best, dtype=torch.float16)
    for quantile in quantiles:
        place = quantile * (w_RC.shape[1] - 1)
        low = int(place)
        clip = torch.lerp(ordered_RC[:, low], ordered_RC[:, min(low + 1, w_RC.shape[1] - 1)], place - low)
        scale = (clip[:, None] / most).to(torch.float16)
        code_RC = (w_RC / scale.float().clamp_min(_LEAST)).round_().clamp_(-most, most)
        error = (code_RC * scale.float() - w_RC).square().sum(dim=1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        codes, scales = torch.where(better, code_RC.to(torch.int8), codes), torch.where(better, scale, scales)
    return codes, scales


def restore_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [R, C] of codes int8 [R, C] and scales float16 [R, 1]."""
    return codes.to(torch.float32) * scales.to(torch.float32)
