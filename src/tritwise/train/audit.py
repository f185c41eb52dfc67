"""What a run really holds in memory: every tensor with its role, type and bytes. No trained float can hide here."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritwise.nn import tensor_roles, trit_modules

STATE_ROLES = {
    "momentum": "momentum",
    "row_exponent": "momentum",
    "group_exponent": "momentum",
    "row_level": "momentum",
    "scale_momentum": "momentum",
    "scale_row_exponent": "momentum",
    "scale_evidence": "scale",
    "column_momentum": "momentum",
    "column_row_exponent": "momentum",
    "column_evidence": "scale",
}


def audit(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer] = ()) -> dict[str, Any]:
    """List the tensors of `model` and `optimizers` and add them up, as plain JSON.

    float_trainable         float numbers that training changes: float parameters, and float optimizer state
    float_state_bytes       bytes of such numbers that last from step to step
    state_bytes_per_weight  bytes that last from step to step (weights, scales, momentum) over the number of weights
    Gradients and activations are transient and not counted; nor are gradient ports, which hold no number of their own
    (they are listed, as role "port", with the one constant element that they show).
    """
    roles, names = tensor_roles(model), {}
    rows: list[dict[str, Any]] = []
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names[tensor] = name
        # A float that autograd trains counts whatever role it was given.
        trains = roles[name] != "table" or tensor.requires_grad
        rows.append(_row(name, tensor, roles[name], trains=trains, state=False))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:  # trained all the same
                    names[parameter] = "(not in the model)"
                    rows.append(_row(names[parameter], parameter, "optimizer", trains=True, state=False))
                for key, value in optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor):
                        owner = names[parameter].removesuffix(".register")
                        role = STATE_ROLES.get(key, "optimizer")
                        rows.append(_row(f"{owner}.{key}", value, role, trains=True, state=True))
    ports = [(f"{name}.port", layer.port) for name, layer in trit_modules(model) if layer.port is not None]
    rows += [_row(name, port, "port", trains=False, state=False) for name, port in ports]

    lasting = [row for row in rows if row["trainable"]]
    floats = [row for row in lasting if row["dtype"].startswith(("float", "bfloat", "complex"))]
    weights = sum(row["numbers"] for row in rows if row["role"] in ("matrix", "embedding", "head", "vector"))
    by_role: dict[str, int] = {}
    for row in lasting:
        by_role[row["role"]] = by_role.get(row["role"], 0) + row["bytes"]
    return {
        "weights": weights,
        "float_trainable": sum(row["numbers"] for row in floats),
        "float_state_bytes": sum(row["bytes"] for row in floats),
        "state_bytes": sum(by_role.values()),
        "state_bytes_per_weight": round(sum(by_role.values()) / max(weights, 1), 4),
        "bytes_by_role": by_role,
        "peak_bytes": peak_bytes(),
        "tensors": rows,
    }


def _row(name: str, tensor: Tensor, role: str, *, trains: bool, state: bool) -> dict[str, Any]:
    stored = tensor.untyped_storage().nbytes() if role == "port" else tensor.numel() * tensor.element_size()
    return {
        "name": name,
        "role": role,
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": list(tensor.shape),
        "numbers": tensor.numel(),
        "bytes": stored,
        "trainable": trains,
        "state": state,
    }


def peak_bytes() -> int:
    """The most memory this process has held, in bytes: on the GPU if one was used, else the resident set of the process
    (0 where the system does not tell)."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # no cheap way to ask
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts kilobytes
