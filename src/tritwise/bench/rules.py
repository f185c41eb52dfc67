"""Every update rule by name: which layers it trains, how its optimizers are made, and the rates it is tuned over.

A model is the same ByteLM for all of them; a rule replaces its linear layers or embeddings where it needs others.
"""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from tritwise.bench.counters import DQT, Bop, SignCounter
from tritwise.bench.layers import GainEmbedding, GainLinear, QATLinear, ThresholdLinear
from tritwise.bench.optimizers import Lion, SignSGD
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import use_fp8
from tritwise.nn.trit import WEIGHT_TRITS
from tritwise.optim import TritOptimizer
from tritwise.train.config import parse_value
from tritwise.train.optimizers import float_groups, float_optimizers, keep_initial_rates

Optimizers = list[torch.optim.Optimizer]
Optimize = Callable[..., Optimizers]
"""(model, rate, seed, steps, /, **settings) -> optimizers. Settings are keyword arguments with a default."""

TRAINED = ("matrix", "embedding", "head")
SCHEDULE: dict[str, type] = {"decay": float, "warmup": int}
"""What a rule may have of its own of a cell's schedule, beside its rates."""


@dataclass(frozen=True)
class Rule:
    """An update rule.

    about      one line for tables and help
    grid       rates to tune over, ascending; a single one where the rule has no rate
    optimize   makes the optimizers
    weights    "trit" or "float": the layers of ByteLM, unless `linear` or `embedding` replace them
    parameters dtype of float parameters and, with them, of optimizer state; None leaves float32
    settings   setting -> its default, which also says of what kind it is
    """

    name: str
    about: str
    grid: tuple[float, ...]
    optimize: Optimize
    settings: dict[str, Any]
    weights: str = "float"
    linear: Callable[..., nn.Module] | None = None
    embedding: Callable[..., nn.Module] | None = None
    parameters: torch.dtype | None = None

    def build(
        self,
        config: ModelConfig,
        settings: dict[str, Any],
        seed: int,
        dtype: torch.dtype,
        steps: int,
        device: torch.device | str = "cpu",
    ) -> tuple[ByteLM, Optimizers]:
        """A fresh model and its optimizers on `device`, each group with its rate in "lr" and "initial_lr".

        settings: "rate", and any of the rule's settings. seed: of weights and rounding; the weights come from the CPU's
        generator, so they are the same on every device. dtype: of activations. steps: how long the run will be.
        Raises UserError for settings that the rule does not have.
        """
        self.check({name: value for name, value in settings.items() if name != "rate"})
        torch.manual_seed(seed)
        shape = replace(config, weights=self.weights, weight_trits=settings.get("weight_trits", 1))
        model = ByteLM(shape, dtype, linear=self.linear, embedding=self.embedding)  # type: ignore[arg-type]
        if self.parameters is not None:
            for parameter in model.parameters():  # and no buffers: tables of constants stay as they are
                parameter.data = parameter.data.to(self.parameters)
        model.to(device)
        return model, self.optimizers(model, settings, seed, steps)

    def optimizers(self, model: ByteLM, settings: dict[str, Any], seed: int, steps: int) -> Optimizers:
        """The optimizers of a model of this rule, as `build` makes them, for settings that `check` lets pass."""
        given = {name: value for name, value in settings.items() if name not in ("rate", "weight_trits")}
        try:
            optimizers = self.optimize(model, settings["rate"], seed, steps, **given)
        except ValueError as error:
            raise UserError(f"{self.name} cannot be set up: {error}") from None
        keep_initial_rates(optimizers)
        return optimizers

    def check(self, settings: dict[str, Any]) -> None:
        """Raises UserError, naming the nearest, for a setting that the rule does not have, or one of the wrong kind."""
        for name, value in settings.items():
            if name not in self.settings:
                known = [other for other in self.settings if not other.startswith(tuple(f"{r}_" for r in TRAINED))]
                near = difflib.get_close_matches(name, self.settings, n=1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
                raise UserError(f"the rule {self.name} has no setting {name!r}; {hint}")
            kind = type(self.settings[name])
            if not isinstance(value, (int, float) if kind is float else kind):
                raise UserError(f"{name} of {self.name} is {value!r}; it must be like {self.settings[name]!r}")
            if name == "weight_trits" and value not in WEIGHT_TRITS:
                raise UserError(f"{name} of {self.name} is {value}; choose {WEIGHT_TRITS[0]} to {WEIGHT_TRITS[-1]}")

    def parse(self, pairs: dict[str, str]) -> dict[str, Any]:
        """Settings given as text, each of its kind. Raises UserError as `check` does."""
        self.check({name: self.settings.get(name) for name in pairs})
        return {name: parse_value(name, text, type(self.settings[name])) for name, text in pairs.items()}


def _ours(model: ByteLM, rate: float, seed: int, steps: int, /, *, fp8: bool = False, **settings: Any) -> Optimizers:
    """TritOptimizer. `ROLE_NAME=…` sets NAME for one role; `ROLE_rate` multiplies the rate there. fp8: `nn.use_fp8`.
    The setting weight_trits is of the model, and has had its say there."""
    if fp8:
        use_fp8(model)
    everywhere: dict[str, Any] = {}
    roles: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        role, _, name = key.partition("_")
        if role in TRAINED:
            roles.setdefault(role, {})[name] = rate * value if name == "rate" else value
        else:
            everywhere[key] = value
    return [TritOptimizer(model, rate, roles=roles, seed=seed, **everywhere)]


def _ours_settings() -> dict[str, Any]:
    own = {
        name: parameter.default
        for name, parameter in inspect.signature(TritOptimizer).parameters.items()
        if isinstance(parameter.default, int | float | str) and name not in ("rate", "seed")
    }
    by_role = {f"{role}_{name}": value for role in TRAINED for name, value in (own | {"rate": 1.0}).items()}
    return own | {"fp8": False, "weight_trits": 1} | by_role


def _sign_counter(model: ByteLM, rate: float, seed: int, steps: int, /, *, threshold: int) -> Optimizers:
    return [SignCounter(model, threshold=threshold)]  # has no rate


def _bop(model: ByteLM, rate: float, seed: int, steps: int, /, *, threshold: float = 0.1) -> Optimizers:
    return [Bop(model, rate, threshold=threshold)]


def _dqt(
    model: ByteLM, rate: float, seed: int, steps: int, /, *, beta1: float = 0.9, beta2: float = 0.95
) -> Optimizers:
    return [DQT(model, rate, betas=(beta1, beta2), seed=seed)]


def _adamw(
    model: ByteLM,
    rate: float,
    seed: int,
    steps: int,
    /,
    *,
    beta1: float = 0.9,
    beta2: float = 0.95,
    weight_decay: float = 0.0,
) -> Optimizers:
    return float_optimizers(model, "adamw", rate, beta1=beta1, beta2=beta2, weight_decay=weight_decay)


def _muon(
    model: ByteLM, rate: float, seed: int, steps: int, /, *, momentum: float = 0.95, weight_decay: float = 0.0
) -> Optimizers:
    return float_optimizers(model, "muon", rate, momentum=momentum, weight_decay=weight_decay)


def _signsgd(
    model: ByteLM, rate: float, seed: int, steps: int, /, *, momentum: float = 0.0, weight_decay: float = 0.0
) -> Optimizers:
    return [SignSGD(float_groups(model, rate), momentum=momentum, weight_decay=weight_decay)]


def _lion(
    model: ByteLM,
    rate: float,
    seed: int,
    steps: int,
    /,
    *,
    beta1: float = 0.9,
    beta2: float = 0.99,
    weight_decay: float = 0.0,
) -> Optimizers:
    return [Lion(float_groups(model, rate), betas=(beta1, beta2), weight_decay=weight_decay)]


def _rule(
    name: str,
    about: str,
    grid: tuple[float, ...],
    optimize: Optimize,
    *,
    settings: dict[str, Any] | None = None,
    **layers: Any,
) -> Rule:
    if settings is None:
        parameters = inspect.signature(optimize).parameters.values()
        settings = {p.name: p.default for p in parameters if p.default is not p.empty}
    return Rule(name, about, grid, optimize, settings, **layers)


_ADAM = (5e-4, 1e-3, 2e-3, 4e-3)
_LION = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
_MUON = (0.005, 0.01, 0.02, 0.04)
_SIGN = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3)
_BF16: dict[str, Any] = {"parameters": torch.bfloat16}
_COUNTER = "votes of gradient signs, thrown away at a flip; a flip needs "

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        _rule(
            "ours",
            "five-trit registers, int8 momentum, stochastic carry",
            (0.005, 0.01, 0.02, 0.04),
            _ours,
            settings=_ours_settings(),
            weights="trit",
        ),
        *(
            _rule(
                f"sign-counter-{threshold}",
                f"{_COUNTER}{threshold}",
                (1.0,),
                partial(_sign_counter, threshold=threshold),
                weights="trit",
            )
            for threshold in (3, 8, 32)
        ),
        _rule(
            "random-trits",
            "control: trits stay random, AdamW trains float gains",
            (1e-3, 2e-3, 4e-3, 8e-3),
            _adamw,
            linear=GainLinear,
            embedding=GainEmbedding,
        ),
        _rule("dqt", "AdamW's step rounded stochastically to trits", (3e-4, 1e-3, 3e-3, 1e-2), _dqt, weights="trit"),
        _rule("bop", "a float mean of the gradient flips trits", (3e-4, 1e-3, 3e-3, 1e-2), _bop, weights="trit"),
        _rule("bitnet-adamw", "BitNet b1.58 QAT, AdamW", (1e-3, 2e-3, 4e-3, 8e-3), _adamw, linear=QATLinear),
        _rule("bitnet-muon", "BitNet b1.58 QAT, Muon", (0.01, 0.02, 0.04, 0.08), _muon, linear=QATLinear),
        _rule("signsgd", "sign of the gradient, float weights", _SIGN, _signsgd),
        _rule(
            "signsgd-c",
            "SignSGD on float latents, ternary with a scale a group",
            _SIGN,
            _signsgd,
            linear=partial(QATLinear, per_group=True),
        ),
        _rule("signsgd-e", "SignSGD on float weights, small ones cut to 0", _SIGN, _signsgd, linear=ThresholdLinear),
        _rule("lion", "Lion, float32", _LION, _lion),
        _rule("lion-bf16", "Lion, bfloat16 weights and state", _LION, _lion, **_BF16),
        _rule("adamw", "AdamW, float32", _ADAM, _adamw),
        _rule("adamw-bf16", "AdamW, bfloat16 weights and state", _ADAM, _adamw, **_BF16),
        _rule("muon", "Muon for matrices, AdamW for the rest, float32", _MUON, _muon),
    )
}


