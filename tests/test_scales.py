"""Scale exponents: the table against integer arithmetic, exactness in three float types, and the way back."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.registers import (
    EXPONENT_LIMIT,
    EXPONENTS_PER_OCTAVE,
    exponent_for,
    make_key,
    move_exponents,
    random_bits16,
    scale_table,
    scale_values,
)
from tritwise.registers.scales import _table

EXPONENTS = range(-128, 128)


def bf16_of_power(exponent: int) -> float:
    """bf16(2**(exponent/8)) without any float rounding: the nearest n/128 * 2**octave with 128 <= n < 256.

    n is the number for which (n - 1/2)/128 < 2**(eighth/8) <= (n + 1/2)/128; both sides to the eighth power are whole.
    """
    octave, eighth = divmod(exponent, 8)
    target = 256**8 << eighth
    n = next(n for n in range(128, 256) if (2 * n - 1) ** 8 < target < (2 * n + 1) ** 8)
    return n / 128 * 2.0**octave


def test_the_numbers_of_the_design():
    assert (EXPONENTS_PER_OCTAVE, EXPONENT_LIMIT) == (8, 127)


def test_every_entry_is_the_bf16_rounding_of_its_power():
    table = scale_table()
    assert table.dtype == torch.float32 and table.shape == (256,)
    assert table.tolist() == [bf16_of_power(e) for e in EXPONENTS]
    assert table[128].item() == 1.0 and table[0].item() == 2.0**-16
    # Files are read with this table: a few entries by hand.
    assert [table[128 + e].item() for e in (1, 2, 4, 7, -1, 127)] == [
        1.09375,
        1.1875,
        1.4140625,
        1.8359375,
        0.91796875,
        60160.0,
    ]


def test_exact_in_bf16_fp32_and_fp16():
    table = scale_table()
    assert torch.equal(table.to(torch.bfloat16).float(), table)
    half = table.to(torch.float16).float()
    normal = table >= 2.0**-14  # below, fp16 has fewer than 8 bits left
    assert torch.equal(half[normal], table[normal]) and torch.isfinite(half).all()
    assert normal.sum().item() == 256 - 16
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        scales = table[normal].to(dtype)
        for trit in (-1, 0, 1):
            assert torch.equal((trit * scales).double(), trit * table[normal].double())


def test_steps_of_nine_percent():
    table = scale_table().double()
    assert (table[1:] > table[:-1]).all()
    assert torch.equal(table[8:], 2 * table[:-8])  # eight steps are exactly an octave
    ratio = table[1:] / table[:-1]
    assert ratio.min().item() > 1.08 and ratio.max().item() < 1.10
    true = torch.tensor([2.0 ** (e / 8) for e in EXPONENTS], dtype=torch.float64)
    assert ((table / true) - 1).abs().max().item() <= 2**-8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_scale_values_reads_the_table(dtype):
    exponents = torch.arange(-128, 128, dtype=torch.int8).view(4, 64)
    values = scale_values(exponents, dtype)
    assert values.dtype == dtype and values.shape == (4, 64)
    assert values.double().flatten().tolist() == [bf16_of_power(e) for e in EXPONENTS]
    values.zero_()  # what was read may be written to
    assert scale_values(exponents).min().item() > 0


def test_a_table_made_in_inference_mode_serves_training():
    _table.cache_clear()
    with torch.inference_mode():
        scale_values(torch.zeros(3, dtype=torch.int8))
    values = scale_values(torch.zeros(3, dtype=torch.int8))
    assert not values.is_inference() and values.tolist() == [1.0] * 3


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_table_is_kept(device):
    assert scale_table(device) is scale_table(device)


def test_exponent_for_finds_every_entry_again():
    for e in range(-127, 128):
        assert exponent_for(scale_table()[e + 128].item()) == e
        assert exponent_for(2.0 ** (e / 8)) == e


@given(st.floats(2**-15.9, 2**15.9))
def test_exponent_for_is_the_nearest_in_ratio(scale):
    found = exponent_for(scale)
    assert isinstance(found, int)
    distance = {e: abs(math.log2(scale) - e / 8) for e in range(-127, 128)}
    assert distance[found] <= min(distance.values()) + 1e-12


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1e-30, -127), (5e-324, -127), (2.0**-16, -127), (1e30, 127), (1.7e308, 127), (65536, 127), (1, 0), (2, 8)],
)
def test_exponent_for_stays_within_the_limit(scale, expected):
    assert exponent_for(scale) == expected


@pytest.mark.parametrize("scale", [0, 0.0, -0.0, -1.0, math.nan, math.inf, -math.inf])
def test_exponent_for_refuses_what_is_no_scale(scale):
    with pytest.raises(ValueError, match="positive and finite"):
        exponent_for(scale)


# Learned exponents


def int8(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int8)


def move(
    exponents: list[int], evidence: list[int], direction: list[float], octaves: float, seed: int = 0
) -> tuple[list[int], list[int]]:
    kept = int8(*exponents), int8(*evidence), torch.tensor(direction)
    moved = move_exponents(
        *(tensor.clone() for tensor in kept), octaves, random_bits16(kept[0].numel(), make_key(seed))
    )
    assert all(m.dtype == torch.int8 and m.shape == kept[0].shape for m in moved)
    return moved[0].tolist(), moved[1].tolist()


def test_whole_steps_are_exact():
    """An octave is eight exponents; a 2048th of it is one unit of evidence."""
    assert move([0, 5, -7], [0, 3, -4], [1.0, -1.0, 0.0], 1.0) == ([8, -3, -7], [0, 3, -4])
    assert move([0, 5, -7], [0, 3, -4], [1.0, -2.0, 0.5], 1 / 1024) == ([0, 5, -7], [2, -1, -3])


def test_evidence_carries():
    """From -128 to 127, as a register's digits: at 128 an exponent steps up and is 128 short of it."""
    assert move([3, 3, 3, 3], [126, 127, -127, -128], [1.0, 1.0, -1.0, -1.0], 1 / 2048) == (
        [3, 4, 3, 2],
        [127, -128, -128, 127],
    )
    assert move([-1], [100], [1.0], 300 / 2048) == ([1], [-112])  # 100 + 300 = 2 * 256 - 112


