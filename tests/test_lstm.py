"""The ternary LSTM: its step against the formula in float64, gradients, carried state, and that it learns to wait."""

import pytest
import torch
from torch import Tensor, nn

from tritwise.nn import FloatLinear, TritLinear, TritLSTM, TritLSTMCell, tensor_roles, trit_modules
from tritwise.nn.lstm import GAIN, LSTMState
from tritwise.optim import TritOptimizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def read_slowly(layer: TritLSTM, x_BTC: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
    """The cell, step by step, with autograd's own gradients."""
    outputs = []
    for x_BC in x_BTC.unbind(1):
        state = layer.cell(x_BC, state)
        outputs.append(state.h_BH)
    assert state is not None
    return torch.stack(outputs, 1), state


def test_a_step_is_the_formula():
    torch.manual_seed(0)
    cell = TritLSTMCell(5, 6, linear=FloatLinear)
    x, h, c = normal(3, 5), normal(3, 6, seed=1), normal(3, 6, seed=2)
    new = cell(x, LSTMState(h, c))
    a = x.double() @ cell.input.weight.double().T + h.double() @ cell.recurrent.weight.double().T
    z = GAIN * a / a.square().mean(1, keepdim=True).sqrt()
    i, f, o, g = z[:, :6].sigmoid(), (z[:, 6:12] + 1).sigmoid(), z[:, 12:18].sigmoid(), z[:, 18:].tanh()
    c64 = f * c.double() + i * g
    torch.testing.assert_close(new.c_BH.double(), c64, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new.h_BH.double(), o * c64.tanh(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("time", [1, 7])
@pytest.mark.parametrize("given", [False, True])
def test_a_sequence_and_its_gradients_are_those_of_the_cell(time, given):
    torch.manual_seed(0)
    layer = TritLSTM(5, 6, linear=FloatLinear).double()
    x = normal(2, time, 5).double().requires_grad_()
    state = LSTMState(normal(2, 6, seed=4).double(), normal(2, 6, seed=5).double()) if given else None
    upstream = normal(2, time, 6, seed=3).double()
    results = []
    for read in (layer, lambda *arguments: read_slowly(layer, *arguments)):
        y, last = read(x, state)
        results.append([y, last.h_BH, last.c_BH, *torch.autograd.grad(y, [x, *layer.parameters()], upstream)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("linear", [TritLinear, FloatLinear])
def test_reading_in_pieces_equals_reading_at_once(linear):
    torch.manual_seed(0)
    layer, x, state, parts = TritLSTM(8, 16, linear=linear), normal(2, 11, 8), None, []
    for part in x.split([1, 4, 6], dim=1):
        y, state = layer(part, state)
        parts.append(y)
    whole, last = layer(x)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(state.c_BH, last.c_BH, rtol=1e-4, atol=1e-5)
    assert not state.h_BH.requires_grad and not state.c_BH.requires_grad  # no gradient goes back into a state


def test_every_trained_tensor_is_an_integer_and_has_a_role():
    layer = TritLSTM(8, 16)
    assert {p.dtype for p in layer.parameters()} == {torch.int8}
    assert set(tensor_roles(layer).values()) == {"matrix", "scale"}
    assert [m.blocks for _, m in trit_modules(layer)] == [4, 4]


def test_the_state_stays_in_float32_under_bfloat16():
    layer, x = TritLSTM(8, 16), normal(2, 5, 8)
    y, state = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16 and state.c_BH.dtype == torch.float32
    assert (y.float() - layer(x)[0]).norm() < 0.05 * layer(x)[0].norm()
    assert layer.cell(x[:, 0].bfloat16()).c_BH.dtype == torch.float32


def test_it_learns_to_remember_over_a_distance():
    """What stood first is to be said last, 6 steps of noise later: nothing but the carried state can tell."""
    torch.manual_seed(0)
    layer, head = TritLSTM(8, 32), TritLinear(32, 4, role="head")
    optimizer = TritOptimizer(nn.ModuleList((layer, head)), rate=0.02)
    generator = torch.Generator().manual_seed(0)
    for step in range(120):
        optimizer.configure(rate=0.02 * (1 - step / 120))
        x, first = torch.randn(64, 7, 8, generator=generator), torch.randint(4, (64,), generator=generator)
        x[:, 0] = 3 * nn.functional.one_hot(first, 8)
        logits = head(layer(x)[0][:, -1])
        nn.functional.cross_entropy(logits, first).backward()
        optimizer.step()
    assert (logits.argmax(1) == first).float().mean() > 0.9  # a guess has 0.25
