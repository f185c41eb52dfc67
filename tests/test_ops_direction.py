"""Directions: unit RMS from any momentum, Newton-Schulz against a float64 SVD, and row exponents from end to end."""

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops.direction import METHODS
from tritwise.ops.direction.reference import newton_schulz

SHAPES = [(1, 1), (1, 7), (7, 1), (8, 8), (13, 17), (17, 13), (16, 32), (31, 97), (97, 31), (128, 384), (300, 64)]


def state(rows: int, columns: int, seed: int = 0, lowest: int = -20, highest: int = -10) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    momentum = torch.randn(rows, columns, generator=generator).mul_(40).round_().clamp_(-127, 127).to(torch.int8)
    momentum[0, 0] = 100  # never all zero
    exponent = torch.randint(lowest, highest, (rows, 1), dtype=torch.int8, generator=generator)
    return momentum, exponent


def flat(rows: int, value: int = 0) -> Tensor:
    return torch.full((rows, 1), value, dtype=torch.int8)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def quintic(s: Tensor, steps: int) -> Tensor:
    """What `steps` of Muon's polynomial make of a singular value."""
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return s


def spectral_oracle(x: Tensor, steps: int) -> Tensor:
    """U p(S) V^T in float64, S being the singular values over the Frobenius norm."""
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ torch.diag(quintic(s / s.norm(), steps)) @ vh


# Everything here is asked of every backend that this machine can run.
OPERATION = "direction"
pytestmark = pytest.mark.usefixtures("each_backend")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_unit_rms(method, shape, poisoned):
    momentum, exponent = state(*shape)
    kept = momentum.clone(), exponent.clone()
    u = ops.direction(momentum, exponent, method)
    assert u.dtype == torch.float32 and u.shape == shape and u.is_contiguous()
    assert rms(u) == pytest.approx(1, abs=1e-5)
    assert torch.equal(momentum, kept[0]) and torch.equal(exponent, kept[1])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 1), (6, 4), (4, 20)])
def test_zero_stays_zero(method, shape):
    for e in (-126, 0, 120):
        u = ops.direction(torch.zeros(shape, dtype=torch.int8), flat(shape[0], e), method)
        assert u.shape == shape and u.count_nonzero() == 0  # a NaN counts as not zero


@pytest.mark.parametrize("method", METHODS)
def test_a_row_or_column_of_zeros_stays_zero(method):
    momentum, exponent = state(12, 20)
    momentum[3], momentum[:, 5] = 0, 0
    u = ops.direction(momentum, exponent, method)
    assert torch.isfinite(u).all() and rms(u) == pytest.approx(1, abs=1e-5)
    assert u[3].abs().max().item() < 1e-5 and u[:, 5].abs().max().item() < 1e-5


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [-100, -3, 60, 120])
def test_the_overall_size_does_not_matter(method, shift):
    momentum, exponent = state(10, 14, lowest=-6, highest=0)
    u = ops.direction(momentum, exponent, method)
    assert torch.equal(ops.direction(momentum, exponent + shift, method), u)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (6, 40), (40, 6)])
def test_a_power_of_two_may_stand_in_the_momentum_or_in_the_exponent(method, shape):
    momentum, exponent = state(*shape)
    momentum.clamp_(-31, 31)
    moved, lower = momentum.clone(), exponent.clone()
    moved[::2] *= 4
    lower[::2] -= 2
    u = ops.direction(momentum, exponent, method)
    assert torch.equal(ops.direction(moved, lower, method), u)


def test_row_exponents_are_respected():
    """Newton-Schulz and rms see the numbers that momentum and exponents mean."""
    momentum, exponent = state(9, 15, lowest=-8, highest=0)
    value = momentum.double() * torch.exp2(exponent.double())
    u = ops.direction(momentum, exponent, "rms").double()
    assert torch.allclose(u, value / rms(value), rtol=1e-6, atol=0)
    expected = spectral_oracle(value, 3)
    u = ops.direction(momentum, exponent, "newton_schulz").double()
    assert (u - expected / rms(expected)).norm() < 1e-5 * u.norm()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("columns", [3, 8, 40])
