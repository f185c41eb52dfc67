"""The baselines of the benchmarks: every formula on numbers worked out by hand, audits, and each rule learning."""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tritwise.bench.counters import DQT, Bop, SignCounter
from tritwise.bench.layers import GainEmbedding, GainLinear, QATLinear, ThresholdLinear
from tritwise.bench.optimizers import Lion, SignSGD
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import FloatEmbedding, FloatLinear, TritEmbedding, TritLinear, tensor_roles
from tritwise.optim import Muon
from tritwise.registers import scale_values
from tritwise.train.audit import audit

GroupQAT = partial(QATLinear, per_group=True)
Int8QAT = partial(QATLinear, activation_bits=8)
Layer = Callable[..., nn.Module]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def set_weight(layer: nn.Module, values: list[list[float]]) -> None:
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values))  # type: ignore[operator]


def shown(layer: nn.Module, columns: int) -> Tensor:
    """The matrix that the layer multiplies by."""
    return layer(torch.eye(columns)).detach().T


# Layers


def test_one_scale_for_each_matrix():
    layer = QATLinear(2, 4, blocks=2)
    set_weight(layer, [[2.0, -0.9], [1.0, 0.1], [0.5, 0.2], [-0.1, 0.0]])  # mean |w|: 1 and .2
    assert layer.trits().tolist() == [[1, -1], [1, 0], [1, 1], [0, 0]] and layer.trits().dtype == torch.int8
    torch.testing.assert_close(shown(layer, 2), torch.tensor([[1.0, -1.0], [1.0, 0.0], [0.2, 0.2], [0.0, 0.0]]))
    layer.blocks = 1  # mean |w| .6
    assert layer.trits().tolist() == [[1, -1], [1, 0], [1, 0], [0, 0]]


