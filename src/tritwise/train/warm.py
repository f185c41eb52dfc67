"""Everything that is compiled or recorded at a first step happens before the clock: one step at every depth, undone."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritwise.models import Arb, ByteLM
from tritwise.optim import TritOptimizer
from tritwise.train.stepper import Stepper


def warm_up(
    stepper: Stepper,
    model: ByteLM | Arb,
    optimizers: Sequence[torch.optim.Optimizer],
    batches: Sequence[tuple[Any, ...]],
    depths: Sequence[int],
) -> None:
    """Take a step over each of `batches` at every number of repeats in `depths`, then put weights and optimizers back.

    batches: one of every shape, of the same shapes for every process, as a step is taken together. The weights stay
    where they are in memory, so what was recorded still holds. Afterwards every bit is as before.
    """
    if stepper.records_whole_steps:  # which takes its own trial steps back, and keeps every tensor where it is
        for loops in depths:
            for batch in batches:
                stepper.record(batch, loops)
        return
    weights = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    states = [_copied(optimizer.state_dict()) for optimizer in optimizers]
    share = len(stepper.crew.micros(stepper.accum))
    for loops in depths:
        for batch in batches:
            stepper.step_over([batch] * share, loops)
    stepper.settle()
    with torch.no_grad():
        for tensor, before in weights:
            tensor.copy_(before)
    for optimizer, state in zip(optimizers, states, strict=True):
        if isinstance(optimizer, TritOptimizer):
            _ = optimizer.skipped  # steps that a GPU has not told of yet are counted now, and not later
            optimizer.flips_by_layer = {}
        optimizer.load_state_dict(state)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state dict whose tensors no step reaches."""
    own = {
        key: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for key, s in state["state"].items()
    }
    return {"state": own, "param_groups": [dict(group) for group in state["param_groups"]]}


def graphs_compiled() -> int:
    """How many graphs torch.compile has made in this process."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
