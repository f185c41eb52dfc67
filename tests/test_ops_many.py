"""The operations on lists of tensors: the same bits as one call after the other, on every backend."""

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops.direction import METHODS
from tritwise.registers import Key, make_key

OPS = torch.ops.tritwise
SHAPES = [(3, 7), (1, 1), (12, 40), (1, 24), (40, 12)]
KEYS = [make_key(3, 0, number) for number in range(len(SHAPES))]
BLOCKS = [3, 1, 2, 1, 5]

# Everything here is asked of every backend that this machine can run; directions have no "cpu" and take the reference.
OPERATION = "update"
pytestmark = pytest.mark.usefixtures("each_backend")


def int8(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def momenta() -> list[Tensor]:
    return [int8(-126, 126, shape, number) for number, shape in enumerate(SHAPES)]


def exponents() -> list[Tensor]:
    return [int8(-20, -2, (shape[0], 1), 9 + number) for number, shape in enumerate(SHAPES)]


def floats(size: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(shape, generator=generator) * size for shape in SHAPES]


def flat(keys: list[Key]) -> list[int]:
    return [number for key in keys for number in key]


def assert_equal(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("decay", [0.9, 1.0])
@pytest.mark.parametrize("size", [1e-3, 1e5])
def test_accumulation(decay, size, poisoned):
    grads = floats(size)
    grads[2][5, 3] = float("nan")  # the others are taken all the same
    grads[4][0, 0] = float("-inf")
    alone, alone_exponents = momenta(), exponents()
    parts = zip(alone, alone_exponents, grads, KEYS, strict=True)
    taken = torch.stack([ops.accumulate_momentum(m, e, g, decay, key) for m, e, g, key in parts])
    together, together_exponents = momenta(), exponents()
    found = ops.accumulate_momentum_many(together, together_exponents, grads, decay, KEYS)
    assert found.dtype == torch.bool and found.tolist() == taken.tolist() == [True, True, False, True, False]
    assert_equal(together, alone)
    assert_equal(together_exponents, alone_exponents)
    assert torch.equal(together[2], momenta()[2]) and torch.equal(together_exponents[2], exponents()[2])


@pytest.mark.parametrize("go", [None, True, False])
@pytest.mark.parametrize("limit", [121, 127])
def test_moves(go, limit, poisoned):
    directions, rates = floats(), [20.0, 0.3, 55.0, 0.0, 81.0]
    alone, together = momenta(), momenta()
    flips = [0] * len(SHAPES)
    if go is not False:
        parts = zip(alone, directions, rates, KEYS, strict=True)
        flips = [ops.move_registers(r, d, rate, key, limit).item() for r, d, rate, key in parts]
        assert sum(flips) > 100
    switch = None if go is None else torch.tensor(go)
    found = ops.move_registers_many(together, directions, rates, KEYS, limit, switch)
    assert found.dtype == torch.int64 and found.tolist() == flips
    assert_equal(together, alone)


def test_the_limit_is_that_of_registers_unless_said():
    registers = [torch.full((4,), 100, dtype=torch.int8)]
    ops.move_registers_many(registers, [torch.full((4,), -100.0)], [81.0], KEYS[:1])
    assert registers[0].tolist() == [121] * 4


def test_tensors_that_are_not_contiguous():
    plain, plain_exponents = momenta(), exponents()
    strided = [m.T.contiguous().T for m in momenta()]
    strided_exponents = [torch.stack((e, e), dim=2)[:, :, 0] for e in exponents()]
    turned = [x.T.contiguous().T for x in floats()]
    ops.accumulate_momentum_many(plain, plain_exponents, floats(), 0.9, KEYS)
    ops.accumulate_momentum_many(strided, strided_exponents, turned, 0.9, KEYS)
    assert_equal(strided, plain)
    assert_equal(strided_exponents, plain_exponents)
    ops.move_registers_many(plain, floats(), [9.0] * len(SHAPES), KEYS)
    ops.move_registers_many(strided, turned, [9.0] * len(SHAPES), KEYS)
    assert_equal(strided, plain)


@pytest.mark.parametrize("method", METHODS)
def test_directions(method, poisoned):
    values, powers = momenta(), exponents()
    powers[2][1:] += 100  # far apart
    found = ops.direction_many(values, powers, method, 3, BLOCKS)
    parts = zip(values, powers, BLOCKS, strict=True)
    for u, (m, e, blocks), shape in zip(found, parts, SHAPES, strict=True):
        with ops.backend("reference"):
            expected = ops.direction(m, e, method, 3, blocks)
        assert u.dtype == torch.float32 and u.shape == shape and u.is_contiguous()
        assert (u - expected).norm() <= 1e-5 * expected.norm()
        assert torch.equal(u, ops.direction(m, e, method, 3, blocks)) or method in ("newton_schulz", "balanced")
    assert_equal(values, momenta())


def test_blocks_of_one_shape_keep_their_own_matrix_size():
    """Three blocks of one tensor and the only one of another share a batch: each tensor still has unit RMS."""
    values = [int8(-126, 126, (24, 10), 1), int8(-3, 3, (8, 10), 2), int8(-126, 126, (16, 10), 3)]
    powers = [torch.zeros(v.shape[0], 1, dtype=torch.int8) for v in values]
    for method in METHODS:
        for blocks in ([3, 1, 2], 1, 2):
            for u in ops.direction_many(values, powers, method, blocks=blocks):
                assert u.square().mean().sqrt().item() == pytest.approx(1, abs=1e-5)


def test_defaults_and_an_unknown_method():
    values, powers = momenta(), exponents()
    assert_equal(
        ops.direction_many(values, powers), ops.direction_many(values, powers, "newton_schulz", 3, [1] * len(SHAPES))
    )
    with pytest.raises(ValueError, match="newton_schulz, balanced, row_column, rms, sign"):
        ops.direction_many(values, powers, "muon")


def test_opcheck():
    m, e, x, keys = momenta()[:2], exponents()[:2], floats()[:2], flat(KEYS[:2])
    levels = [torch.zeros_like(part, dtype=torch.int16) for part in e]
    torch.library.opcheck(OPS.accumulate_momentum_many.default, (m, e, x, 0.9, keys))
    for go in (None, torch.tensor(False)):
        torch.library.opcheck(OPS.move_registers_many.default, (m, x, [9.0, 0.5], 121, keys, go))
    torch.library.opcheck(OPS.direction_many.default, (m, e, "newton_schulz", 3, [3, 1], [], 0.0))
    torch.library.opcheck(OPS.direction_many.default, (m, e, "row_column", 3, [3, 1], levels, 0.9))