def test_one_scale_for_each_group():
    layer = GroupQAT(5, 2, group=2)  # the last group is short
    set_weight(layer, [[3.0, -1.0, 0.1, 0.1, -0.7], [0.0, 0.0, 1.0, 0.2, 5.0]])
    assert layer.trits().tolist() == [[1, 0, 1, 1, -1], [0, 0, 1, 0, 1]]  # 1/2 rounds to the even 0
    values = [[2.0, 0.0, 0.1, 0.1, -0.7], [0.0, 0.0, 0.6, 0.0, 5.0]]
    torch.testing.assert_close(shown(layer, 5), torch.tensor(values))
    wide = GroupQAT(5, 2, group=256)
    set_weight(wide, [[3.0, -1.0, 0.1, 0.1, -0.8], [0.0, 0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(shown(wide, 5), torch.tensor([[1.0, -1.0, 0.0, 0.0, -1.0], [0.0] * 5]))


def test_activations_of_eight_bits_have_a_scale_for_each_token():
    layer = Int8QAT(3, 1)
    set_weight(layer, [[1.0, 1.0, 1.0]])
    x = torch.tensor([[127.0, 50.4, 0.4], [0.0, 0.0, 0.0], [-1.27, 0.503, 0.006]], requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y.detach(), torch.tensor([[177.0], [0.0], [-0.76]]))
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.ones(3, 3))  # straight through
    with pytest.raises(ValueError, match="activation_bits is 4; choose 8, or 0"):
        QATLinear(3, 1, activation_bits=4)


def test_a_threshold_keeps_every_size():
    layer = ThresholdLinear(2, 4, blocks=2, threshold=0.5)
    set_weight(layer, [[2.0, -0.5], [0.4, 1.1], [0.01, 0.0], [0.02, 0.01]])  # mean |w|: 1 and .01
    expected = [[2.0, -0.5], [0.0, 1.1], [0.01, 0.0], [0.02, 0.01]]
    torch.testing.assert_close(shown(layer, 2), torch.tensor(expected))
    assert not hasattr(layer, "trits")


@pytest.mark.parametrize("make", [QATLinear, GroupQAT, Int8QAT, ThresholdLinear])
def test_the_gradient_passes_straight_through(make: Layer):
    torch.manual_seed(0)
    layer, plain = make(6, 4), FloatLinear(6, 4)
    x, error = normal(5, 6).mul(10).round_(), normal(5, 4, seed=1)
    (layer(x) * error).sum().backward()
    (plain(x) * error).sum().backward()
    rtol, atol = (0.1, 0.4) if make is Int8QAT else (1e-5, 1e-5)  # x is rounded to a 127th of its largest
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, rtol=rtol, atol=atol)


def test_trits_times_scale_are_exact_in_the_matmul():
    torch.manual_seed(0)
    layer = QATLinear(64, 32)
    sizes = shown(layer, 64).abs().unique()
    assert sizes.numel() == 2 and torch.equal(sizes[1], layer.weight.detach().abs().mean())
    assert torch.equal(shown(layer, 64).sign().to(torch.int8), layer.trits())
    assert layer.trits().unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize(("columns", "group"), [(48, 256), (48, 16), (48, 20)])
def test_the_control_starts_as_the_ternary_layer_does(columns, group):
    torch.manual_seed(3)
    trit = TritLinear(columns, 40, group=group)
    torch.manual_seed(3)
    control = GainLinear(columns, 40, group=group)
    assert torch.equal(control.trits(), trit.trits()) and control.gain.shape == trit.exponent.shape
    torch.testing.assert_close(control.gain.detach(), scale_values(trit.exponent), rtol=0.05, atol=0)  # 1/16 octave
    x = normal(7, columns)
    torch.testing.assert_close(control(x), trit(x), rtol=0.05, atol=0.05)


def test_gains_are_all_that_the_control_trains():
    torch.manual_seed(0)
    layer, table = GainLinear(5, 3, group=2), GainEmbedding(6, 5, group=2)
    with torch.no_grad():
        layer.gain.copy_(torch.arange(9.0).view(3, 3))
        table.gain.copy_(torch.arange(18.0).view(6, 3))
    spread = layer.gain.detach()[:, [0, 0, 1, 1, 2]]
    torch.testing.assert_close(shown(layer, 5), spread * layer.trits())
    error = normal(4, 3)
    x = normal(4, 5, seed=1)
    (layer(x) * error).sum().backward()
    product = (error.T @ x) * layer.trits()
    expected = torch.stack((product[:, :2].sum(1), product[:, 2:4].sum(1), product[:, 4]), dim=1)
    torch.testing.assert_close(layer.gain.grad, expected)
    ids = torch.tensor([[5, 0], [5, 2]])
    torch.testing.assert_close(table(ids), table.trits()[ids] * table.gain.detach()[:, [0, 0, 1, 1, 2]][ids])
    assert [name for name, _ in layer.named_parameters()] == ["gain"]
    assert tensor_roles(layer) == {"table": "table", "gain": "scale"} == tensor_roles(table)


LINEARS = [QATLinear, GroupQAT, Int8QAT, ThresholdLinear, GainLinear]


@pytest.mark.parametrize("make", LINEARS)
def test_one_graph_in_bfloat16(make: Layer):
    torch.manual_seed(0)
    layer = make(24, 12, role="head", group=16, blocks=3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x, grads = normal(2, 5, 24).to(torch.bfloat16), []
    for form in (layer, compiled):
        layer.zero_grad()
        y = form(x)
        y.float().square().sum().backward()
        assert y.dtype == torch.bfloat16 and y.shape == (2, 5, 12)
        grads.append([p.grad for p in layer.parameters()])
    torch.testing.assert_close(layer(x), compiled(x))
    torch.testing.assert_close(grads[0], grads[1])
    assert all(p.dtype == torch.float32 for p in layer.parameters())


# Float optimizers


def float_steps(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], dtype=torch.float32) -> list[Tensor]:
    """Two weights after each of three steps from 1, with gradients 1 & -2, -3 & 1, 0 & 1; others have no gradient."""
    weight, idle = nn.Parameter(torch.ones(2, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer, seen = make([weight, idle]), []
    for grad in ([1.0, -2.0], [-3.0, 1.0], [0.0, 1.0]):
        weight.grad = torch.tensor(grad, dtype=dtype)
        assert optimizer.step() is None
        assert torch.equal(weight.grad, torch.tensor(grad, dtype=dtype))  # the gradient is the caller's
        seen.append(weight.detach().clone())
    assert torch.equal(idle.detach(), torch.ones_like(idle)) and idle not in optimizer.state
    assert all(value.dtype == dtype for value in optimizer.state.get(weight, {}).values())
    return seen


def check(seen: list[Tensor], expected: list[list[float]]) -> None:
    torch.testing.assert_close(torch.stack(seen), torch.tensor(expected))


def test_signsgd():
    check(float_steps(lambda p: SignSGD(p, lr=0.1)), [[0.9, 1.1], [1.0, 1.0], [1.0, 0.9]])
    # momentum .5: means .5 & -1, then -1.25 & 0, then -.625 & .5
    check(float_steps(lambda p: SignSGD(p, lr=0.1, momentum=0.5)), [[0.9, 1.1], [1.0, 1.1], [1.1, 1.0]])
    check(float_steps(lambda p: SignSGD(p, lr=0.1, weight_decay=1.0))[:1], [[0.8, 1.0]])


def test_lion():
    # interpolated: .25 & -.5 | -.6 & -.05 | -.33 & .16; means: .2 & -.4 | -.44 & -.12
    check(float_steps(lambda p: Lion(p, lr=0.1, betas=(0.75, 0.8))), [[0.9, 1.1], [1.0, 1.2], [1.1, 1.1]])
    check(float_steps(lambda p: Lion(p, lr=0.1, weight_decay=0.5))[:1], [[0.85, 1.05]])
    weight = nn.Parameter(torch.zeros(1))
    weight.grad = torch.ones(1)
    optimizer = Lion([weight], betas=(0.5, 0.8))
    optimizer.step()
    torch.testing.assert_close(optimizer.state[weight]["momentum"], torch.tensor([0.2]))


def test_bfloat16_rounds_small_steps_away():
    assert float_steps(lambda p: SignSGD(p, lr=1e-3), torch.bfloat16)[-1].tolist() == [1, 1]
    assert float_steps(lambda p: Lion(p, lr=1e-3), torch.bfloat16)[-1].tolist() == [1, 1]
    assert float_steps(lambda p: SignSGD(p, lr=1e-2), torch.bfloat16)[0].tolist() != [1, 1]


def test_a_step_runs_its_closure():
    weight = nn.Parameter(torch.ones(3))

    def closure() -> float:
        loss = weight.sum()
        loss.backward()
        return loss.item()

    assert SignSGD([weight], lr=0.5).step(closure) == 3 and weight.tolist() == [0.5] * 3


# Muon: matrices of one shape go through one product


def muon_steps(weights: list[Tensor], **settings: Any) -> list[Tensor]:
    params = [nn.Parameter(w.clone()) for w in weights]
    optimizer = Muon(params, lr=0.1, **settings)
    for step in range(3):
        for index, p in enumerate(params):
            p.grad = normal(*p.shape, seed=10 * step + index)
        optimizer.step()
    return [p.detach() for p in params]


def test_stacked_matrices_move_as_alone():
    shapes = [(4, 12), (8, 8), (4, 12), (12, 4), (8, 8), (4, 12)]
    weights = [normal(*shape, seed=i) for i, shape in enumerate(shapes)]
    together = muon_steps(weights, weight_decay=0.1)
    for index, weight in enumerate(weights):
        alone = nn.Parameter(weight.clone())
        optimizer = Muon([alone], lr=0.1, weight_decay=0.1)
        for step in range(3):
            alone.grad = normal(*alone.shape, seed=10 * step + index)
            optimizer.step()
        torch.testing.assert_close(together[index], alone.detach(), rtol=0, atol=1e-6)


def test_blocks_are_matrices_of_their_own():
    weight, grad = normal(12, 4), normal(12, 4, seed=1)
    stacked, parts = nn.Parameter(weight.clone()), [nn.Parameter(part.clone()) for part in weight.chunk(3)]
    stacked.grad = grad
    for part, piece in zip(parts, grad.chunk(3), strict=True):
        part.grad = piece.clone()
    Muon([{"params": [stacked], "blocks": 3}]).step()
    Muon(parts).step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in parts]), rtol=0, atol=1e-6)
    whole = nn.Parameter(weight.clone())
    whole.grad = grad
    Muon([whole]).step()
    assert (whole - stacked).abs().max() > 1e-3
    with pytest.raises(ValueError, match="12 rows do not divide into 5 blocks"):
        Muon([{"params": [nn.Parameter(weight)], "blocks": 5}])


