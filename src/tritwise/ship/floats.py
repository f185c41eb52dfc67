"""How a model with float weights becomes streams of bytes, and comes back: int8, int7 or int6 rows, small ones float16.

Unlike ternary weights these lose something when they ship; how much is measured, never assumed. Streams: `codes`, one
byte a number of every large matrix; `row_scales`, float16; `small`, all other parameters in float16.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tritwise.ship.quantise import BASELINE_QUANTILE, QUANTILES, SMALL, quantise_rows, restore_rows


class Method(NamedTuple):
    """bits of a code, the clips that are tried, and whether each stream is one zlib stream already."""

    bits: int
    quantiles: tuple[float, ...]
    zlib: bool


METHODS = {
    "int8": Method(8, QUANTILES, False),
    "int7": Method(7, QUANTILES, False),
    "int6": Method(6, QUANTILES, False),
    "int8+zlib": Method(8, (BASELINE_QUANTILE,), True),  # the challenge's baseline recipe
}
SEARCHED = ("int8", "int7", "int6")  # what is tried for a budget, best first


def float_streams(model: nn.Module, method: str, small: int = SMALL) -> dict[str, bytes]:
    """The streams of every parameter of `model`, in their order."""
    how = METHODS[method]
    codes, scales, rest = [], [], []
    for parameter in _parameters(model):
        if _is_large(parameter, small):
            code, scale = quantise_rows(parameter, how.bits, how.quantiles)
            codes.append(code.cpu().numpy().tobytes())
            scales.append(scale.cpu().numpy().tobytes())
        else:
            rest.append(parameter.to(torch.float16).cpu().numpy().tobytes())
    streams = {"codes": b"".join(codes), "row_scales": b"".join(scales), "small": b"".join(rest)}
    return {name: zlib.compress(raw, 9) for name, raw in streams.items()} if how.zlib else streams


def fill_floats(model: nn.Module, streams: dict[str, bytes], small: int) -> None:
    """Put the streams of `float_streams`, without zlib, into a model of the same shape."""
    codes, scales = _taker(streams["codes"], np.int8), _taker(streams["row_scales"], np.float16)
    rest = _taker(streams["small"], np.float16)
    with torch.no_grad():
        for parameter in model.parameters():
            if _is_large(parameter, small):
                found = restore_rows(codes(parameter.shape), scales((parameter.shape[0], 1)))
            else:
                found = rest(parameter.shape).to(torch.float32)
            parameter.copy_(found)


def stream_sizes(model: nn.Module, small: int) -> dict[str, int]:
    """Bytes of the streams of `float_streams`, without zlib, of a model of this shape."""
    sizes = {"codes": 0, "row_scales": 0, "small": 0}
    for parameter in model.parameters():
        if _is_large(parameter, small):
            sizes["codes"] += parameter.numel()
            sizes["row_scales"] += 2 * parameter.shape[0]
        else:
            sizes["small"] += 2 * parameter.numel()
    return sizes


def inflated(raw: bytes, size: int) -> bytes:
    """What is in a zlib stream, at most one byte more than `size`: what somebody made by hand takes no more memory.
    ValueError if it is damaged or cut off."""
    reader = zlib.decompressobj()
    try:
        found = reader.decompress(raw, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(found) == size and not reader.eof:
        raise ValueError("a stream is cut off")
    return found


def _taker(raw: bytes, kind: Any) -> Callable[[Iterable[int]], Tensor]:
    """A function of a shape that gives the next numbers."""
    numbers = torch.from_numpy(np.frombuffer(raw, kind).copy())

    def take(shape: Iterable[int]) -> Tensor:
        nonlocal numbers
        size = tuple(shape)
        found, numbers = numbers[: math.prod(size)], numbers[math.prod(size) :]
        return found.view(size)

    return take


def _parameters(model: nn.Module) -> Iterable[Tensor]:
    return (parameter.detach() for parameter in model.parameters())


def _is_large(parameter: Tensor, small: int) -> bool:
    return parameter.ndim == 2 and parameter.numel() > small


def code_bytes(bits: int, columns: int) -> float:
    """About how many bytes a code takes when compressed: the entropy of normal weights whose clip is a row's largest.

    The largest of n normal numbers lies near .92 sqrt(2 ln n) standard deviations, and a normal variable with a
    standard deviation of s steps has an entropy of log2(s sqrt(2 pi e)) = log2(4.13 s) bits.
    """
    clip = 0.92 * math.sqrt(2 * math.log(max(columns, 2)))
    return min(8.0, math.log2(4.13 * (2 ** (bits - 1) - 1) / clip)) / 8


def float_estimate(model: nn.Module, method: str, small: int = SMALL) -> dict[str, int]:
    """About how many bytes each stream takes."""
    large = [parameter for parameter in model.parameters() if _is_large(parameter, small)]
    codes = sum(code_bytes(METHODS[method].bits, parameter.shape[1]) * parameter.numel() for parameter in large)
    return stream_sizes(model, small) | {"codes": round(codes)}
