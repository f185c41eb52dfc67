"""The C kernels of the "cpu" backend: the reference's bits for every input, and a reason instead of an error."""

import errno
import itertools
import os
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise import ops
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.ops import backends, native
from tritwise.ops.embedding import reference as embedding_reference
from tritwise.ops.linear import reference as linear_reference
from tritwise.ops.update import reference as update_reference
from tritwise.optim import TritOptimizer
from tritwise.registers import Key, make_key

_LOADED = native.load()
needs_kernels = pytest.mark.skipif(isinstance(_LOADED, str), reason=str(_LOADED))
SHAPES = [(1, 1), (1, 2), (2, 1), (97, 1), (1, 97), (3, 257), (7, 255), (13, 31), (5, 600), (64, 128)]
FLOATS = st.floats(allow_nan=False, width=32)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of floats: tells -0 from 0."""
    return x.view(torch.int32)


def int8(low: int, high: int, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """int8 uniform over low … high."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, dtype=torch.int16, generator=generator).to(torch.int8)


def floats(shape: tuple[int, ...], seed: int, low: int = 0, high: int = 0) -> torch.Tensor:
    """float32 normal numbers times 2**low … 2**high; some rows and elements are zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    x *= torch.exp2(torch.randint(low, high + 1, shape, generator=generator).double())
    x[torch.rand(shape, generator=generator) < 0.05] = 0
    x[torch.rand(shape[0], generator=generator) < 0.1] = 0
    return x.float()


def on(name: str, run, *arguments):
    """What `run` returns under the backend `name`, and its tensor arguments after it. The arguments themselves stay."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with ops.backend(name):
        returned = run(*copies)
    return [returned, *(c for c in copies if isinstance(c, torch.Tensor))]


def assert_same(run, *arguments) -> list[torch.Tensor]:
    """Both backends return and leave behind the same bits and types."""
    want, got = on("reference", run, *arguments), on("cpu", run, *arguments)
    for expected, actual in zip(want, got, strict=True):
        assert expected.dtype == actual.dtype and expected.shape == actual.shape
        if expected.dtype == torch.float32:
            expected, actual = bits(expected.detach().contiguous()), bits(actual.detach().contiguous())
        assert torch.equal(expected, actual)
    return got


# ---- accumulation


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("low", "high"), [(-9, 2), (-149, -120), (-20, 126), (0, 0)])
def test_accumulation_is_bit_equal(shape, low, high):
    grad = floats(shape, seed=low, low=low, high=high)
    momentum, exponent = int8(-127, 127, shape, seed=1), int8(max(low, -126), min(high, 118), (shape[0], 1), seed=2)
    grad[grad.isinf()] = 1.0
    for decay in (0.95, 1.0, 0.0):
        taken, *_ = assert_same(ops.accumulate_momentum, momentum, exponent, grad, decay, make_key(3))
        assert bool(taken)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**32 - 1),
    decay=st.floats(0, 1),
    exponents=st.tuples(st.integers(-128, 127), st.integers(-128, 127)).map(sorted),
    sizes=st.tuples(st.integers(-150, 127), st.integers(-150, 127)).map(sorted),
    key=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
)
def test_accumulation_is_bit_equal_for_any_state(rows, columns, seed, decay, exponents, sizes, key):
    momentum = int8(-128, 127, (rows, columns), seed)
    exponent = int8(exponents[0], exponents[1], (rows, 1), seed)
    grad = floats((rows, columns), seed, sizes[0], sizes[1])
    assert_same(ops.accumulate_momentum, momentum, exponent, grad, decay, Key(*key))


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(row=st.lists(FLOATS, min_size=1, max_size=40), exponent=st.integers(-126, 120))
def test_accumulation_is_bit_equal_for_chosen_floats(row, exponent):
    grad = torch.tensor([row], dtype=torch.float32)
    momentum = int8(-127, 127, grad.shape, seed=len(row))
    assert_same(ops.accumulate_momentum, momentum, torch.tensor([[exponent]], dtype=torch.int8), grad, 0.9, make_key(1))


