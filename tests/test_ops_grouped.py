"""Products of runs of rows with a matrix each: against the products one by one, in float64; torch.library's checks."""

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops.linear import reference
from tritwise.registers import scale_values

OPERATION = "linear"
OPS = torch.ops.tritwise

RUNS = [(3, 0, 5, 1), (0, 0, 9, 0), (4, 5, 0, 0), (1, 1, 1, 1), (0, 0, 0, 0), (64, 8, 0, 56)]
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ends_of(runs: tuple[int, ...]) -> Tensor:
    return torch.tensor(runs).cumsum(0).to(torch.int32)


def one_by_one(x: Tensor, weight: Tensor, runs: tuple[int, ...]) -> Tensor:
    return torch.cat([part @ w.T for part, w in zip(x.split(list(runs)), weight, strict=True)])


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("runs", RUNS)
@pytest.mark.parametrize(("outputs", "inputs"), [(24, 16), (5, 7), (64, 128)])
def test_values_and_gradients(outputs, inputs, runs, dtype, device):
    """Those of (5, 7) no grouped product of a GPU takes."""
    x, weight, upstream = (
        normal(sum(runs), inputs),
        normal(4, outputs, inputs, seed=1),
        normal(sum(runs), outputs, seed=2),
    )
    own = [t.to(device, dtype).requires_grad_(t is not upstream) for t in (x, weight, upstream)]
    y = ops.grouped_product(*own[:2], ends_of(runs).to(device))
    found = [y.detach(), *torch.autograd.grad(y, own[:2], own[2])]
    exact = [t.detach().cpu().double().requires_grad_() for t in own]
    expected = one_by_one(exact[0], exact[1], runs)
    expected = [expected.detach(), *torch.autograd.grad(expected, exact[:2], exact[2])]
    tolerance = 1e-5 if dtype is torch.float32 else 2**-7
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm()
    empty = [number for number, count in enumerate(runs) if count == 0]
    assert found[2][empty].count_nonzero() == 0


@pytest.mark.usefixtures("each_backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_ternary_matrices_are_decoded_with_the_scales_of_their_columns(scaled, dtype):
    check_decoding(scaled, dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_ternary_matrices_are_decoded_on_a_gpu(scaled, dtype):
    check_decoding(scaled, dtype, "cuda")


def check_decoding(scaled: bool, dtype: torch.dtype, device: str) -> None:
    """Values and gradients of matrices of which one is frozen, each against the reference."""
    generator = torch.Generator().manual_seed(0)
    registers = [torch.randint(-121, 122, (32, 80), generator=generator).to(torch.int8) for _ in range(3)]
    exponents = [torch.randint(-9, 9, (32, 2), generator=generator).to(torch.int8) for _ in range(3)]
    columns = [torch.arange(80, dtype=torch.int8) % (9 + n) - 4 for n in range(3)] if scaled else []
    ports = [torch.zeros(1, device=device).as_strided((32, 80), (0, 0)).requires_grad_() for _ in range(3)]
    placed = [[t.to(device) for t in tensors] for tensors in (registers, exponents, columns)]
    frozen = [ports[0], None, ports[2]]
    leads = [81, 27, 27]
    found = ops.stacked_weights(*placed[:2], [64] * 3, dtype, frozen, placed[2], leads)
    given = zip(registers, exponents, leads, strict=True)
    plain = torch.stack([reference.decode(r, e, 64, dtype, lead) for r, e, lead in given])
    factor = scale_values(torch.stack(columns))[:, None] if scaled else torch.ones(())
    assert found.dtype == dtype and torch.equal(found.detach().cpu(), plain * factor.to(dtype))
    upstream = normal(3, 32, 80).to(dtype)
    first, last = torch.autograd.grad(found, [ports[0], ports[2]], upstream.to(device))
    for number, grad in ((0, first), (2, last)):
        assert grad.dtype == torch.float32
        assert torch.equal(grad.cpu(), (upstream.float() * factor)[number])


@pytest.mark.usefixtures("each_backend")
def test_opcheck():
    x, weight, ends = normal(9, 8).requires_grad_(), normal(4, 5, 8, seed=1).requires_grad_(), ends_of((3, 0, 5, 1))
    torch.library.opcheck(OPS.grouped_product.default, (x, weight, ends))
    torch.library.opcheck(OPS.grouped_weight_grad.default, (normal(9, 5), x.detach(), ends))
    registers = [torch.tensor([[121, -80], [3, 50]], dtype=torch.int8)] * 2
    exponents = [torch.tensor([[8], [-8]], dtype=torch.int8)] * 2
    given = registers, exponents, [256, 256], [torch.ones(2, dtype=torch.int8)] * 2, registers, torch.float32, [81, 27]
    torch.library.opcheck(OPS.stacked_weights.default, given)
    torch.library.opcheck(OPS.stacked_weights_grad.default, (normal(2, 2, 2), [torch.ones(2, dtype=torch.int8)] * 2))


@pytest.mark.gpu
def test_a_recording_serves_other_runs():
    """What is recorded reads where runs end from the device."""
    x, weight, ends = (
        normal(64, 32).bfloat16().cuda(),
        normal(4, 16, 32, seed=1).bfloat16().cuda(),
        ends_of(RUNS[3]).cuda(),
    )
    x, weight = x.requires_grad_(), weight.requires_grad_()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())

    def run() -> list[Tensor]:
        y = ops.grouped_product(x, weight, ends)
        return [y.detach(), *torch.autograd.grad(y, (x, weight), torch.ones_like(y))]

    ends.copy_(ends_of((16, 16, 16, 16)))
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph, stream=side):
        found = run()
    for runs in ((64, 0, 0, 0), (0, 1, 60, 3), (17, 15, 9, 23)):
        ends.copy_(ends_of(runs))
        expected = run()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
