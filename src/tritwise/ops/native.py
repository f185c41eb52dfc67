"""Builds native.c with the machine's C compiler, once, and loads it through ctypes: the kernels of the "cpu" backend.

The shared library is kept in the folder `native` of the cache (`tritwise.files.cache_folder`), whose content is run as
code. Its name holds two checksums: one of everything it was made from (source, compiler, flags, processor), so that a
change makes a new one, and one of the library itself, so that a damaged file is made anew and never loaded. It appears
by a rename: processes that start together may both build, and both load a whole file.

Nothing here raises. What cannot be is a reason, a string, with which the backend refuses; the reference then runs.
"""

import ctypes
import functools
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tritwise.errors import UserError
from tritwise.files import CACHE_REMEDY, atomic_write, cache_folder, make_folder, read_bytes, sha256_of

SOURCE = Path(__file__).with_name("native.c")
VERSION = 3  # what tritwise_version() of native.c says
FLAGS = ["-O3", "-ffp-contract=off", "-fwrapv", "-fno-math-errno", "-shared", "-fPIC", "-std=c11"]
# Some compilers know no -march=native on their processor; the code is right without it, only slower.
TUNINGS = (["-march=native"], [])
LIBRARIES = ["-lm"]
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 120
# The lines of /proc/cpuinfo that say what the processor can do; the others change from minute to minute.
PROCESSOR_LINES = ("vendor_id", "model name", "flags", "CPU implementer", "CPU architecture", "CPU part", "Features")

_POINTER, _INT32, _INT64, _FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Kernels(NamedTuple):
    """The functions of native.c, as documented there. Pointers are ints from `Tensor.data_ptr()`."""

    accumulate: Callable[..., int]
    move: Callable[..., int]
    decode: Callable[..., None]
    gather: Callable[..., int]


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "accumulate": (_INT32, [_POINTER, _POINTER, _POINTER, _INT64, _INT64, _FLOAT, _INT32, _INT32]),
    "move": (_INT64, [_POINTER, _POINTER, _INT64, _FLOAT, _INT32, _INT32, _INT32]),
    "decode": (None, [_POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT32]),
    "gather": (_INT32, [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _INT64, _INT64, _INT64, _INT64, _INT32]),
}


def refuses(device: torch.device) -> str | None:
    """Why the "cpu" backend cannot run on `device`, or None. The first call for a CPU builds and loads the kernels."""
    if device.type != "cpu":
        return "it runs on CPUs only"
    found = load()
    return found if isinstance(found, str) else None


def kernels() -> Kernels:
    """The loaded kernels; only to be called once `refuses` has said None."""
    found = load()
    assert not isinstance(found, str), found
    return found


@functools.cache
def load() -> Kernels | str:
    """The kernels, built first if this machine has none yet, or the reason why there are none."""
    if sys.byteorder != "little":
        return "its random bits need a little-endian processor"
    try:
        folder = cache_folder() / "native"
        compiler, version = _compiler()
        key = _key(version)
        path = _kept(folder, key) or _keep(folder, key, _compile(compiler))
        return _open(path)
    except UserError as refusal:
        return str(refusal)
    except (OSError, AttributeError, ValueError, subprocess.SubprocessError) as error:
        return f"the C code cannot be built or loaded: {' '.join(str(error).split())}"


def _compiler() -> tuple[list[str], str]:
    """The command of the first compiler that answers, and what it says its version is."""
    for candidate in (os.environ.get("CC", ""), *COMPILERS):
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            answer = subprocess.run([*command, "--version"], capture_output=True, timeout=COMPILE_SECONDS)
            if answer.returncode == 0:
                return command, answer.stdout.decode(errors="replace")
    raise UserError("there is no C compiler; install gcc or clang, or name one in the environment variable CC")


def _processor() -> str:
    lines = [platform.system(), platform.machine(), platform.processor()]
    facts = Path("/proc/cpuinfo")
    if facts.exists():
        first = facts.read_text(errors="replace").split("\n\n", 1)[0]
        lines += [line for line in first.splitlines() if line.split("\t", 1)[0].rstrip(" :") in PROCESSOR_LINES]
    return "\n".join(lines)


