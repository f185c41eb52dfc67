"""Between live objects and checkpoints: what is saved, and how a run or its model comes back from the disk."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.models import Arb, ByteLM
from tritwise.nn import trit_modules
from tritwise.train.average import Average
from tritwise.train.checkpoint import Checkpoint
from tritwise.train.config import Config
from tritwise.train.device import build_model
from tritwise.train.optimizers import build_optimizers
from tritwise.train.run import RunFolder


def pack_state(
    model: ByteLM | Arb, optimizers: Sequence[torch.optim.Optimizer], average: Average | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors by name, plain JSON) that `unpack_state` needs to bring model and optimizers back bit for bit.

    The tensors are the live ones, where they are: whoever writes them down takes no copy of them all.
    """
    tensors = {f"model.{name}": tensor.detach() for name, tensor in model.state_dict().items()}
    groups: list[list[dict[str, Any]]] = []
    for number, optimizer in enumerate(optimizers):
        state = optimizer.state_dict()
        for index, values in state["state"].items():
            for key, value in values.items():
                tensors[f"optimizer.{number}.{index}.{key}"] = value.detach()
        groups.append([_plain(group) for group in state["param_groups"]])
    sums, count = average.state() if average is not None else ({}, 0)
    return tensors | {f"average.{name}": total for name, total in sums.items()}, {"groups": groups, "averaged": count}


def _plain(group: dict[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in group.items()}


def unpack_state(
    checkpoint: Checkpoint,
    model: ByteLM | Arb,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    average: Average | None = None,
) -> None:
    """Put a checkpoint into a model and optimizers built from the same config. Raises UserError if it does not fit."""
    try:
        model.load_state_dict(_named(checkpoint, "model."))
        if average is not None:
            sums = _named(checkpoint, "average.")
            average.restore(sums, checkpoint.meta.get("averaged", 0), next(model.parameters()).device)
        on_cpu = next(model.parameters()).is_cpu
        for number, optimizer in enumerate(optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in checkpoint.tensors.items():
                kind, _, rest = name.partition(".")
                if kind == "optimizer" and rest.startswith(f"{number}."):
                    _, index, key = rest.split(".", 2)
                    # torch takes what is on the right device as it is, and these are pages of the checkpoint's file.
                    state.setdefault(int(index), {})[key] = tensor.clone() if on_cpu else tensor
            optimizer.load_state_dict({"state": state, "param_groups": checkpoint.meta["groups"][number]})
    except (RuntimeError, KeyError, IndexError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise UserError(f"checkpoint {checkpoint.step} does not fit the run's config ({reason}); train again") from None


def averaged_of(checkpoint: Checkpoint, model: ByteLM | Arb) -> ByteLM | Arb | None:
    """A copy of `model` with the mean weights of the checkpoint; None if it has none."""
    average = Average()
    average.restore(_named(checkpoint, "average."), checkpoint.meta.get("averaged", 0), torch.device("cpu"))
    return average.of(model) if average.count else None


def _named(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    found = checkpoint.tensors.items()
    return {name.removeprefix(prefix): tensor for name, tensor in found if name.startswith(prefix)}


def load_run(path: Any, *, with_optimizers: bool = False) -> tuple[Config, ByteLM | Arb, list[Any], Checkpoint]:
    """(config, model, optimizers, newest checkpoint) of the run folder at `path`; optimizers is [] unless asked for.

    Ternary layers come frozen (no gradient ports) unless optimizers are asked for.
    Raises UserError if there is no run, no checkpoint, or it is damaged.
    """
    folder = RunFolder(path)
    config = folder.config()
    checkpoint = folder.store().load()
    model = build_model(config, torch.device("cpu"))
    optimizers = build_optimizers(model, config.train) if with_optimizers else []
    unpack_state(checkpoint, model, optimizers)
    if not with_optimizers:
        for _, layer in trit_modules(model):
            layer.trainable(False)
        model.eval()
    return config, model, optimizers, checkpoint


def take_over(model: Arb, path: Any) -> None:
    """Give `model` the weights of the newest checkpoint of the run at `path`. Parts that run had not stay new.

    Raises UserError if there is no such run, it is no ARB run, or a part of it has another shape.
    """
    folder = RunFolder(path)
    if not folder.config().media.task:
        raise UserError(
            f"{path} is a byte model of 256 symbols; start from a run of train text, or from another ARB run"
        )
    checkpoint = folder.store().load()
    found = _named(checkpoint, "model.")
    own = model.state_dict()
    other = [name for name in own if name in found and own[name].shape != found[name].shape]
    # A part is there as a whole or not at all; the trunk always is.
    parts = {name.split(".")[0] for name in found}
    other += [name for name in own if name not in found and name.split(".")[0] in parts]
    if other:
        raise UserError(
            f"the checkpoint of {path} does not fit: {other[0]} is "
            f"{list(found[other[0]].shape) if other[0] in found else 'not in it'}, "
            f"{list(own[other[0]].shape)} is needed; use its --width, --depth and encoder"
        )
    kept = {name: tensor for name, tensor in found.items() if name in own}
    model.load_state_dict(kept, strict=False)
