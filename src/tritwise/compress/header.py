"""The first bytes of a compressed file. They count in its size, so there are few: 17 for a text of 100 kB.

    2 bytes    D3 5A
    1 byte     format version in the upper half; below it the flags EMBEDDED and CUDA
    varints    bytes of the text, lanes, window, stride
    4 bytes    start of the SHA-256 of the model's artifact
    2 bytes    fingerprint of the software: torch, Tritwise, its matmul precision
    1 byte     fingerprint of the processor or GPU
    1 byte     check of all this
    …          with EMBEDDED: a varint, the bytes of the artifact, and the artifact

A varint has seven bits to a byte, lowest first; the last byte is below 128.
"""

import hashlib
import platform
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from tritwise._version import __version__
from tritwise.errors import UserError

MAGIC = b"\xd3\x5a"
VERSION = 1
EMBEDDED, CUDA = 1, 2
MODEL_BYTES = 4
MOST_LANES = 1 << 16
_REMEDY = "copy it again, or compress the original again"


class Header(NamedTuple):
    """What a compressed file says of itself. `model`: the start of the artifact's SHA-256."""

    length: int
    lanes: int
    window: int
    stride: int
    model: bytes
    embedded: bool
    cuda: bool
    software: bytes
    machine: bytes


def spell(header: Header) -> bytes:
    """The header as bytes, check included."""
    flags = VERSION << 4 | EMBEDDED * header.embedded | CUDA * header.cuda
    numbers = b"".join(map(varint, (header.length, header.lanes, header.window, header.stride)))
    start = MAGIC + bytes([flags]) + numbers + header.model + header.software + header.machine
    return start + _check(start)


def parse(read: Callable[[int], bytes], path: Path) -> Header:
    """The header that `read` gives, which reads up to n bytes. Raises UserError for all that is none."""
    start = read(len(MAGIC) + 1)
    if not start:
        raise UserError(f"{path} is empty; name a file that tritwise compress made")
    if not start.startswith(MAGIC) or len(start) <= len(MAGIC):
        raise UserError(f"{path} is not a compressed file of Tritwise; name a file that tritwise compress made")
    version, flags = start[-1] >> 4, start[-1] & 15
    if version != VERSION:
        raise UserError(
            f"{path} has format {version} and this version reads {VERSION}, or is damaged; upgrade tritwise"
        )
    numbers, spelled = [], start
    for _ in range(4):
        number, raw = read_varint(read, path)
        numbers.append(number)
        spelled += raw
    rest = read(MODEL_BYTES + 4)
    spelled += rest[:-1]
    length, lanes, window, stride = numbers
    if len(rest) < MODEL_BYTES + 4 or _check(spelled) != rest[-1:] or not 1 <= lanes <= MOST_LANES:
        raise UserError(f"{path} is damaged in its header; {_REMEDY}")
    software, machine = rest[MODEL_BYTES:-2], rest[-2:-1]
    return Header(
        length, lanes, window, stride, rest[:MODEL_BYTES], bool(flags & EMBEDDED), bool(flags & CUDA), software, machine
    )


def varint(number: int) -> bytes:
    """A number of any size, seven bits to a byte."""
    spelled = bytearray()
    while number > 127:
        spelled.append(number & 127 | 128)
        number >>= 7
    return bytes([*spelled, number])


def read_varint(read: Callable[[int], bytes], path: Path) -> tuple[int, bytes]:
    """A number below 2**63, and its bytes. Raises UserError if there is none."""
    spelled = b""
    while not spelled or spelled[-1] > 127:
        byte = read(1)
        if not byte or len(spelled) == 9:
            raise UserError(f"{path} is damaged or cut short in its header; {_REMEDY}")
        spelled += byte
    return sum((byte & 127) << 7 * place for place, byte in enumerate(spelled)), spelled


def software_mark() -> bytes:
    """Two bytes that change with whatever software may change a probability's last bit."""
    return _digest(f"{torch.__version__} {__version__} {torch.get_float32_matmul_precision()}", 2)


def machine_mark(device: torch.device) -> bytes:
    """One byte that changes with the kind of processor or GPU."""
    if device.type == "cuda":
        return _digest(torch.cuda.get_device_name(device), 1)
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text(errors="replace").splitlines() if facts.exists() else [platform.processor()]
    name = next((line for line in lines if line.startswith("model name")), "")
    return _digest(f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {name}", 1)


def _digest(text: str, count: int) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:count]


def _check(data: bytes) -> bytes:
    return bytes([zlib.crc32(data) & 255])
