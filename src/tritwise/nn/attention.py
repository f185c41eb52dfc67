"""Causal self-attention: rotary positions, query-key norm, grouped heads, an optional sliding window, a KV cache.

Shape suffixes: B batch, T time, S time including the cache, H heads, K key-value heads, D size of a head, C width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

from tritwise import ops
from tritwise.nn.ledger import KVLedger
from tritwise.nn.linear import TritLinear, give_unit_inputs
from tritwise.nn.norm import EPS, fuses, rms_norm


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021) for positions 0 … length-1 and heads of size `size`.

    The second half of a head is paired with its first half. Tables are constants (role "table"), not saved. Positions
    beyond them are turned only in an endless stream, whose angles are computed when they are needed.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, size: int, length: int, base: float = 10000.0) -> None:
        super().__init__()
        self.roles = {"cos": "table", "sin": "table"}
        frequency = base ** (-torch.arange(0, size, 2, dtype=torch.float32) / size)
        angle_TD = torch.arange(length, dtype=torch.float32)[:, None] * frequency
        self.frequency = frequency
        self.register_buffer("cos", angle_TD.cos(), persistent=False)
        self.register_buffer("sin", angle_TD.sin(), persistent=False)

    def forward(self, x_BTHD: Tensor, start: int = 0, *, endless: bool = False) -> Tensor:
        """Rotate positions start … start+T-1; the same shape and dtype. ValueError beyond the length of the tables,
        unless endless."""
        cos, sin = (table[:, None].to(x_BTHD.dtype) for table in self.tables(start, x_BTHD.shape[1], endless=endless))
        return _Rotate.apply(x_BTHD, cos, sin)  # type: ignore[no-any-return]

    def tables(self, start: int, time: int, *, endless: bool = False) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions start … start+time-1, float32 [time, size/2]. ValueError as of `forward`."""
        stop = start + time
        if stop <= self.cos.shape[0]:
            return self.cos[start:stop], self.sin[start:stop]
        if endless:
            # float64: in float32 a position of a million would be off by a tenth of a turn.
            angle_TD = torch.arange(start, stop, dtype=torch.float64)[:, None] * self.frequency.double()
            return angle_TD.cos().to(self.cos), angle_TD.sin().to(self.sin)
        raise ValueError(f"{stop} positions do not fit a context of {self.cos.shape[0]}; read them in windows")


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(a, b) -> (a cos - b sin, b cos + a sin) for the halves a, b of the last dimension; a new tensor."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return torch.cat((torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)), dim=-1)


class _Rotate(torch.autograd.Function):
    # The gradient of a rotation is the rotation back: cheaper than autograd's account of every product.
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grad, cos, -sin), None, None


class _TurnedHeads(torch.autograd.Function):
    # On a GPU: one pass each way, for which nothing is kept but parts, of which the values are a view.
    @staticmethod
    def forward(ctx: Any, parts: Tensor, cos: Tensor, sin: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        q_BTHD, k_BTKD = ops.turned_heads(parts, cos, sin, heads)
        ctx.save_for_backward(parts, cos, sin)
        return q_BTHD, k_BTKD, parts[:, :, heads + k_BTKD.shape[2] :]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor, v_grad: Tensor) -> tuple[Tensor, None, None, None]:
        return ops.turned_heads_grad(q_grad, k_grad, v_grad, *ctx.saved_tensors), None, None, None