# Rules for trits


def trit_layer(trits: list[int]) -> TritLinear:
    layer = TritLinear(len(trits), 1)
    layer.register.copy_(torch.tensor([trits], dtype=torch.int8) * 81 + 7)  # evidence, which these rules cut off
    return layer


def feed(layer: TritLinear, optimizer: torch.optim.Optimizer, grad: list[float]) -> list[int]:
    """One step with this gradient of the weights; the trits after it."""
    assert layer.consumer is not None
    layer.consumer(layer, torch.tensor([grad]))
    optimizer.step()
    return layer.trits()[0].tolist()


def test_votes_flip_a_trit_and_are_thrown_away():
    layer = trit_layer([0, 0, 1, -1, 1])
    optimizer = SignCounter([layer], threshold=2)
    assert layer.register.tolist() == [[0, 0, 81, -81, 81]]
    counter = optimizer.state[layer.register]["counter"]
    assert counter.dtype == torch.int8
    assert feed(layer, optimizer, [0.1, -9.0, -1.0, -1.0, 0.0]) == [0, 0, 1, -1, 1]
    assert counter.tolist() == [[-1, 1, 1, 1, 0]]
    # the third asks for more than +1: it stays, and its votes are gone; the fourth takes one step, not two
    assert feed(layer, optimizer, [3.0, 1.0, -2.0, -1e-9, 1.0]) == [-1, 0, 1, 0, 1]
    assert counter.tolist() == [[0, 0, 0, 0, -1]]
    assert feed(layer, optimizer, [3.0, 1.0, 1.0, -1.0, 1.0]) == [-1, 0, 1, 0, 0]
    assert layer.register.tolist() == [[-81, 0, 81, 0, 0]]


