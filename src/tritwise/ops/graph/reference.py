"""The oracle of message passing, in torch. Sums are taken in float32 (float64 for float64), whatever x's type is."""

import torch
from torch import Tensor


def edge_sum(x: Tensor, source: Tensor, target: Tensor, rows: int) -> Tensor:
    """y[r] = sum of x[source[e]] over the edges e with target[e] = r, in their order; x's dtype [rows, C]."""
    real_E = ((source >= 0) & (target >= 0)).nonzero()[:, 0]
    wide = torch.promote_types(x.dtype, torch.float32)
    total_RC = x.new_zeros(rows, x.shape[1], dtype=wide)
    return total_RC.index_add_(0, target[real_E], x[source[real_E]].to(wide)).to(x.dtype)


def gather_add(base: Tensor, x: Tensor, index: Tensor) -> Tensor:
    """base[r] + x[index[r]], or base[r] where index[r] is below 0; base's dtype [R, C]."""
    if not len(x):
        return base.clone()
    return base + x[index.clamp(min=0)].to(base.dtype).masked_fill((index < 0)[:, None], 0.0)
