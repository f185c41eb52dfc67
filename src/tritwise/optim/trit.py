"""The register rule as a torch optimizer: int8 momentum, a direction of unit RMS, stochastic rounding into registers.

For every ternary layer, as soon as backward has made its gradient G:

    momentum  M <- round(decay * M + G)                     int8, one power-of-two exponent a row
    scales    the same for the gradient of the scale exponents

and at `step()`, layer by layer:

    direction U <- orthogonalised (or row/column-normalised, …) M, unit RMS
    registers R <- clamp(R - round(rate * 81 * U), +-121)   the leading trit of R is the weight
    exponents E <- clamp(E - round(scale_rate * 8 * u), +-127)

`round` is stochastic and counter-based. The gradient is let go of at once: memory never holds two. Source: DESIGN.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn import TritModule, trit_modules
from tritwise.ops.direction import METHODS
from tritwise.ops.update.reference import EXPONENT_FLOOR
from tritwise.registers import EXPONENT_LIMIT, EXPONENTS_PER_OCTAVE, LEAD, make_key

# Streams of randomness of one tensor at one step; micro-batches count up from the last.
_MOVE, _MOVE_SCALE, _ACCUMULATE = 0, 1, 2

# Row/column beats Newton-Schulz where rows are symbols: a rare row gets its step whatever the others do.
ROLE_DEFAULTS: dict[str, dict[str, Any]] = {
    "embedding": {"direction": "row_column"},
    "head": {"direction": "row_column"},
}


class TritOptimizer(torch.optim.Optimizer):
    """Trains every ternary layer of a model. State: 1 byte a weight for momentum, beside the register's own byte.

    layers: a model, an iterable of TritModule, or a list of groups {"params": [TritModule, …], "lr": …, …}. A model or
        an iterable is split into one group per declared role (matrix, embedding, head).
    rate: step of a register in leading-trit units for a direction of 1; stored as "lr", so torch's schedulers work.
    momentum: decay of the int8 momentum. scale_rate: step of a scale in octaves (0: scales stay).
    direction: of the groups that have no other by default (ROLE_DEFAULTS), one of `tritwise.ops.direction.METHODS`;
        steps: Newton-Schulz steps.
    roles: settings for single roles, such as {"embedding": {"direction": "row_column", "rate": 0.01}}.
    interval: a layer moves at every interval-th step, by interval times as much; layers take turns.
    seed: of the stochastic rounding.

    Gradient accumulation: call backward several times before `step()`, each with loss / count. Every micro-batch is
    added into the integer momentum. `zero_grad` is not needed.
    Raises ValueError for a rate, momentum or direction that cannot work.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[TritModule] | list[dict[str, Any]],
        rate: float = 0.02,
        *,
        momentum: float = 0.95,
        scale_rate: float = 0.0,
        direction: str = "newton_schulz",
        steps: int = 3,
        interval: int = 1,
        roles: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": rate,
            "momentum": momentum,
            "scale_rate": scale_rate,
            "direction": direction,
            "steps": steps,
            "interval": interval,
            "seed": seed,
            "step": 0,
            "skipped": 0,
        }
        self._layers: dict[Tensor, TritModule] = {}
        self._number: dict[Tensor, int] = {}
        self._received: dict[Tensor, int] = {}
        self._taken: list[Tensor] = []
        self._touched: dict[Tensor, Tensor] = {}
        self.flips_by_layer: dict[TritModule, Tensor] = {}
        super().__init__(_groups(layers, roles or {}), defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": [TritModule, …], …settings}. The layers' gradients come here from now on."""
        layers = list(param_group["params"])
        for layer in layers:
            if not isinstance(layer, TritModule):
                raise ValueError(f"TritOptimizer trains ternary layers, not {type(layer).__name__}; give it to AdamW")
        settings = {k: v for k, v in param_group.items() if k not in ("params", "rate")}
        if "rate" in param_group:
            settings["lr"] = param_group["rate"]
        merged = self.defaults | settings
        _check(merged)
        super().add_param_group({"params": [layer.register for layer in layers], **settings})
        index = len(self.param_groups) - 1
        for layer in layers:
            self._layers[layer.register] = layer
            self._number[layer.register] = len(self._number)
            # By index: load_state_dict puts new dicts in the place of the groups.
            layer.consumer = lambda layer, grad: self._consume(layer, grad, self.param_groups[index])

    @property
    def step_count(self) -> int:
        """Steps taken, the skipped ones included."""
        return self.param_groups[0]["step"]

    @property
    def skipped(self) -> int:
        """Steps at which nothing moved because a gradient held a NaN or an infinity."""
        return self.param_groups[0]["skipped"]

    @property
    def flips(self) -> int:
        """Leading trits that changed at the last step."""
        return sum(int(flips) for flips in self.flips_by_layer.values())

    def _state_of(self, layer: TritModule, scales: bool) -> dict[str, Tensor]:
        state = self.state[layer.register]
        if "momentum" not in state:
            rows, device = layer.register.shape[0], layer.register.device
            state["momentum"] = torch.zeros_like(layer.register)
            state["row_exponent"] = torch.full((rows, 1), EXPONENT_FLOOR, dtype=torch.int8, device=device)
        if scales and "scale_momentum" not in state:
            device = layer.register.device
            state["scale_momentum"] = torch.zeros(1, layer.exponent.numel(), dtype=torch.int8, device=device)
            state["scale_row_exponent"] = torch.full((1, 1), EXPONENT_FLOOR, dtype=torch.int8, device=device)
        return state

    @torch.no_grad()
    def _consume(self, layer: TritModule, grad: Tensor, group: dict[str, Any]) -> None:
        """Take one layer's gradient into its momentum. Called from backward, once for every micro-batch."""
        register = layer.register
        micro = self._received.get(register, 0)
        self._received[register] = micro + 1
        decay = group["momentum"] if micro == 0 else 1.0
        scales = group["scale_rate"] > 0
        state = self._state_of(layer, scales)
        stream = _ACCUMULATE + 3 * micro
        where = (group["seed"], group["step"], self._number[register])
        if layer.sparse:
            self._accumulate_rows(register, state, grad, group["momentum"], where, stream)
        else:
            key = make_key(*where, stream)
            taken = ops.accumulate_momentum(state["momentum"], state["row_exponent"], grad, decay, key)
            self._taken.append(taken)
        if scales:
            scale_grad = ops.linear_scale_grad(grad, register, layer.exponent, layer.group).view(1, -1)
            key = make_key(*where, stream + 2)
            ops.accumulate_momentum(state["scale_momentum"], state["scale_row_exponent"], scale_grad, decay, key)

    def _accumulate_rows(
        self,
        register: Tensor,
        state: dict[str, Tensor],
        grad: Tensor,
        decay: float,
        where: tuple[int, int, int],
        stream: int,
    ) -> None:
        """The same for the rows that have a gradient, and only those. A row decays when a step first touches it."""
        used_V = grad.abs().amax(dim=1) != 0  # true for NaN as well: such a row is refused below
        known_V = self._touched.get(register)
        parts = [(used_V, decay)] if known_V is None else [(used_V & ~known_V, decay), (used_V & known_V, 1.0)]
        for part, (mask_V, factor) in enumerate(parts):
            rows = mask_V.nonzero()[:, 0]
            if rows.numel():
                momentum, exponent = state["momentum"][rows], state["row_exponent"][rows]
                key = make_key(*where, stream + part)
                self._taken.append(ops.accumulate_momentum(momentum, exponent, grad[rows], factor, key))
                state["momentum"][rows], state["row_exponent"][rows] = momentum, exponent
        self._touched[register] = used_V if known_V is None else used_V | known_V

    def refuse(self) -> None:
        """Let the next `step()` move nothing and count as skipped: for a loss that is no number, before backward."""
        self._taken.append(torch.zeros((), dtype=torch.bool, device=next(iter(self._layers)).device))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the registers of every layer that received a gradient since the last step; returns closure's loss.

        If any gradient held a NaN or an infinity nothing moves, `skipped` counts it, and the step still counts.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        skip = bool(self._taken) and not bool(torch.stack(self._taken).all())
        self.flips_by_layer = {}
        for group in self.param_groups:
            if skip:
                group["skipped"] += 1
            else:
                for register in group["params"]:
                    if register in self._received:
                        self._move(self._layers[register], group)
            group["step"] += 1
        self._received.clear()
        self._taken.clear()
        self._touched.clear()
        return loss

    def _move(self, layer: TritModule, group: dict[str, Any]) -> None:
        register, number, step, interval = (
            layer.register,
            self._number[layer.register],
            group["step"],
            group["interval"],
        )
        if (step + number) % interval:
            return
        state, method = self._state_of(layer, scales=False), group["direction"]
        rate = group["lr"] * interval
        momentum, exponent, moved = state["momentum"], state["row_exponent"], register
        rows = self._touched[register].nonzero()[:, 0] if layer.sparse else None
        if rows is not None:
            if not rows.numel():
                return
            momentum, exponent, moved = momentum[rows], exponent[rows], register[rows]
        u = ops.direction(momentum, exponent, method, group["steps"], layer.blocks)
        flips = ops.move_registers(moved, u, rate * LEAD, make_key(group["seed"], step, number, _MOVE))
        if rows is not None:
            register[rows] = moved
        self.flips_by_layer[layer] = flips
        if group["scale_rate"] > 0:
            u = ops.direction(state["scale_momentum"], state["scale_row_exponent"], "rms").view_as(layer.exponent)
            # Scales follow the schedule of the rate; at a rate of 0 they stay.
            initial = group.get("initial_lr", group["lr"])
            scale_rate = group["scale_rate"] * rate / initial if initial else 0.0
            moved = layer.exponent
            if rows is not None:
                u, moved = u[rows], moved[rows]
            key = make_key(group["seed"], step, number, _MOVE_SCALE)
            ops.move_registers(moved, u, scale_rate * EXPONENTS_PER_OCTAVE, key, limit=EXPONENT_LIMIT)
            if rows is not None:
                layer.exponent[rows] = moved


def _groups(
    layers: nn.Module | Iterable[TritModule] | list[dict[str, Any]], roles: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One group per role, in the order in which roles appear, unless the caller made groups already."""
    if isinstance(layers, nn.Module):
        found = [layer for _, layer in trit_modules(layers)]
    else:
        listed = list(layers)
        if listed and all(isinstance(entry, dict) for entry in listed):
            if roles:
                raise ValueError("groups carry their own settings; put those of `roles` into the groups")
            return listed  # type: ignore[return-value]
        found = listed
    if not found:
        raise ValueError("there is no ternary layer to train; build the model with weights='trit'")
    groups: dict[str, list[Any]] = {}
    for layer in found:
        groups.setdefault(getattr(layer, "role", "matrix"), []).append(layer)
    unknown = set(roles) - set(groups)
    if unknown:
        raise ValueError(f"no layer has the role {sorted(unknown)[0]!r}; the model has {', '.join(groups)}")
    return [
        {"params": members, "role": role, **ROLE_DEFAULTS.get(role, {}), **roles.get(role, {})}
        for role, members in groups.items()
    ]


def _check(group: dict[str, Any]) -> None:
    for name in ("lr", "scale_rate"):
        if not 0 <= group[name] < float("inf"):
            raise ValueError(f"{'rate' if name == 'lr' else name} is {group[name]}; it must be 0 or more and finite")
    if not 0 <= group["momentum"] < 1:
        raise ValueError(f"momentum is {group['momentum']}; it must be at least 0 and below 1")
    if group["direction"] not in METHODS:
        raise ValueError(f"there is no direction {group['direction']!r}; choose one of {', '.join(METHODS)}")
    if group["steps"] < 1 or group["interval"] < 1:
        raise ValueError("steps and interval must be at least 1")
