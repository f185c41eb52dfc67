"""Ternary linear: forward and every gradient against dense float64 autograd, the port, and torch.library's checks."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tritwise import ops
from tritwise.ops import backends
from tritwise.registers import LEAD, scale_table

OPS = torch.ops.tritwise


def registers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-121, 122, shape, dtype=torch.int8, generator=generator)


def exponents(*shape: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-20, 9, shape, dtype=torch.int8, generator=generator)


def normal(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def open_port(rows: int, columns: int) -> Tensor:
    return torch.zeros(1).as_strided((rows, columns), (0, 0)).requires_grad_()


def dense(register: Tensor, exponent: Tensor, group: int, lead: int = LEAD) -> tuple[Tensor, Tensor]:
    """(weights in units of their scales, scales spread over their groups) as float64 [O, I], element by element."""
    table, rows, columns = scale_table().tolist(), *register.shape
    half = lead // 2
    trits = [[(abs(r) + half) // lead * (1 if r > 0 else -1) for r in row] for row in register.tolist()]
    scales = [[table[int(exponent[o, i // group]) + 128] for i in range(columns)] for o in range(rows)]
    return torch.tensor(trits, dtype=torch.float64), torch.tensor(scales, dtype=torch.float64)


def assert_close(found: Tensor, oracle: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the oracle's size: errors of a sum go with its terms, not with what is left of it."""
    assert found.shape == oracle.shape
    assert (found.double() - oracle).norm() <= tolerance * oracle.norm()


# Everything here is asked of every backend that this machine can run.
OPERATION = "linear"
pytestmark = pytest.mark.usefixtures("each_backend")


SHAPES = [  # leading dimensions, inputs, outputs, group
    ((1,), 1, 1, 256),
    ((4,), 1, 9, 256),
    ((4,), 9, 1, 256),
    ((7,), 13, 11, 256),
    ((), 13, 11, 4),
    ((2, 3), 17, 5, 5),
    ((2, 3), 256, 3, 256),
    ((3,), 257, 4, 256),
    ((2, 2), 600, 7, 256),  # three groups, the last one of 88
    ((2, 1, 3), 12, 8, 4),
    ((0,), 5, 3, 256),
    ((5,), 6, 3, 1),
]


