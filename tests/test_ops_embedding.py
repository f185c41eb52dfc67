"""Ternary embedding: rows and their gradient against dense float64 autograd, the port, and torch.library's checks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops import backends
from tritwise.registers import scale_table

OPS = torch.ops.tritwise


def table(rows: int, columns: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    register = torch.randint(-121, 122, (rows, columns), dtype=torch.int8, generator=generator)
    exponent = torch.randint(-20, 9, (rows, -(-columns // group)), dtype=torch.int8, generator=generator)
    return register, exponent


def draw_ids(rows: int, *shape: int) -> Tensor:
    return torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(7))


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def open_port(rows: int, columns: int) -> Tensor:
    return torch.zeros(1).as_strided((rows, columns), (0, 0)).requires_grad_()


def dense(register: Tensor, exponent: Tensor, group: int) -> Tensor:
    """W as float64 [V, D], element by element."""
    scales = scale_table().tolist()
    return torch.tensor(
        [
            [((r > 40) - (r < -40)) * scales[int(exponent[v, d // group]) + 128] for d, r in enumerate(row)]
            for v, row in enumerate(register.tolist())
        ],
        dtype=torch.float64,
    )


# Everything here is asked of every backend that this machine can run.
OPERATION = "embedding"
pytestmark = pytest.mark.usefixtures("each_backend")


CASES = [  # rows, columns, group, shape of ids: fewer ids than rows, and as many or more
    (1, 1, 256, (1,)),
    (1, 1, 256, (2, 3)),
    (256, 13, 256, (2, 5)),
    (11, 13, 256, (3, 7)),
    (11, 13, 4, (11,)),
    (17, 300, 256, (4,)),
    (5, 600, 256, (2, 2, 3)),
    (19, 7, 3, ()),
    (19, 7, 3, (0,)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns", "group", "shape"), CASES)
def test_rows_and_gradient_against_dense_autograd(rows, columns, group, shape, dtype, poisoned):
    register, exponent = table(rows, columns, group)
    ids, port = draw_ids(rows, *shape), open_port(rows, columns)
    y = ops.embedding(ids, register, exponent, group, port, dtype)
    upstream = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(3)).to(dtype)
    y.backward(upstream)
    weight = dense(register, exponent, group).requires_grad_()
    y64 = weight[ids]
    y64.backward(upstream.double())
    assert y.dtype == dtype and y.shape == (*shape, columns)
    assert torch.equal(y.detach().double(), y64.detach())  # a gather of exact numbers is exact
    assert grad_of(port).shape == (rows, columns) and grad_of(port).dtype == torch.float32
    assert (grad_of(port).double() - grad_of(weight)).norm() <= 1e-6 * grad_of(weight).norm()
    assert torch.equal(grad_of(port) == 0, grad_of(weight) == 0)  # rows that were not used get nothing


@pytest.mark.parametrize("lead", [81, 27, 9])
def test_both_ways_of_decoding_agree(lead):
    """A short list of ids decodes rows, a long one the table: the same bits."""
    register, exponent = table(40, 300, 256)
    ids = draw_ids(40, 200)
    whole = ops.embedding(ids, register, exponent, lead=lead)
    parts = torch.cat([ops.embedding(part, register, exponent, lead=lead) for part in ids.split(39)])
    assert torch.equal(whole, parts)
    number = (register.double() / lead).round()  # W where every scale is 1
    assert torch.equal(ops.embedding(ids, register, torch.zeros_like(exponent), lead=lead).double(), number[ids])


def test_a_row_used_often_sums_its_gradients():
    register, exponent = table(9, 4, 256)
    port = open_port(9, 4)
    y = ops.embedding(torch.tensor([[3, 3, 8], [3, 0, 8]]), register, exponent, 256, port)
    y.sum().backward()
    assert grad_of(port).tolist() == [[float(n)] * 4 for n in (1, 0, 0, 3, 0, 0, 0, 0, 2)]


def test_bfloat16_gradient_is_summed_in_float32():
    grad = torch.full((1000, 2), 1.0, dtype=torch.bfloat16)
    summed = OPS.embedding_weight_grad(grad, torch.zeros(1000, dtype=torch.int64), 3)
    assert summed.dtype == torch.float32
    assert summed.tolist() == [[1000.0] * 2, [0.0] * 2, [0.0] * 2]  # bf16 alone would stop at 256


def test_the_port_takes_no_memory_and_changes_no_row():
    register, exponent = table(20, 30, 7)
    ids, port = draw_ids(20, 5), open_port(20, 30)
    y = ops.embedding(ids, register, exponent, 7, port)
    assert torch.equal(y.detach(), ops.embedding(ids, register, exponent, 7))
    y.sum().backward()
    assert port.stride() == (0, 0) and port.untyped_storage().nbytes() == 4 and port.count_nonzero() == 0


def patch_all(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., None]) -> None:
    for entry in backends._backends["embedding"].values():
        monkeypatch.setattr(entry.module, name, function)


def test_without_a_port_there_is_no_weight_gradient(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight gradient was computed")

    patch_all(monkeypatch, "weight_grad", refuse)
    register, exponent = table(20, 30, 256)
    ids = draw_ids(20, 5)
    factor = torch.ones(30, requires_grad=True)
    assert not ops.embedding(ids, register, exponent).requires_grad
    (ops.embedding(ids, register, exponent, 256, open_port(20, 30).detach()) * factor).sum().backward()
    assert factor.grad is not None
    with pytest.raises(AssertionError, match="weight gradient"):  # the patch does reach the op
        ops.embedding(ids, register, exponent, 256, open_port(20, 30)).sum().backward()


@pytest.mark.parametrize("shape", [(2,), (30,)], ids=["rows", "whole table"])
@pytest.mark.parametrize("wrong", [20, 10**6, -1, -21])
def test_an_id_outside_the_table_is_an_error(shape, wrong):
    register, exponent = table(20, 3, 256)
    ids = torch.zeros(shape, dtype=torch.int64)
    ids[-1] = wrong
    with pytest.raises(IndexError):
        ops.embedding(ids, register, exponent)


def test_nothing_is_changed():
    register, exponent = table(6, 9, 4)
    ids = draw_ids(6, 9)
    kept = ids.clone(), register.clone(), exponent.clone()
    ops.embedding(ids, register, exponent, 4, open_port(6, 9)).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip((ids, register, exponent), kept, strict=True))


@pytest.mark.parametrize("ported", [False, True])
@pytest.mark.parametrize(("rows", "columns", "group", "shape"), [(9, 7, 256, (2, 3)), (5, 300, 256, (7,))])
def test_opcheck(rows, columns, group, shape, ported):
    register, exponent = table(rows, columns, group)
    port = open_port(rows, columns) if ported else None
    ids = draw_ids(rows, *shape)
    torch.library.opcheck(OPS.embedding.default, (ids, register, exponent, group, port, torch.float32, 27))
    torch.library.opcheck(OPS.embedding_weight_grad.default, (torch.randn(*shape, columns), ids, rows))