def test_the_gradient_reaches_the_votes_from_backward():
    torch.manual_seed(0)
    layer, x = TritLinear(6, 4), normal(5, 6)
    optimizer = SignCounter(layer, threshold=1)
    before, error = layer.trits(), normal(5, 4, seed=1)
    (layer(x) * error).sum().backward()
    assert layer.port is not None and layer.port.grad is None
    optimizer.step()
    expected = (before - (error.T @ x).sign()).clamp(-1, 1)
    assert torch.equal(layer.trits().float(), expected)


def test_bop_flips_where_the_mean_is_large_for_its_layer():
    layer = trit_layer([0, 0, 0, 1, -1])
    optimizer = Bop([layer], rate=0.5, threshold=0.3)
    # RMS 2: means are 2, -.5, .65, … and must exceed .6
    grad = [4.0, -1.0, 1.3, -math.sqrt(20 - 16 - 1 - 1.69 - 1), -1.0]
    assert feed(layer, optimizer, grad) == [-1, 0, -1, 1, -1]
    mean = optimizer.state[layer.register]["momentum"]
    torch.testing.assert_close(mean, torch.tensor([grad]) / 2)
    assert mean.dtype == torch.float32
    # RMS 2.26: means are 1.5, 1.5, .325, -.139, 1.5 and must exceed .68; the first is at its end
    assert feed(layer, optimizer, [1.0, 3.5, 0.0, 0.0, 3.5]) == [-1, -1, -1, 1, -1]
    tiny = trit_layer([0, 0, 0, 1, -1])
    assert feed(tiny, Bop([tiny], rate=0.5, threshold=0.3), [1e-6 * g for g in grad]) == [-1, 0, -1, 1, -1]