LEADS = (LEAD, 27, 9, 1)  # of one, two, three and five trits a weight


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("leading", "inputs", "outputs", "group"), SHAPES)
def test_forward_and_gradients_against_dense_autograd(leading, inputs, outputs, group, lead, poisoned):
    register, exponent = registers(outputs, inputs), exponents(outputs, -(-inputs // group))
    x = normal(*leading, inputs).requires_grad_()
    upstream = normal(*leading, outputs, seed=3)
    port = open_port(outputs, inputs)
    y = ops.linear(x, register, exponent, group, port, lead)
    y.backward(upstream)

    trits, scales = dense(register, exponent, group, lead)
    x64 = x.detach().double().requires_grad_()
    weight = (trits * scales).requires_grad_()
    y64 = x64 @ weight.T
    y64.backward(upstream.double())
    assert y.dtype == torch.float32
    assert_close(y.detach(), y64.detach())
    assert_close(grad_of(x), grad_of(x64))
    assert_close(grad_of(port), grad_of(weight))
    assert grad_of(port).shape == (outputs, inputs) and grad_of(port).dtype == torch.float32


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("leading", "inputs", "outputs", "group"), SHAPES[:10])
def test_scale_gradient_against_dense_autograd(leading, inputs, outputs, group, lead, poisoned):
    register, exponent = registers(outputs, inputs), exponents(outputs, -(-inputs // group))
    x, upstream = normal(*leading, inputs), normal(*leading, outputs, seed=3)
    trits, _ = dense(register, exponent, group, lead)
    # The oracle differentiates by the natural logarithm of each scale, through which W = trit * exp(log).
    log = torch.from_numpy(scale_table()[exponent.long() + 128].double().log().numpy()).requires_grad_()
    spread = torch.stack([log[:, i // group] for i in range(inputs)], dim=1)
    ((x.double() @ (trits * spread.exp()).T) * upstream.double()).sum().backward()
    weight_grad = OPS.linear_weight_grad(upstream, x)
    found = ops.linear_scale_grad(weight_grad, register, exponent, group, lead)
    assert found.dtype == torch.float32
    assert_close(found, grad_of(log), 1e-5)


@pytest.mark.parametrize("lead", LEADS)
@pytest.mark.parametrize(("leading", "inputs", "outputs", "group"), SHAPES[:10])
def test_column_gradient_against_dense_autograd(leading, inputs, outputs, group, lead, poisoned):
    """A column's scale is put on what the column meets; its logarithm has the gradient that the weight's tells."""
    register, exponent = registers(outputs, inputs), exponents(outputs, -(-inputs // group))
    x, upstream = normal(*leading, inputs), normal(*leading, outputs, seed=3)
    trits, scales = dense(register, exponent, group, lead)
    log = normal(inputs, seed=4).double().requires_grad_()
    (((x.double() * log.exp()) @ (trits * scales).T) * upstream.double()).sum().backward()
    weight_grad = OPS.linear_weight_grad(upstream.double(), x.double() * log.detach().exp()).float()
    found = ops.linear_column_grad(weight_grad, register, exponent, group, lead)
    assert found.dtype == torch.float32
    assert_close(found, grad_of(log), 1e-5)


def test_gradients_of_scales_of_many_matrices_have_the_bits_of_each(poisoned):
    """Aligned ones of one width and of several, others between them, and one that no kernel serves."""
    sizes = [(24, 512, 256), (7, 256, 256), (3, 13, 5), (130, 512, 256), (9, 48, 64), (5, 48, 4096), (2, 130, 64)]
    given = [registers(rows, columns) for rows, columns, _ in sizes]
    powers = [exponents(rows, -(-columns // group)) for rows, columns, group in sizes]
    grads = [normal(rows, columns, seed=n) for n, (rows, columns, _) in enumerate(sizes)]
    grads[4] = grads[4].double()
    groups, leads = [group for _, _, group in sizes], [LEADS[n % 3] for n in range(len(sizes))]
    for one, many in (
        (ops.linear_scale_grad, ops.linear_scale_grads),
        (ops.linear_column_grad, ops.linear_column_grads),
    ):
        found = many(grads, given, powers, groups, leads)
        expected = [one(*each) for each in zip(grads, given, powers, groups, leads, strict=True)]
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and a.is_contiguous() and torch.equal(a, b)
        assert len({a.data_ptr() for a in found}) == len(sizes)
        assert torch.equal(many(grads[:1], given[:1], powers[:1], groups[:1])[0], expected[0])  # no leads: 81


def test_default_group_is_256():
    register, x = registers(3, 300), normal(2, 300)
    for exponent in (exponents(3, 2), exponents(3, 2, seed=9)):
        assert torch.equal(ops.linear(x, register, exponent), ops.linear(x, register, exponent, 256))
        weight_grad = normal(3, 300)
        assert torch.equal(
            ops.linear_scale_grad(weight_grad, register, exponent),
            ops.linear_scale_grad(weight_grad, register, exponent, 256),
        )
        assert torch.equal(
            ops.linear_column_grad(weight_grad, register, exponent),
            ops.linear_column_grad(weight_grad, register, exponent, 256),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoded_weight_is_exact(dtype):
    """Every register with every exponent: an identity matrix in gives the weight out, bit for bit."""
    register = torch.arange(-121, 122, dtype=torch.int8).repeat(256, 1)
    trits = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64).repeat_interleave(81)
    exponent = torch.arange(-128, 128, dtype=torch.int8)
    scales = scale_table().double()
    y = ops.linear(torch.eye(243, dtype=dtype), register, exponent.view(256, 1))
    assert y.dtype == dtype and torch.equal(y.T.double(), trits * scales[:, None])
    # And in groups of 81 that have different exponents.
    y = ops.linear(torch.eye(243, dtype=dtype), register, torch.stack((exponent, -1 - exponent, exponent), dim=1), 81)
    spread = torch.stack((scales, scales.flip(0), scales), dim=1).repeat_interleave(81, dim=1)
    assert torch.equal(y.T.double(), trits * spread)


@pytest.mark.parametrize("group", [256, 64])
def test_bfloat16_activations(group, poisoned):
    register, exponent = registers(31, 300), exponents(31, -(-300 // group))
    x = normal(4, 5, 300).bfloat16().requires_grad_()
    upstream = normal(4, 5, 31, seed=3).bfloat16()
    port = open_port(31, 300)
    y = ops.linear(x, register, exponent, group, port)
    y.backward(upstream)
    trits, scales = dense(register, exponent, group)
    weight, flat = trits * scales, upstream.double().view(20, 31)
    assert y.dtype == grad_of(x).dtype == torch.bfloat16 and grad_of(port).dtype == torch.float32
    assert_close(y.detach(), x.detach().double() @ weight.T, 2**-8)
    assert_close(grad_of(x), upstream.double() @ weight, 2**-8)
    assert_close(grad_of(port), flat.T @ x.detach().double().view(20, 300), 2**-8)


def test_inputs_that_are_not_contiguous():
    register, exponent = registers(5, 7), exponents(5, 2)
    x = normal(7, 6).T
    port, same = open_port(5, 7), open_port(5, 7)
    upstream = normal(5, 6).T
    ops.linear(x, register, exponent, 4, port).backward(upstream)
    ops.linear(x.contiguous(), register, exponent, 4, same).backward(upstream.contiguous())
    assert_close(grad_of(port), grad_of(same).double(), 1e-6)
    ops.linear(normal(6, 7), register, exponent, 4, port).sum().backward()  # an upstream of stride 0
    assert torch.isfinite(grad_of(port)).all()


def test_the_port_takes_no_memory_and_holds_no_weight():
    port = open_port(40, 30)
    y = ops.linear(normal(2, 30), registers(40, 30), exponents(40, 1), 256, port)
    y.sum().backward()
    assert port.stride() == (0, 0) and port.untyped_storage().nbytes() == 4
    assert port.count_nonzero() == 0
    assert grad_of(port).shape == (40, 30) and grad_of(port).is_contiguous()


def test_the_forward_does_not_depend_on_the_port():
    x, register, exponent = normal(3, 9), registers(4, 9), exponents(4, 1)
    with_port = ops.linear(x, register, exponent, 256, open_port(4, 9))
    assert torch.equal(with_port, ops.linear(x, register, exponent))
    assert with_port.requires_grad and not ops.linear(x, register, exponent).requires_grad


def test_two_uses_of_a_layer_add_up_in_the_port():
    register, exponent, port = registers(4, 9), exponents(4, 1), open_port(4, 9)
    a, b = normal(3, 9), normal(2, 9, seed=5)
    (
        ops.linear(a, register, exponent, 256, port).sum() + 2 * ops.linear(b, register, exponent, 256, port).sum()
    ).backward()
    assert_close(grad_of(port), (a.double().sum(0) + 2 * b.double().sum(0)).expand(4, 9))


def patch_all(monkeypatch: pytest.MonkeyPatch, name: str, function: Callable[..., None]) -> None:
    for entry in backends._backends["linear"].values():
        monkeypatch.setattr(entry.module, name, function)


def test_without_a_port_there_is_no_weight_gradient(monkeypatch):
    def refuse(*_):
        raise AssertionError("a weight gradient was computed")

    patch_all(monkeypatch, "weight_grad", refuse)
    x = normal(3, 9).requires_grad_()
    register, exponent = registers(4, 9), exponents(4, 1)
    for port in (None, open_port(4, 9).detach()):  # no port, or one that wants no gradient
        x.grad = None
        ops.linear(x, register, exponent, 256, port).sum().backward()
        assert x.grad is not None
    with pytest.raises(AssertionError, match="weight gradient"):  # the patch does reach the op
        ops.linear(x, register, exponent, 256, open_port(4, 9)).sum().backward()


def test_without_a_wish_there_is_no_input_gradient(monkeypatch):
    def refuse(*_):
        raise AssertionError("an input gradient was computed")

    patch_all(monkeypatch, "input_grad", refuse)
    port = open_port(4, 9)
    ops.linear(normal(3, 9), registers(4, 9), exponents(4, 1), 256, port).sum().backward()
    assert port.grad is not None


def test_activations_are_kept_only_for_a_port():
    x, register, exponent = normal(3, 9).requires_grad_(), registers(4, 9), exponents(4, 1)
    for port, kept in ((None, []), (open_port(4, 9), [(3, 9)])):
        shapes: list[tuple[int, ...]] = []

        def pack(tensor: Tensor, shapes: list[tuple[int, ...]] = shapes) -> Tensor:
            shapes.append(tuple(tensor.shape) if tensor.is_floating_point() else ())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            ops.linear(x, register, exponent, 256, port)
        assert [s for s in shapes if s] == kept


def test_nothing_is_changed():
    x, register, exponent = normal(3, 9), registers(4, 9), exponents(4, 3)
    kept = x.clone(), register.clone(), exponent.clone()
    weight_grad = normal(4, 9)
    kept_grad = weight_grad.clone()
    ops.linear(x.requires_grad_(), register, exponent, 3, open_port(4, 9)).sum().backward()
    ops.linear_scale_grad(weight_grad, register, exponent, 3)
    ops.linear_column_grad(weight_grad, register, exponent, 3)
    assert all(torch.equal(a, b) for a, b in zip((x, register, exponent), kept, strict=True))
    assert torch.equal(weight_grad, kept_grad)


@pytest.mark.parametrize("ported", [False, True])
@pytest.mark.parametrize(("leading", "inputs", "outputs", "group"), [((3, 5), 7, 4, 256), ((2,), 300, 3, 256)])
def test_opcheck_linear(leading, inputs, outputs, group, ported):
    arguments = (registers(outputs, inputs), exponents(outputs, -(-inputs // group)), group)
    port = open_port(outputs, inputs) if ported else None
    torch.library.opcheck(OPS.linear.default, (normal(*leading, inputs).requires_grad_(), *arguments, port, 27))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_gradients(dtype):
    register, exponent = registers(4, 7), exponents(4, 3)
    grad, x = normal(2, 5, 4).to(dtype), normal(2, 5, 7).to(dtype)
    torch.library.opcheck(OPS.linear.default, (x, register, exponent, 3, None, LEAD))
    torch.library.opcheck(OPS.linear_input_grad.default, (grad, register, exponent, 3, 9))
    torch.library.opcheck(OPS.linear_weight_grad.default, (grad, x))
    torch.library.opcheck(OPS.linear_scale_grad.default, (normal(4, 7), register, exponent, 3, 27))
    torch.library.opcheck(OPS.linear_column_grad.default, (normal(4, 7), register, exponent, 3, LEAD))
    many = [normal(4, 7), normal(2, 3)], [register, registers(2, 3)], [exponent, exponents(2, 1)], [3, 3], [LEAD, 27]
    torch.library.opcheck(OPS.linear_scale_grads.default, many)
    torch.library.opcheck(OPS.linear_column_grads.default, many)