def test_exponents_far_apart(method, blocks, columns):
    """Rows from 2**-126 to 2**100, in any order: finite and of unit RMS."""
    momentum, _ = state(8, columns)
    exponent = torch.tensor([-126, 100, 0, -60, 99, -126, -90, -30], dtype=torch.int8).view(8, 1)
    for rolled in range(8):
        u = ops.direction(momentum, exponent.roll(rolled, 0), method, blocks=blocks)
        assert torch.isfinite(u).all() and rms(u) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("method", ["row_column", "balanced"])
def test_row_column_is_blind_to_exponents(method):
    """Rows are divided by their own size: one that has decayed for thousands of steps must not disturb the others."""
    momentum, exponent = state(20, 30)
    u = ops.direction(momentum, exponent, method)
    for low in (-60, -100, -105, -115, -126):
        exponent[7] = low
        assert torch.equal(ops.direction(momentum, exponent, method), u)


def evened(x: Tensor) -> Tensor:
    """Rows, then columns, over their RMS, twice; float64."""
    x = x.double()
    for dim in (1, 0, 1, 0):
        x = x / x.square().mean(dim, keepdim=True).sqrt()
    return x


@pytest.mark.parametrize("steps", [1, 3, 5])
@pytest.mark.parametrize(("blocks", "rows", "columns"), [(1, 12, 12), (1, 30, 11), (1, 9, 40), (3, 8, 14), (2, 40, 8)])
def test_balanced_is_newton_schulz_of_row_column(blocks, rows, columns, steps):
    momentum, exponent = state(blocks * rows, columns)
    momentum[1] = momentum[1].div(9, rounding_mode="trunc")  # a quiet row, and a loud column
    momentum[:, 2] = 100
    expected = torch.cat([spectral_oracle(evened(part), steps) for part in momentum.split(rows)])
    u = ops.direction(momentum, exponent, "balanced", steps, blocks).double()
    assert (u - expected / rms(expected)).norm() < 2e-5 * u.norm()
    plain = ops.direction(momentum, flat(blocks * rows), "newton_schulz", steps, blocks).double()
    assert (u - plain).norm() > 0.1 * u.norm()  # evening out first is not the same


