"""docs/RULE.md: the program on the page is the rule of the package, and it learns."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tritwise import ops
from tritwise.ops.linear.reference import decode as decode_here
from tritwise.registers import LEAD, make_key

PAGE = Path(__file__).parent.parent / "docs" / "RULE.md"
KEY = make_key(0)


@pytest.fixture(scope="module")
def page() -> dict[str, Any]:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, Any] = {}
    exec(blocks[0], names)
    return names


def integers(shape: tuple[int, ...], limit: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-limit, limit + 1, shape)


def int8(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values).to(torch.int8)


def test_it_decodes_the_same_weights(page):
    registers, exponents = integers((5, 300), 121), integers((5, 2), 60, seed=1)
    expected = decode_here(int8(registers), int8(exponents), 256, torch.float32).numpy()
    np.testing.assert_allclose(page["decode"](registers, exponents), expected, rtol=4e-3)  # scales are rounded to bf16


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
def test_its_direction_is_that_of_the_package(page, shape):
    momentum = integers(shape, 127)
    level = torch.zeros(shape[0], 1, dtype=torch.int8)
    expected = ops.direction(int8(momentum), level, "balanced").numpy()
    found = page["direction"](momentum)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


def test_its_momentum_has_the_same_exponents_and_the_same_mean(page):
    grad = np.random.default_rng(3).standard_normal((6, 500)).astype(np.float32) * 10.0 ** -np.arange(6)[:, None]
    start, exponents = integers((6, 500), 127), integers((6, 1), 9, seed=1)
    momentum, row = int8(start), int8(exponents)
    ops.accumulate_momentum(momentum, row, torch.from_numpy(grad), 0.9, KEY)
    found, e = page["accumulate"](start, exponents.astype(float), grad, np.random.default_rng(0))
    assert np.array_equal(e, row.numpy())
    exact = (0.9 * start * 2.0**exponents + grad) / 2.0**e
    for rounded in (found, momentum.numpy()):
        assert np.abs(rounded - exact).max() <= 1 and abs((rounded - exact).mean()) < 0.03


def test_its_registers_move_as_far(page):
    registers, u = integers((50, 400), 121), np.random.default_rng(5).standard_normal((50, 400)).astype(np.float32)
    moved = int8(registers)
    ops.move_registers(moved, torch.from_numpy(u), 0.03 * LEAD, KEY)
    found = page["move"](registers, u, 0.03, np.random.default_rng(0))
    exact = np.clip(registers - 0.03 * 81 * u, -121, 121)
    for rounded in (found, moved.numpy()):
        assert np.abs(rounded - exact).max() <= 1 and abs((rounded - exact).mean()) < 0.02


def test_it_learns_a_ternary_matrix(page):
    rng, secret = np.random.default_rng(0), integers((8, 16), 1, seed=2)
    exponents = np.full((8, 1), round(8 * np.log2(1 / np.sqrt(16 * 0.66))))
    registers, momentum, e = integers((8, 16), 72), np.zeros((8, 16)), np.full((8, 1), -126.0)
    before = _agreement(registers, secret)
    for step in range(400):
        x = rng.standard_normal((64, 16))
        error = x @ (page["decode"](registers, exponents) - secret * 2.0 ** (exponents / 8)).T
        momentum, e = page["accumulate"](momentum, e, error.T @ x / 64, rng)
        registers = page["move"](registers, page["direction"](momentum), 0.03 * (1 - step / 400), rng)
    assert before < 0.5 and _agreement(registers, secret) > 0.95


def _agreement(registers: np.ndarray, secret: np.ndarray) -> float:
    return float((((registers > 40) * 1 - (registers < -40)) == secret).mean())
