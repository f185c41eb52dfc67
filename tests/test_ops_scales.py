"""Moving scales: all sets in one call have the bits of each alone, on every backend; and the arithmetic by hand."""

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops.scales import reference
from tritwise.registers import make_key, random_bits16

OPERATION = "scales"
pytestmark = pytest.mark.usefixtures("each_backend")
SHAPES = [(3, 7), (1, 1), (600, 1), (1, 24), (5, 3)]
KEYS = [make_key(3, 0, number) for number in range(len(SHAPES))]
OCTAVES = [0.005, 3.0, 0.02, 1e-4, 0.0]


def int8(low: int, high: int, shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randint(low, high + 1, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def some(shapes: list[tuple[int, int]] = SHAPES) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Exponents, evidences and momenta; the third is that of a table used at few rows, the fourth all zeros."""
    flat = [(1, rows * columns) for rows, columns in shapes]
    momenta = [int8(-127, 126, shape, 20 + n) for n, shape in enumerate(flat)]
    if len(momenta) > 3:
        momenta[2][:, 3:] //= 64
        momenta[3].zero_()
    exponents = [int8(-126, 126, shape, n) for n, shape in enumerate(shapes)]
    return exponents, [int8(-128, 127, shape, 10 + n) for n, shape in enumerate(flat)], momenta


def numbers(exponents: list[Tensor], evidences: list[Tensor]) -> Tensor:
    return torch.cat(
        [e.view(-1).double() + v.view(-1).double() / 256 for e, v in zip(exponents, evidences, strict=True)]
    )


def by_hand(octaves: list[float], stays: Tensor | None = None) -> Tensor:
    """The numbers after the move, in float64 and integers."""
    exponents, evidences, momenta = some()
    parts = []
    for e, v, m, rate, key in zip(exponents, evidences, momenta, octaves, KEYS, strict=True):
        x = m.view(-1).double()
        u = (x / x.square().mean().sqrt()).clamp(-8, 8) if x.any() else x
        moved = (-u.float().double() * rate * 2048).clamp(-65024, 65024)
        steps = torch.floor(moved + (random_bits16(m.numel(), key).double() + 32768) / 65536)
        parts.append((e.view(-1).double() * 256 + v.view(-1), steps))
    before, steps = (torch.cat(one) for one in zip(*parts, strict=True))
    if stays is not None:
        steps = steps.masked_fill(stays, 0)
    return (before + steps).clamp(-32512, 32512) / 256


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("go", [None, True, False])
@pytest.mark.parametrize("live", [False, True])
def test_the_numbers_are_those_by_hand(live, go, still, poisoned):
    exponents, evidences, momenta = some()
    before = numbers(exponents, evidences)
    stays = torch.arange(before.numel()) % 3 == 0 if still else None
    octaves, keys = (torch.tensor(OCTAVES, dtype=torch.float64), torch.tensor(KEYS)) if live else (OCTAVES, KEYS)
    ops.move_scales_many(exponents, evidences, momenta, octaves, keys, stays, None if go is None else torch.tensor(go))
    found = numbers(exponents, evidences)
    if go is False:
        assert torch.equal(found, before)
        return
    # The RMS in float32 can be a rounding off the one here.
    expected = by_hand(OCTAVES, stays)
    assert (found - expected).abs().max() <= 1 / 256 and (found != expected).sum() <= 2
    assert (found != before).sum() > 300 - 100 * still


def test_octaves_and_keys_may_lie_anywhere_on_the_device():
    """One number that stands for all sets, and keys out of a wider table."""
    found, expected = some(), some()
    octaves, keys = torch.tensor(0.3, dtype=torch.float64).expand(len(SHAPES)), torch.tensor(KEYS).repeat(1, 2)[:, :2]
    ops.move_scales_many(*found, octaves, keys)
    ops.move_scales_many(*expected, [0.3] * len(SHAPES), KEYS)
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_no_scale_of_a_large_table_runs_away():
    """One row of 40,000 that has all of the gradient: u of unit RMS would be 200."""
    momentum = torch.zeros(1, 40_000, dtype=torch.int8)
    momentum[0, 7] = -127
    exponent, evidence = torch.zeros(40_000, 1, dtype=torch.int8), torch.zeros_like(momentum)
    ops.move_scales_many([exponent], [evidence], [momentum], [0.125], [make_key(0, 0, 0)])
    assert int(exponent[7, 0]) == 8 and int(evidence[0, 7]) == 0  # an octave
    assert exponent.count_nonzero() == 1 and not evidence.any()


@pytest.mark.parametrize("octaves", [0.005, 0.3, 40.0])
def test_every_backend_has_the_bits_of_the_reference(octaves):
    (found, expected), momenta = (some() for _ in range(2)), some()[2]
    ops.move_scales_many(*found, [octaves] * len(SHAPES), KEYS)
    reference.move_scales_many(*expected, [octaves] * len(SHAPES), KEYS, None, None)
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(found[2], momenta, strict=True))


def test_together_they_have_the_bits_of_each_alone():
    together, alone = some(), some()
    ops.move_scales_many(*together, OCTAVES, KEYS)
    for number in range(len(SHAPES)):
        exponent, evidence, momentum = ([one[number]] for one in alone)
        ops.move_scales_many(exponent, evidence, momentum, [OCTAVES[number]], [KEYS[number]])
    assert all(torch.equal(a, b) for x, y in zip(together, alone, strict=True) for a, b in zip(x, y, strict=True))


def test_a_large_set_has_the_bits_of_the_reference():
    """Its sum of squares is more than float32 can hold, and one of integers."""
    found, expected = some([(300, 40)]), some([(300, 40)])
    assert found[2][0].long().square().sum() > 2**24
    before = numbers(*found[:2])
    ops.move_scales_many(*found, [0.1], KEYS[:1])
    reference.move_scales_many(*expected, [0.1], KEYS[:1], None, None)
    after, truth = numbers(*found[:2]), numbers(*expected[:2])
    assert torch.equal(after, truth)
    assert (after != before).sum() > 10_000


def test_tensors_that_are_not_contiguous():
    plain, strided = some(), some()
    turned = [e.T.contiguous().T for e in strided[0]]
    ops.move_scales_many(*plain, OCTAVES, KEYS)
    ops.move_scales_many(turned, *strided[1:], OCTAVES, KEYS)
    assert all(torch.equal(a, b) for a, b in zip(turned, plain[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(strided[1], plain[1], strict=True))


def test_opcheck():
    flat = [number for key in KEYS for number in key]
    for go in (None, torch.tensor(False)):
        given = (*some(), OCTAVES, flat, None, go)
        torch.library.opcheck(torch.ops.tritwise.move_scales_many.default, given)
