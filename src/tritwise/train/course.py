"""How a run goes: which share of it is done, by steps or by time, and what follows from that: rate, depth, momentum.

A pure function of steps and seconds. Where the seconds are those of the slowest process, all processes of a run agree
at every step, and so they deepen at the same one.
"""

import re
from typing import NamedTuple

from tritwise.errors import UserError
from tritwise.optim import rate_factor

_PHASE = re.compile(r"([0-9]*\.?[0-9]+):([0-9]+)", re.ASCII)


class Phase(NamedTuple):
    """Up to the share `until` of a run, from 0 to 1, the core repeats `loops` times."""

    until: float
    loops: int


def plan_of_depth(text: str, loops: int) -> tuple[Phase, ...]:
    """ "0.4:2,0.65:3,1:4" as phases; an empty text is one phase of all `loops` repeats.

    Raises UserError for a plan that cannot be read, does not end at 1, does not rise, or repeats more than `loops`.
    """
    if not text:
        return (Phase(1.0, loops),)
    words = [word.strip() for word in text.split(",")]
    found = [_PHASE.fullmatch(word) for word in words]
    phases = tuple(Phase(float(match[1]), int(match[2])) for match in found if match)
    if len(phases) < len(words):
        raise UserError(f"depth_plan {text!r} is no list of SHARE:REPEATS; write for example 0.4:2,0.65:3,1:4")
    shares = [phase.until for phase in phases]
    if shares != sorted(set(shares)) or shares[0] <= 0 or shares[-1] != 1:
        raise UserError(f"depth_plan {text!r} must have rising shares, the last of them 1; write 0.4:2,0.65:3,1:4")
    most = max(phase.loops for phase in phases)
    if most > loops:
        raise UserError(f"depth_plan {text!r} repeats {most} times, and the model {loops}; set loops={most}, or less")
    if min(phase.loops for phase in phases) < 1:
        raise UserError(f"depth_plan {text!r} must repeat 1 to {loops} times; write for example 0.4:1,1:{loops}")
    return phases


class Course:
    """The course of one run. Arguments as the settings of `TrainConfig` and `ModelConfig` that have their names."""

    def __init__(
        self,
        steps: int,
        *,
        seconds: float = 0.0,
        warmup: int = 0,
        decay: float = 0.5,
        momentum: float = 0.9,
        momentum_start: float = 0.0,
        momentum_warmup: int = 0,
        depth_plan: str = "",
        loops: int = 1,
    ) -> None:
        self.steps, self.seconds, self.warmup, self.decay = steps, seconds, warmup, decay
        self._momenta = (momentum, momentum_start, momentum_warmup)
        self._phases, self._deepest = plan_of_depth(depth_plan, loops), loops

    def share(self, step: int, seconds: float) -> float:
        """How much of the run is done after `step` steps that took `seconds`: 0 to 1."""
        return min(1.0, seconds / self.seconds if self.seconds else step / self.steps)

    def over(self, step: int, seconds: float) -> bool:
        """Whether no step is left."""
        return step >= self.steps or bool(self.seconds and seconds >= self.seconds)

    def factor(self, step: int, seconds: float) -> float:
        """What the rate is multiplied by at the next step."""
        share = self.share(step, seconds) if self.seconds else None
        return rate_factor(step, self.steps, self.warmup, self.decay, share=share)

    def part(self, step: int, seconds: float) -> str:
        """What the rate does then, in a word: rises, stays or falls. A score in between is to be read with it."""
        if step < self.warmup:
            return "rises"
        return "falls" if self.share(step, seconds) > 1 - self.decay else "stays"

    def momentum(self, step: int) -> float | None:
        """The momentum of the next step; None where it never changes."""
        end, start, warmup = self._momenta
        return start + (end - start) * min(1.0, step / warmup) if warmup else None

    def loops(self, step: int, seconds: float) -> int:
        """How often the core repeats at the next step."""
        share = self.share(step, seconds)
        return next((phase.loops for phase in self._phases if share < phase.until), self._phases[-1].loops)

    @property
    def depths(self) -> list[int]:
        """All numbers of repeats that the run uses, rising."""
        return sorted({phase.loops for phase in self._phases})

    def full(self, step: int, seconds: float) -> bool:
        """Whether the next step runs at the depth that is shipped."""
        return self.loops(step, seconds) == self._deepest