def rule_called(name: str) -> Rule:
    """The rule of that name. Raises UserError, naming the nearest, if there is none."""
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"choose of {', '.join(RULES)}"
        raise UserError(f"there is no rule {name!r}; {hint}")
    return RULES[name]


def parse_rules(text: str) -> list[tuple[str, dict[str, Any]]]:
    """ "ours,ours:momentum=0.95,steps=5,adamw" -> (rule, settings) pairs. Empty: every rule at its defaults.

    A colon begins settings, and every KEY=VALUE that follows belongs to the same rule. rates=0.01/0.02 names the rates
    to tune that rule over, decay=1.0 and warmup=200 its schedule: `tune` takes them out of the settings again. Raises
    UserError for unknown rules and settings.
    """
    if not text.strip():
        return [(name, {}) for name in RULES]
    found: list[tuple[str, dict[str, str]]] = []
    for piece in (piece.strip() for piece in text.split(",")):
        name, colon, first = piece.partition(":")
        if not colon and "=" in piece:
            if not found:
                raise UserError(f"the setting {piece} has no rule before it; write RULE:{piece}")
            pair = piece
        else:
            rule_called(name)
            found.append((name, {}))
            pair = first
        if pair:
            key, equals, value = pair.partition("=")
            if not equals:
                raise UserError(f"{pair} in {piece} is not KEY=VALUE; write for example ours:momentum=0.9")
            found[-1][1][key.strip()] = value
    chosen: list[tuple[str, dict[str, Any]]] = []
    for name, pairs in found:
        listed = pairs.pop("rates", None)
        own: dict[str, Any] = {"rates": parse_rates(listed, "/")} if listed is not None else {}
        own |= {key: parse_value(key, pairs.pop(key), kind) for key, kind in SCHEDULE.items() if key in pairs}
        chosen.append((name, rule_called(name).parse(pairs) | own))
    return chosen


def parse_rates(text: str, separator: str = ",") -> list[float]:
    """ "0.01,0.02" -> [0.01, 0.02], ascending. Raises UserError if it is no list of numbers."""
    try:
        return sorted(float(rate) for rate in text.split(separator))
    except ValueError:
        raise UserError(f"rates {text} are no numbers; write for example 0.01{separator}0.02") from None
