"""Linear layers of the baselines: weights that look ternary and hold a float, or that hold trits and train only floats.

    QATLinear        float32 latent, ternary in the matmul (BitNet b1.58); with per_group the seeds' "config C"
    ThresholdLinear  float32 latent, small weights cut to 0 (the seeds' "config E"): a float net, not a ternary one
    GainLinear       random trits that never move under trained float gains: the control
    GainEmbedding    the same as a table

Constructors take what FloatLinear takes, so `ByteLM(config, dtype, linear=QATLinear, embedding=FloatEmbedding)` works;
options of a class go in with functools.partial. BitNet keeps its embedding in float: with QATLinear and ThresholdLinear
the embedding is FloatEmbedding, and the head is quantised like every other linear layer.

Shape suffixes: O rows (outputs), I columns (inputs), G groups of inputs, V entries of a table.
"""

import math

import torch
from torch import Tensor, nn

from tritwise.nn import FloatLinear
from tritwise.registers import init_registers, leading_trit, make_key

EPS = 1e-5  # of BitNet b1.58: keeps an all-zero matrix and an all-zero token at zero


def straight_through(x: Tensor, shown: Tensor) -> Tensor:
    """`shown` to the last bit, with the gradient of x. Both of one shape and dtype, x finite."""
    return shown.detach() + (x - x.detach())


def group_means(size_OI: Tensor, group: int) -> Tensor:
    """Means over groups of `group` columns, the last of which may be short: [O, G]."""
    whole = size_OI.shape[1] // group * group
    parts = [size_OI[:, :whole].unflatten(1, (-1, group)).mean(dim=2)] if whole else []
    if whole < size_OI.shape[1]:
        parts.append(size_OI[:, whole:].mean(dim=1, keepdim=True))
    return torch.cat(parts, dim=1)


def spread(value_OG: Tensor, group: int, columns: int) -> Tensor:
    """One value a group -> one value a column: [..., G] -> [..., columns]."""
    return value_OG.unsqueeze(-1).expand(*value_OG.shape, group).flatten(-2)[..., :columns]


class QATLinear(FloatLinear):
    """y = x Q^T, where Q = clamp(round(w / (s + eps)), -1, 1) * s and s = mean |w|: BitNet b1.58 (Ma et al. 2024).

    The gradient passes straight through to the float weight w [out, in], which is what the optimizer trains.
    per_group: one s for every `group` inputs of a row; else one for each matrix (`blocks` matrices share the rows).
    activation_bits: 8 rounds x to 8 bits with one scale a token (the largest |x|), as the paper does; 0 leaves x as it
        is, which is the stronger baseline. ValueError for another number.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        role: str = "matrix",
        group: int = 256,
        blocks: int = 1,
        per_group: bool = False,
        activation_bits: int = 0,
    ) -> None:
        super().__init__(in_features, out_features, role=role, group=group, blocks=blocks)
        if activation_bits not in (0, 8):
            raise ValueError(f"activation_bits is {activation_bits}; choose 8, or 0 for activations as they are")
        self.group, self.per_group, self.activation_bits = group, per_group, activation_bits

    def forward(self, x: Tensor) -> Tensor:
        trits_OI, scale = self._quantised()
        shown_OI = straight_through(self.weight.float(), trits_OI * scale)
        if self.activation_bits:
            x = straight_through(x, int8_per_token(x))
        return nn.functional.linear(x, shown_OI.to(x.dtype))

    def trits(self) -> Tensor:
        """The ternary weights that a matmul uses now, int8 [O, I]."""
        return self._quantised()[0].to(torch.int8)

    def _quantised(self) -> tuple[Tensor, Tensor]:
        """Trits as float32 [O, I], and scales that broadcast to them."""
        with torch.no_grad():
            weight_OI = self.weight.float()
            if self.per_group:
                scale = spread(group_means(weight_OI.abs(), self.group), self.group, weight_OI.shape[1])
            else:
                scale = _matrix_means(weight_OI, self.blocks)
            return (weight_OI / (scale + EPS)).round().clamp(-1, 1), scale


class ThresholdLinear(FloatLinear):
    """y = x Q^T, where Q = w wherever |w| >= threshold * mean |w| of its matrix, and 0 elsewhere.

    The seeds call it ternary with a scale for every element; since that scale is |w| itself, every float survives, and
    so the layer shows no `trits`. The gradient passes straight through. 0.7 is the threshold of ternary weight networks
    (Li et al. 2016).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        role: str = "matrix",
        group: int = 256,
        blocks: int = 1,
        threshold: float = 0.7,
    ) -> None:
        super().__init__(in_features, out_features, role=role, group=group, blocks=blocks)
        self.threshold = threshold

    def forward(self, x: Tensor) -> Tensor:
        weight_OI = self.weight.float()
        with torch.no_grad():
            kept_OI = weight_OI.abs() >= self.threshold * _matrix_means(weight_OI, self.blocks)
            shown_OI = weight_OI * kept_OI
        return nn.functional.linear(x, straight_through(weight_OI, shown_OI).to(x.dtype))


