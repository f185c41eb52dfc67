"""Log-probabilities as whole numbers: what a range coder needs, exact and the same wherever it is computed.

Only the scaling and the rounding are done in floating point, in double precision, and those are defined to the last
bit. The exponential is a table of integers. So the result depends on the log-probabilities alone: not on a mathematical
library, on vector instructions or on the number of threads.

Shape suffixes: B any, V vocabulary.
"""

import functools
import math
from decimal import Decimal, localcontext

import torch
from torch import Tensor

from tritwise.compress.coder import TOTAL

SYMBOLS = 256
_STEPS = 1 << 12  # steps of log2(p): rounding to them costs about 2e-9 bits a symbol
_ONE = 30  # the likeliest symbol weighs 2**30
_SMALLEST = -1e6  # stands for log 0 and for what is no number


def cumulative(log_probs_BV: Tensor) -> Tensor:
    """Natural logs of probabilities, float32 [B, V >= 256] -> int64 [B, 257], rising from 0 to TOTAL.

    Byte s has the interval from number s to number s + 1, never empty. Symbols above 255 share nothing. The floor of
    one for each byte costs 255 / TOTAL of the mass, 2.2e-5 bits a byte.
    """
    logs = torch.nan_to_num(log_probs_BV[..., :SYMBOLS].double(), _SMALLEST, -_SMALLEST, _SMALLEST)
    logs = logs - logs.amax(dim=-1, keepdim=True)
    steps = torch.round(logs * (_STEPS / math.log(2))).clamp_(min=-(_ONE + 1) * _STEPS).to(torch.int64)
    weights = _table(logs.device)[steps % _STEPS] >> -(steps // _STEPS)
    sums = weights.cumsum(dim=-1)  # at most 2**38, so the product below fits 63 bits
    shares = sums * (TOTAL - SYMBOLS) // sums[..., -1:] + torch.arange(1, SYMBOLS + 1, device=logs.device)
    return torch.nn.functional.pad(shares, (1, 0))


@functools.cache
def _table(device: torch.device) -> Tensor:
    """2**(i / steps) for i = 0 … steps - 1 as integers with _ONE bits after the point; int64 [steps]."""
    with localcontext(prec=25):  # decimal arithmetic is the same on every machine
        root = Decimal(2) ** (Decimal(1) / _STEPS)
        values, value = [], Decimal(1 << _ONE)
        for _ in range(_STEPS):
            values.append(int(value.to_integral_value()))
            value *= root
    return torch.tensor(values, device=device)
