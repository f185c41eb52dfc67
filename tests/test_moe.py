"""The mixture of experts against its formula, both ways of computing it, even load, halting, and that it learns."""

import pytest
import torch
from torch import Tensor, nn

from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import FloatLinear, TritLinear, TritMoE, rms_norm, tensor_roles, trit_modules
from tritwise.nn.moe import HALTED
from tritwise.optim import TritOptimizer
from tritwise.train.stepper import Stepper


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(**changes: object) -> TritMoE:
    torch.manual_seed(0)
    return TritMoE(16, 24, **{"experts": 4, "active": 2, **changes})  # type: ignore[arg-type]


def formula(layer: TritMoE, x_NC: Tensor) -> Tensor:
    """Every expert on every position, weighed."""
    logits = layer.router(x_NC)
    best = logits.topk(layer.active, dim=1)
    gates = torch.zeros_like(logits).scatter(1, best.indices, best.values.softmax(1))
    return sum(gates[:, e : e + 1] * expert(x_NC) for e, expert in enumerate(layer.experts))  # type: ignore[return-value]


@pytest.mark.parametrize("active", [1, 2, 4])
@pytest.mark.parametrize("linear", [TritLinear, FloatLinear])
def test_a_pass_is_the_weighted_sum_of_the_best(active, linear):
    layer, x = make(active=active, linear=linear), rms_norm(normal(3, 7, 16))
    torch.testing.assert_close(layer(x), formula(layer, x.view(21, 16)).view(3, 7, 16), rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_the_formula():
    layer, x = make(linear=FloatLinear, balance=0.0), rms_norm(normal(21, 16)).requires_grad_()
    upstream = normal(21, 16, seed=3)
    tensors = [x, *layer.parameters()]
    found = torch.autograd.grad(layer(x), tensors, upstream)
    expected = torch.autograd.grad(formula(layer, x), tensors, upstream)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("iters", [1, 3])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("linear", [TritLinear, FloatLinear])
def test_products_of_all_experts_at_once_say_the_same(linear, columns, iters, monkeypatch):
    """What is compiled or runs on a GPU, where the number of positions of an expert stays unknown; experts without one
    get gradients of zero."""
    layer, x = make(max_iters=iters, linear=linear, experts=7, leak=0.5), rms_norm(normal(21, 16)).requires_grad_()
    for module in layer.modules() if columns and linear is TritLinear else ():
        if isinstance(module, TritLinear):
            module.add_column_scales()
            count = len(module.column_exponent)
            module.column_exponent.copy_(torch.arange(count) % 9 - 4)
    ports = [m.port if linear is TritLinear else m.weight for m in layer.experts.modules() if isinstance(m, linear)]
    found = []
    for together in (False, True):
        monkeypatch.setattr("tritwise.nn.moe.in_runs", lambda rows, together=together: together)
        y = layer(x)
        found.append([y, *torch.autograd.grad(y, [x, *ports], normal(21, 16, seed=3), allow_unused=True)])
    assert found[1][1].count_nonzero() and all(grad.dtype == torch.float32 for grad in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, torch.zeros_like(other) if one is None else one, rtol=1e-4, atol=1e-5)


def test_experts_without_a_position_are_left_alone():
    layer = make(experts=40, active=1)
    layer(rms_norm(normal(3, 16))).sum().backward()
    reached = [e for e, expert in enumerate(layer.experts) if expert.up.port.grad is not None]
    assert reached == sorted(set(layer.route(rms_norm(normal(3, 16)))[0].flatten().tolist())) and len(reached) <= 3


def test_pressure_makes_the_load_more_even():
    """Positions that are alike, and a task that does not mind whom it asks: left alone, most go the same way."""
    spread = {}
    for balance in (0.0, 1.0):
        layer, x = make(experts=8, active=2, balance=balance), rms_norm(normal(256, 16) + 0.5)
        optimizer = TritOptimizer(layer, rate=0.02)
        for step in range(40):
            optimizer.configure(rate=0.02 * (1 - step / 40))
            (layer(x) - x).square().mean().backward()
            optimizer.step()
        load = torch.bincount(layer.route(x)[0].flatten(), minlength=8) / (256 * 2 / 8)
        spread[balance] = float(load.max() - load.min())
    assert spread[1.0] < 0.75 * spread[0.0]


def test_passes_are_weighed_by_when_they_halt():
    layer, x = make(max_iters=3), rms_norm(normal(21, 16))
    state, left, expected, passes = x, torch.ones(21, 1), torch.zeros(21, 16), torch.zeros(21, dtype=torch.int64)
    for number in (1, 2, 3):
        passes += left[:, 0] > 0
        state = state + formula(layer, rms_norm(state))
        share = left * torch.sigmoid(layer.halt(rms_norm(state))) if number < 3 else left
        share = torch.where(left - share < HALTED, left, share)
        expected, left = expected + share * (state - x), left - share
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.passes(x), passes) and layer.passes(x.view(3, 7, 16)).shape == (3, 7)
    assert make().passes(x).tolist() == [1] * 21