class _WithoutOwn(torch.autograd.Function):
    # On a GPU: the norm and what follows it, one pass each way, for which nothing new is kept.
    @staticmethod
    def forward(ctx: Any, y_BTHD: Tensor, v_BTKD: Tensor, scale: Tensor | None) -> Tensor:
        ctx.save_for_backward(y_BTHD, v_BTKD, scale)
        return ops.without_own(y_BTHD, v_BTKD, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        y_grad, v_grad = ops.without_own_grad(grad, *ctx.saved_tensors)
        return y_grad, v_grad, None


class KVCache:
    """Keys and values of one attention layer for up to `length` positions: two tensors [B, K, length, D]."""

    endless = False

    def __init__(self, batch: int, kv_heads: int, length: int, size: int, device: torch.device, dtype: torch.dtype):
        self.keys = torch.zeros(batch, kv_heads, length, size, device=device, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.used = 0

    def append(self, k_BKTD: Tensor, v_BKTD: Tensor) -> tuple[Tensor, Tensor]:
        """Add T positions and return all keys and values so far. The caller keeps used + T within the length."""
        stop = self.used + k_BKTD.shape[2]
        assert stop <= self.keys.shape[2], "the cache is full: start it again from the last half of the context"
        self.keys[:, :, self.used : stop] = k_BKTD
        self.values[:, :, self.used : stop] = v_BKTD
        self.used = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop]


class Attention(nn.Module):
    """out(norm(attention(qkv(x)))), x of unit RMS, queries and keys RMS-normalised per head and rotated.

    width: C. heads: H, which divides C. kv_heads: K, which divides H (grouped-query attention, Ainslie et al. 2023).
    window: a position sees itself and window-1 before it; None sees all. `linear`: TritLinear or FloatLinear.
    causal: False lets every position see every other (no window, no cache).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        linear: type[nn.Module],
        window: int | None = None,
        group: int = 256,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.heads, self.kv_heads, self.size, self.window = heads, kv_heads, width // heads, window
        rows = (heads + 2 * kv_heads) * self.size
        self.qkv = linear(width, rows, group=group, blocks=3 if heads == kv_heads else 1)
        self.out = linear(width, width, group=group)
        give_unit_inputs(self.qkv, self.out)

    def forward(
        self, x_BTC: Tensor, rotary: Rotary, cache: KVCache | KVLedger | None = None, *, exclusive: bool = False
    ) -> Tensor:
        """exclusive: what a head found, normalised, loses its part along the position's own value, which the residual
        stream has already (`without_own`)."""
        batch, time, width = x_BTC.shape
        parts = self.qkv(x_BTC).view(batch, time, self.heads + 2 * self.kv_heads, self.size)
        start = cache.used if cache is not None else 0
        endless = cache is not None and cache.endless
        if fuses(parts):
            found = _TurnedHeads.apply(parts, *rotary.tables(start, time, endless=endless), self.heads)
        else:
            turned = rotary(rms_norm(parts[:, :, : self.heads + self.kv_heads]), start, endless=endless)
            found = turned[:, :, : self.heads], turned[:, :, self.heads :], parts[:, :, self.heads + self.kv_heads :]
        q_BHTD, k_BKSD, v_BKSD = (part.transpose(1, 2) for part in found)
        own_BKTD = v_BKSD
        if cache is not None:
            k_BKSD, v_BKSD = cache.append(k_BKSD, v_BKSD)
        mask = self._mask(time, k_BKSD.shape[2], x_BTC.device) if self.causal else None
        y_BHTD = scaled_dot_product_attention(
            q_BHTD,
            k_BKSD,
            v_BKSD,
            attn_mask=mask,
            is_causal=self.causal and mask is None and time > 1,
            enable_gqa=self.heads != self.kv_heads,
        )
        if exclusive and fuses(y_BHTD):
            given = y_BHTD.transpose(1, 2), own_BKTD.transpose(1, 2)
            if not isinstance(self.out, TritLinear):
                return self.out(_WithoutOwn.apply(*given, None))
            return self.out(_WithoutOwn.apply(*given, self.out.column_scales(y_BHTD.dtype)), scaled=True)
        y_BTC = rms_norm(y_BHTD.transpose(1, 2).reshape(batch, time, width))
        if exclusive:
            # After the norm: the first position finds its own value alone, and of nothing a norm would make noise.
            found_BHTD = y_BTC.view(batch, time, self.heads, self.size).transpose(1, 2)
            y_BTC = without_own(found_BHTD, own_BKTD).transpose(1, 2).reshape(batch, time, width)
        return self.out(y_BTC)

    def _mask(self, time: int, total: int, device: torch.device) -> Tensor | None:
        """True where a query may look. None where plain causality (or a single last query) says it all."""
        windowed = self.window is not None and self.window < total
        if not windowed and (time == total or time == 1):
            return None
        query = torch.arange(total - time, total, device=device)[:, None]
        key = torch.arange(total, device=device)[None, :]
        mask = key <= query
        return mask & (key > query - self.window) if windowed and self.window is not None else mask


def without_own(y_BHTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """y - (y·u)u for each head, u being the unit vector along its own value at the same position; same shape.

    K divides H; H / K neighbouring heads share a value. A value of zero takes nothing away.
    """
    batch, heads, time, size = y_BHTD.shape
    y, v = y_BHTD.view(batch, v_BKTD.shape[1], -1, time, size), v_BKTD[:, :, None]
    along = (y * v).sum(-1, keepdim=True) / (v * v).sum(-1, keepdim=True).clamp_min(EPS)
    return (y - along * v).view(batch, heads, time, size)