@needs_kernels
def test_peaks_at_every_power_of_two_get_the_same_exponent():
    # peak / 127 just below, at and above each power of two; then the smallest floats there are.
    peaks = 127 * torch.exp2(torch.arange(-149, 121).double()).float()
    around = torch.stack((torch.nextafter(peaks, torch.tensor(0.0)), peaks, torch.nextafter(peaks, 2 * peaks)))
    grad = torch.cat((around.view(-1), torch.arange(200, dtype=torch.int32).view(torch.float32))).view(-1, 1)
    momentum, exponent = torch.zeros_like(grad, dtype=torch.int8), torch.full(grad.shape, -126, dtype=torch.int8)
    _, moved, exponents, _ = assert_same(ops.accumulate_momentum, momentum, exponent, grad, 1.0, make_key(0))
    assert set(range(-126, 121)) <= set(exponents.view(-1).tolist()) and moved.max() == 127


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    shape = (3, 37)
    momentum, exponent = int8(-127, 127, shape, 1), int8(-20, 20, (3, 1), 2)
    for place in itertools.product((0, 2), range(37)):
        grad = floats(shape, 3)
        grad[place] = bad
        taken, *after = assert_same(ops.accumulate_momentum, momentum, exponent, grad, 0.9, make_key(4))
        assert not bool(taken) and torch.equal(after[0], momentum) and torch.equal(after[1], exponent)


@needs_kernels
def test_a_sum_that_overflows_is_refused_too():
    momentum, exponent = torch.full((2, 9), 127, dtype=torch.int8), torch.tensor([[0], [120]], dtype=torch.int8)
    grad = torch.zeros(2, 9)
    grad[1, 8] = torch.finfo(torch.float32).max
    taken, *after = assert_same(ops.accumulate_momentum, momentum, exponent, grad, 1.0, make_key(4))
    assert not bool(taken) and torch.equal(after[0], momentum)


# ---- moves


@needs_kernels
@pytest.mark.parametrize("shape", [*SHAPES, (0,), (), (257,), (3, 5, 7)])
@pytest.mark.parametrize("limit", [121, 127])
def test_moves_are_bit_equal(shape, limit):
    register = int8(-limit, limit, shape, seed=len(shape))
    direction = floats((*shape, 1), seed=limit, low=-4, high=6).view(shape)
    for rate in (0.0, 1.62, -1.62, 300.0):
        assert_same(ops.move_registers, register, direction, rate, make_key(5), limit)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    direction=st.lists(FLOATS, min_size=1, max_size=300),
    rate=st.floats(-1e6, 1e6) | st.floats(allow_nan=False, allow_infinity=False),
    key=st.tuples(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**31), 2**31 - 1)),
)
def test_moves_are_bit_equal_for_chosen_floats(direction, rate, key):
    direction = torch.tensor(direction, dtype=torch.float32)
    direction[(direction == 0) | direction.isinf()] = 1.0  # 0 * infinity would be no number
    direction[direction * torch.tensor(rate).float() != direction * torch.tensor(rate).float()] = 1.0
    assert_same(ops.move_registers, int8(-121, 121, direction.shape, 6), direction, rate, Key(*key))


@needs_kernels
def test_the_rate_is_rounded_as_torch_rounds_it():
    # A double rate times 65536 becomes a float32 before the product; a product in double would differ here.
    generator = torch.Generator().manual_seed(7)
    register, direction = int8(-121, 121, (500,), 7), floats((500, 1), 8, low=-3, high=3).view(-1)
    rates = torch.exp2(torch.rand(400, dtype=torch.float64, generator=generator) * 40 - 30).tolist()
    differs = 0
    for step, rate in enumerate(rates):
        assert_same(ops.move_registers, register, direction, rate, make_key(7, step))
        in_double = (direction.double() * (-rate * 65536)).round().clamp(-254 * 65536, 254 * 65536)
        differs += int((in_double != (direction * (-rate * 65536)).round().clamp(-254 * 65536, 254 * 65536)).sum())
    assert differs > 1000


@needs_kernels
def test_an_infinite_direction_moves_as_far_as_it_can():
    register = torch.zeros(4, dtype=torch.int8)
    direction = torch.tensor([float("inf"), -float("inf"), 1e38, -1e38])
    flips, moved, _ = assert_same(ops.move_registers, register, direction, 1e6, make_key(1))
    assert moved.tolist() == [-121, 121, -121, 121] and int(flips) == 4


# ---- weights


