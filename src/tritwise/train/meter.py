"""What happened between two log lines: mean loss, speed, and what the registers did, layer by layer."""

import math
from typing import Any

import torch
from torch import nn

from tritwise.nn import trit_modules
from tritwise.optim import TritOptimizer
from tritwise.registers import REGISTER_LIMIT, zero_fraction


class Meter:
    """Gathers steps until `records` turns them into lines of metrics.jsonl and starts again."""

    def __init__(self, model: nn.Module) -> None:
        self.layers = dict(trit_modules(model))
        self._clear()

    def _clear(self) -> None:
        self.losses: list[float] = []
        self.seconds, self.bytes = 0.0, 0
        self.flips = dict.fromkeys(self.layers, 0)

    def add(self, loss: float, count: int, seconds: float, optimizer: torch.optim.Optimizer) -> None:
        """One step: its loss in nats per byte, the bytes it read, how long it took, and the optimizer that moved."""
        if math.isfinite(loss):
            self.losses.append(loss)
        self.seconds += seconds
        self.bytes += count
        if isinstance(optimizer, TritOptimizer):
            for name, layer in self.layers.items():
                self.flips[name] += int(optimizer.flips_by_layer.get(layer, 0))

    def records(self, steps: int, where: dict[str, Any], rate: float, skipped: int) -> list[dict[str, Any]]:
        """The "train" line and, for ternary models, the "layers" line of the last `steps` steps."""
        loss = sum(self.losses) / len(self.losses) if self.losses else math.nan
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
        lines = [record]
        if self.layers:
            sizes = {name: layer.register.numel() for name, layer in self.layers.items()}
            layers = {
                name: {
                    "flip_rate": self.flips[name] / (max(steps, 1) * sizes[name]),
                    "zero_fraction": zero_fraction(layer.register),
                    "saturation": float((layer.register.abs() == REGISTER_LIMIT).float().mean()),
                }
                for name, layer in self.layers.items()
            }
            total = sum(sizes.values())
            flips = sum(self.flips.values()) / max(steps, 1)
            zeros = sum(layers[name]["zero_fraction"] * sizes[name] for name in layers) / total
            record |= {"flips": flips, "flip_rate": flips / total, "zero_fraction": zeros}
            lines.append({"kind": "layers", **where, "layers": layers})
        self._clear()
        return lines
