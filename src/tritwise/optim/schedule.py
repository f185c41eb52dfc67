"""The rate's course: warm-up, constant, linear decay to zero. A pure function of the step, so a resumed run agrees."""


def rate_factor(step: int, steps: int, warmup: int = 0, decay: float = 0.5) -> float:
    """What the rate is multiplied by at `step` (0 … steps-1), in (0, 1].

    The first `warmup` steps rise linearly; the last `decay` share of `steps` falls linearly and would reach zero one
    step after the last. For ternary weights only the rate may decay: the flip boundary never moves.
    """
    rising = (step + 1) / (warmup + 1) if step < warmup else 1.0
    tail = max(1.0, decay * steps)
    falling = min(1.0, (steps - step) / tail) if decay > 0 else 1.0
    return min(rising, falling)
