"""What happened between two log lines: mean loss, speed, and what the registers did, layer by layer."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tritwise.nn import TritModule, trit_modules
from tritwise.optim import TritOptimizer
from tritwise.registers import REGISTER_LIMIT, zero_fraction


class Meter:
    """Gathers steps until `records` turns them into lines of metrics.jsonl and starts again. scale: turns the loss of a
    position into one of a byte."""

    def __init__(self, model: nn.Module, scale: float = 1.0) -> None:
        self.scale = scale
        # Learned vectors have no trits that could flip.
        self.layers = {name: layer for name, layer in trit_modules(model) if layer.role != "vector"}
        self._clear()

    def _clear(self) -> None:
        self.losses: list[float | Tensor] = []
        self.by_kind: dict[str, list[Tensor]] = {}
        self.seconds, self.bytes = 0.0, 0
        self.moved: list[tuple[list[TritModule], Tensor]] = []  # at each step: the layers that moved, and their flips

    def add(self, loss: float | Tensor, count: int, seconds: float, optimizer: torch.optim.Optimizer) -> None:
        """One step: its loss in nats per position, the bytes it read, how long it took, and the optimizer that moved.

        Nothing waits for a GPU here; `records` does.
        """
        self.losses.append(loss)
        self.seconds += seconds
        self.bytes += count
        if isinstance(optimizer, TritOptimizer) and optimizer.flips_by_layer:
            layers, flips = zip(*optimizer.flips_by_layer.items(), strict=True)
            self.moved.append((list(layers), torch.stack(flips)))

    def add_by_kind(self, shares: Iterable[tuple[str, Tensor]], count: int) -> None:
        """The micro-batches of a step of a mixture: of each its kind, and what it gave to the mean loss of `count`."""
        for kind, share in shares:
            self.by_kind.setdefault(kind, []).append(share * count)

    def records(self, steps: int, where: dict[str, Any], rate: float, skipped: int) -> list[dict[str, Any]]:
        """The "train" line and, for ternary models, the "layers" line of the last `steps` steps."""
        losses = [loss for loss in map(float, self.losses) if math.isfinite(loss)]
        loss = self.scale * sum(losses) / len(losses) if losses else math.nan
        record: dict[str, Any] = {
            "kind": "train",
            **where,
            "loss": loss,
            "bpb": loss / math.log(2),
            "rate": rate,
            "bytes_per_second": self.bytes / max(self.seconds, 1e-9),
            "step_seconds": self.seconds / max(steps, 1),
            "skipped": skipped,
        }
        if self.by_kind:
            means = {kind: torch.stack(losses).float() for kind, losses in sorted(self.by_kind.items())}
            record["losses"] = {kind: float(losses[losses.isfinite()].mean()) for kind, losses in means.items()}
        lines = [record]
        if self.layers:
            counts = dict.fromkeys(self.layers.values(), 0)
            for moved, flips in self.moved:
                for layer, count in zip(moved, flips.tolist(), strict=True):
                    if layer in counts:
                        counts[layer] += count
            sizes = {name: layer.register.numel() for name, layer in self.layers.items()}
            layers = {
                name: {
                    "flip_rate": counts[layer] / (max(steps, 1) * sizes[name]),
                    "zero_fraction": zero_fraction(layer.register),
                    "saturation": float((layer.register.abs() == REGISTER_LIMIT).float().mean()),
                }
                for name, layer in self.layers.items()
            }
            total = sum(sizes.values())
            flips = sum(counts.values()) / max(steps, 1)
            zeros = sum(layers[name]["zero_fraction"] * sizes[name] for name in layers) / total
            record |= {"flips": flips, "flip_rate": flips / total, "zero_fraction": zeros}
            lines.append({"kind": "layers", **where, "layers": layers})
        self._clear()
        return lines
