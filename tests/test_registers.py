"""Five-trit registers: every one of the 243 values, moves against plain integers, and initial values."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.registers import (
    EVIDENCE_LIMIT,
    LEAD,
    REGISTER_LIMIT,
    evidence,
    init_registers,
    join,
    lead_of,
    leading_number,
    leading_trit,
    make_key,
    move,
    random_words,
    to_trits,
    zero_fraction,
)

VALUES = range(-121, 122)
ALL = torch.tensor(list(VALUES), dtype=torch.int8)


def balanced(number: int) -> list[int]:
    """The five balanced-ternary digits of `number`, most significant first, by repeated division."""
    digits = []
    for _ in range(5):
        digit = (number + 1) % 3 - 1
        digits.append(digit)
        number = (number - digit) // 3
    assert number == 0
    return digits[::-1]


def test_the_numbers_of_the_design():
    assert (LEAD, EVIDENCE_LIMIT, REGISTER_LIMIT) == (81, 40, 121)


def test_every_register_is_its_leading_trit_and_its_evidence():
    trits, rest = leading_trit(ALL), evidence(ALL)
    assert trits.dtype == rest.dtype == torch.int8
    for value, t, r in zip(VALUES, trits.tolist(), rest.tolist(), strict=True):
        assert value == 81 * t + r
        assert t in (-1, 0, 1) and abs(r) <= 40
    assert Counter(trits.tolist()) == {-1: 81, 0: 81, 1: 81}


def test_join_is_the_inverse_of_leading_trit_and_evidence():
    joined = join(leading_trit(ALL), evidence(ALL))
    assert joined.dtype == torch.int8 and torch.equal(joined, ALL)
    trits = torch.tensor([-1, 0, 1], dtype=torch.int8).repeat_interleave(81)
    rest = torch.arange(-40, 41, dtype=torch.int8).repeat(3)
    registers = join(trits, rest)
    assert torch.equal(leading_trit(registers), trits) and torch.equal(evidence(registers), rest)
    assert sorted(registers.tolist()) == list(VALUES)


def test_five_trits_of_every_register():
    digits = to_trits(ALL)
    assert digits.dtype == torch.int8 and digits.shape == (243, 5)
    assert digits.tolist() == [balanced(value) for value in VALUES]
    assert torch.equal((digits * torch.tensor([81, 27, 9, 3, 1])).sum(1), ALL.long())
    assert torch.equal(digits[:, 0], leading_trit(ALL))
    assert all(torch.equal(to_trits(ALL, count), digits[:, :count]) for count in range(1, 6))


@pytest.mark.parametrize("trits", [1, 2, 3, 4, 5])
def test_a_weight_of_leading_trits_is_the_nearest_multiple(trits):
    lead, register = lead_of(trits), torch.arange(-121, 122, dtype=torch.int16).to(torch.int8)
    found = leading_number(register, lead)
    digits = to_trits(register, trits).int() * torch.tensor([3**place for place in reversed(range(trits))])
    assert found.dtype == torch.int8 and torch.equal(found.int(), digits.sum(1))
    assert (register.int() - found.int() * lead).abs().max() == (lead - 1) // 2


def test_shapes_are_kept():
    grid = ALL.reshape(3, 81, 1)
    assert leading_trit(grid).shape == evidence(grid).shape == grid.shape
    assert to_trits(grid).shape == (3, 81, 1, 5)
    assert leading_trit(grid.mT).shape == (3, 1, 81)  # not contiguous
    assert torch.equal(leading_trit(ALL[::2]), leading_trit(ALL)[::2])


@pytest.mark.parametrize(
    ("register", "step", "moved", "trit", "rest"),
    [
        (40, 1, 41, 1, -40),  # carry
        (41, -1, 40, 0, 40),  # and back
        (-40, -1, -41, -1, 40),
        (0, 81, 81, 1, 0),
        (81, -162, -81, -1, 0),  # straight through zero
        (121, 1, 121, 1, 40),  # saturated
        (-121, -1, -121, -1, -40),
        (121, -1, 120, 1, 39),
        (7, 0, 7, 0, 7),
    ],
)
def test_carries_by_hand(register, step, moved, trit, rest):
    after = move(torch.tensor([register], dtype=torch.int8), torch.tensor([step], dtype=torch.int32))
    assert (after.item(), leading_trit(after).item(), evidence(after).item()) == (moved, trit, rest)


WIDTHS = {torch.int8: 8, torch.int16: 16, torch.int32: 32, torch.int64: 64}


@settings(deadline=None)
@given(st.data())
def test_move_is_integer_addition_carried_and_clamped(data):
    dtype = data.draw(st.sampled_from(list(WIDTHS)))
    top = (1 << (WIDTHS[dtype] - 1)) - 1
    step = st.one_of(st.integers(max(-300, -top - 1), min(300, top)), st.integers(-top - 1, top))
    pairs = data.draw(st.lists(st.tuples(st.integers(-121, 121), step), max_size=20))
    registers = torch.tensor([r for r, _ in pairs], dtype=torch.int8)
    steps = torch.tensor([s for _, s in pairs], dtype=dtype)
    kept, kept_steps = registers.clone(), steps.clone()
    moved = move(registers, steps)
    assert moved.dtype == torch.int8
    assert moved.tolist() == [min(121, max(-121, r + s)) for r, s in pairs]
    assert torch.equal(registers, kept) and torch.equal(steps, kept_steps)


def test_every_carry_adds_up():
    """R + s for all 243 registers and all steps that stay within the range: nothing is lost at a flip."""
    registers = ALL.repeat_interleave(243)
    steps = torch.arange(-121, 122, dtype=torch.int16).repeat(243)
    moved = move(registers, steps)
    inside = (registers.int() + steps).abs() <= 121
    total = LEAD * leading_trit(moved).int() + evidence(moved).int()
    assert torch.equal(total[inside], (registers.int() + steps)[inside])
    back = move(moved, -steps)
    assert torch.equal(back[inside], registers[inside])


def test_initial_registers_follow_the_formula():
    key = make_key(3, tensor=5)
    for span, reach in ((0.9, 72), (0.1, 8), (1.0, 81), (1.5, 121), (9.0, 121), (0.0, 0)):
        drawn = init_registers((7, 11), key, span)
        assert drawn.dtype == torch.int8 and drawn.shape == (7, 11)
        words = random_words(77, key).tolist()
        assert drawn.flatten().tolist() == [((w & 0xFFFF) * (2 * reach + 1) >> 16) - reach for w in words]


def test_initial_registers_are_uniform():
    drawn = init_registers((400, 725), make_key(1))
    counts = torch.bincount(drawn.flatten().int() + 72, minlength=145)
    assert len(counts) == 145  # nothing above 72
    expected = drawn.numel() / 145
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 144) < 5 * math.sqrt(2 * 144)  # too even would be as wrong as too uneven


def test_initial_zero_fraction():
    drawn = init_registers((500, 500), make_key(2))
    share = 81 / 145
    assert abs(zero_fraction(drawn) - share) < 5 * math.sqrt(share * (1 - share) / drawn.numel())
    assert zero_fraction(drawn) == pytest.approx((leading_trit(drawn) == 0).double().mean().item(), abs=1e-12)
    assert zero_fraction(init_registers((50, 50), make_key(2), span=0.4)) == 1.0
    assert zero_fraction(torch.tensor([[121, -41], [40, -40]], dtype=torch.int8)) == 0.5


def test_same_key_same_registers():
    first = init_registers((64, 64), make_key(7, tensor=1))
    assert torch.equal(first, init_registers((64, 64), make_key(7, tensor=1)))
    assert torch.equal(first.flatten()[:100], init_registers((100,), make_key(7, tensor=1)))
    for other in (make_key(8, tensor=1), make_key(7, tensor=2), make_key(7, 1, 1), make_key(7, tensor=1, stream=1)):
        same = (first == init_registers((64, 64), other)).double().mean().item()
        assert abs(same - 1 / 145) < 0.01


def test_golden_initial_registers():
    """A seed must give the same model in every version."""
    golden = [[-66, 17, 14, 13, -29, 16], [55, -36, -69, -42, -14, 34]]
    assert init_registers((2, 6), make_key(1234)).tolist() == golden
