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
        self._all = torch.zeros(1 + 2 * groups, dtype=torch.int64, device=device)  # written by one copy
        self.step, rates = self._all[0], self._all[1:]
        self.rates = rates.view(torch.float64).view(groups, 2)

    def write(self, step: int, rates: Sequence[tuple[float, float]]) -> None:
        """Set the step and the rates for the next replay; the host does not wait."""
        told = torch.empty(self._all.shape, dtype=torch.int64, pin_memory=self.device.type == "cuda")
        told[0] = step
        told[1:].view(torch.float64)[:] = torch.tensor(rates, dtype=torch.float64).view(-1)
        self._all.copy_(told, non_blocking=True)

    def keys(self, places: Sequence[Place]) -> Tensor:
        """Keys at the step that is written here, whatever step the places name: int64 [places, 2]."""
        hashed = gpu.keys_at if self.device.type == "cuda" and gpu.refuses(self.device) is None else keys_at
        return hashed(self.step, gpu.upload(rows_of_places(places), self.device))