@needs_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [1, 31, 256, 1000])
def test_decoded_weights_are_bit_equal(shape, group):
    register = int8(-128, 127, shape, seed=group)
    exponent = int8(-128, 127, (shape[0], -(-shape[1] // group)), seed=9)
    x, y = floats((6, shape[1]), 10), floats((6, shape[0]), 11)
    eye = torch.eye(shape[1])
    weight = assert_same(lambda r, e: ops.linear(eye, r, e, group).T, register, exponent)[0]
    assert torch.equal(weight, linear_reference.decode(register, exponent, group, torch.float32))
    assert_same(lambda r, e: ops.linear(x, r, e, group), register, exponent)
    assert_same(lambda r, e: torch.ops.tritwise.linear_input_grad(y, r, e, group, 27), register, exponent)
    assert_same(lambda r, e: torch.ops.tritwise.linear_scale_grad(y.T @ x, r, e, group, 27), register, exponent)


@needs_kernels
def test_every_register_and_every_scale_decodes_to_the_same_bits():
    from tritwise.ops.linear import cpu

    register = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).expand(256, 256).contiguous()
    exponent = register[0].reshape(256, 1)
    want = linear_reference.decode(register, exponent, 256, torch.float32)
    assert torch.equal(bits(cpu.decode(register, exponent, 256, torch.float32)), bits(want))


@needs_kernels
@pytest.mark.parametrize("ids_shape", [(), (0,), (3,), (5, 40), (2, 3, 4)])
@pytest.mark.parametrize(("columns", "group"), [(1, 256), (37, 16), (300, 256)])
@pytest.mark.parametrize("lead", [81, 27, 9])
def test_embedded_rows_are_bit_equal(ids_shape, columns, group, lead):
    register, exponent = int8(-121, 121, (50, columns), 1), int8(-128, 127, (50, -(-columns // group)), 2)
    ids = torch.randint(50, ids_shape, generator=torch.Generator().manual_seed(3))
    got = assert_same(lambda i, r, e: ops.embedding(i, r, e, group, lead=lead), ids, register, exponent)[0]
    assert torch.equal(got, embedding_reference.forward(ids, register, exponent, group, torch.float32, lead))


@needs_kernels
@pytest.mark.parametrize("bad", [-1, 50, 2**40])
def test_an_id_out_of_range_raises_as_the_reference_does(bad):
    register, exponent = int8(-121, 121, (50, 8), 1), int8(-9, 9, (50, 1), 2)
    for name in ("reference", "cpu"):
        with ops.backend(name), pytest.raises(IndexError):
            ops.embedding(torch.tensor([0, bad]), register, exponent)


# ---- what C does not do itself


@needs_kernels
def test_tensors_that_are_not_contiguous_are_changed_in_place():
    big, key = int8(-100, 100, (40, 90), 1), make_key(1)
    views = {"transposed": lambda x: x.T, "every second column": lambda x: x[:, ::2], "a part": lambda x: x[3:9, 5:50]}
    exponents = int8(-9, 9, (90, 4), 2)
    for (name, view), start in itertools.product(views.items(), (0, 1)):
        momentum, register = [big.clone(), big.clone()], [big.clone(), big.clone()]
        row_exponent, shape = [exponents.clone(), exponents.clone()], view(big).shape
        grad = floats((shape[1], shape[0] * 2), 3)[:, start::2].T
        for which, backend in enumerate(("reference", "cpu")):
            column = row_exponent[which][: shape[0], 1:2]
            with ops.backend(backend):
                ops.accumulate_momentum(view(momentum[which]), column, grad, 0.9, key)
                ops.move_registers(view(register[which]), grad, 9.0, key)
        for pair in (momentum, register, row_exponent):
            assert torch.equal(*pair), name
        assert not torch.equal(momentum[1], big) and not torch.equal(register[1], big)
        assert not torch.equal(row_exponent[1], exponents)
    x, scales = floats((6, 40), 4), int8(-9, 9, (1, 90), 5).T
    assert_same(lambda: ops.linear(x, big.T, scales))
    assert_same(lambda: ops.embedding(torch.arange(20).view(4, 5).T, big.T, scales))


@needs_kernels
def test_other_types_and_shapes_go_to_the_reference():
    momentum, exponent, grad = int8(-9, 9, (4, 6), 1), int8(-9, 9, (4, 1), 2), floats((4, 6), 3)
    for other in (grad.double(), grad.bfloat16(), grad[:1], grad[:, :1]):
        assert_same(ops.accumulate_momentum, momentum, exponent, other, 0.9, make_key(1))
        if other.shape == grad.shape:
            assert_same(ops.move_registers, momentum, other, 0.9, make_key(1))
    wide = int8(-121, 121, (4, 300), 4)  # one scale a row although a group is 256
    assert_same(lambda: ops.linear(floats((2, 300), 5), wide, exponent, 256))
    half = floats((2, 300), 5).bfloat16()
    got = on("cpu", lambda: ops.linear(half, wide, exponent, 512))[0]
    assert got.dtype == torch.bfloat16 and torch.equal(
        got, on("reference", lambda: ops.linear(half, wide, exponent, 512))[0]
    )
    for name in ("reference", "cpu"):
        with ops.backend(name), pytest.raises((RuntimeError, IndexError)):
            ops.accumulate_momentum(momentum, exponent, floats((3, 6), 3), 0.9, make_key(1))


@needs_kernels
def test_only_cpus():
    assert native.refuses(torch.device("cuda")) == "it runs on CPUs only"
    assert native.refuses(torch.device("cpu")) is None


# ---- training


def train(steps: int = 20) -> tuple[dict[str, torch.Tensor], list[float]]:
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=16, ngrams=2, ngram_rows=64, group=24))
    optimizer = TritOptimizer(model, rate=0.05, scale_rate=0.01)
    text = torch.randint(256, (steps, 4, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for batch in text:
        for half in batch.split(2):
            loss = model.loss(half[:, :-1], half[:, 1:]) / 2
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    tensors = dict(model.state_dict())
    for number, state in enumerate(optimizer.state.values()):
        tensors |= {f"{number}.{name}": value for name, value in state.items()}
    return tensors, losses


@needs_kernels
def test_training_gives_the_same_registers_and_losses():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ops.backend("reference"):
            want, want_losses = train()
        with ops.backend("cpu"):
            got, losses = train()
            table = ops.backend_table()
    finally:
        torch.set_num_threads(before)
    assert table | {"linear": "cpu", "update": "cpu", "embedding": "cpu"} == table
    assert losses == want_losses and want.keys() == got.keys()
    for name in want:
        assert torch.equal(want[name], got[name]), name


# ---- building and loading


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and nothing loaded; afterwards the usual one again."""
    monkeypatch.setenv("TRITWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(backends, "_warned", set())
    native.load.cache_clear()
    yield tmp_path / "cache" / "native"
    native.load.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@needs_kernels
def test_built_once_then_loaded_and_made_again_when_damaged(cache, monkeypatch):
    assert isinstance(native.load(), native.Kernels)
    (library,) = cache.iterdir()
    whole = library.read_bytes()

    def no_compile(_):
        raise AssertionError("compiled again")

    with monkeypatch.context() as patch:
        patch.setattr(native, "_compile", no_compile)
        native.load.cache_clear()
        assert isinstance(native.load(), native.Kernels)
    made = []
    monkeypatch.setattr(native, "_compile", lambda compiler: made.append(compiler) or whole)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (whole[: len(whole) // 2], b"", bytes(flipped), b"not a library"):
        library.unlink()  # not overwritten: it is mapped into this process
        library.write_bytes(damaged)
        native.load.cache_clear()
        assert isinstance(native.load(), native.Kernels) and library.read_bytes() == whole
    assert len(made) == 4


@needs_kernels
def test_the_name_changes_with_source_flags_compiler_and_processor(monkeypatch, tmp_path):
    keys = {native._key("gcc 1"), native._key("gcc 2")}
    with monkeypatch.context() as patch:
        patch.setattr(native, "FLAGS", ["-O0"])
        keys.add(native._key("gcc 1"))
    with monkeypatch.context() as patch:
        patch.setattr(native, "_processor", lambda: "another")
        keys.add(native._key("gcc 1"))
    with monkeypatch.context() as patch:
        patch.setattr(native, "SOURCE", tmp_path / "native.c")
        native.SOURCE.write_text("int x;")
        keys.add(native._key("gcc 1"))
    assert len(keys) == 5 and native._key("gcc 1") in keys


@needs_kernels
def test_processes_that_start_together_all_load(cache):
    program = "from tritwise.ops import native; print(type(native.load()).__name__)"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    assert [process.communicate(timeout=120)[0].strip() for process in running] == ["Kernels"] * 2
    assert not list(cache.glob(".*")) and all(file.suffix == ".so" for file in cache.iterdir())


def test_without_a_compiler_the_reference_runs_and_says_so_once(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    register, direction = int8(-121, 121, (40,), 1), floats((40, 1), 2).view(-1)
    want = on("reference", ops.move_registers, register, direction, 9.0, make_key(1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            moved = register.clone()
            flips = ops.move_registers(moved, direction, 9.0, make_key(1))
    assert torch.equal(flips, want[0]) and torch.equal(moved, want[1])
    assert ops.backend_table()["update"] == "reference"
    (message,) = [str(warning.message) for warning in caught]
    assert message.startswith("update falls back from cpu on cpu: there is no C compiler; install gcc or clang")
    with ops.backend("cpu"), pytest.raises(UserError, match="cannot run update on cpu: there is no C compiler"):
        ops.move_registers(register, direction, 9.0, make_key(1))
    assert not cache.exists()


def test_a_compiler_that_fails_is_a_reason(cache, tmp_path, monkeypatch):
    broken = script(tmp_path / "broken-cc", '[ "$1" = --version ] && exit 0\necho "fatal: no stdint.h" >&2\nexit 3\n')
    monkeypatch.setenv("CC", broken)
    reason = native.load()
    assert isinstance(reason, str) and "broken-cc cannot compile it: fatal: no stdint.h;" in reason
    killed = script(tmp_path / "killed-cc", '[ "$1" = --version ] && exit 0\nkill -9 $$\n')
    monkeypatch.setenv("CC", killed)
    native.load.cache_clear()
    assert "killed-cc cannot compile it: exit status -9;" in str(native.load())
    monkeypatch.setenv("CC", "an 'unfinished quote")
    native.load.cache_clear()
    assert "the C code cannot be built or loaded: No closing quotation" in str(native.load())


@needs_kernels
def test_a_compiler_without_native_tuning_and_with_arguments_is_used(cache, tmp_path, monkeypatch):
    real = next(path for path in map(shutil.which, native.COMPILERS) if path)
    wrapper = script(tmp_path / "plain-cc", f'case "$*" in *march*) exit 1;; esac\nshift\nexec {real} "$@"\n')
    monkeypatch.setenv("CC", f"{wrapper} first")
    assert native._compiler()[0] == [wrapper, "first"]
    assert isinstance(native.load(), native.Kernels)


@needs_kernels
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path, monkeypatch, cache):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRITWISE_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(native, "_compile", lambda compiler: b"library")
    reason = native.refuses(torch.device("cpu"))
    assert reason == (
        f"cannot write {tmp_path}/file/native: a file is in the way where a folder is needed; "
        "set TRITWISE_CACHE to a writable folder with room"
    )
    monkeypatch.setenv("TRITWISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    native.load.cache_clear()
    assert "no space left on the disk (or over its quota); set TRITWISE_CACHE" in str(native.load())
    assert not list(cache.iterdir())


@needs_kernels
def test_a_library_that_does_not_load_is_a_reason(cache, monkeypatch):
    monkeypatch.setattr(native, "_compile", lambda compiler: b"\x7fELF but no more")
    reason = native.load()
    assert isinstance(reason, str) and reason.startswith("the C code cannot be built or loaded: ")


@needs_kernels
def test_wrong_results_or_another_version_are_a_reason(monkeypatch, cache):
    with monkeypatch.context() as patch:
        patch.setattr(native, "SELF_TEST", (*native.SELF_TEST[:-1], 0))
        assert "gives wrong results on this machine" in str(native.load())
    native.load.cache_clear()
    monkeypatch.setattr(native, "VERSION", native.VERSION + 1)
    assert "gives wrong results on this machine" in str(native.load())


def test_big_endian_machines_are_refused(monkeypatch, cache):
    monkeypatch.setattr(sys, "byteorder", "big")
    assert native.load() == "its random bits need a little-endian processor"


def test_the_self_test_is_what_the_reference_computes(monkeypatch):
    class OnTorch:
        """The kernels' signatures on ctypes arrays, computed by the reference."""

        @staticmethod
        def _tensor(array, dtype, *shape):
            return torch.frombuffer(array, dtype=dtype).view(*shape)

        def accumulate(self, momentum, exponent, grad, rows, columns, decay, *key):
            m, e = self._tensor(momentum, torch.int8, rows, columns), self._tensor(exponent, torch.int8, rows, 1)
            g = self._tensor(grad, torch.float32, rows, columns)
            return int(update_reference.accumulate_momentum(m, e, g, decay, Key(*key)))

        def move(self, register, direction, count, factor, limit, *key):
            r, d = self._tensor(register, torch.int8, count), self._tensor(direction, torch.float32, count)
            return int(update_reference.move_registers(r, d, -factor / 65536, limit, Key(*key)))

        def _weight(self, register, exponent, scales, rows, columns, group, lead):
            e = self._tensor(exponent, torch.int8, rows, -1)
            table = self._tensor(scales, torch.float32, 256)
            monkeypatch.setattr(linear_reference, "scale_values", lambda e, dtype: table[e.long() + 128])
            r = self._tensor(register, torch.int8, rows, columns)
            return linear_reference.decode(r, e, group, torch.float32, lead)

        def decode(self, register, exponent, scales, out, *sizes):
            made = self._weight(register, exponent, scales, *sizes)
            self._tensor(out, torch.float32, *made.shape).copy_(made)

        def gather(self, ids, register, exponent, scales, out, count, *sizes):
            made = self._weight(register, exponent, scales, *sizes)[list(ids)]
            self._tensor(out, torch.float32, *made.shape).copy_(made)
            return 1

    run = OnTorch()
    kernels = native.Kernels(run.accumulate, run.move, run.decode, run.gather)
    assert native.self_test(kernels) == native.SELF_TEST