def test_bop_moves_one_step_at_a_time():
    layer = trit_layer([1])
    optimizer = Bop([layer], rate=1.0, threshold=0.9)
    assert [feed(layer, optimizer, [g]) for g in (1.0, 1.0, 1.0, -1.0)] == [[0], [-1], [-1], [0]]


def test_dqt_moves_with_the_probability_of_its_update():
    layer = TritLinear(500, 400)
    layer.register.fill_(5)
    optimizer = DQT([layer], rate=0.25, betas=(0.9, 0.95))
    grad = torch.full((400, 500), 1e-3)
    grad[:200] *= -4.0
    grad[:, ::2] *= 3.0
    assert layer.consumer is not None
    layer.consumer(layer, grad)
    optimizer.step()  # the first update of Adam is the sign
    trits = layer.trits().float()
    assert torch.equal(trits.abs(), -trits * grad.sign())
    assert abs(trits.abs().mean() - 0.25) < 0.005  # 5 standard deviations
    assert set(layer.register.unique().tolist()) == {-81, 0, 81}
    optimizer.step()  # without a gradient nothing moves
    assert torch.equal(layer.trits().float(), trits)


def test_dqt_follows_adam():
    """A step of 1 is certain; at half of it, the mean of many trits is half of what AdamW moves."""
    grads = [[1.0, -0.5, 2.0, 0.25], [1.0, 1.0, -2.0, -4.0]]
    layer = trit_layer([0, 0, 0, 0])
    optimizer = DQT([layer], rate=1.0, betas=(0.5, 0.5), eps=0.0)
    assert feed(layer, optimizer, grads[0]) == [-1, 1, -1, -1]
    adam = nn.Parameter(torch.zeros(4))
    twin = torch.optim.AdamW([adam], lr=1.0, betas=(0.5, 0.5), eps=0.0, weight_decay=0.0)
    wide = TritLinear(4, 2000)
    optimizer = DQT([wide], rate=0.5, betas=(0.5, 0.5), eps=0.0)
    for grad in grads:
        adam.grad, before = torch.tensor(grad), adam.detach().clone()
        twin.step()
        wide.register.zero_()
        assert wide.consumer is not None
        wide.consumer(wide, torch.tensor(grad).expand(2000, 4))
        optimizer.step()
    update = before - adam.detach()
    assert update.abs().min() < 0.8 < update.abs().max()
    torch.testing.assert_close(-wide.trits().float().mean(dim=0), 0.5 * update, rtol=0, atol=0.06)  # 5 deviations