def _key(compiler_version: str) -> str:
    """16 hex digits of everything that decides what the compiler makes."""
    parts = [sha256_of(SOURCE), compiler_version, repr((FLAGS, TUNINGS, LIBRARIES)), _processor()]
    return sha256_of("\0".join(parts).encode())[:16]


def _kept(folder: Path, key: str) -> Path | None:
    """A whole library in the cache, if there is one. Loading a damaged one could kill the process."""
    for path in sorted(folder.glob(f"{key}-*.so")):
        if path.stem == _name(key, read_bytes(path)):
            return path
    return None


def _keep(folder: Path, key: str, library: bytes) -> Path:
    path = make_folder(folder, CACHE_REMEDY) / f"{_name(key, library)}.so"
    atomic_write(path, library, CACHE_REMEDY)
    return path


def _name(key: str, library: bytes) -> str:
    return f"{key}-{sha256_of(library)[:16]}"


def _compile(compiler: list[str]) -> bytes:
    said = ""
    with tempfile.TemporaryDirectory(prefix="tritwise-") as folder:
        made = Path(folder) / "native.so"
        for tuning in TUNINGS:
            command = [*compiler, *FLAGS, *tuning, "-o", str(made), str(SOURCE), *LIBRARIES]
            run = subprocess.run(command, capture_output=True, timeout=COMPILE_SECONDS)
            if run.returncode == 0:
                return made.read_bytes()
            said = run.stderr.decode(errors="replace").strip().split("\n")[0] or f"exit status {run.returncode}"
    raise UserError(f"{shlex.join(compiler)} cannot compile it: {said}; repair the compiler or name another in CC")


def _open(path: Path) -> Kernels:
    library = ctypes.CDLL(str(path))
    functions = {}
    for name, (result, arguments) in _SIGNATURES.items():
        function = functions[name] = getattr(library, f"tritwise_{name}")
        function.restype, function.argtypes = result, arguments
    found = Kernels(**functions)
    if library.tritwise_version() != VERSION or self_test(found) != SELF_TEST:
        raise UserError(f"{path} gives wrong results on this machine; delete it and name another compiler in CC")
    return found


SELF_TEST = (1, 38, 1, 3806541359, 3294684452, 4071778013, 2305270176, 2745339587)
"""What `self_test` gives where the kernels compute as the reference does."""


def self_test(run: Kernels) -> tuple[int, ...]:
    """Checksums of what each kernel makes of a fixed 3 x 43 matrix: long enough for vector code and its remainder."""
    rows, columns, group = 3, 43, 40
    count = rows * columns
    momentum = (ctypes.c_int8 * count)(*(i * 37 % 255 - 127 for i in range(count)))
    exponent = (ctypes.c_int8 * rows)(-5, 2, -9)
    grad = (ctypes.c_float * count)(*((i * 29 % 101 - 50) / 7 for i in range(count)))
    taken = run.accumulate(momentum, exponent, grad, rows, columns, 0.95, 0x1234567, -0x7654321)
    register = (ctypes.c_int8 * count)(*(i * 53 % 243 - 121 for i in range(count)))
    flips = run.move(register, grad, count, -9.7 * 65536, 121, -0x1234567, 0x7654321)
    groups = (ctypes.c_int8 * (2 * rows))(-128, 127, 0, 5, -7, 64)
    scales = (ctypes.c_float * 256)(*(i / 3 for i in range(256)))
    weight, gathered = (ctypes.c_float * count)(), (ctypes.c_float * columns)()
    run.decode(register, groups, scales, weight, rows, columns, group, 27)
    found = run.gather((ctypes.c_int64 * 1)(1), register, groups, scales, gathered, 1, rows, columns, group, 9)
    return taken, flips, found, *(zlib.crc32(bytes(x)) for x in (momentum, exponent, register, weight, gathered))
