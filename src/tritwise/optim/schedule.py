"""The rate's course: warm-up, constant, linear decay to zero. A pure function of how far a run is, so a resumed run
agrees."""


def rate_factor(step: int, steps: int, warmup: int = 0, decay: float = 0.5, *, share: float | None = None) -> float:
    """What the rate is multiplied by at `step` (0 … steps-1), in (0, 1].

    The first `warmup` steps rise linearly; the last `decay` share of `steps` falls linearly and would reach zero one
    step after the last. For ternary weights only the rate may decay: the flip boundary never moves.
    share: how much of a run is done, 0 to 1, where that goes by time; the rate falls over the last `decay` of it.
    """
    rising = (step + 1) / (warmup + 1) if step < warmup else 1.0
    if decay <= 0:
        return rising
    left = (steps - step) / max(1.0, decay * steps) if share is None else (1.0 - share) / decay
    return min(rising, 1.0, max(0.0, left))