def test_halting_is_learned():
    """Under pressure to stop positions take fewer passes, and as few as the task wants without."""
    passes = {}
    for name, ponder, offset in (("free", 0.0, 0.0), ("pressed", 3.0, 0.0), ("task", 0.0, 1.0)):
        layer, x = make(max_iters=4, ponder=ponder), rms_norm(normal(128, 16) + offset)
        before = layer.passes(x).float().mean()
        optimizer = TritOptimizer(layer, rate=0.03)
        for step in range(40):
            optimizer.configure(rate=0.03 * (1 - step / 40))
            layer(x).square().mean().backward()  # best solved by doing as little as possible
            optimizer.step()
        passes[name] = float(layer.passes(x).float().mean())
        assert before > 2.5
    assert passes["pressed"] < passes["free"] - 1 and passes["task"] < 2


def test_it_fits_what_an_mlp_of_one_expert_cannot():
    """Four clusters, each with a map of its own."""
    torch.manual_seed(0)
    centre, maps = 4 * normal(4, 16, seed=1), normal(4, 16, 16, seed=2) / 4
    losses = {}
    for experts in (1, 8):
        layer = make(experts=experts, active=1)
        optimizer, generator = TritOptimizer(layer, rate=0.03), torch.Generator().manual_seed(0)
        for step in range(150):
            optimizer.configure(rate=0.03 * (1 - step / 150))
            kind, noise = torch.randint(4, (128,), generator=generator), torch.randn(128, 16, generator=generator)
            y = torch.einsum("nij,nj->ni", maps[kind], noise)
            loss = (layer(rms_norm(centre[kind] + noise)) - y).square().mean()
            loss.backward()
            optimizer.step()
        losses[experts] = loss.item()
    assert losses[8] < 0.95 * losses[1]


def test_roles_and_refusals():
    layer = make(max_iters=2)
    assert set(tensor_roles(layer).values()) == {"matrix", "scale"}
    assert len(list(trit_modules(layer))) == 4 * 2 + 2  # experts, router, halt
    for changes, message in (
        ({"active": 5}, "5 of 4 experts"),
        ({"active": 0}, "0 of 4"),
        ({"max_iters": 5}, "1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**changes)


def test_the_pressure_changes_no_answer():
    layer, x = make(), rms_norm(normal(9, 16))
    with torch.no_grad():
        quiet = layer(x)
    assert torch.equal(layer(x.requires_grad_()).detach(), quiet) and isinstance(layer, nn.Module)


@pytest.mark.gpu
def test_a_gpu_takes_all_experts_at_once():
    """In bfloat16 as one product, close to a CPU's; in float32 one by one."""
    torch.manual_seed(0)
    layer, x = TritMoE(64, 48, experts=5, active=2), rms_norm(normal(200, 64))
    expected = layer(x)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.02)):
        y = layer.cuda()(x.cuda().to(dtype))
        same = layer.route(x.cuda().to(dtype))[0].cpu() == layer.cpu().route(x)[0]  # rounding may change who is asked
        alike = same.all(dim=1)
        assert alike.float().mean() > 0.9
        assert (y.cpu().float() - expected)[alike].norm() < tolerance * expected[alike].norm()


@pytest.mark.gpu
def test_experts_are_recorded():
    ids = torch.randint(0, 256, (6, 4, 33), generator=torch.Generator().manual_seed(0)).cuda()
    found = []
    for graph in (False, True):
        torch.manual_seed(0)
        model = ByteLM(ModelConfig(width=128, depth=2, ctx=32, experts=4, column_scales=True), torch.bfloat16).cuda()
        optimizer = TritOptimizer(model, 0.02)
        stepper = Stepper(model, [optimizer], graph=graph)
        losses = [float(stepper.step(batch[:, :-1], batch[:, 1:])) for batch in ids]
        found.append((losses, [layer.register.clone() for _, layer in trit_modules(model)]))
    assert found[0][0] == found[1][0] and all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
