"""Memory of a training step by role: what lasts from step to step, what passes, and the most that was held at once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tritwise.models import Arb, ByteLM
from tritwise.nn import trit_modules
from tritwise.train.audit import audit


class Kept:
    """While entered, counts the bytes that autograd keeps for backward: `now`, and `peak`, the most of them.

    Every storage counts once; those of the model's parameters and buffers, and of `others`, do not, as they are there
    anyway. What a checkpointed function computes again in backward is not seen.
    """

    def __init__(self, model: torch.nn.Module, *others: Tensor) -> None:
        self.now = self.peak = 0
        lasting = [*model.parameters(), *model.buffers(), *others]
        lasting += [layer.port for _, layer in trit_modules(model) if layer.port is not None]
        self._lasting = {_place(tensor) for tensor in lasting}
        self._users: dict[int, int] = {}
        self._hooks = saved_tensors_hooks(lambda tensor: _Saved(self, tensor), lambda saved: saved.tensor)

    def __enter__(self) -> "Kept":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def take(self, tensor: Tensor) -> None:
        """One more user of a tensor's storage."""
        place = _place(tensor)
        if place not in self._lasting:
            self._users[place] = self._users.get(place, 0) + 1
            if self._users[place] == 1:
                self.now += tensor.untyped_storage().nbytes()
                self.peak = max(self.peak, self.now)

    def leave(self, tensor: Tensor) -> None:
        """One user less."""
        place = _place(tensor)
        if place not in self._lasting:
            self._users[place] -= 1
            if self._users[place] == 0:
                self.now -= tensor.untyped_storage().nbytes()


class _Saved:
    """A tensor that autograd keeps, for as long as it keeps it."""

    def __init__(self, kept: Kept, tensor: Tensor) -> None:
        self.kept, self.tensor = kept, tensor
        kept.take(tensor)

    def __del__(self) -> None:
        self.kept.leave(self.tensor)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def activation_bytes(model: ByteLM | Arb, *batch: Any) -> int:
    """Bytes of activations that one batch, the arguments of `model.loss`, needs in backward: one forward pass, eager.

    With checkpointing, the most that is computed again at one time is added: a block, or a chunk of the loss.
    """
    tensors = [part for part in batch if isinstance(part, Tensor)]
    with Kept(model, *tensors) as whole:
        model.loss(*batch)
    trunk = model.trunk if isinstance(model, Arb) else model
    again, ids, width = [0], tensors[0], model.config.width
    if trunk.checkpoint and ids.dim() == 2:
        x_BTC = torch.zeros(*ids.shape, width, dtype=model.dtype, device=ids.device, requires_grad=True)
        with Kept(model, x_BTC) as block:
            trunk.blocks[0](x_BTC, trunk.rotary)
        again.append(block.peak)
    if 0 < trunk.loss_chunk < ids.numel():
        x_NC = torch.zeros(trunk.loss_chunk, width, dtype=model.dtype, device=ids.device, requires_grad=True)
        targets_N = tensors[1].reshape(-1)[: trunk.loss_chunk]
        with Kept(model, x_NC, targets_N) as chunk:
            trunk.loss_of_features(x_NC, targets_N)
        again.append(chunk.peak)
    return whole.peak + max(again)


def gradient_bytes(model: torch.nn.Module, *, together: bool = False) -> int:
    """Bytes of weight gradients, float32, that a step holds at one time.

    Ternary layers give theirs away one by one, so it is the largest; all of them if they are handed over `together`.
    Float weights keep theirs until the step is over.
    """
    ternary = [4 * layer.register.numel() for _, layer in trit_modules(model) if layer.port is not None]
    floats = [p.nbytes for p in model.parameters() if p.requires_grad]
    return (sum(ternary) if together else max(ternary, default=0)) + sum(floats)


def memory_by_role(
    model: torch.nn.Module,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    *,
    activations: int | None = None,
    together: bool = False,
) -> dict[str, int | None]:
    """Bytes by role, as plain JSON.

    registers, momentum, scales  of ternary layers; a compact layer's momentum lies in its registers
    floats         float weights and the state of their optimizers
    tables         constants
    gradients      of weights, at one time; `together` as in `gradient_bytes`
    activations    as given, from `activation_bytes`; else on a GPU the measured peak without all of the above, which
                   includes what kernels and directions take for a moment; else None
    peak           the most that was held up to now: by tensors on a GPU; by the whole process, Python and torch
                   included, elsewhere
    reserved       the most that torch took from the GPU, its free lists included; None elsewhere
    """
    found: dict[str, int] = dict.fromkeys(("registers", "momentum", "scales", "floats", "tables"), 0)
    names = {"momentum": "momentum", "scale": "scales", "table": "tables"}
    report = audit(model, optimizers)
    for row in report["tensors"]:
        if row["role"] != "port":
            is_float = row["role"] != "table" and not row["dtype"].startswith("int")
            found["floats" if is_float else names.get(row["role"], "registers")] += row["bytes"]
    gradients, peak = gradient_bytes(model, together=together), report["peak_bytes"]
    on_gpu = next(model.parameters()).is_cuda
    if activations is None and on_gpu:
        activations = max(0, peak - sum(found.values()) - gradients)
    reserved = torch.cuda.max_memory_reserved() if on_gpu else None
    return {**found, "gradients": gradients, "activations": activations, "peak": peak, "reserved": reserved}
