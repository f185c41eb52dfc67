"""Five-trit registers: one signed byte R in [-121, 121] that holds a ternary weight and the evidence about it.

R = 81*t + r, with the leading trit t in {-1, 0, 1} (the weight) and the evidence r in [-40, 40] (the four lower trits
of the balanced-ternary number R). Moving R by an integer is all that learning does: when the evidence passes +-40 the
addition carries into the leading trit, and nothing is thrown away. Source: DESIGN, "The idea in five lines".
"""

import torch
from torch import Tensor

from tritwise.registers.random import Key, random_words

TRITS = 5  # in a register
LEAD = 81  # 3**4, what one unit of the leading trit is worth
PLACES = (81, 27, 9, 3, 1)  # what one unit of each trit is worth
EVIDENCE_LIMIT = 40  # (3**4 - 1) / 2
REGISTER_LIMIT = 121  # (3**5 - 1) / 2


def leading_trit(register: Tensor) -> Tensor:
    """The weight in each register: +1 where R > 40, -1 where R < -40, else 0. int8 in, int8 of the same shape out."""
    return (register > EVIDENCE_LIMIT).view(torch.int8) - (register < -EVIDENCE_LIMIT).view(torch.int8)


def lead_of(weight_trits: int) -> int:
    """What a weight of 1 is worth in a register whose first `weight_trits` trits are the weight: 81 for one, 27 for
    two, 9 for three."""
    return 3 ** (TRITS - weight_trits)


def leading_number(register: Tensor, lead: int = LEAD) -> Tensor:
    """The weight in each register in units of its scale, round(R / lead): int8 in, int8 of the same shape out. lead: of
    `lead_of`. With 81 it is the leading trit; with 27 the two leading ones, 3 t1 + t2 from -4 to 4."""
    if lead == LEAD:
        return leading_trit(register)
    return (register.float() * (1.0 / lead)).round_().to(torch.int8)  # lead is odd: nothing lies halfway


def evidence(register: Tensor) -> Tensor:
    """What lies below the leading trit, r = R - 81*t in [-40, 40]; int8, same shape."""
    return register - LEAD * leading_trit(register)


def join(trit: Tensor, rest: Tensor) -> Tensor:
    """The register with leading trit `trit` and evidence `rest`; the inverse of (leading_trit, evidence). int8."""
    return (trit * LEAD + rest).to(torch.int8)


def to_trits(register: Tensor, count: int = TRITS) -> Tensor:
    """The first `count` balanced-ternary digits, most significant first: shape [..., count], int8. With all five, the
    sum of digit * 3**(4-k) is R."""
    digits, rest = [], register
    for place in PLACES[:count]:
        half = (place - 1) // 2  # what the lower places can hold: the digit is 0 within +-half
        digit = (rest > half).view(torch.int8) - (rest < -half).view(torch.int8)
        digits.append(digit)
        rest = rest - digit * place
    return torch.stack(digits, dim=-1)


def move(register: Tensor, steps: Tensor, limit: int = REGISTER_LIMIT) -> Tensor:
    """R + steps, carried and clamped to +-limit. `steps` is any integer tensor of R's shape; returns a new int8 tensor.

    Clamping saturates the evidence of a weight that is already as sure as it can be; it never changes a trit's sign.
    """
    # Steps are cut to the width of the range first, so that no sum can overflow and turn back.
    whole = steps.to(torch.int64).clamp(-2 * limit, 2 * limit)
    return whole.add_(register).clamp_(-limit, limit).to(torch.int8)


def init_registers(shape: tuple[int, ...], key: Key, span: float = 0.9) -> Tensor:
    """Registers uniform over the integers within +-span*81, drawn from `key`; int8 of `shape`, on the CPU.

    span is in leading-trit units. 0.9 starts with 55 % zeros and beat 1.5 (25 % zeros would come later by themselves).
    """
    reach = min(int(span * LEAD), REGISTER_LIMIT)
    count = 1
    for size in shape:
        count *= size
    words = random_words(count, key)
    # Multiply-shift maps 16 random bits onto 0..2*reach without a modulo; the bias is below 2**-8 of a unit.
    values = ((words & 0xFFFF) * (2 * reach + 1)) >> 16
    return (values - reach).to(torch.int8).reshape(shape)


def zero_fraction(register: Tensor) -> float:
    """The share of weights that are 0, in [0, 1]."""
    return 1.0 - float(torch.count_nonzero(leading_trit(register))) / max(register.numel(), 1)
