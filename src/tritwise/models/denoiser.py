"""The diffusion part: a transformer over the patches of a noisy picture (DiT, Peebles and Xie 2023), of ternary layers.

Flow matching (Lipman et al. 2023): z = t x + (1 - t) e goes in a straight line from noise e at t = 0 to the picture x
at t = 1; its velocity is x - e. The network does not tell the velocity but, of the same plane,

    f = ((1 - t) x - t e) / s,   s² = t² + (1 - t)²        and reads z / s,

both of unit variance at every t if x is (the angle of Salimans and Ho 2022): layers whose weights have three values
and whose inputs are normalised are good at that. The velocity is ((2 t - 1) z + s f) / s².

Shape suffixes: B batch, N patches, C width; pictures are [B, channels, H, W] of mean 0 and variance 1.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from tritwise.models.arb_parts import PartsConfig
from tritwise.nn import (
    MLP,
    Attention,
    FloatEmbedding,
    FloatLinear,
    Rotary,
    TritEmbedding,
    TritLinear,
    relu_squared_norm,
    rms_norm,
)

FREQUENCIES = 64  # of the time: sines and cosines
MEAN, DEVIATION = 0.286, 0.353  # of Fashion-MNIST's pixels; any picture of the same kind is near enough


class DenoiserBlock(nn.Module):
    """Attention over all patches, then an MLP; the condition is added to what each of them reads. [B, N, C]."""

    def __init__(self, width: int, linear: type[nn.Module], group: int) -> None:
        super().__init__()
        heads = max(1, width // 64)
        self.attention = Attention(width, heads, heads, linear=linear, group=group, causal=False)
        self.mlp = MLP(width, 4 * width, linear=linear, group=group)
        self.condition = linear(width, 2 * width, group=group)

    def forward(self, x_BNC: Tensor, c_BC: Tensor, rotary: Rotary) -> Tensor:
        first, second = self.condition(c_BC)[:, None].chunk(2, dim=-1)
        x_BNC = x_BNC + self.attention(rms_norm(rms_norm(x_BNC) + first), rotary)
        return x_BNC + self.mlp(rms_norm(rms_norm(x_BNC) + second))


class Denoiser(nn.Module):
    """(z [B, channels, H, W], t float32 [B], label int64 [B]) -> f, of the shape of z. See the module's docstring.

    A label of `classes` (one more than the last) stands for "any": it is learned from examples whose label was hidden.
    `dtype` is the type of the activations, as of `ByteLM`; z and f are float32.
    """

    frequencies: Tensor

    def __init__(
        self, parts: PartsConfig, dtype: torch.dtype = torch.float32, *, weights: str = "trit", group: int = 256
    ) -> None:
        super().__init__()
        self.dtype = dtype
        ternary = weights == "trit"
        linear = TritLinear if ternary else FloatLinear
        embedding = TritEmbedding if ternary else FloatEmbedding
        width, self.side, self.patch, self.channels = parts.draw_width, parts.picture, parts.patch, parts.channels
        self.classes = max(1, len(parts.class_names))
        pixels, across = parts.channels * parts.patch**2, parts.picture // parts.patch
        self.roles = {"frequencies": "table"}
        frequencies = torch.exp(torch.linspace(0.0, math.log(1000.0), FREQUENCIES))
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.into = linear(pixels, width, group=group)
        self.places = embedding(across**2, width, group=group)
        self.labels = embedding(self.classes + 1, width, group=group)
        self.time_up = linear(2 * FREQUENCIES, width, group=group)
        self.time_down = linear(width, width, group=group)
        self.blocks = nn.ModuleList(DenoiserBlock(width, linear, group) for _ in range(parts.draw_depth))
        self.out = linear(width, pixels, role="head", group=group)
        self.rotary = Rotary(width // max(1, width // 64), across**2)

    def forward(self, z: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        s = _spread(t_B)
        # unfold and fold speak of [B, pixels of a patch, N]
        patches = nn.functional.unfold(z / s, self.patch, stride=self.patch).transpose(1, 2)
        places_NC = self.places(torch.arange(patches.shape[1], device=z.device))
        x_BNC = rms_norm(self.into(patches.to(self.dtype)) + places_NC.to(self.dtype))
        angle = t_B[:, None] * self.frequencies
        waves = math.sqrt(2) * torch.cat((angle.sin(), angle.cos()), dim=-1)
        time_BC = self.time_down(relu_squared_norm(self.time_up(waves.to(self.dtype))))
        c_BC = rms_norm(time_BC + self.labels(label_B).to(self.dtype))
        for block in self.blocks:
            x_BNC = block(x_BNC, c_BC, self.rotary)
        told = self.out(rms_norm(x_BNC)).float().transpose(1, 2)
        return nn.functional.fold(told, (self.side, self.side), self.patch, stride=self.patch)

    def loss(self, x: Tensor, noise: Tensor, t_B: Tensor, label_B: Tensor) -> Tensor:
        """Mean squared error of f, a 0-d float32 tensor; 1 is what zero would cost."""
        t = t_B[:, None, None, None]
        s = _spread(t_B)
        told = self(t * x + (1 - t) * noise, t_B, label_B)
        return nn.functional.mse_loss(told.float(), ((1 - t) * x - t * noise) / s)

    def velocity(self, z: Tensor, t_B: Tensor, label_B: Tensor, guidance: float = 0.0) -> Tensor:
        """dz/dt. guidance: how far beyond the "any" picture to go towards the label's (Ho and Salimans 2022)."""
        f = self(z, t_B, label_B)
        if guidance:
            f = f + guidance * (f - self(z, t_B, torch.full_like(label_B, self.classes)))
        t, s = t_B[:, None, None, None], _spread(t_B)
        return ((2 * t - 1) * z + s * f) / s**2


def _spread(t_B: Tensor) -> Tensor:
    """s of the module's docstring, [B, 1, 1, 1]."""
    return torch.sqrt(t_B**2 + (1 - t_B) ** 2)[:, None, None, None]


def centred(pixels: Tensor) -> Tensor:
    """uint8 pixels as float32 of about mean 0 and variance 1."""
    return (pixels.float() / 255 - MEAN) / DEVIATION


def pixels_of(x: Tensor) -> Tensor:
    """The inverse of `centred`: uint8, what lies outside is cut off."""
    return ((x * DEVIATION + MEAN) * 255).round().clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def draw(
    model: Denoiser, labels: list[int], *, steps: int = 20, guidance: float = 1.5, seed: int = 0, progress=None
) -> Tensor:
    """Pictures of the classes `labels`, uint8 [B, channels, H, W], in `steps` steps of Heun's method.

    The noise of a picture depends on (seed, its place in the list) alone. progress: called with (steps done, all).
    """
    device = next(model.parameters()).device
    shape = (model.channels, model.side, model.side)
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + place) for place in range(len(labels))]
    z = torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)
    label_B = torch.tensor(labels, device=device)
    times = torch.linspace(0, 1, steps + 1).tolist()
    for step, (now, then) in enumerate(itertools.pairwise(times)):
        at = torch.full((len(labels),), now, device=device)
        slope = model.velocity(z, at, label_B, guidance)
        ahead = z + (then - now) * slope
        if step + 1 < steps:
            slope = (slope + model.velocity(ahead, torch.full_like(at, then), label_B, guidance)) / 2
            ahead = z + (then - now) * slope
        z = ahead
        if progress is not None:
            progress(step + 1, steps)
    return pixels_of(z)
