"""One byte a weight: the states of a nibble register, even rounding, the reference's rule, and Triton's bits.

What compares backends runs as in test_triton.py: in Triton's interpreter in a process of its own, and with -m gpu.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from test_triton import assert_same_bits, floats, int8, needs_triton, normal, not_interpreted, on_each_device
from tritwise import ops
from tritwise.ops.nibble import EXPONENT_FLOOR, GROUP
from tritwise.registers import (
    MOMENTUM_LEVELS,
    Key,
    join_nibbles,
    leading_trit,
    level_values,
    make_key,
    nearest_level,
    random_bits16,
    random_level,
    round_stochastic,
    split_nibbles,
    to_fixed_point,
    to_nibbles,
    weyl_bits16,
    weyl_turn,
)

OPS = torch.ops.tritwise
SHAPES = [(1, 1), (3, 7), (1, 2100), (21, 130), (70, 64)]
KEY = make_key(5, 0, 1, 2)
UNIT_LIMIT = 7


def every_state() -> tuple[Tensor, Tensor]:
    """r and m of all 225 states, int8 [15, 15] each."""
    levels = torch.arange(-7, 8, dtype=torch.int8)
    return levels.view(15, 1).repeat(1, 15), levels.repeat(15, 1)


def nibbles(shape: tuple[int, ...], seed: int) -> Tensor:
    return join_nibbles(int8(-7, 7, shape, seed), int8(-7, 7, shape, seed + 100))


def exponents(shape: tuple[int, int], seed: int, low: int = -9, high: int = 2) -> tuple[Tensor, Tensor]:
    rows, columns = shape
    return int8(low, high, (rows, 1), seed), int8(-40, 0, (rows, -(-columns // GROUP)), seed)


def fresh(shape: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """A state without momentum, and r random."""
    rows, columns = shape
    register = join_nibbles(int8(-7, 7, shape, 4), torch.zeros(shape, dtype=torch.int8))
    row = torch.full((rows, 1), EXPONENT_FLOOR, dtype=torch.int8)
    return register, row, torch.zeros(rows, -(-columns // GROUP), dtype=torch.int8)


# ---- the byte


def test_the_trit_of_the_byte_is_the_trit_of_its_register():
    r, m = every_state()
    b = join_nibbles(r, m)
    assert b.dtype == torch.int8 and b.unique().numel() == 225
    assert torch.equal(leading_trit(b), r.sign() * (r.abs() > 2))
    found = split_nibbles(b)
    assert [x.dtype for x in found] == [torch.int8] * 2
    assert torch.equal(found[0], r) and torch.equal(found[1], m)


def test_five_trit_registers_become_nibbles_of_the_same_weight():
    register = torch.arange(-121, 122, dtype=torch.int8)
    b = to_nibbles(register)
    r, m = split_nibbles(b)
    assert b.dtype == torch.int8 and not m.any() and torch.equal(leading_trit(b), leading_trit(register))
    assert torch.equal(r, -r.flip(0)) and r.unique().tolist() == list(range(-7, 8))
    assert (r * 16.0 - register).abs().max() <= 9  # within half a unit, and at +-121 what is out of reach


# ---- rounding that is even over the steps


def test_weyl_bits_are_the_documented_formula():
    base = random_bits16(7, KEY).long()
    for phase in (0, 1, 2, 40_000, 10**12, -3):
        expected = (base + phase * 40521 + 2**15) % 2**16 - 2**15
        found = weyl_bits16(7, KEY, phase)
        assert found.dtype == torch.int16 and torch.equal(found.long(), expected)
        assert weyl_turn(phase) == phase * 40521 % 2**16


def test_a_weight_sees_every_number_once_in_65536_phases():
    turns = torch.tensor([weyl_turn(phase) for phase in range(-5, 2**16 - 5)])
    assert torch.bincount(turns, minlength=2**16).eq(1).all()


def test_no_gap_between_the_first_draws_is_large():
    for count in (5, 20, 100, 300, 1000, 5000):
        turns = torch.tensor(sorted(weyl_turn(phase) for phase in range(count)))
        gaps = torch.diff(turns, append=turns[:1] + 2**16)
        assert gaps.max() < 3 * 2**16 / count  # of independent draws: about log(count) instead


@pytest.mark.parametrize("phase", [0, 1, 12345])
def test_rounding_is_unbiased_over_the_weights(phase):
    count = 1 << 18
    fixed = to_fixed_point(torch.full((count,), 0.3))
    steps = round_stochastic(fixed, weyl_bits16(count, KEY, phase))
    assert steps.unique().tolist() == [0, 1]
    assert steps.double().mean().item() == pytest.approx(0.3, abs=5 * (0.21 / count) ** 0.5)


def test_the_roundings_of_a_constant_add_up_for_every_weight():
    count, steps = 200, 1000
    even, independent = torch.zeros(count), torch.zeros(count)
    for step in range(steps):
        fixed = to_fixed_point(torch.full((count,), 0.075))
        even += round_stochastic(fixed.clone(), weyl_bits16(count, KEY, step))
        independent += round_stochastic(fixed, random_bits16(count, make_key(5, step)))
    assert (even - 75).abs().max() <= 2
    assert independent.std() > 6  # sqrt(1000 * 0.075 * 0.925) = 8.3


# ---- levels of a momentum


def test_levels_and_the_middles_between_them():
    levels = torch.tensor(MOMENTUM_LEVELS)
    m = torch.arange(-7, 8, dtype=torch.int8)
    assert torch.equal(level_values(m), torch.cat((-levels.flip(0), levels[1:])))
    assert torch.equal(nearest_level(level_values(m)), m)
    middles = (levels[1:] + levels[:-1]) / 2
    for sign in (1, -1):
        assert nearest_level(sign * middles).tolist() == [sign * k for k in range(7)]  # the nearer to 0 of two
        assert nearest_level(sign * middles * (1 + 2**-20)).tolist() == [sign * (k + 1) for k in range(7)]


def test_levels_drawn_at_random_are_right_in_the_mean():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for value in (0.0, 0.2, -0.5, 1.0, -3.3, 6.9, 7.0):
        drawn = random_level(torch.full((2**16,), value), bits)
        assert (drawn.unique().diff() == 1).all() and drawn.unique().numel() <= 2
        assert level_values(drawn).double().mean().item() == pytest.approx(value, abs=1e-4)


# ---- accumulation


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [1e-28, 1e-4, 1.0, 1e30])
def test_units_are_the_smallest_that_hold_the_peak(shape, size):
    register, row, group = fresh(shape)
    grad = normal(*shape) * size * torch.logspace(0, -3, shape[0])[:, None]
    assert bool(ops.accumulate_nibble(register, row, group, grad, 0.9, KEY, 3))
    unit = torch.exp2(row.double() + group.double() / 8).repeat_interleave(GROUP, dim=1)
    for part in range(group.shape[1]):
        columns = slice(part * GROUP, (part + 1) * GROUP)
        ratio = grad[:, columns].abs().amax(dim=1) / unit[:, columns].amax(dim=1)
        slack = 2**-8  # a unit is 2**(E/8) rounded to bfloat16
        assert (ratio <= UNIT_LIMIT * (1 + slack)).all() and (ratio > UNIT_LIMIT * 2 ** (-1 / 8) * (1 - slack)).all()
    assert (group.amax(dim=1) > -8).all() and (group <= 0).all()


def test_groups_are_bounded_from_below_by_their_row():
    register, row, group = fresh((2, 70))
    grad = torch.zeros(2, 70)
    grad[0, 0], grad[0, 40] = 7.0, 1e-9
    assert bool(ops.accumulate_nibble(register, row, group, grad, 0.9, KEY, 0))
    assert row.tolist() == [[0], [EXPONENT_FLOOR]]  # a row of zeros takes the floor
    assert group.tolist() == [[0, -127, -127], [-127] * 3]
    assert ops.momentum_of(register, row, group)[0, 0] == 7


@pytest.mark.parametrize("shape", SHAPES)
def test_accumulation_is_decay_and_sum_without_bias(shape):
    register, (row, group) = nibbles(shape, 1), exponents(shape, 2)
    grad = normal(*shape) * 0.1
    before = ops.momentum_of(register, row, group).double()
    total, draws = torch.zeros(shape, dtype=torch.float64), 256
    for phase in range(draws):
        b, p, e = register.clone(), row.clone(), group.clone()
        assert bool(ops.accumulate_nibble(b, p, e, grad, 1.0, KEY, phase))
        assert torch.equal(split_nibbles(b)[0], split_nibbles(register)[0])
        assert split_nibbles(b)[1].abs().max() <= UNIT_LIMIT
        total += ops.momentum_of(b, p, e)
    unit = torch.exp2(p.double() + e.double() / 8).repeat_interleave(GROUP, dim=1)[:, : shape[1]]
    # The error of a mean of Weyl draws is of the order of log(n) / n steps, not of 1 / sqrt(n); a step is 1.9 units.
    assert ((total / draws - before - grad).abs() / unit).max() < 8 / draws


@pytest.mark.parametrize("shape", SHAPES)
def test_a_decayed_momentum_takes_the_nearest_level(shape):
    register, (row, group) = nibbles(shape, 1), exponents(shape, 2)
    grad = normal(*shape) * 0.1
    value = ops.momentum_of(register, row, group) * 0.75 + grad
    b, p, e = register.clone(), row.clone(), group.clone()
    assert bool(ops.accumulate_nibble(b, p, e, grad, 0.75, KEY, 3))
    assert torch.equal(split_nibbles(b)[0], split_nibbles(register)[0])
    unit = torch.exp2(p.double() + e.double() / 8).repeat_interleave(GROUP, dim=1)[:, : shape[1]]
    scaled = value / unit
    error = (ops.momentum_of(b, p, e) / unit - scaled).abs()
    levels = torch.tensor(MOMENTUM_LEVELS, dtype=torch.float64)
    best = (scaled.abs()[..., None] - levels).abs().amin(dim=-1)
    assert (error - best).abs().max() < 0.05 and error.max() < 1.0  # a unit is 2**(E/8) rounded to bfloat16


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(bad):
    register, (row, group) = nibbles((3, 70), 1), exponents((3, 70), 2)
    grad = normal(3, 70)
    grad[1, 69] = bad
    b, p, e = register.clone(), row.clone(), group.clone()
    taken = ops.accumulate_nibble(b, p, e, grad, 0.9, KEY, 0)
    assert taken.dtype == torch.bool and taken.shape == () and not bool(taken)
    assert torch.equal(b, register) and torch.equal(p, row) and torch.equal(e, group)


def test_what_a_momentum_stands_for_is_exact():
    r, m = every_state()
    row, group = torch.arange(-110, 125, 16, dtype=torch.int8).view(15, 1), torch.full((15, 1), -8, dtype=torch.int8)
    value = ops.momentum_of(join_nibbles(r, m), row, group)
    assert value.dtype == torch.float32
    assert torch.equal(value.double(), level_values(m) * torch.exp2(row.double() - 1))
    group = torch.tensor([[0, -3]], dtype=torch.int8)  # the last group is short
    value = ops.momentum_of(torch.full((1, 33), 5, dtype=torch.int8), torch.tensor([[2]], dtype=torch.int8), group)
    assert value[0, :32].tolist() == [15.0] * 32
    assert value[0, 32].item() == 15 * float(torch.tensor(2 ** (-3 / 8)).bfloat16())


# ---- moves


def test_a_move_changes_the_register_and_not_the_momentum():
    r, m = every_state()
    for direction in (-9.0, -0.4, 0.0, 0.2, 1.0, 9.0):
        b = join_nibbles(r, m)
        flips = ops.move_nibbles(b, torch.full((15, 15), direction), 1.0, KEY, 0)
        after, kept = split_nibbles(b)
        assert torch.equal(kept, m)
        assert torch.equal(after, (r - round(5 * direction)).clamp(-7, 7))  # whole steps: nothing to draw
        assert flips.dtype == torch.int64 and flips == (leading_trit(b) != leading_trit(16 * r)).sum()


def test_small_moves_add_up():
    register = torch.zeros(1000, dtype=torch.int8)
    for phase in range(100):
        ops.move_nibbles(register, torch.full((1000,), -1.0), 0.01, KEY, phase)
    r, m = split_nibbles(register)
    assert not m.any() and (r - 5).abs().max() <= 1 and r.float().mean().item() == pytest.approx(5, abs=0.05)


# ---- lists


def mixed() -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Key]]:
    """Registers, row exponents, group exponents, gradients and keys of tensors of several shapes."""
    powers = [exponents(shape, n) for n, shape in enumerate(SHAPES)]
    return (
        [nibbles(shape, n) for n, shape in enumerate(SHAPES)],
        [p for p, _ in powers],
        [e for _, e in powers],
        [floats(shape, n, -3, 3) for n, shape in enumerate(SHAPES)],
        [make_key(n) for n in range(len(SHAPES))],
    )


RATES = [0.5, 0.01, 3.0, 0.0, 0.2]


def test_a_list_is_one_after_the_other(poisoned):
    *state, grads, keys = mixed()
    grads[3][20, 77] = float("nan")  # the others are taken all the same
    taken = ops.accumulate_nibble_many(*state, grads, 0.9, keys, 4)
    assert taken.tolist() == [True, True, True, False, True]
    values = ops.momentum_of_many(*state)
    flips = ops.move_nibbles_many(state[0], values, RATES, keys, 5)
    alone, rows, groups, *_ = mixed()
    for n, (b, p, e) in enumerate(zip(alone, rows, groups, strict=True)):
        assert bool(ops.accumulate_nibble(b, p, e, grads[n], 0.9, keys[n], 4)) == taken[n]
        u = ops.momentum_of(b, p, e)
        assert torch.equal(u, values[n]) and u.isfinite().all()
        assert ops.move_nibbles(b, u, RATES[n], keys[n], 5) == flips[n]
        assert all(torch.equal(x, y[n]) for x, y in zip((b, p, e), state, strict=True))


def test_rates_and_phases_may_be_known_to_the_device_alone():
    *state, grads, keys = mixed()
    *other, _, _ = mixed()
    for phase in (3, 2**33 + 7, -5):
        ops.accumulate_nibble_many(*state, grads, 0.9, keys, phase)
        ops.accumulate_nibble_many(*other, grads, 0.9, keys, torch.tensor(phase))
        flips = ops.move_nibbles_many(state[0], grads, RATES, keys, phase)
        rates = torch.tensor(RATES, dtype=torch.float64)
        assert torch.equal(flips, ops.move_nibbles_many(other[0], grads, rates, keys, torch.tensor(phase)))
    assert all(torch.equal(a, b) for x, y in zip(state, other, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("go", [True, False])
def test_moves_wait_for_leave(go):
    registers, _, _, directions, keys = mixed()
    flips = ops.move_nibbles_many(registers, directions, RATES, keys, 0, torch.tensor(go))
    assert bool(flips.sum()) is go
    assert [torch.equal(b, nibbles(s, n)) for n, (b, s) in enumerate(zip(registers, SHAPES, strict=True))] == [
        not go or rate == 0 for rate in RATES
    ]


def test_opcheck():
    *state, grads, keys = (part[:2] for part in mixed())
    flat = [number for key in keys for number in key]
    torch.library.opcheck(OPS.accumulate_nibble_many.default, (*state, grads, 0.9, flat, 3))
    torch.library.opcheck(OPS.momentum_of_many.default, tuple(state))
    for go in (None, torch.tensor(False)):
        torch.library.opcheck(OPS.move_nibbles_many.default, (state[0], grads, [0.5, 0.1], flat, 3, go))


# ---- Triton


@on_each_device
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("low", "high", "decay"), [(-9, 2, 0.9), (-9, 2, 1.0), (-149, -120, 1.0), (-20, 126, 0.9)])
def test_triton_accumulation(device, shape, low, high, decay, poisoned):
    grad = floats(shape, 0, low, high)
    grad[grad.isinf()] = 1.0
    register, (row, group) = nibbles(shape, 1), exponents(shape, 2, max(low, -126), min(high, 120))
    taken, *_ = assert_same_bits(
        device, ops.accumulate_nibble, register, row, group, grad, decay, make_key(3), low + 2**20
    )
    assert taken.shape == () and bool(taken)


@on_each_device
@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
    decay=st.one_of(st.floats(0, 1), st.just(1.0)),
    sizes=st.tuples(st.integers(-150, 127), st.integers(-150, 127)).map(sorted),
    key=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
    phase=st.one_of(st.integers(0, 3), st.integers(-(2**40), 2**40)),
)
def test_triton_accumulation_of_any_state(device, rows, columns, seed, decay, sizes, key, phase):
    shape = (rows, columns)
    register, (row, group) = nibbles(shape, seed), exponents(shape, seed, -126, 127)
    grad = floats(shape, seed, sizes[0], sizes[1])
    assert_same_bits(device, ops.accumulate_nibble, register, row, group, grad, decay, Key(*key), phase)


@on_each_device
def test_triton_peaks_at_every_unit_get_the_same_exponents(device):
    # 7 units: just below, at and above each; then the smallest floats there are.
    units = (torch.exp2(torch.arange(-149 * 8, 125 * 8, 5).double() / 8)).bfloat16().float() * 7
    around = torch.stack((torch.nextafter(units, torch.tensor(0.0)), units, torch.nextafter(units, 2 * units)))
    tiny = torch.tensor([1e-45, 3e-45, 1e-38, 1.1754944e-38, 0.0, 3.4e38])
    register, row, group = fresh((len(tiny) + around.numel(), 1))
    grad = torch.cat((around.view(-1), tiny)).view(-1, 1)
    _, _, p, e, *_ = assert_same_bits(device, ops.accumulate_nibble, register, row, group, grad, 1.0, KEY, 1)
    assert p.unique().tolist() == list(range(EXPONENT_FLOOR, 125))
    assert {*range(-7, 1), -127} <= set(e.view(-1).tolist())


@on_each_device
def test_triton_lists_of_mixed_shapes(device, poisoned):
    *state, values, keys = mixed()
    for go in (None, torch.tensor(True), torch.tensor(False)):
        flips, *_ = assert_same_bits(device, ops.move_nibbles_many, state[0], values, RATES, keys, 77, go)
        assert bool(flips.sum()) is (go is None or bool(go))
    live = torch.tensor(RATES, dtype=torch.float64), keys, torch.tensor(2**20 + 9)
    assert_same_bits(device, ops.move_nibbles_many, state[0], values, *live)
    for decay in (0.9, 1.0):
        assert_same_bits(device, ops.accumulate_nibble_many, *state, values, decay, *live[1:])
    assert_same_bits(device, ops.momentum_of_many, *state)
    for bad, at in ((float("nan"), (20, 77)), (float("inf"), (0, 129)), (3e38, (3, 3))):
        grads = [value.clone() for value in values]
        grads[3][at] = bad
        if bad == 3e38:  # finite, but the sum is not
            state[0][3][at], state[1][3][at[0]], state[2][3][at[0]] = 7, 124, 0
        taken, *after = assert_same_bits(device, ops.accumulate_nibble_many, *state, grads, 0.9, keys, 77)
        assert taken.tolist() == [True, True, True, False, True]
        assert all(torch.equal(after[n * len(SHAPES) + 3], part[3]) for n, part in enumerate(state))


@on_each_device
def test_triton_tensors_that_are_not_contiguous(device):
    *state, values, keys = mixed()
    turned: list[Any] = [[x.T.contiguous().T for x in part] for part in (*state, values)]
    state, values = turned[:3], turned[3]
    assert_same_bits(device, ops.accumulate_nibble_many, *state, values, 0.9, keys, 2)
    assert_same_bits(device, ops.move_nibbles_many, state[0], values, RATES, keys, 2)


@needs_triton
@not_interpreted
def test_in_the_interpreter(in_interpreter):
    printed = in_interpreter([Path(__file__)], "test_triton_")
    assert re.findall(r"(\d+) passed", printed) == ["24"] and "skipped" not in printed


@needs_triton
@not_interpreted
def test_kernels_compile_for_a_gpu_that_is_not_here(tmp_path, monkeypatch):
    """To the instructions that keep bits: no fused multiply-add and no flushing of small numbers to zero."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tritwise.ops.nibble import kernels

    pointers = {"table": "*i64", "flips_T": "*i64", "go": "*i1", "taken_T": "*i8", "scales": "*fp32"}
    pointers |= {"peak_R": "*i32", "peak_L": "*i32", "kept_L": "*fp32", "refused_T": "*i32"}
    for kernel, block, turn, nearest in (
        (kernels.peaks, 64, "i32", {}),
        (kernels.requantise, 64, "i32", {"NEAREST": False}),
        (kernels.requantise, 64, "*i64", {"NEAREST": False}),
        (kernels.requantise, 64, "*i64", {"NEAREST": True}),
        (kernels.momentum_of, 64, "i32", {}),
        (kernels.move, 2048, "i32", {}),
        (kernels.move, 2048, "*i64", {}),
    ):
        pointers["turn"] = turn
        constants = {"TENSORS": 16, "BLOCK": block, "ALIGNED": True} | nearest
        types = {a: "constexpr" if a in constants else pointers.get(a, "i32") for a in kernel.arg_names}
        source = ASTSource(kernel, types, {(kernel.arg_names.index(a),): v for a, v in constants.items()})
        made = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": False})
        assert "st.global" in made.asm["ptx"]
        assert not re.findall(r"\bfma\b|\.ftz", made.asm["ptx"])
