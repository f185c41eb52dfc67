"""Other rules for ternary layers, against which the register rule is measured. None keeps a copy of a weight.

    SignCounter  an int8 vote count for every weight, thrown away when it flips one (the seeds' rule)   2 bytes a weight
    Bop          a float32 mean of the gradient; a weight flips where it is large enough                5
    DQT          AdamW's step, stochastically rounded to a trit at once                                 9

All train `TritModule` layers: a trit is stored as a register of 81 times it, scale exponents stay as they started, and
a layer's gradient is taken as soon as backward (or the stepper) hands it over. Call backward once a step. Nothing waits
for the device. A gradient that holds a NaN is not refused: these rules exist to be measured, not to be relied on.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tritwise import ops
from tritwise.nn import TritModule, trit_modules
from tritwise.registers import LEAD, leading_trit, make_key

Layers = nn.Module | Iterable[TritModule] | Iterable[dict[str, Any]]


class _TritRule(torch.optim.Optimizer):
    """What the rules share: layers for registers, registers cut to their trits, gradients handed over in backward.

    layers: a model, an iterable of TritModule, or groups {"params": [TritModule, …], "lr": …, …}. Every group carries
    "initial_lr". State is there from the start, so that an audit before the first step is complete.
    """

    def __init__(self, layers: Layers, defaults: dict[str, Any]) -> None:
        self._layers: dict[Tensor, TritModule] = {}
        self._number: dict[Tensor, int] = {}
        self._received: set[Tensor] = set()
        if isinstance(layers, nn.Module):
            layers = [layer for _, layer in trit_modules(layers)]
        found = list(layers)
        if not found:
            raise ValueError("there is no ternary layer to train; build the model with weights='trit'")
        grouped = all(isinstance(entry, dict) for entry in found)
        super().__init__(found if grouped else [{"params": found}], defaults | {"step": 0})  # type: ignore[arg-type]

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add {"params": [TritModule, …], …settings}. The layers' gradients come here from now on."""
        layers = list(param_group["params"])
        super().add_param_group(param_group | {"params": [layer.register for layer in layers]})
        index, group = len(self.param_groups) - 1, self.param_groups[-1]
        self._check(group)
        group.setdefault("initial_lr", group["lr"])
        for layer in layers:
            register = layer.register
            self._layers[register] = layer
            self._number[register] = len(self._number)
            register.copy_(leading_trit(register).mul_(LEAD))
            self.state[register] = self._new_state(register)
            # By index: load_state_dict puts new dicts in the place of the groups.
            layer.consumer = lambda layer, grad: self._consume(layer, grad, self.param_groups[index])

    def _consume(self, layer: TritModule, grad: Tensor, group: dict[str, Any]) -> None:
        with torch.no_grad():
            self._take(layer.register, self.state[layer.register], grad, group)
        self._received.add(layer.register)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move the trits of every layer that received a gradient since the last step; returns closure's loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for register in group["params"]:
                if register in self._received:
                    trit = leading_trit(register)
                    self._move(register, trit, self.state[register], group)
                    register.copy_(trit.clamp_(-1, 1).mul_(LEAD))
            group["step"] += 1
        self._received.clear()
        return loss

    def _check(self, group: dict[str, Any]) -> None:
        """ValueError for settings that cannot work."""
        if not 0 <= group["lr"] < float("inf"):
            raise ValueError(f"rate is {group['lr']}; it must be 0 or more and finite")

    def _new_state(self, register: Tensor) -> dict[str, Tensor]:
        raise NotImplementedError

    def _take(self, register: Tensor, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
        """Put a gradient, float32 [O, I], into the state. The gradient stays as it is."""
        raise NotImplementedError

    def _move(self, register: Tensor, trit: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        """Change `trit`, int8 [O, I]; the caller clamps it to ±1 and stores it."""
        raise NotImplementedError


class SignCounter(_TritRule):
    """The seeds' rule: votes <- votes - sign(g); at |votes| >= threshold the trit moves one step and votes are 0 again.

    threshold: votes that move a trit, 1 … 127. The published default is 3, the published repair 32.
    A trit at its end (+1 asked to rise) stays, and its votes are thrown away all the same. There is no rate and nothing
    that decays, as in the seeds: "lr" is in the groups for the schedule's sake and does nothing.
    State: an int8 counter a weight.
    """

    def __init__(self, layers: Layers, threshold: int = 3) -> None:
        super().__init__(layers, {"lr": 1.0, "threshold": threshold})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if not 1 <= group["threshold"] <= 127:
            raise ValueError(f"threshold is {group['threshold']}; an int8 counter reaches 1 … 127")

    def _new_state(self, register: Tensor) -> dict[str, Tensor]:
        return {"counter": torch.zeros_like(register)}

    def _take(self, register: Tensor, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
        state["counter"].sub_(grad.sign().to(torch.int8))

    def _move(self, register: Tensor, trit: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        counter, threshold = state["counter"], group["threshold"]
        fired = counter.abs() >= threshold
        trit.add_(counter.sign() * fired)
        counter.masked_fill_(fired, 0)


class Bop(_TritRule):
    """Binary optimizer (Helwegen et al. 2019) for trits: m <- (1 - rate) m + rate * g; where |m| > threshold * RMS(g),
    and the trit can still move against the sign of m, it moves one step. m is kept at a flip.

    rate: the paper's adaptivity gamma, 0 … 1, which decays with the schedule as the paper's does; stored as "lr".
    threshold: the paper's tau, but in units of the root mean square of this layer's gradient at this step, so that one
        value suits layers whose gradients differ by orders of magnitude. (Pure noise would give m an RMS of
        sqrt(rate / 2) in these units; gradients have heavy tails, and most means lie well below.)
    State: m in float32.
    """

    def __init__(self, layers: Layers, rate: float = 0.01, threshold: float = 0.01) -> None:
        self._rms: dict[Tensor, Tensor] = {}
        super().__init__(layers, {"lr": rate, "threshold": threshold})

    def _check(self, group: dict[str, Any]) -> None:
        if not 0 <= group["lr"] <= 1:
            raise ValueError(f"rate is {group['lr']}; as the share of the newest gradient it must be 0 … 1")
        if not 0 <= group["threshold"] < float("inf"):
            raise ValueError(f"threshold is {group['threshold']}; it must be 0 or more and finite")

    def _new_state(self, register: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.zeros_like(register, dtype=torch.float32)}

    def _take(self, register: Tensor, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
        state["momentum"].lerp_(grad, group["lr"])
        self._rms[register] = torch.linalg.vector_norm(grad) / math.sqrt(grad.numel())

    def _move(self, register: Tensor, trit: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        momentum = state["momentum"]
        bound = self._rms.pop(register) * group["threshold"]
        trit.add_(momentum < -bound).sub_((momentum > bound).view(torch.int8))


class DQT(_TritRule):
    """Direct quantised training (Zhao et al. 2024) of trits: t <- clamp(round(t - rate * u)), stochastically rounded.

    u is AdamW's update, m / (1 - b1^n) over sqrt(v / (1 - b2^n)) + eps, so rate * |u| is the probability that a trit
    moves one step (above 1 it surely does). There is no weight decay.
    rate: in leading-trit units, stored as "lr". seed: of the rounding, which is counter-based (seed, step, layer,
    index) on a grid of 2**-16: the same bits on every device.
    State: m and v in float32, 8 bytes a weight.
    """

    def __init__(
        self,
        layers: Layers,
        rate: float = 0.01,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__(layers, {"lr": rate, "betas": betas, "eps": eps, "seed": seed})

    def _new_state(self, register: Tensor) -> dict[str, Tensor]:
        return {
            "momentum": torch.zeros_like(register, dtype=torch.float32),
            "square": torch.zeros_like(register, dtype=torch.float32),
        }

    def _take(self, register: Tensor, state: dict[str, Tensor], grad: Tensor, group: dict[str, Any]) -> None:
        first, second = group["betas"]
        state["momentum"].lerp_(grad, 1 - first)
        state["square"].mul_(second).addcmul_(grad, grad, value=1 - second)

    def _move(self, register: Tensor, trit: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> None:
        first, second = group["betas"]
        count = group["step"] + 1
        spread = state["square"].sqrt().div_(math.sqrt(1 - second**count)).add_(group["eps"])
        rate = group["lr"] / (1 - first**count)
        key = make_key(group["seed"], group["step"], self._number[register])
        ops.move_registers(trit, state["momentum"] / spread, rate, key, limit=1)
