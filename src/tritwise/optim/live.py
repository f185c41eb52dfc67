"""What changes from step to step, as tensors on the device: a recorded step (a CUDA graph) reads it at every replay."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tritwise.ops import gpu
from tritwise.registers import Place, keys_at, rows_of_places


class Live:
    """The number of the step, int64 0-d, and the rates of every group, float64 [groups, 2], on `device`: of registers
    and of scales.

    `keys` gives the bits that the host would have given for the same numbers.
    """

    def __init__(self, device: torch.device, groups: int) -> None:
        self.device = device
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self.rates = torch.zeros(groups, 2, dtype=torch.float64, device=device)

    def write(self, step: int, rates: Sequence[tuple[float, float]]) -> None:
        """Set the step and the rates for the next replay; the host does not wait."""
        pin = self.device.type == "cuda"
        self.step.copy_(torch.tensor(step, pin_memory=pin), non_blocking=True)
        self.rates.copy_(torch.tensor(rates, dtype=torch.float64, pin_memory=pin), non_blocking=True)

    def keys(self, places: Sequence[Place]) -> Tensor:
        """Keys at the step that is written here, whatever step the places name: int64 [places, 2]."""
        hashed = gpu.keys_at if self.device.type == "cuda" and gpu.refuses(self.device) is None else keys_at
        return hashed(self.step, gpu.upload(rows_of_places(places), self.device))