def test_one_loud_row_does_not_outvote_the_others():
    quiet, exponent = state(20, 30)
    quiet.clamp_(-12, 12)
    loud = quiet.clone()
    loud[4] *= 10
    for method, low, high in (("balanced", 0.0, 1e-5), ("newton_schulz", 0.1, 2.0)):
        change = rms(ops.direction(loud, exponent, method) - ops.direction(quiet, exponent, method))
        assert low <= change < high


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 5), (24, 24), (24, 36), (36, 24), (24, 48), (48, 24), (16, 200)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape, steps):
    """Both ways of computing it: plain below twice as many columns as rows, through the Gram matrix from there on."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    found, expected = newton_schulz(x, steps), spectral_oracle(x, steps)
    assert found.shape == shape
    assert (found - expected).norm() < 2e-5 * expected.norm()


@pytest.mark.parametrize("columns", [32, 48, 63, 64, 96, 200])
def test_three_steps_bring_singular_values_into_the_band(columns):
    """Of a matrix with condition at most 3 (Frobenius-normalised: above 0.03), all land in 0.68 … 1.2025."""
    generator = torch.Generator().manual_seed(columns)
    u = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(columns, 32, generator=generator))[0]
    x = u @ torch.diag(torch.linspace(1, 3, 32)) @ v.T
    for matrix in (x, x.T, 1e-6 * x, 1e6 * x):
        values = torch.linalg.svdvals(newton_schulz(matrix, 3))
        assert values.min().item() > 0.68 and values.max().item() < 1.2025
    assert torch.linalg.svdvals(newton_schulz(x, 3)).min() > 4 * torch.linalg.svdvals(x / x.norm()).min()


@pytest.mark.parametrize("columns", [40, 79, 80, 81, 160, 400])
def test_the_gram_path_equals_the_plain_path(columns):
    """At 80 columns the way of computing changes; a matrix padded with columns of zeros takes the other way."""
    x = torch.randn(40, columns, generator=torch.Generator().manual_seed(0))
    padded = torch.cat((x, torch.zeros(40, 400)), dim=1)
    gram = newton_schulz(padded, 3)
    assert gram[:, columns:].count_nonzero() == 0
    plain = newton_schulz(x, 3)
    assert (gram[:, :columns] - plain).norm() < 1e-5 * plain.norm()


def test_five_steps_in_bfloat16_iterate_the_matrix_itself():
    """A wide matrix whose singular values span e^8: through the Gram matrix the small ones are lost to rounding."""
    u, _, v = torch.linalg.svd(torch.randn(96, 384, generator=torch.Generator().manual_seed(0)), full_matrices=False)
    x = u * torch.exp(torch.arange(96) / -12) @ v
    exact = newton_schulz(x, 5)
    lost, kept = (newton_schulz(x.bfloat16(), 5, through_gram=way).float() for way in (True, False))
    assert (kept - exact).norm() < 0.15 * exact.norm() < (lost - exact).norm()


@pytest.mark.parametrize("shape", [(24, 24), (24, 36), (24, 48), (24, 200)])
def test_tall_is_the_transpose_of_wide(shape):
    momentum, _ = state(*shape)
    wide = ops.direction(momentum, flat(shape[0]))
    tall = ops.direction(momentum.T.contiguous(), flat(shape[1]))
    assert (tall.T - wide).norm() < 1e-5 * wide.norm()


@pytest.mark.parametrize(("blocks", "rows", "columns"), [(3, 16, 16), (3, 8, 40), (2, 40, 8), (4, 5, 7)])
def test_blocks_are_independent_matrices(blocks, rows, columns):
    momentum, exponent = state(blocks * rows, columns)
    exponent[:rows] += 30  # a block that is much larger than the others changes nothing for them
    exponent[rows : 2 * rows] -= 70
    u = ops.direction(momentum, exponent, blocks=blocks)
    parts = [
        newton_schulz(m * torch.exp2(e.double()), 3).double()
        for m, e in zip(momentum.double().split(rows), exponent.split(rows), strict=True)
    ]
    expected = torch.cat(parts)
    expected /= rms(expected)
    assert (u - expected).norm() < 1e-5 * expected.norm()
    for other in ("row_column", "rms", "sign"):
        assert torch.equal(
            ops.direction(momentum, exponent, other, 3, blocks), ops.direction(momentum, exponent, other)
        )


@pytest.mark.parametrize("shape", [(64, 64), (40, 120), (120, 40)])
def test_row_column_evens_out_rows_and_columns(shape):
    momentum, exponent = state(*shape, lowest=-60, highest=20)
    momentum[3] = momentum[3].div(10, rounding_mode="trunc")  # a rare row
    momentum[:, 5] = momentum[:, 5].div(5, rounding_mode="trunc")
    u = ops.direction(momentum, exponent, "row_column").double()
    assert (u.square().mean(1).sqrt() - 1).abs().max().item() < 0.02
    assert (u.square().mean(0).sqrt() - 1).abs().max().item() < 0.02
    assert torch.equal(u.sign(), momentum.double().sign())


def test_sign():
    momentum, exponent = state(10, 14)
    momentum[:, 3:7] = 0
    u = ops.direction(momentum, exponent, "sign")
    assert torch.allclose(u, momentum.sign() * (1 / (momentum != 0).float().mean()).sqrt(), rtol=1e-6)


def test_defaults():
    momentum, exponent = state(12, 18)
    u = ops.direction(momentum, exponent)
    assert torch.equal(u, ops.direction(momentum, exponent, "newton_schulz", 3, 1))
    assert not torch.equal(u, ops.direction(momentum, exponent, steps=5))
    assert not torch.equal(u, ops.direction(momentum, exponent, blocks=3))


def fresh(rows: int) -> Tensor:
    return torch.full((rows, 1), ops.LEVEL_FLOOR, dtype=torch.int16)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("blocks", "rows", "columns"), [(1, 24, 40), (3, 30, 7), (1, 1, 5)])
def test_steadied_rows_follow_a_running_mean_of_their_squares(method, blocks, rows, columns):
    """Over several steps, beside the mean in float64; the level follows it to a thousandth of an octave a step."""
    level, mean = fresh(rows), torch.zeros(rows, 1, dtype=torch.float64)
    for step in range(12):
        momentum, exponent = state(rows, columns, seed=step)
        plain = ops.direction(momentum, exponent, method, 3, blocks).double()
        mean = 0.8 * mean + 0.2 * plain.square().mean(dim=1, keepdim=True)
        expected = plain / mean.sqrt()
        u = ops.direction(momentum, exponent, method, 3, blocks, level, 0.8)
        assert rms(u) == pytest.approx(1, abs=1e-5) and u.is_contiguous()
        assert (u - expected / rms(expected)).norm() < 3e-3 * u.norm()
        assert (level / 1024 - torch.log2(mean)).abs().max() < 5e-3
    if rows > 1 and method in ("newton_schulz", "rms"):  # the others make rows nearly equal
        assert (u - plain).norm() > 0.02 * u.norm()  # what came before is remembered


def test_steadied_rows_of_several_matrices_are_those_of_each():
    shapes = [((8, 20), 1), ((24, 20), 3), ((8, 20), 1), ((5, 6), 1)]
    states = [state(*shape, seed=number) for number, (shape, _) in enumerate(shapes)]
    together, alone = ([fresh(shape[0]) for shape, _ in shapes] for _ in range(2))
    blocks = [count for _, count in shapes]
    for _ in range(2):
        given = [momentum for momentum, _ in states], [exponent for _, exponent in states]
        many = ops.direction_many(*given, "balanced", 3, blocks, together, 0.9)
        for (momentum, exponent), count, level, u in zip(states, blocks, alone, many, strict=True):
            assert torch.allclose(ops.direction(momentum, exponent, "balanced", 3, count, level, 0.9), u, atol=1e-5)
    for one, other in zip(together, alone, strict=True):
        assert (one.int() - other.int()).abs().max() <= 1 and (one > ops.LEVEL_FLOOR).all()


def test_a_steadied_row_of_zeros_stays_zero_and_a_refused_step_is_not_remembered():
    momentum, exponent = state(6, 10)
    momentum[2] = 0
    level = fresh(6)
    u = ops.direction(momentum, exponent, "balanced", 3, 1, level, 0.9)
    assert torch.isfinite(u).all() and u[2].abs().max() < 1e-5 and rms(u) == pytest.approx(1, abs=1e-5)
    kept = level.clone()
    for go, same in ((False, True), (True, False)):
        ops.direction_many([momentum.flip(1)], [exponent], "rms", 3, 1, [level], 0.9, torch.tensor(go))
        assert torch.equal(level, kept) == same


@pytest.mark.parametrize("method", ["muon", "", "Sign", "newton-schulz"])
def test_unknown_method(method):
    momentum, exponent = state(3, 4)
    with pytest.raises(ValueError, match="newton_schulz, balanced, row_column, rms, sign"):
        ops.direction(momentum, exponent, method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "blocks"), [((6, 10), 1), ((20, 3), 1), ((3, 20), 1), ((6, 10), 3), ((60, 3), 3)])
def test_opcheck(method, shape, blocks):
    momentum, exponent = state(*shape)
    for levels in ([], [fresh(shape[0])]):
        arguments = [momentum], [exponent], method, 3, [blocks], levels, 0.9
        torch.library.opcheck(torch.ops.tritwise.direction_many.default, arguments)
