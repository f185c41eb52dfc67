"""The "tilelang" backend: what it refuses, what it leaves to "triton", and its kernel against the reference.

The kernel itself runs on a GPU with -m gpu. Where tilelang is installed without one, its program runs in C on the CPU,
thread by thread, and its CUDA source is made for GPUs that are not here.
"""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from test_triton import assert_close, int8, normal
from tritwise import ops
from tritwise.bench.kernel_cases import make_cases
from tritwise.errors import UserError
from tritwise.ops import backends, gpu
from tritwise.ops.linear import reference, tilelang, triton
from tritwise.registers import scale_table

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HAS_TILELANG = importlib.util.find_spec("tilelang") is not None
needs_tilelang = pytest.mark.skipif(not HAS_TILELANG, reason="tilelang is not installed")
BF16, FP16 = torch.bfloat16, torch.float16


def matrix(outputs: int, inputs: int, group: int) -> tuple[Tensor, Tensor, int]:
    return int8(-121, 121, (outputs, inputs), 0), int8(-20, 8, (outputs, -(-inputs // group)), 1), group


# ---- where it runs, and how it is chosen


def test_nothing_is_decoded_ahead_of_products_that_decode():
    (register, exponent, group), rounds = matrix(32, 64, 64), [(False, False)] * 2
    assert tilelang.decode_many([register] * 2, [exponent] * 2, [group] * 2, BF16, rounds) == [ops.Operand()] * 2


def test_reasons_to_refuse(monkeypatch):
    why = tilelang.refuses.__wrapped__
    assert why(CPU) == "it runs on CUDA devices only"
    monkeypatch.setattr(tilelang.importlib.util, "find_spec", lambda name: None)
    assert why(CUDA) == "tilelang is not installed; pip install 'tritwise[tilelang]'"
    monkeypatch.setattr(tilelang.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert why(CUDA) == "Tesla T4 is older than compute capability 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(gpu, "refuses", lambda device: "triton is not installed")
    assert why(CUDA) == "what it leaves to triton cannot run: triton is not installed"
    monkeypatch.setattr(gpu, "refuses", lambda device: None)

    def broken(*_: Any) -> Any:
        raise OSError("libz3.so:\nno such file")

    monkeypatch.setattr(tilelang, "_kernels", broken)
    assert why(CUDA) == "TileLang cannot compile or run: OSError: libz3.so: no such file"
    monkeypatch.setattr(tilelang, "_kernels", lambda: SimpleNamespace(compiler=lambda: None))
    assert why(CUDA).startswith("TileLang finds no compiler; pip install 'tilelang[nvcc]', or set CUDA_HOME")
    monkeypatch.setattr(tilelang, "_kernels", lambda: SimpleNamespace(compiler=lambda: "nvrtc"))
    monkeypatch.setattr(tilelang, "_self_test", lambda device: False)
    assert "wrong results" in why(CUDA)
    monkeypatch.setattr(tilelang, "_self_test", lambda device: True)
    assert why(CUDA) is None


def test_it_is_taken_only_if_asked_for(monkeypatch):
    assert ops.backends_of("linear")[-1] == "tilelang"
    assert backends._backends["linear"]["tilelang"].devices == ("cuda",)
    monkeypatch.setenv("TRITWISE_BACKEND", "tilelang")
    with pytest.raises(UserError, match="'tilelang' cannot run linear on cpu: it runs on CUDA devices only"):
        ops.linear(normal(2, 64), *matrix(3, 64, 64))


def test_other_operations_go_by_the_automatic_choice(monkeypatch):
    register, exponent, group = matrix(5, 8, 256)
    momentum = int8(-127, 127, (5, 8), 2)

    def run() -> list[Tensor]:
        return [ops.embedding(torch.tensor([1, 4]), register, exponent, group), ops.direction(momentum, exponent)]

    monkeypatch.setattr(backends, "_chosen", {})
    expected, chosen = run(), ops.backend_table()
    monkeypatch.setenv("TRITWISE_BACKEND", "tilelang")
    backends._chosen.clear()
    for found, before in zip(run(), expected, strict=True):
        assert torch.equal(found, before)
    assert ops.backend_table() == chosen and sorted(chosen) == ["direction", "embedding"]


@pytest.mark.parametrize(
    ("dtype", "group", "reason"),
    [
        (torch.float32, 64, "it serves bfloat16 and float16, not float32"),
        (BF16, 40, "it serves groups of whole rows or of multiples of 64 inputs, not of 40"),
        (FP16, 128, "it serves registers and exponents of int8, of which there are some"),
        (BF16, 256, "it serves memory that begins at a multiple of 16 bytes"),
    ],
)
def test_what_it_does_not_serve_is_left_to_triton_and_said_once(dtype, group, reason, monkeypatch, recwarn):
    monkeypatch.setattr(triton, "forward", reference.forward)
    monkeypatch.setattr(triton, "input_grad", reference.input_grad)
    tilelang._say.cache_clear()
    register, exponent, group = matrix(16, 160, group)
    x, grad = normal(3, 160).to(dtype), normal(3, 16).to(dtype)
    if group == 128:
        register = register.to(torch.int16)
    if group == 256:
        x, grad = (torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in (x, grad))
    for _ in range(2):
        y = tilelang.forward(x, register, exponent, group)
        assert torch.equal(y, reference.forward(x, register, exponent, group))
        found = tilelang.input_grad(grad, register, exponent, group)
        assert torch.equal(found, reference.input_grad(grad, register, exponent, group))
    assert [str(w.message) for w in recwarn] == [f"linear falls back from tilelang to triton: {reason}"]


# ---- the way to the kernel


def reference_product(outputs: int, columns: int, width: int, dtype: str, turned: bool) -> Any:
    """The reference in the place of the compiled program, where all that this takes for granted holds."""

    def run(*given: Tensor) -> None:
        x_NK, register_OI, exponent_OG, scales, y_NM = given
        for tensor in given:
            assert not tensor.requires_grad and tensor.stride()[-1] == 1
            assert tensor.dim() == 1 or tensor.stride(0) == tensor.shape[1]
        assert (outputs, columns) == register_OI.shape and dtype == "bfloat16" and torch.equal(scales, scale_table())
        assert exponent_OG.shape == (outputs, -(-columns // width))
        one = reference.input_grad if turned else reference.forward
        y_NM.copy_(one(x_NK, register_OI, exponent_OG, width))

    return run


@pytest.mark.parametrize("leading", [(70,), (2, 3), (), (0,)])
@pytest.mark.parametrize(("inputs", "group"), [(130, 64), (130, 256), (13, 256), (1, 1)])
def test_the_kernel_is_given_plain_matrices(leading, inputs, group, monkeypatch, poisoned):
    monkeypatch.setattr(tilelang, "_kernels", lambda: SimpleNamespace(product=reference_product))
    assert tilelang._self_test(CPU)
    register, exponent, group = matrix(31, inputs, group)
    register, exponent = register.t().contiguous().t(), exponent.t().contiguous().t()
    x = normal(inputs, *leading).to(BF16).movedim(0, -1).requires_grad_()
    grad = normal(1).to(BF16).expand(*leading, 31)
    y = tilelang.forward(x, register, exponent, group)
    assert y.dtype == BF16 and torch.equal(y, reference.forward(x, register, exponent, group))
    found = tilelang.input_grad(grad, register, exponent, group)
    assert torch.equal(found, reference.input_grad(grad, register, exponent, group))


# ---- the program without a GPU


PROGRAMS = [(70, 130, 64), (129, 200, 64), (129, 201, 201), (3, 300, 128), (1, 1, 1)]  # outputs, inputs, group


@needs_tilelang
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(("outputs", "inputs", "group"), PROGRAMS)
def test_the_program_in_c(outputs, inputs, group, turned, monkeypatch, tmp_path):
    """A CPU has one thread a block: what the threads share out on a GPU is an array of its own here."""
    import tilelang as tl
    import tilelang.language as T

    kernels = tilelang._kernels()
    language = SimpleNamespace(**{name: getattr(T, name) for name in dir(T)})
    language.alloc_shared = language.alloc_fragment = T.alloc_local
    language.Parallel = T.grid
    monkeypatch.setattr(kernels, "T", language)
    monkeypatch.setenv("TILELANG_CACHE_DIR", str(tmp_path))
    program = kernels.program(outputs, inputs, group, "float32", turned)
    run = tl.compile(program, target="c", execution_backend="cython")
    register, exponent, group = matrix(outputs, inputs, group)
    for rows in (1, 131):
        x = normal(rows, outputs if turned else inputs)
        y = torch.full((rows, inputs if turned else outputs), float("nan"))
        run(x, register, exponent, scale_table(), y)
        one = reference.input_grad if turned else reference.forward
        assert_close(y, one(x.double(), register, exponent, group), 1e-6)


@needs_tilelang
def test_which_compiler_there_is(monkeypatch, tmp_path):
    kernels = tilelang._kernels()
    monkeypatch.setattr(kernels, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(kernels, "is_nvrtc_available", True)
    monkeypatch.setattr(kernels, "get_cplus_compiler", lambda: "c++")
    assert kernels.compiler() is None
    for file, name in (("include/cuda_fp16.h", "nvrtc"), ("bin/nvcc", "tvm_ffi")):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
        assert kernels.compiler() == name
    monkeypatch.setattr(kernels, "get_cplus_compiler", lambda: None)
    assert kernels.compiler() == "nvrtc"
    monkeypatch.setattr(kernels, "is_nvrtc_available", False)
    assert kernels.compiler() is None


@needs_tilelang
@pytest.mark.slow
@pytest.mark.parametrize(("arch", "unit"), [("sm_80", "mma_sync"), ("sm_90a", "wgmma_ss")])
def test_cuda_source_is_made_for_a_gpu_that_is_not_here(arch, unit):
    import tilelang as tl

    kernels = tilelang._kernels()
    target = tl.tvm.target.Target({"kind": "cuda", "arch": arch})
    for turned in (False, True):
        for outputs, inputs, group in ((768, 512, 256), (129, 201, 201)):
            program = kernels.program(outputs, inputs, group, "bfloat16", turned)
            with tl.tvm.transform.PassContext(config=kernels.PASSES), target:
                assert unit in tl.lower(program, target=target).kernel_source


# ---- on a GPU


@pytest.fixture
def by_tilelang():
    if not HAS_TILELANG or not torch.cuda.is_available():
        pytest.skip("tilelang is not installed, or torch sees no GPU")
    assert tilelang.refuses(CUDA) is None
    tilelang._say.cache_clear()
    with ops.backend("tilelang"):
        yield
    assert ops.backend_table()["linear"] == "tilelang"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("leading", "outputs", "inputs", "group", "dtype"),
    [
        ((1,), 1, 1, 256, BF16),
        ((5,), 7, 13, 256, FP16),
        ((2, 70), 257, 301, 512, BF16),  # one group, wider than the row; nothing is a multiple of anything
        ((130,), 192, 320, 64, BF16),
        ((17,), 40, 600, 256, BF16),  # three groups, the last of 88
        ((17,), 40, 600, 256, FP16),
        ((33,), 129, 640, 128, FP16),
        ((300,), 768, 512, 256, BF16),
        ((), 64, 2048, 2048, BF16),
        ((0,), 8, 64, 64, BF16),
    ],
)
def test_forward_and_input_gradient(leading, outputs, inputs, group, dtype, by_tilelang, poisoned, recwarn):
    register, exponent, group = matrix(outputs, inputs, group)
    on_gpu = register.cuda(), exponent.cuda(), group
    for op, one, depth in (
        (torch.ops.tritwise.linear, reference.forward, inputs),
        (torch.ops.tritwise.linear_input_grad, reference.input_grad, outputs),
    ):
        x = normal(*leading, depth).to(dtype)
        rest = (None, 81) if op is torch.ops.tritwise.linear else (81,)
        y = op(x.cuda(), *on_gpu, *rest)
        assert y.dtype == dtype
        assert_close(y.cpu(), one(x.double(), register, exponent, group), 1e-2)
    assert not [w for w in recwarn if "falls back" in str(w.message)]


@pytest.mark.gpu
def test_every_register_with_every_scale(by_tilelang):
    """One product a sum: bfloat16 holds it exactly."""
    register = torch.arange(-121, 122, dtype=torch.int16).to(torch.int8).repeat(256, 1)
    exponent = torch.arange(-128, 128, dtype=torch.int16).to(torch.int8).view(256, 1)
    y = ops.linear(torch.eye(243, dtype=BF16, device="cuda"), register.cuda(), exponent.cuda())
    assert torch.equal(y.cpu().T, reference.decode(register, exponent, 256, BF16))


@pytest.mark.gpu
def test_a_layer_learns_by_it(by_tilelang):
    """Autograd, where gradients of weights and scales are triton's; then a recording of the same in a CUDA graph."""
    register, exponent, group = matrix(96, 320, 64)
    x, upstream = normal(2, 60, 320).to(BF16), normal(2, 60, 96, seed=3).to(BF16)
    place = x.cuda().requires_grad_()
    port = torch.zeros(1, device="cuda").expand(96, 320).requires_grad_()
    y = ops.linear(place, register.cuda(), exponent.cuda(), group, port)
    y.backward(upstream.cuda())
    assert place.grad is not None and port.grad is not None
    assert_close(place.grad.cpu(), reference.input_grad(upstream.double(), register, exponent, group), 1e-2)
    assert_close(port.grad.cpu(), upstream.double().view(-1, 96).T @ x.double().view(-1, 320), 1e-2)
    scales = ops.linear_scale_grad(port.grad, register.cuda(), exponent.cuda(), group)
    assert_close(scales.cpu(), reference.scale_grad(port.grad.cpu(), register, exponent, group), 1e-5)

    still, given = place.detach().clone(), (register.cuda(), exponent.cuda(), group)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        again = ops.linear(still, *given)
    still.zero_()
    graph.replay()
    assert not again.any()
    still.copy_(place.detach())
    graph.replay()
    assert torch.equal(again, y.detach())


# ---- bench kernels


@pytest.mark.parametrize(("dtype", "reason", "names"), [(BF16, None, True), (BF16, "why", False), (None, None, False)])
def test_bench_kernels_times_it_where_it_runs(dtype, reason, names, monkeypatch):
    monkeypatch.setattr(tilelang, "refuses", lambda device: reason)
    cases = [case for case in make_cases(CPU, dtype or torch.float32, [16], 4, 1) if case.kernel.startswith("forward")]
    assert {case.backend for case in cases} == ({None, "tilelang"} if names else {None})
    assert all(case.kernel == ("forward tilelang" if case.backend else "forward") for case in cases)
