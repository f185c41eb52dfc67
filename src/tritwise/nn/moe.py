"""A mixture of ternary experts: a router sends every position to a few of them, once or, while it pays, again.

Shape suffixes: N positions, C width, E experts, K active experts of a position, S = N * K rows that experts make.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tritwise import ops
from tritwise.nn.linear import TritLinear, stacked
from tritwise.nn.mlp import MLP
from tritwise.nn.norm import relu_squared_norm, rms_norm

MOST_ITERS = 4
HALTED = 0.05
"""A position stops when less than this share of its output is still to be decided; its last pass takes the rest."""


class TritMoE(nn.Module):
    """y = sum over the K best experts e of gate_e(x) * MLP_e(x); x of unit RMS [..., width] -> [..., width].

    experts: E. active: K. hidden: of each expert, so a position meets K * hidden hidden units whatever E is.
    `linear` makes all matrices: TritLinear, or FloatLinear for the float twin. leak: of the experts, as in `MLP`. In
    bfloat16 on a GPU, and compiled, all experts are one product of runs of rows: float8 is not used there, and widths
    that are no multiple of 8, or float32 on a GPU, cost a product of all rows for each expert.

    balance: what keeps the load even. The gradient of the router's logits is turned against experts that get more than
        their share of the batch (the gradient of Fedus et al. 2021's loss, measured against the task's own), so nothing
        has to be remembered from batch to batch; 0: off.
    max_iters: passes through the same experts, at the most 4. Each reads what the one before made of x, and a learned
        halting probability weighs the passes (Graves 2016, "Adaptive computation time"; Banino et al. 2021): see
        `passes`. ponder: pressure to halt early, relative to the task's own gradient, as `balance`; 0: off.
    Raises ValueError for numbers that cannot work.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        experts: int = 8,
        active: int = 2,
        max_iters: int = 1,
        balance: float = 1.0,
        ponder: float = 0.1,
        linear: type[nn.Module] = TritLinear,
        group: int = 256,
        leak: float = 0.0,
    ) -> None:
        super().__init__()
        if not 1 <= active <= experts:
            raise ValueError(f"{active} of {experts} experts cannot be active; choose 1 to {experts}")
        if not 1 <= max_iters <= MOST_ITERS:
            raise ValueError(f"max_iters is {max_iters}; choose 1 to {MOST_ITERS}")
        self.active, self.max_iters, self.balance, self.ponder = active, max_iters, balance, ponder
        self.leak = leak
        self.router = linear(width, experts, group=group)
        self.experts = nn.ModuleList(MLP(width, hidden, linear=linear, group=group, leak=leak) for _ in range(experts))
        for layer in self.experts.modules():
            if isinstance(layer, TritLinear):
                layer.decodes_ahead = False  # it is decoded with those of the other experts
        self.halt = linear(width, 1, group=group) if max_iters > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        x_NC = x.reshape(-1, x.shape[-1])
        y_NC = self._mix(x_NC) if self.halt is None else self._repeat(x_NC)[0]
        return y_NC.view(x.shape)

    def route(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Whom each position goes to, int64 [N, K], and the shares of their answers, x's dtype [N, K], of sum 1."""
        logits_NE = self.router(x_NC)
        chosen_NK = logits_NE.topk(self.active, dim=1).indices
        if self.balance and torch.is_grad_enabled() and logits_NE.requires_grad:
            logits_NE = _nudged(logits_NE, self._pressure(logits_NE.detach().float(), chosen_NK))
        return chosen_NK, torch.softmax(logits_NE.gather(1, chosen_NK).float(), dim=1).to(x_NC.dtype)

    def passes(self, x: Tensor) -> Tensor:
        """How many passes each position takes, int64 of x's shape without the last dimension."""
        if self.halt is None:
            return torch.ones(x.shape[:-1], dtype=torch.int64, device=x.device)
        return self._repeat(x.reshape(-1, x.shape[-1]))[1].view(x.shape[:-1])

    def _pressure(self, logits_NE: Tensor, chosen_NK: Tensor) -> Tensor:
        """Towards which logits must fall for the load to be even; 0 where it is."""
        experts = logits_NE.shape[1]
        excess_E = _load(chosen_NK, experts).float() * (experts / chosen_NK.numel()) - 1.0
        p_NE = torch.softmax(logits_NE, dim=1)
        return self.balance * experts * p_NE * (excess_E - (p_NE * excess_E).sum(dim=1, keepdim=True))

    def _mix(self, x_NC: Tensor) -> Tensor:
        """One pass: [N, C] -> [N, C]."""
        chosen_NK, gate_NK = self.route(x_NC)
        order_S = torch.argsort(chosen_NK.flatten(), stable=True)
        slot_NK = torch.empty_like(order_S).scatter_(0, order_S, torch.arange(len(order_S), device=x_NC.device))
        slot_NK = slot_NK.view(chosen_NK.shape)
        rows_SC = _Dispatched.apply(x_NC, order_S // self.active, slot_NK)
        return ops.combine(self._made(rows_SC, _load(chosen_NK, len(self.experts))), slot_NK, gate_NK)

    def _made(self, rows_SC: Tensor, load_E: Tensor) -> Tensor:
        """What experts make of rows that lie in their order, load_E, int64, of each."""
        if in_runs(rows_SC):  # how many rows an expert has stays on the device
            experts = cast("list[MLP]", list(self.experts))
            up_EHC = stacked([expert.up for expert in experts], rows_SC.dtype)
            down_ECH = stacked([expert.down for expert in experts], rows_SC.dtype)
            if up_EHC is not None and down_ECH is not None:
                ends_E = load_E.cumsum(0).to(torch.int32)
                h_SH = ops.grouped_product(rows_SC, up_EHC, ends_E)
                return ops.grouped_product(relu_squared_norm(h_SH, self.leak), down_ECH, ends_E)
        parts = zip(self.experts, rows_SC.split(load_E.tolist()), strict=True)
        return torch.cat([expert(part) for expert, part in parts if len(part)])

    def _repeat(self, x_NC: Tensor) -> tuple[Tensor, Tensor]:
        """Passes until every position has halted: what they add to x [N, C], and how many each took, int64 [N]."""
        assert self.halt is not None
        state_NC, y_NC = x_NC, torch.zeros_like(x_NC)
        left_N1 = x_NC.new_ones(len(x_NC), 1)  # the share of the output that is still to be decided
        taken_N = torch.zeros(len(x_NC), dtype=torch.int64, device=x_NC.device)
        for number in range(1, self.max_iters + 1):
            going_N1 = left_N1 > 0
            taken_N = taken_N + going_N1[:, 0]
            state_NC = state_NC + self._mix(rms_norm(state_NC))
            if number < self.max_iters:
                logit_N1 = self.halt(rms_norm(state_NC))
                if self.ponder and torch.is_grad_enabled() and logit_N1.requires_grad:
                    logit_N1 = _nudged(logit_N1, -self.ponder * going_N1.float())
                share_N1 = left_N1 * torch.sigmoid(logit_N1)
                share_N1 = torch.where(left_N1 - share_N1 < HALTED, left_N1, share_N1)
            else:
                share_N1 = left_N1
            y_NC = y_NC + share_N1 * (state_NC - x_NC)
            left_N1 = left_N1 - share_N1
            if not torch.compiler.is_compiling() and not bool((left_N1 > 0).any()):
                break
        return y_NC, taken_N


def _load(chosen_NK: Tensor, experts: int) -> Tensor:
    """How many rows each expert gets, int64 [E]; the host does not wait."""
    return (chosen_NK.flatten()[:, None] == torch.arange(experts, device=chosen_NK.device)).sum(dim=0)


def in_runs(rows_SC: Tensor) -> bool:
    """Whether products of all experts are one operation: where the host must not wait to know how many rows each has,
    or, in bfloat16 on a GPU, need not."""
    if torch.compiler.is_compiling():
        return True
    return rows_SC.is_cuda and (rows_SC.dtype is torch.bfloat16 or torch.cuda.is_current_stream_capturing())


class _Dispatched(torch.autograd.Function):
    # Rows of x by their numbers. Each position's gradients are added up in the order of its experts: the same bits
    # every time, which the gradient of indexing has not on a GPU.
    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, source_S: Tensor, slot_NK: Tensor) -> Tensor:
        ctx.save_for_backward(slot_NK)
        return x_NC.index_select(0, source_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SC: Tensor) -> tuple[Tensor, None, None]:
        (slot_NK,) = ctx.saved_tensors
        return grad_SC[slot_NK].sum(dim=1), None, None


class _Nudge(torch.autograd.Function):
    # x as it is; its gradient gets `pressure`, in units of the RMS of the gradient itself. So the pressure weighs the
    # same whatever the loss is scaled by, and no loss has to be carried out of the layer.
    @staticmethod
    def forward(ctx: Any, x: Tensor, pressure: Tensor) -> Tensor:
        ctx.save_for_backward(pressure)
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (pressure,) = ctx.saved_tensors
        unit = grad.float().square().mean().sqrt()
        return grad + (unit * pressure).to(grad.dtype), None


def _nudged(x: Tensor, pressure: Tensor) -> Tensor:
    return _Nudge.apply(x, pressure)  # type: ignore[no-any-return]
