"""Packing: how trits lie in a file. `base3` puts five to a byte (1.6 bits each), `twobit` four (2 bits each).

base3:  byte = sum over k of (trit_k + 1) * 3**k, k = 0 … 4, first trit in the lowest place: 0 … 242.
twobit: byte = sum over k of (trit_k + 1) << 2k,  k = 0 … 3, first trit in the lowest bits; code 3 is never written.
A last group that is not full is filled with zeros (trit 0), so equal trits always give equal bytes.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_BASE3_PLACES = (1, 3, 9, 27, 81)


class Packing(NamedTuple):
    """One storage format: how many trits a byte holds, and the two directions."""

    trits_per_byte: int
    pack: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor, int], Tensor]


def _grouped(trits: Tensor, size: int) -> Tensor:
    """Flat trits shifted to 0, 1, 2 and laid out as [bytes, size], padded with the code of trit 0."""
    flat = trits.reshape(-1).to(torch.int8)
    if flat.numel() and (int(flat.min()) < -1 or int(flat.max()) > 1):
        raise ValueError("only -1, 0 and +1 can be packed; take the leading trits of the registers first")
    padded = torch.ones(-(-flat.numel() // size) * size, dtype=torch.uint8, device=flat.device)
    padded[: flat.numel()] = (flat + 1).to(torch.uint8)
    return padded.view(-1, size)


def pack_base3(trits: Tensor) -> Tensor:
    """int8 trits of any shape (read in row-major order) -> uint8 [ceil(n/5)]. ValueError for any other number."""
    codes = _grouped(trits, 5)
    places = torch.tensor(_BASE3_PLACES, dtype=torch.uint8, device=codes.device)
    return (codes * places).sum(dim=1, dtype=torch.uint8)


@functools.cache
def _base3_table(device: torch.device) -> Tensor:
    codes = torch.arange(243, dtype=torch.int16).unsqueeze(1)
    places = torch.tensor(_BASE3_PLACES, dtype=torch.int16)
    return (codes // places % 3 - 1).to(torch.int8).to(device)


def unpack_base3(packed: Tensor, count: int) -> Tensor:
    """uint8 bytes from `pack_base3` -> the first `count` trits as int8 [count]. ValueError for a byte above 242."""
    _check_length(packed, count, 5)
    if packed.numel() and int(packed.max()) > 242:
        raise ValueError("a byte above 242 is no base3 code; the packed stream is damaged")
    return _base3_table(packed.device)[packed.to(torch.int64)].reshape(-1)[:count]


def pack_twobit(trits: Tensor) -> Tensor:
    """int8 trits of any shape (read in row-major order) -> uint8 [ceil(n/4)]. ValueError for any other number."""
    codes = _grouped(trits, 4)
    places = torch.tensor((1, 4, 16, 64), dtype=torch.uint8, device=codes.device)
    return (codes * places).sum(dim=1, dtype=torch.uint8)


def unpack_twobit(packed: Tensor, count: int) -> Tensor:
    """uint8 bytes from `pack_twobit` -> the first `count` trits as int8 [count]. ValueError for the code 3."""
    _check_length(packed, count, 4)
    shifts = torch.tensor((0, 2, 4, 6), dtype=torch.uint8, device=packed.device)
    codes = packed.unsqueeze(1).bitwise_right_shift(shifts).bitwise_and_(3)
    if packed.numel() and int(codes.max()) > 2:
        raise ValueError("the code 3 is no trit; the packed stream is damaged")
    return (codes.to(torch.int8) - 1).reshape(-1)[:count]


def _check_length(packed: Tensor, count: int, size: int) -> None:
    if packed.numel() != -(-count // size):
        raise ValueError(f"{count} trits need {-(-count // size)} bytes, not {packed.numel()}; the stream is cut off")


PACKINGS = {
    "base3": Packing(5, pack_base3, unpack_base3),
    "twobit": Packing(4, pack_twobit, unpack_twobit),
}


def packed_bytes(count: int, packing: str = "base3") -> int:
    """Bytes that `count` trits take in the named packing."""
    return -(-count // PACKINGS[packing].trits_per_byte)