@pytest.mark.parametrize("sign", [1, -1])
def test_exponents_are_clamped(sign):
    limit = sign * EXPONENT_LIMIT
    for start in (limit, sign * 120, -limit):
        assert move([start], [sign * 5], [float(sign)], 1000.0) == ([limit], [0])
        assert move([start], [0], [float(sign)], 1e30) == ([limit], [0])
    assert move([limit], [0], [float(sign)], 1 / 2048) == ([limit], [0])
    assert move([limit], [0], [-float(sign)], 1 / 2048) == ([limit], [-sign])


@given(
    st.lists(st.tuples(st.integers(-127, 127), st.integers(-128, 127), st.floats(-4, 4, width=32)), min_size=1),
    st.floats(0, 0.1),
    st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_step_is_exact_but_for_its_last_unit(rows, octaves, seed):
    exponents, evidence, direction = (list(column) for column in zip(*rows, strict=True))
    moved = move(exponents, evidence, direction, octaves, seed)
    for e, v, d, now_e, now_v in zip(exponents, evidence, direction, *moved, strict=True):
        limit = 127 * 256
        exact = max(-limit, min(limit, 256 * e + v + d * octaves * 8 * 256))
        assert -128 <= now_v <= 127 and abs(256 * now_e + now_v - exact) < 1 + 1e-4


def test_rounding_is_even_handed_and_has_its_own_bits():
    count = 20_000
    zero, ones = torch.zeros(count, dtype=torch.int8), torch.ones(count)
    for units in (0.25, -0.7):
        exponent, evidence = move_exponents(zero, zero, ones, units / 2048, random_bits16(zero.numel(), make_key(5)))
        assert not exponent.any() and set(evidence.tolist()) == {math.floor(units), math.ceil(units)}
        assert evidence.double().mean().item() == pytest.approx(units, abs=4.5 * 0.5 / count**0.5)
    again = move_exponents(zero, zero, ones, 0.5 / 2048, random_bits16(zero.numel(), make_key(5)))[1]
    assert torch.equal(again, move_exponents(zero, zero, ones, 0.5 / 2048, random_bits16(zero.numel(), make_key(5)))[1])
    assert not torch.equal(
        again, move_exponents(zero, zero, ones, 0.5 / 2048, random_bits16(zero.numel(), make_key(6)))[1]
    )


def test_a_table_first_asked_for_in_inference_mode_serves_training():
    _table.cache_clear()
    with torch.inference_mode():
        assert not scale_table("cpu").is_inference()
    _table.cache_clear()


def test_a_compiler_takes_the_table_as_a_constant():
    graphs: list[torch.fx.GraphModule] = []
    torch._dynamo.reset()
    compiled = torch.compile(scale_values, fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    exponent = torch.arange(-128, 128).to(torch.int8)
    assert torch.equal(compiled(exponent), scale_table())
    kinds = [node.op for node in graphs[0].graph.nodes]
    assert kinds.count("get_attr") == 1 and len(kinds) <= 7  # and nothing that makes it
    torch._dynamo.reset()