class _Gains(nn.Module):
    """Constant trits [rows, columns] and a trained float gain for each group of a row, as they start in TritModule.

    Trits declare the role "table" (constants) and gains "scale", so that an audit counts what is trained: the gains.
    """

    table: Tensor

    def __init__(self, rows: int, columns: int, *, fan_in: int, group: int) -> None:
        super().__init__()
        self.roles = {"table": "table", "gain": "scale"}
        self.group = min(group, columns)
        registers = init_registers((rows, columns), make_key(int(torch.randint(2**62, ()))))
        self.register_buffer("table", leading_trit(registers))
        density = max(float(self.table.count_nonzero()) / self.table.numel(), 1e-6)
        groups = -(-columns // self.group)
        self.gain = nn.Parameter(torch.full((rows, groups), 1.0 / math.sqrt(fan_in * density)))

    def trits(self) -> Tensor:
        """The ternary weights, int8 [rows, columns]: the same ones for ever."""
        return self.table


class GainLinear(_Gains):
    """y = x (T * gain)^T with random constant trits T [O, I] and a trained float gain per row and group of inputs.

    What a network gains from its scales alone: a rule that trains trits must beat it. The same seed draws the trits
    with which TritLinear starts. `role` and `blocks` mean nothing here: no matrix is trained.
    """

    def __init__(
        self, in_features: int, out_features: int, *, role: str = "matrix", group: int = 256, blocks: int = 1
    ) -> None:
        super().__init__(out_features, in_features, fan_in=in_features, group=group)

    def forward(self, x: Tensor) -> Tensor:
        weight_OI = self.table * spread(self.gain, self.group, self.table.shape[1])
        return nn.functional.linear(x, weight_OI.to(x.dtype))


class GainEmbedding(_Gains):
    """The same as a table [V, dim]: ids int64 [...] -> float [..., dim]. `role` and `sparse` mean nothing here."""

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        role: str = "embedding",
        group: int = 256,
        sparse: bool = False,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, fan_in=1, group=group)

    def forward(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        gain = nn.functional.embedding(ids, self.gain)
        return (self.table[ids] * spread(gain, self.group, self.table.shape[1])).to(dtype)


def int8_per_token(x: Tensor) -> Tensor:
    """x rounded to 255 levels around 0, scaled by the largest |x| of the last dimension; same shape and dtype."""
    with torch.no_grad():
        levels = 127.0 / x.float().abs().amax(dim=-1, keepdim=True).clamp(min=EPS)
        return ((x * levels).round().clamp(-128, 127) / levels).to(x.dtype)


def _matrix_means(weight_OI: Tensor, blocks: int) -> Tensor:
    """mean |w| of each of the `blocks` matrices that share the rows, for every row: [O, 1]."""
    means = weight_OI.abs().view(blocks, -1).mean(dim=1)
    return means.repeat_interleave(weight_OI.shape[0] // blocks).unsqueeze(1)
