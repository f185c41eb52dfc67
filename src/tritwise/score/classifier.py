"""A small float network that tells classes of small pictures apart: a measuring instrument, never part of a model.

It judges drawn pictures. Its own accuracy on pictures that it has not seen belongs beside every figure it gives.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tritwise.models.denoiser import centred


class Classifier(nn.Module):
    """Three convolutions and two linear layers: uint8 [B, channels, H, W] -> logits [B, classes]."""

    def __init__(self, channels: int, side: int, classes: int, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(2 * width * (side // 4) ** 2, 128),
            nn.ReLU(),
            nn.Linear(128, classes),
        )

    def forward(self, pictures: Tensor) -> Tensor:
        return self.layers(centred(pictures))


def train_classifier(
    pictures: Tensor,
    labels: Tensor,
    classes: int,
    *,
    steps: int = 0,
    batch: int = 128,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Classifier:
    """A classifier of pictures uint8 [N, channels, H, W] with labels int64 [N], by AdamW, where the pictures are.

    steps: 0 for three times through the pictures, and at least 100.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Classifier(pictures.shape[1], pictures.shape[-1], classes).to(pictures.device)
    order = torch.Generator().manual_seed(seed)
    batch = min(batch, len(pictures))
    total = steps or max(100, 3 * len(pictures) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    rest = torch.empty(0, dtype=torch.int64)
    for step in range(total):
        if len(rest) < batch:
            rest = torch.randperm(len(pictures), generator=order)
        at, rest = rest[:batch].to(pictures.device), rest[batch:]
        loss = nn.functional.cross_entropy(model(pictures[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step + 1 < total:
            schedule.step()
        if progress is not None:
            progress(step + 1, total)
    return model.eval()


@torch.inference_mode()
def classes_told(model: Classifier, pictures: Tensor) -> Tensor:
    """The class of each picture, int64 [N]."""
    return torch.cat([model(part).argmax(dim=-1) for part in pictures.split(500)])
