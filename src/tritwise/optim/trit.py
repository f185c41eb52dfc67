"""The register rule as a torch optimizer: int8 momentum, a direction of unit RMS, stochastic rounding into registers.

For every ternary layer, as soon as backward has made its gradient G:

    momentum  M <- round(decay * M + G)                     int8, one power-of-two exponent a row
    scales    the same for the gradient of the scale exponents

and at `step()`:

    direction U <- orthogonalised (or row/column-normalised, …) M, unit RMS
    registers R <- clamp(R - round(rate * 81 * U), +-121)   the leading trit of R is the weight
    exponents E <- E - scale_rate * 8 * u                   an integer; what is less than one step of it is kept as
                                                            evidence, an int8 of 1/256 steps, as a register keeps it

A compact layer keeps momentum and register in one byte, as nibbles (`tritwise.registers.nibble`): half the state.

`round` is stochastic and counter-based. The gradient is let go of at once, or with some others if they are small.
Source: DESIGN.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tritwise.nn import TritModule
from tritwise.optim.consuming import Consuming
from tritwise.optim.groups import ROLE_RATES, SETTINGS, check, groups_of, roles_of
from tritwise.optim.moves import RecordedMoves
from tritwise.optim.moving import Moving
from tritwise.registers import to_nibbles


class TritOptimizer(Consuming, Moving):
    """Trains every ternary layer of a model. State: 1 byte a weight for momentum, beside the register's own byte.

    layers: a model, an iterable of TritModule, or a list of groups {"params": [TritModule, …], "lr": …, …}. A model or
        an iterable is split into one group per declared role (matrix, embedding, head).
    rate: step of a register in leading-trit units for a direction of 1; stored as "lr", so torch's schedulers work.
    momentum: decay of the int8 momentum. nesterov: directions are made of momentum * M + gradient once more (Nesterov
        1983, as in Muon), which takes one more byte a weight within a step, none between steps. scale_rate: step of a
        scale in octaves (0: scales stay).
    direction: of the groups that have no other by default (ROLE_DEFAULTS), one of `tritwise.ops.direction.METHODS`;
        steps: Newton-Schulz steps. row_memory: rows of the direction are divided by the root of a running mean of their
        squares, and this is its decay; it takes two bytes a row. 0: they are not.
    roles: settings for single roles, such as {"embedding": {"direction": "row_column", "rate": 0.01}}.
    interval: a layer moves at every interval-th step, by interval times as much; layers take turns.
    compact: register and momentum share one byte a weight, in 15 steps each, beside an exponent for 32 weights: half
        the state for a little loss. Only for dense layers; their registers become nibbles, with the same trits.
    seed: of the stochastic rounding.

    Gradient accumulation: call backward several times before `step()`, each with loss / count. Every micro-batch is
    added into the integer momentum. `zero_grad` is not needed. On a GPU neither consuming a gradient nor a step waits
    for the device, unless a sparse layer is very large, and small gradients are consumed several at once (`take`).
    Raises ValueError for a rate, momentum or direction that cannot work.
    """

    def __init__(
        self,
        layers: nn.Module | Iterable[TritModule] | list[dict[str, Any]],
        rate: float = 0.03,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        scale_rate: float = 0.005,
        direction: str = "balanced",
        steps: int = 3,
        row_memory: float = 0.0,
        interval: int = 1,
        compact: bool = False,
        roles: dict[str, dict[str, Any]] | None = None,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": rate,
            "momentum": momentum,
            "nesterov": nesterov,
            "scale_rate": scale_rate,
            "direction": direction,
            "steps": steps,
            "row_memory": row_memory,
            "interval": interval,
            "compact": compact,
            "seed": seed,
            "step": 0,
            "skipped": 0,
        }
        check(defaults)
        self._layers = {}
        self._group_of = {}
        self._number = {}
        self._received = {}
        self._taken = []
        self._touched = {}
        self._masks = {}
        self._lookahead = {}
        self._waiting = {}
        self._uncounted: Tensor | None = None  # skipped steps that the host has not read yet
        self._live = None
        self._records = False
        self._moves: RecordedMoves | None = None
        self.records_moves = False
        """Whether the moves of a step are recorded as a CUDA graph where they can be; it keeps memory for them."""
        self.version = 0
        """Counts what makes a recorded step stale: changed groups or settings, tensors in the place of others."""
        self.flips_by_layer: dict[TritModule, Tensor] = {}
        super().__init__(groups_of(layers, roles or {}, rate), defaults)

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
        check(merged)
        _check_layers(merged, layers)
        if merged["compact"]:
            _drop_momentum(layers)
        self.version += 1
        super().add_param_group({"params": [layer.register for layer in layers], **settings})
        for layer in layers:
            self._layers[layer.register] = layer
            self._group_of[layer.register] = len(self.param_groups) - 1
            self._number[layer.register] = len(self._number)
            layer.consumer = self.take

    @property
    def layers(self) -> list[TritModule]:
        """The layers that this trains, group by group."""
        return [self._layers[register] for group in self.param_groups for register in group["params"]]

    @property
    def skipped(self) -> int:
        """Steps at which nothing moved because a gradient held a NaN or an infinity."""
        if self._uncounted is not None:
            count = int(self._uncounted)
            self._uncounted.zero_()
            for group in self.param_groups:
                group["skipped"] += count
        return self.param_groups[0]["skipped"]

    @property
    def flips(self) -> int:
        """Leading trits that changed at the last step."""
        return sum(int(flips) for flips in self.flips_by_layer.values())

    def configure(self, role: str | None = None, **settings: Any) -> None:
        """Change settings between steps: those of `__init__` but for roles, of all groups or of those of one role.

        A new rate is that of matrices, or of the role that is named, and schedules start from it. ValueError for an
        unknown role or setting, or a value that cannot work; then nothing has changed.
        """
        groups = [group for group in self.param_groups if role is None or group.get("role") == role]
        if not groups:
            raise ValueError(f"no group has the role {role!r}; choose one of {roles_of(self.param_groups)}")
        unknown = set(settings) - set(SETTINGS)
        if unknown:
            raise ValueError(f"there is no setting {sorted(unknown)[0]!r}; choose one of {', '.join(SETTINGS)}")
        changed = []
        for group in groups:
            own = {name: value for name, value in settings.items() if name != "rate"}
            check(dict(group) | own | {"lr": settings.get("rate", 0.0)})
            _check_layers(own, [self._layers[register] for register in group["params"]])
            if "rate" in settings:
                factor = ROLE_RATES.get(group.get("role", ""), 1.0) if role is None else 1.0
                own["lr"] = own["initial_lr"] = settings["rate"] * factor
            changed.append(own)
        self.version += 1
        for group, own in zip(groups, changed, strict=True):
            group.update(own)

    def reset_runtime_state(self) -> None:
        """Forget what is not a weight: momentum, the evidence of scales, gradients taken since the last step, and the
        counts of steps and skipped steps. Registers, scale exponents and settings stay."""
        self.state.clear()
        self._forget_gradients()
        self._waiting.clear()
        self.flips_by_layer.clear()
        self._uncounted = None
        self.version += 1
        for group in self.param_groups:
            group["step"] = group["skipped"] = 0
            if group["compact"]:
                _drop_momentum([self._layers[register] for register in group["params"]])

    def state_dict(self) -> dict[str, Any]:
        """As torch's, with every skipped step counted."""
        _ = self.skipped
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's."""
        self.version += 1
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("row_memory", 0.0)  # of before there was one
            group.setdefault("nesterov", False)

    @property
    def recordable(self) -> bool:
        """Whether a step can be recorded in a CUDA graph: steps of one phase move the same layers by the same calls."""
        alike = len({group["step"] for group in self.param_groups}) == 1
        return alike and not any(layer.sparse and not self._in_place(layer) for layer in self.layers)

    @property
    def phases(self) -> int:
        """After so many steps it is the turn of the same layers again."""
        return math.lcm(*(group["interval"] for group in self.param_groups))

    @property
    def phase(self) -> int:
        """Whose turn it is at the next step: 0 … phases - 1. A recording serves the steps of one phase."""
        return self.step_count % self.phases

    @contextmanager
    def ahead(self, steps: int) -> Iterator[None]:
        """Inside, so many more steps seem to have been taken: to record phases before their turn."""
        for group in self.param_groups:
            group["step"] += steps
        try:
            yield
        finally:
            for group in self.param_groups:
                group["step"] -= steps

    @contextmanager
    def recording(self) -> Iterator[list[Tensor]]:
        """Inside, `consume` and `step` take what changes from step to step from the device, and count no steps: so they
        can be recorded in a CUDA graph. Before each replay call `before_replay`. Yields every tensor that they change,
        for whoever tries a step first and wants to take it back. Only for optimizers that are `recordable`."""
        self._tell()
        if self._uncounted is None:
            self._uncounted = torch.zeros(1, dtype=torch.int64, device=self._numbers().device)
        changed = [self._uncounted]
        for group in self.param_groups:
            for layer in (self._layers[register] for register in group["params"]):
                state = self._state_of(layer, self._learns_scale(layer))
                changed += [layer.register, *layer.exponents(), *state.values()]
        with self._reading_the_device():
            yield changed

    def before_replay(self) -> None:
        """Tell the device the step's number and rates, and count the step that a replay now takes."""
        self._tell()
        for group in self.param_groups:
            group["step"] += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the registers of every layer that received a gradient since the last step; returns closure's loss.

        If any gradient held a NaN or an infinity nothing moves, `skipped` counts it, and the step still counts.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.take_waiting()
        go = torch.cat(self._taken).all() if self._taken else None
        known = True  # whether something may move, as far as the host knows without asking a GPU
        if go is not None and go.is_cuda:
            if self._uncounted is None:
                self._uncounted = torch.zeros(1, dtype=torch.int64, device=go.device)
            self._uncounted += ~go
        elif go is not None and not bool(go):
            known = False
            for group in self.param_groups:
                group["skipped"] += 1
        self.flips_by_layer = {}
        if known and go is not None and self._moves_are_recorded(go):
            if self._moves is None:
                self._moves = RecordedMoves(go.device)
            key = tuple(group["step"] % group["interval"] for group in self.param_groups)
            given = self._move_all, self._reading_the_device, self._tell
            self.flips_by_layer = self._moves.make(key, self.version, go, *given)
        elif known:
            self.flips_by_layer = self._move_all(go)
        if not self._records:
            for group in self.param_groups:
                group["step"] += 1
        self._forget_gradients()
        return loss

    def _forget_gradients(self) -> None:
        """What was known of the gradients that were taken since the last step."""
        for pending in (self._received, self._taken, self._touched, self._lookahead):
            pending.clear()

    def _moves_are_recorded(self, go: Tensor) -> bool:
        """Whether this step's moves can be recorded, or come from a recording: those of every layer, on a GPU."""
        if not self.records_moves or self._records or not go.is_cuda or len(self._received) < len(self._layers):
            return False
        # What nesterov looks at is made anew at every step, and a recording of moves alone would not find it.
        return self.recordable and not any(group["nesterov"] for group in self.param_groups)


def _check_layers(settings: dict[str, Any], layers: Iterable[TritModule]) -> None:
    """Raise ValueError for settings that sparse layers cannot have."""
    for name, told in (("compact", "be compact"), ("nesterov", "have nesterov")):
        if settings.get(name) and any(layer.sparse for layer in layers):
            raise ValueError(f"a sparse layer cannot {told}; make it with sparse=False, or take it out of the group")


@torch.no_grad()
def _drop_momentum(layers: Iterable[TritModule]) -> None:
    """Five-trit registers become nibbles of the same trits; what are nibbles already lose their momentum alone."""
    for layer in layers:
        layer.register.copy_(to_nibbles(layer.register))
