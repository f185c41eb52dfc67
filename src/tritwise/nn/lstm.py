"""LSTM with ternary projections: a cell for one step, and a layer that reads sequences and can carry its state on.

Shape suffixes: B batch, T time, C inputs, H hidden units, Z = 4H pre-activations in the order i, f, o, g.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tritwise.nn.linear import TritLinear
from tritwise.nn.norm import EPS

GAIN = 2.0
"""RMS of the pre-activations. At 1, the gates never close; a ternary matrix cannot grow to close them."""
REMEMBER = 1.0  # added to the forget gate, so that a new cell keeps what it holds (Gers et al. 2000)


class LSTMState(NamedTuple):
    """What an LSTM remembers: output and cell, float [B, H] each, which no optimizer trains."""

    h_BH: Tensor
    c_BH: Tensor


class TritLSTMCell(nn.Module):
    """One step of an LSTM (Hochreiter and Schmidhuber 1997) with normalised pre-activations (after Ba et al. 2016):

        z = GAIN * rms_norm(W x + U h)       i, f, o = sigmoid(z_i, z_f + 1, z_o)       g = tanh(z_g)
        c' = f c + i g                       h' = o tanh(c')

    inputs: C. hidden: H. `linear` makes W [4H, C] and U [4H, H]: TritLinear, or FloatLinear for the float twin.
    There is no bias and no gain to learn: a ternary layer's scales set how much W and U weigh against each other.
    """

    def __init__(self, inputs: int, hidden: int, *, linear: type[nn.Module] = TritLinear, group: int = 256) -> None:
        super().__init__()
        self.hidden = hidden
        self.input = linear(inputs, 4 * hidden, group=group, blocks=4)
        self.recurrent = linear(hidden, 4 * hidden, group=group, blocks=4)

    def forward(self, x_BC: Tensor, state: LSTMState | None = None) -> LSTMState:
        """The state after reading x; without a state, from zeros. `h_BH` of the result is the output."""
        h_BH, c_BH = state or self.new_state(x_BC)
        new = _step((self.input(x_BC) + self.recurrent(h_BH.to(x_BC.dtype))).to(c_BH.dtype), c_BH)
        return LSTMState(new.o * new.t, new.c)

    def new_state(self, x: Tensor) -> LSTMState:
        """A state that has read nothing, for inputs like x [B, …]; float32 (float64 for float64), whatever x is: a cell
        adds up small numbers over hundreds of steps."""
        wide = torch.promote_types(x.dtype, torch.float32)
        h_BH, c_BH = (x.new_zeros(len(x), self.hidden, dtype=wide) for _ in range(2))
        return LSTMState(h_BH, c_BH)


class TritLSTM(nn.Module):
    """A `TritLSTMCell` over sequences: x [B, T, C] -> y [B, T, H]; y at t depends on x up to t.

    With a state it goes on where that state stopped; backward never goes there (truncated backpropagation in time).
    The inputs of all steps are projected in one product, and the gradients of all steps meet in one.
    """

    def __init__(self, inputs: int, hidden: int, *, linear: type[nn.Module] = TritLinear, group: int = 256) -> None:
        super().__init__()
        self.cell = TritLSTMCell(inputs, hidden, linear=linear, group=group)

    def forward(self, x_BTC: Tensor, state: LSTMState | None = None) -> tuple[Tensor, LSTMState]:
        """y [B, T, H], and the state after the last step, to be given to the next call."""
        h_BH, c_BH = state or self.cell.new_state(x_BTC)
        # A linear layer shows its matrix when it reads the identity: one decoding and one weight gradient for all T.
        u_HZ = self.cell.recurrent(torch.eye(self.cell.hidden, device=x_BTC.device, dtype=x_BTC.dtype))
        x_BTZ = self.cell.input(x_BTC).to(c_BH.dtype)
        y_BTH, c_BH = _Recurrence.apply(x_BTZ, u_HZ.to(c_BH.dtype), h_BH, c_BH)  # type: ignore[misc]
        return y_BTH.to(x_BTC.dtype), LSTMState(y_BTH[:, -1].detach(), c_BH)


class _Step(NamedTuple):
    inverse: Tensor  # of the RMS of the pre-activations [B, 1]
    n: Tensor  # pre-activations of unit RMS [B, Z]
    i: Tensor
    f: Tensor
    o: Tensor
    g: Tensor
    c: Tensor
    t: Tensor  # tanh(c)


def _step(a_BZ: Tensor, c_BH: Tensor) -> _Step:
    inverse_B1 = torch.rsqrt(a_BZ.square().mean(dim=-1, keepdim=True) + EPS)
    n_BZ = a_BZ * inverse_B1
    zi, zf, zo, zg = (GAIN * n_BZ).chunk(4, dim=-1)
    i, f, o, g = torch.sigmoid(zi), torch.sigmoid(zf + REMEMBER), torch.sigmoid(zo), torch.tanh(zg)
    c_BH = torch.addcmul(i * g, f, c_BH)
    return _Step(inverse_B1, n_BZ, i, f, o, g, c_BH, torch.tanh(c_BH))


class _Recurrence(torch.autograd.Function):
    # Autograd's own account of T steps would keep T weight gradients and take twice the time.
    @staticmethod
    def forward(ctx: Any, x_BTZ: Tensor, u_HZ: Tensor, h_BH: Tensor, c_BH: Tensor) -> tuple[Tensor, Tensor]:
        steps, outputs, first = [], [], (h_BH, c_BH)
        for a_BZ in x_BTZ.unbind(1):
            steps.append(_step(torch.addmm(a_BZ, h_BH, u_HZ), c_BH))
            c_BH, h_BH = steps[-1].c, steps[-1].o * steps[-1].t
            outputs.append(h_BH)
        y_BTH = torch.stack(outputs, dim=1)
        ctx.save_for_backward(u_HZ, y_BTH, *first, *(torch.stack(parts) for parts in zip(*steps, strict=True)))
        ctx.mark_non_differentiable(c_BH)
        return y_BTH, c_BH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTH: Tensor, _: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u_HZ, y_BTH, first_h, first_c, *stacked = ctx.saved_tensors
        steps = [_Step(*parts) for parts in zip(*(part.unbind(0) for part in stacked), strict=True)]
        back_h, back_c = torch.zeros_like(first_h), torch.zeros_like(first_c)
        grads = []
        for t in range(len(steps) - 1, -1, -1):
            s = steps[t]
            before_BH = steps[t - 1].c if t else first_c
            back_h = back_h + grad_BTH[:, t]
            back_c = back_c + back_h * s.o * (1 - s.t * s.t)
            z_BZ = torch.cat(
                (
                    back_c * s.g * s.i * (1 - s.i),
                    back_c * before_BH * s.f * (1 - s.f),
                    back_h * s.t * s.o * (1 - s.o),
                    back_c * s.i * (1 - s.g * s.g),
                ),
                dim=-1,
            )
            inner_B1 = (z_BZ * s.n).mean(dim=-1, keepdim=True)
            a_BZ = (z_BZ - s.n * inner_B1) * (GAIN * s.inverse)
            back_c, back_h = back_c * s.f, a_BZ @ u_HZ.T
            grads.append(a_BZ)
        x_grad_BTZ = torch.stack(grads[::-1], dim=1)
        h_BTH = torch.cat((first_h[:, None], y_BTH[:, :-1]), dim=1)
        return x_grad_BTZ, h_BTH.flatten(0, 1).T @ x_grad_BTZ.flatten(0, 1), None, None
