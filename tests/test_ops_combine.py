"""The combination of experts against dense float64 autograd; torch.library's checks."""

import pytest
import torch
from torch import Tensor

from tritwise import ops

OPS = torch.ops.tritwise

# Everything here is asked of every backend that this machine can run.
OPERATION = "combine"
pytestmark = pytest.mark.usefixtures("each_backend")

CASES = [(1, 1, 1, 0), (5, 2, 3, 0), (7, 3, 130, 4), (4, 8, 2100, 0), (3, 2, 17, 9)]  # tokens, K, C, rows left over


def inputs(tokens: int, k: int, columns: int, spare: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows in any order, each of them read by one token at most; gates of any sign."""
    generator = torch.Generator().manual_seed(seed)
    rows = tokens * k + spare
    slot = torch.randperm(rows, generator=generator)[: tokens * k].view(tokens, k)
    return torch.randn(rows, columns, generator=generator), slot, torch.randn(tokens, k, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "k", "columns", "spare"), CASES)
def test_combination_and_gradients_against_autograd(tokens, k, columns, spare, dtype, poisoned):
    x, slot, gate = inputs(tokens, k, columns, spare)
    upstream = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(3)).to(dtype)
    x, gate = x.to(dtype).requires_grad_(), gate.to(dtype).requires_grad_()
    y = ops.combine(x, slot, gate)
    found = [y.detach(), *torch.autograd.grad(y, (x, gate), upstream)]
    x64, gate64 = x.detach().double().requires_grad_(), gate.detach().double().requires_grad_()
    y64 = (gate64[..., None] * x64[slot]).sum(1)
    expected = [y64.detach(), *torch.autograd.grad(y64, (x64, gate64), upstream.double())]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= (1e-6 if dtype is torch.float32 else 2**-8) * b.norm()
    assert found[1][[n for n in range(len(x)) if n not in slot.flatten().tolist()]].count_nonzero() == 0


def test_combination_in_doubles_and_of_nothing():
    """What a kernel is not made for."""
    x, slot, gate = inputs(5, 2, 7, 1)
    assert torch.allclose(ops.combine(x.double(), slot, gate.double()).float(), ops.combine(x, slot, gate), atol=1e-6)
    assert ops.combine(x, slot[:0], gate[:0]).shape == (0, 7)


def test_opcheck_of_combination():
    x, slot, gate = inputs(4, 3, 6, 2)
    torch.library.opcheck(OPS.combine.default, (x.requires_grad_(), slot, gate.requires_grad_()))
    arguments = torch.randn(4, 6), x.detach(), slot, gate.detach()
    torch.library.opcheck(OPS.combine_grads.default, arguments)