def test_settings_that_cannot_work():
    layer = TritLinear(4, 4)
    for make, message in (
        (lambda: SignCounter([layer], threshold=128), "threshold is 128; an int8 counter reaches 1 … 127"),
        (lambda: SignCounter([layer], threshold=0), "threshold is 0"),
        (lambda: Bop([layer], rate=1.5), "rate is 1.5"),
        (lambda: Bop([layer], threshold=-1.0), "threshold is -1.0"),
        (lambda: DQT([layer], rate=math.nan), "rate is nan"),
        (lambda: DQT([]), "there is no ternary layer to train"),
        (lambda: DQT(FloatLinear(3, 3)), "there is no ternary layer to train"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_groups_have_their_own_settings():
    one, two = trit_layer([0, 0]), trit_layer([0, 0])
    optimizer = SignCounter([{"params": [one], "threshold": 1}, {"params": [two]}], threshold=2)
    assert [g["initial_lr"] for g in optimizer.param_groups] == [1.0, 1.0]
    assert one.consumer is not None
    one.consumer(one, torch.tensor([[1.0, -1.0]]))
    assert feed(two, optimizer, [1.0, -1.0]) == [0, 0] and one.trits().tolist() == [[-1, 1]]


# Whole models

TEXT = torch.tensor(list(b"the quick brown fox jumps over the lazy dog; " * 8))
TERNARY = (TritLinear, TritEmbedding)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-2, fused=True)


def model_with(linear: Layer, embedding: Layer) -> ByteLM:
    torch.manual_seed(0)
    shape = ModelConfig(width=32, depth=1, ctx=32)
    return ByteLM(shape, linear=linear, embedding=embedding)  # type: ignore[arg-type]


def losses(model: ByteLM, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> list[float]:
    found = []
    for step in range(start, start + steps):
        at = torch.randint(len(TEXT) - 33, (8,), generator=torch.Generator().manual_seed(step))
        batch = torch.stack([TEXT[a : a + 33] for a in at])
        optimizer.zero_grad()
        loss = model.loss(batch[:, :-1], batch[:, 1:])
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    ("linear", "embedding", "make", "target"),
    [
        (*TERNARY, lambda m: SignCounter(m, threshold=3), 1.2),
        (*TERNARY, lambda m: Bop(m, rate=0.01, threshold=0.1), 1.2),
        (*TERNARY, lambda m: DQT(m, rate=0.03), 1.2),
        (QATLinear, FloatEmbedding, adamw, 0.5),
        (Int8QAT, FloatEmbedding, adamw, 0.5),
        (GroupQAT, FloatEmbedding, adamw, 0.5),
        (ThresholdLinear, FloatEmbedding, adamw, 0.3),
        (GainLinear, GainEmbedding, adamw, 3.0),
        (QATLinear, FloatEmbedding, lambda m: SignSGD(m.parameters(), 3e-3), 1.6),
        (FloatLinear, FloatEmbedding, lambda m: SignSGD(m.parameters(), 3e-3, 0.9), 0.5),
        (FloatLinear, FloatEmbedding, lambda m: Lion(m.parameters(), 3e-3), 0.6),
    ],
    ids=["counter", "bop", "dqt", "qat", "qat-int8", "qat-group", "threshold", "gains", "sign", "signum", "lion"],
)
def test_it_learns(linear, embedding, make, target):
    model = model_with(linear, embedding)
    course = losses(model, make(model), 60)
    assert course[0] > 5 and sum(course[-5:]) / 5 < target  # guessing is 5.5; the text repeats


@pytest.mark.parametrize("make", [SignCounter, Bop, partial(DQT, seed=5)], ids=["counter", "bop", "dqt"])
def test_a_loaded_state_goes_on_alike(make):
    model = model_with(*TERNARY)
    optimizer = make(model)
    losses(model, optimizer, 6)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    straight = losses(model, optimizer, 6, start=6)
    resumed = model_with(*TERNARY)
    resumed.load_state_dict(weights)
    second = make(resumed)
    second.load_state_dict(state)
    assert losses(resumed, second, 6, start=6) == straight
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))
    assert straight[-1] != straight[0]


@pytest.mark.parametrize(
    ("make", "bytes_each", "floats_each"),
    [(SignCounter, 2, 0), (Bop, 5, 1), (DQT, 9, 2)],
    ids=["counter", "bop", "dqt"],
)
def test_the_audit_counts_the_state_of_rules(make, bytes_each, floats_each):
    model = model_with(*TERNARY)
    found = audit(model, [make(model)])  # before the first step
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith("register"))
    scales = sum(p.numel() for name, p in model.named_parameters() if name.endswith("exponent"))
    assert found["weights"] == weights
    assert found["float_trainable"] == floats_each * weights
    assert found["float_state_bytes"] == 4 * floats_each * weights
    assert found["state_bytes"] == bytes_each * weights + scales


def test_the_audit_counts_latent_floats_and_gains():
    model = model_with(QATLinear, FloatEmbedding)
    optimizer = Lion(model.parameters())
    losses(model, optimizer, 1)
    found = audit(model, [optimizer])
    assert found["weights"] == sum(p.numel() for p in model.parameters())
    assert found["state_bytes_per_weight"] == 8 and found["float_trainable"] == 2 * found["weights"]
    control = model_with(GainLinear, GainEmbedding)
    found, gains = audit(control), sum(p.numel() for p in control.parameters())
    assert (found["weights"], found["float_trainable"], found["state_bytes"]) == (0, gains, 4 * gains)
    table = sum(row["bytes"] for row in found["tensors"] if row["role"] == "table" and row["dtype"] == "int8")
    assert table == 2 * 256 * 32 + 12 * 32 * 32
