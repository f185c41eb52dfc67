"""TritOptimizer: which way and how far registers move, groups by role, schedules, sparse rows, refused gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tritwise import ops
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritEmbedding, TritLinear, TritModule, trit_modules
from tritwise.optim import ROLE_RATES, TritOptimizer, rate_factor
from tritwise.registers import LEAD, leading_trit


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 16, outputs: int = 8, seed: int = 0, **options) -> TritLinear:
    torch.manual_seed(seed)
    return TritLinear(inputs, outputs, **options)


def give(layer: TritModule, grad: Tensor) -> None:
    """Let backward hand exactly `grad` to the layer's port."""
    assert layer.port is not None
    (layer.port * grad).sum().backward()


def snapshot(*layers: TritModule) -> list[Tensor]:
    return [tensor.clone() for layer in layers for tensor in (layer.register, layer.exponent)]


def same(before: list[Tensor], *layers: TritModule) -> bool:
    return all(torch.equal(a, b) for a, b in zip(before, snapshot(*layers), strict=True))


def value(optimizer: TritOptimizer, layer: TritModule) -> Tensor:
    """The momentum that the integers stand for, float64."""
    state = optimizer.state[layer.register]
    return state["momentum"].double() * 2.0 ** state["row_exponent"].double()


class Three(nn.Module):
    """One layer of each role."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = TritEmbedding(12, 16)
        self.body = TritLinear(16, 16)
        self.head = TritLinear(16, 12, role="head")

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)))


# --- how registers move ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direction", ["newton_schulz", "balanced", "row_column", "rms", "sign"])
@pytest.mark.parametrize("rate", [0.01, 0.05])
def test_a_step_has_the_rms_of_the_rate_and_goes_against_the_gradient(direction, rate):
    layer, grad = linear(64, 48), normal(48, 64)
    with torch.no_grad():
        layer.register.zero_()  # far from the limits: nothing is clamped
    optimizer, steps = TritOptimizer(layer, rate=rate, direction=direction, momentum=0.9), 7
    for _ in range(steps):
        give(layer, grad)
        optimizer.step()
    moved = layer.register.double() / steps
    # Moves of a constant direction have an RMS of rate * 81 units; rounding adds a variance of 1/4 of a unit at most.
    assert rate * LEAD * 0.98 < moved.square().mean().sqrt() < math.hypot(rate * LEAD * 1.02, 0.5 / steps**0.5)
    assert (moved * grad.double()).sum() < -0.7 * moved.norm() * grad.norm()


def test_the_mean_of_many_seeds_is_the_exact_step():
    grad, total, rate, trials = normal(12, 20), torch.zeros(12, 20).double(), 0.02, 300
    for seed in range(trials):
        layer = linear(20, 12)
        before = layer.register.clone()
        with torch.no_grad():
            layer.register.clamp_(-100, 100)
            before.clamp_(-100, 100)
        optimizer = TritOptimizer(layer, rate=rate, direction="rms", seed=seed)
        give(layer, grad)
        optimizer.step()
        total += (layer.register - before).double()
    exact = -rate * LEAD * grad.double() / grad.double().square().mean().sqrt()
    # Rounding has a deviation of at most 1/2; int8 momentum adds a little.
    assert (total / trials - exact).abs().max() < 4.5 * 0.55 / math.sqrt(trials)


@pytest.mark.parametrize(
    ("direction", "steps", "blocks"),
    [
        ("newton_schulz", 3, 1),
        ("newton_schulz", 1, 1),
        ("newton_schulz", 3, 3),
        ("balanced", 3, 1),
        ("row_column", 3, 3),
        ("sign", 3, 1),
    ],
)
def test_a_step_is_the_direction_of_the_momentum_rounded(direction, steps, blocks):
    layer, grad = linear(20, 12, blocks=blocks), normal(12, 20) * torch.logspace(0, 2, 12)[:, None]
    with torch.no_grad():
        layer.register.zero_()
    optimizer = TritOptimizer(layer, rate=0.1, direction=direction, steps=steps)
    give(layer, grad)
    optimizer.step()
    state = optimizer.state[layer.register]
    u = ops.direction(state["momentum"], state["row_exponent"], direction, steps, blocks)
    assert ((layer.register + 0.1 * LEAD * u).abs() < 1.001).all()
    others = ((2, blocks), (steps, 4)) if direction == "newton_schulz" else ()
    for other in others:  # the bound is tight enough to tell settings apart
        u = ops.direction(state["momentum"], state["row_exponent"], direction, *other)
        assert ((layer.register + 0.1 * LEAD * u).abs() > 1.5).any()


@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("micros", [1, 3])
def test_nesterov_looks_at_the_newest_gradient_once_more(micros, interval):
    """The direction is that of momentum * M + G, M being what the same optimizer without it has; it leaves no state."""
    layers, grads = [linear(64, 48), linear(64, 48)], [normal(48, 64, seed=seed) for seed in range(4)]
    made = [
        TritOptimizer(layer, rate=0.1, direction="rms", scale_rate=0.0, interval=interval, nesterov=nesterov)
        for layer, nesterov in zip(layers, (False, True), strict=True)
    ]
    for grad in grads:
        before = layers[1].register.clone()
        for optimizer, layer in zip(made, layers, strict=True):
            for _ in range(micros):
                give(layer, grad / micros)
            optimizer.step()
        wanted = 0.9 * value(made[0], layers[0]) + grad.double()
        moved = (layers[1].register - before).double()
        if optimizer.flips_by_layer:
            exact = -interval * 0.1 * LEAD * wanted / wanted.square().mean().sqrt()
            free = before.abs() < 60
            assert (moved - exact)[free].abs().max() < 1.6 * interval  # rounded, of int8 momenta
            plain = -interval * 0.1 * LEAD * (m := value(made[0], layers[0])) / m.square().mean().sqrt()
            assert grad is grads[0] or (moved - plain)[free].abs().max() > 3
    one, other = (optimizer.state[layer.register] for optimizer, layer in zip(made, layers, strict=True))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert not made[1]._lookahead


@pytest.mark.parametrize("direction", ["newton_schulz", "balanced", "row_column", "rms", "sign"])
def test_steps_lower_the_loss(direction):
    layer, x = linear(24, 24), normal(64, 24)
    target = x @ normal(24, 24, seed=1).T / 24**0.5
    optimizer = TritOptimizer(layer, rate=0.03, direction=direction)

    def loss() -> Tensor:
        return (layer(x) - target).square().mean()

    first = loss().item()
    for _ in range(40):
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.6 * first


def test_a_ternary_teacher_is_found_again():
    """Linear regression on the outputs of another ternary layer: the student recovers its trits."""
    teacher, student = linear(32, 24, seed=1), linear(32, 24, seed=2)
    with torch.no_grad():
        student.exponent.copy_(teacher.exponent)
    optimizer, steps = TritOptimizer(student, rate=0.05, momentum=0.9), 250
    first = last = 0.0
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * rate_factor(step, steps)
        x = normal(64, 32, seed=step)
        loss = (student(x) - teacher(x).detach()).square().mean()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    found = (leading_trit(student.register) == leading_trit(teacher.register)).double().mean()
    assert found >= 0.95 and last < first / 10


def test_at_rate_zero_nothing_moves_but_momentum_gathers():
    layer = linear()
    optimizer, before = TritOptimizer(layer, rate=0.0, scale_rate=0.5), snapshot(layer)
    for step in range(3):
        give(layer, normal(8, 16, seed=step))
        optimizer.step()
    assert same(before, layer) and optimizer.flips == 0
    exact = sum(0.9 ** (2 - step) * normal(8, 16, seed=step).double() for step in range(3))
    assert (value(optimizer, layer) - exact).norm() < 0.02 * exact.norm()


def test_registers_stay_within_their_range():
    layer, grad = linear(), normal(8, 16).sign()
    optimizer = TritOptimizer(layer, rate=2.0, direction="sign")
    for _ in range(3):
        give(layer, grad)
        optimizer.step()
    assert torch.equal(layer.register.float(), -121 * grad)


def test_flips_are_the_leading_trits_that_changed():
    model = Three()
    optimizer, layers = TritOptimizer(model, rate=0.2), [layer for _, layer in trit_modules(model)]
    trits = [leading_trit(layer.register) for layer in layers]
    model(torch.arange(12)).square().mean().backward()
    optimizer.step()
    changed = {m: int((leading_trit(m.register) != t).sum()) for m, t in zip(layers, trits, strict=True)}
    assert {layer: int(flips) for layer, flips in optimizer.flips_by_layer.items()} == changed
    assert optimizer.flips == sum(changed.values()) > 0
    optimizer.step()  # without a gradient nothing flips, and nothing is left of the step before
    assert optimizer.flips == 0 and optimizer.flips_by_layer == {}


def test_a_layer_without_a_gradient_does_not_move():
    model = Three()
    optimizer, before = TritOptimizer(model, rate=0.2, scale_rate=0.5), snapshot(model.head)
    moved = snapshot(model.embed, model.body)
    model.body(model.embed(torch.arange(12))).square().mean().backward()
    optimizer.step()
    assert same(before, model.head) and model.head.register not in optimizer.state
    assert not same(moved, model.embed, model.body)


def test_a_frozen_layer_does_not_move():
    model = Three()
    model.body.trainable(False)
    optimizer, before = TritOptimizer(model, rate=0.2), snapshot(model.body)
    model(torch.arange(12)).square().mean().backward()
    optimizer.step()
    assert same(before, model.body) and set(optimizer.flips_by_layer) == {model.embed, model.head}


def test_the_gradient_is_consumed_as_soon_as_backward_has_made_it():
    model = Three()
    TritOptimizer(model)
    waiting: list[int] = []  # how many ports hold a gradient at each hand-over
    for _, layer in trit_modules(model):
        consume = layer.consumer
        assert consume is not None

        def count(layer, grad, consume=consume):
            consume(layer, grad)
            waiting.append(sum(m.port.grad is not None for _, m in trit_modules(model) if m.port is not None))

        layer.consumer = count
    model(torch.arange(12)).square().mean().backward()
    assert waiting == [0, 0, 0]


def test_the_same_seed_gives_the_same_registers():
    def train(seed: int) -> list[Tensor]:
        model = Three()
        optimizer = TritOptimizer(model, rate=0.05, seed=seed)
        for _ in range(3):
            model(torch.arange(12)).square().mean().backward()
            optimizer.step()
        return [layer.register.detach().clone() for _, layer in trit_modules(model)]

    one, again, other = train(1), train(1), train(2)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_momentum_draws_bits_of_its_own_seed_step_and_layer():
    found = []
    for seed in (0, 1):
        layers = [linear(), linear()]
        optimizer = TritOptimizer(layers, rate=0.0, momentum=0.0, seed=seed)
        for _ in range(2):
            for layer in layers:
                give(layer, normal(8, 16))
                found.append(value(optimizer, layer))
            optimizer.step()
    assert all(not torch.equal(found[a], found[b]) for a in range(8) for b in range(a))


def test_every_layer_and_every_step_draws_its_own_bits():
    """Two equal layers with equal gradients part ways, and so do two equal steps."""
    one, two = linear(64, 64), linear(64, 64)
    optimizer = TritOptimizer([one, two], rate=0.005, direction="sign")
    moves = []
    for _ in range(2):
        before = snapshot(one, two)[::2]
        for layer in (one, two):
            give(layer, torch.ones(64, 64))
        optimizer.step()
        moves += [layer.register - old for layer, old in zip((one, two), before, strict=True)]
    assert all(not torch.equal(moves[a], moves[b]) for a in range(4) for b in range(a))


def test_step_returns_the_loss_of_its_closure():
    layer, x = linear(), normal(4, 16)
    optimizer, before = TritOptimizer(layer, rate=0.1), snapshot(layer)

    def closure() -> float:
        loss = layer(x).square().mean()
        loss.backward()
        return loss.item()

    expected = layer(x).square().mean().item()
    assert optimizer.step(closure) == expected and not same(before, layer)
    assert optimizer.step() is None


# --- interval -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [1, 2, 3])
def test_layers_move_in_turns(interval):
    layers = [linear(seed=number) for number in range(4)]
    optimizer = TritOptimizer(layers, rate=0.1, interval=interval)
    moved_at: list[list[int]] = [[] for _ in layers]
    for step in range(6):
        before = [snapshot(layer) for layer in layers]
        for number, layer in enumerate(layers):
            give(layer, normal(8, 16, seed=10 * step + number))
        optimizer.step()
        for number, layer in enumerate(layers):
            if not same(before[number], layer):
                moved_at[number].append(step)
    assert moved_at == [[s for s in range(6) if (s + number) % interval == 0] for number in range(4)]


def test_an_interval_keeps_the_speed():
    grad, moved = normal(48, 64), []
    for interval in (1, 4):
        layer = linear(64, 48)
        with torch.no_grad():
            layer.register.zero_()
        optimizer = TritOptimizer(layer, rate=0.02, interval=interval, direction="rms")
        for _ in range(16):
            give(layer, grad)
            optimizer.step()
        moved.append(layer.register.double())
    assert (moved[0] - moved[1]).norm() < 0.1 * moved[0].norm()


# --- scales ---------------------------------------------------------------------------------------------------------


def test_scales_move_towards_a_lower_loss():
    """Outputs twice too large: exponents come down by eight steps, one octave."""
    student = linear(32, 16, group=8)
    x = normal(256, 32)
    with torch.no_grad():
        target = student(x) / 2
        first = (student(x) - target).square().mean()
    before = student.exponent.clone()
    optimizer = TritOptimizer(student, rate=1e-6, scale_rate=0.1, momentum=0.9)
    for step in range(60):
        optimizer.param_groups[0]["scale_rate"] = 0.1 * rate_factor(step, 60, decay=0.8)
        (student(x) - target).square().mean().backward()
        optimizer.step()
    fallen = (before - student.exponent).double()
    assert fallen.median() == 8 and (student(x) - target).square().mean() < first / 20


def test_a_scale_step_is_the_scale_gradient_over_its_rms_rounded():
    """One weight of 1 to a scale: the scale gradients are the weight gradients, and each has its own random bits."""
    layer, grad = linear(200, 1, group=1), normal(1, 200)
    with torch.no_grad():
        layer.register.fill_(81)
        layer.exponent.zero_()
    optimizer = TritOptimizer(layer, rate=0.1, scale_rate=1.0)
    give(layer, grad)
    optimizer.step()
    u = grad / grad.square().mean().sqrt()
    assert ((layer.exponent + 8 * u).abs() < 1.5).all()  # rounding the momentum and then the step
    state = optimizer.state[layer.register]
    assert torch.equal(state["row_exponent"], state["scale_row_exponent"])
    assert not torch.equal(state["momentum"], state["scale_momentum"])


def test_scales_stay_without_a_rate_of_their_own():
    layer = linear()
    optimizer, before = TritOptimizer(layer, rate=0.1, scale_rate=0.0), layer.exponent.clone()
    give(layer, normal(8, 16))
    optimizer.step()
    assert torch.equal(layer.exponent, before)
    assert set(optimizer.state[layer.register]) == {"momentum", "row_exponent"}


@pytest.mark.parametrize("sign", [1, -1])
def test_scale_exponents_stay_within_their_limits(sign):
    layer = linear(16, 8, group=4)
    with torch.no_grad():
        layer.register.fill_(81)
    optimizer = TritOptimizer(layer, rate=1e-6, scale_rate=20.0)
    for _ in range(3):
        give(layer, torch.full((8, 16), -float(sign)))
        optimizer.step()
    assert (layer.exponent == sign * 127).all()


def test_scales_follow_the_schedule_of_the_rate():
    moves = []
    for factor in (1.0, 0.5, 0.0):
        layer = linear(16, 64, group=4)
        before = layer.exponent.clone()
        optimizer = TritOptimizer(layer, rate=0.01, scale_rate=1.0)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _, factor=factor: factor)
        give(layer, normal(64, 16))
        optimizer.step()
        scheduler.step()
        moves.append((layer.exponent - before).double().square().mean().sqrt().item())
    assert moves[0] == pytest.approx(8, rel=0.05) and moves[1] == pytest.approx(4, rel=0.05) and moves[2] == 0


# --- groups ---------------------------------------------------------------------------------------------------------


def test_groups_are_made_from_the_declared_roles():
    model = Three()
    optimizer = TritOptimizer(model, rate=0.03, roles={"embedding": {"rate": 0.01}, "head": {"interval": 2}})
    assert [group["role"] for group in optimizer.param_groups] == ["embedding", "matrix", "head"]
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.03, ROLE_RATES["head"] * 0.03]
    assert [group["direction"] for group in optimizer.param_groups] == ["row_column", "balanced", "row_column"]
    assert [group["interval"] for group in optimizer.param_groups] == [1, 1, 2]
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 1, 1]
    assert optimizer.param_groups[1]["params"][0] is model.body.register


def test_every_layer_of_a_byte_lm_is_in_one_group():
    model = ByteLM(ModelConfig(width=32, depth=2, ctx=8, ngrams=2, ngram_rows=16))
    optimizer = TritOptimizer(model)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(trit_modules(model)))
    assert [group["role"] for group in optimizer.param_groups] == ["embedding", "matrix", "head"]


def test_a_role_may_have_another_direction():
    optimizer = TritOptimizer(Three(), direction="sign", roles={"head": {"direction": "rms"}})
    assert [group["direction"] for group in optimizer.param_groups] == ["row_column", "sign", "rms"]


def test_groups_of_ones_own():
    model = Three()
    groups = [{"params": [model.body], "rate": 0.2, "momentum": 0.5}, {"params": iter([model.head]), "lr": 0.0}]
    optimizer, before = TritOptimizer(groups, rate=0.1), snapshot(model.head, model.embed)
    assert [(g["lr"], g["momentum"], g["direction"]) for g in optimizer.param_groups] == [
        (0.2, 0.5, "balanced"),
        (0.0, 0.9, "balanced"),
    ]
    moved = snapshot(model.body)
    model(torch.arange(12)).square().mean().backward()
    optimizer.step()
    assert same(before, model.head, model.embed) and not same(moved, model.body)


def test_a_group_may_be_added_later():
    one, two = linear(seed=1), linear(seed=2)
    optimizer = TritOptimizer([one], rate=0.1)
    optimizer.add_param_group({"params": [two], "rate": 0.3})
    before = snapshot(two)
    give(two, normal(8, 16))
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.3] and not same(before, two)


def test_the_newest_optimizer_gets_the_gradients():
    layer = linear()
    old, new = TritOptimizer(layer, rate=0.1), TritOptimizer(layer, rate=0.1)
    give(layer, normal(8, 16))
    before = snapshot(layer)
    old.step()
    assert same(before, layer) and not old.state
    new.step()
    assert not same(before, layer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": -0.1}, "rate is -0.1; it must be 0 or more and finite"),
        ({"rate": math.nan}, "rate is nan; it must be 0 or more and finite"),
        ({"rate": math.inf}, "rate is inf; it must be 0 or more and finite"),
        ({"scale_rate": -1.0}, "scale_rate is -1.0; it must be 0 or more and finite"),
        ({"scale_rate": math.nan}, "scale_rate is nan; it must be 0 or more and finite"),
        ({"momentum": 1.0}, "momentum is 1.0; it must be at least 0 and below 1"),
        ({"momentum": -0.5}, "momentum is -0.5; it must be at least 0 and below 1"),
        ({"momentum": math.nan}, "momentum is nan; it must be at least 0 and below 1"),
        ({"nesterov": True, "compact": True}, "nesterov needs a momentum of its own byte; leave compact or nesterov"),
        ({"row_memory": 1.0}, "row_memory is 1.0; it must be at least 0 and below 1"),
        (
            {"direction": "adam"},
            "there is no direction 'adam'; choose one of newton_schulz, balanced, row_column, rms, sign",
        ),
        ({"steps": 0}, "steps and interval must be at least 1"),
        ({"interval": 0}, "steps and interval must be at least 1"),
        ({"roles": {"vector": {}}}, "no layer has the role 'vector'; the model has embedding, matrix, head"),
        ({"roles": {"head": {"rate": -1.0}}}, "rate is -1.0; it must be 0 or more and finite"),
        ({"roles": {"head": {"direction": "up"}}}, "there is no direction 'up'; choose one of newton_schulz"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError) as caught:
        TritOptimizer(Three(), **options)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("layers", [[], [nn.Linear(3, 3)], nn.Linear(3, 3), [{"params": [nn.Linear(3, 3)]}]])
def test_only_ternary_layers_are_taken(layers):
    empty = "there is no ternary layer to train; build the model with weights='trit'"
    wrong = "TritOptimizer trains ternary layers, not Linear; give it to AdamW"
    with pytest.raises(ValueError) as caught:
        TritOptimizer(layers)
    assert str(caught.value) == (empty if not layers or isinstance(layers, nn.Module) else wrong)


def test_a_layer_belongs_to_one_group():
    layer = linear()
    optimizer = TritOptimizer([layer])
    consumer = layer.consumer
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [layer]})
    assert layer.consumer is consumer  # and the refused group left no trace


# --- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "factors"),
    [
        (lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: 1 / (n + 1)), [1, 1 / 2, 1 / 3, 1 / 4]),
        (
            lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 4),
            [0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(4)],
        ),
    ],
)
def test_torchs_schedulers_drive_the_rate(make, factors):
    layer, rate = linear(64, 64), 0.1
    optimizer = TritOptimizer(layer, rate=rate, direction="sign")
    scheduler, found = make(optimizer), []
    for step in range(4):
        with torch.no_grad():
            layer.register.zero_()
        give(layer, normal(64, 64, seed=step))
        optimizer.step()
        scheduler.step()
        found.append(layer.register.double().abs().mean().item() / LEAD)
    # A direction of +-1 moves by a whole number of units or one more, whose mean is the rate.
    assert found == pytest.approx([rate * factor for factor in factors], rel=0.02)


@given(st.integers(1, 500), st.data())
@settings(max_examples=100, deadline=None)
def test_the_factor_is_within_its_bounds(steps, data):
    step = data.draw(st.integers(0, steps - 1))
    warmup, decay = data.draw(st.integers(0, 600)), data.draw(st.floats(0, 1))
    factor = rate_factor(step, steps, warmup, decay)
    assert 0 < factor <= 1 and factor == rate_factor(step, steps, warmup, decay)


@given(st.integers(2, 300), st.integers(0, 100), st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_the_factor_rises_then_falls(steps, warmup, decay):
    course = [rate_factor(step, steps, warmup, decay) for step in range(steps)]
    top = course.index(max(course))
    assert course[: top + 1] == sorted(course[: top + 1]) and course[top:] == sorted(course[top:], reverse=True)


def test_courses_by_hand():
    assert [rate_factor(s, 4, 0, 0.0) for s in range(4)] == [1, 1, 1, 1]
    assert [rate_factor(s, 8, 0, 0.5) for s in range(8)] == [1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [rate_factor(s, 4, 3, 0.0) for s in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [rate_factor(s, 4, 0, 1.0) for s in range(4)] == [1, 0.75, 0.5, 0.25]
    assert [rate_factor(s, 4, 1, 1.0) for s in range(4)] == [0.5, 0.75, 0.5, 0.25]
    assert rate_factor(0, 1) == 1.0  # a single step is a full one
    assert [rate_factor(s, 3, 9, 0.0) for s in range(3)] == [0.1, 0.2, 0.3]  # warm-up longer than the run
    assert rate_factor(5, 10) == 1.0 and rate_factor(6, 10) == 0.8  # half of the steps fall by default


# --- gradients that are no numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["embed", "body", "head", "sparse"])
def test_nothing_moves_after_a_gradient_that_is_no_number(bad, place):
    model = Three()
    model.sparse = TritEmbedding(12, 16, sparse=True)
    layers = [layer for _, layer in trit_modules(model)]
    optimizer = TritOptimizer(model, rate=0.2, scale_rate=0.5)

    def gradients(seed: int) -> dict[str, Tensor]:
        return {name: normal(*m.register.shape, seed=seed) for name, m in trit_modules(model)}

    for name, grad in gradients(0).items():
        give(model.get_submodule(name), grad)  # type: ignore[arg-type]
    optimizer.step()
    before, momentum = snapshot(*layers), value(optimizer, model.get_submodule(place))  # type: ignore[arg-type]
    assert optimizer.skipped == 0
    for name, grad in gradients(1).items():
        if name == place:
            grad[3, 5] = bad
        give(model.get_submodule(name), grad)  # type: ignore[arg-type]
    optimizer.step()
    assert same(before, *layers) and optimizer.flips == 0
    assert (optimizer.skipped, optimizer.step_count) == (1, 2)
    assert torch.equal(value(optimizer, model.get_submodule(place)), momentum)  # type: ignore[arg-type]
    for name, grad in gradients(2).items():
        give(model.get_submodule(name), grad)  # type: ignore[arg-type]
    optimizer.step()  # the next step is a step again
    moved = snapshot(*layers)[::2]
    assert not any(torch.equal(a, b) for a, b in zip(before[::2], moved, strict=True))
    assert (optimizer.skipped, optimizer.step_count) == (1, 3)


def test_one_bad_micro_batch_refuses_the_step():
    layer = linear()
    optimizer, before = TritOptimizer(layer, rate=0.2), snapshot(layer)
    for grad in (normal(8, 16), torch.full((8, 16), math.nan), normal(8, 16)):
        give(layer, grad)
    optimizer.step()
    assert same(before, layer) and optimizer.skipped == 1
    assert value(optimizer, layer).isfinite().all()


def test_refuse_lets_one_step_move_nothing():
    layer = linear()
    optimizer, before = TritOptimizer(layer, rate=0.2), snapshot(layer)
    give(layer, normal(8, 16))
    optimizer.refuse()
    optimizer.step()
    assert same(before, layer) and (optimizer.skipped, optimizer.step_count) == (1, 1)
    give(layer, normal(8, 16))
    optimizer.step()
    assert not same(before, layer) and (optimizer.skipped, optimizer.step_count) == (1, 2)
    optimizer.refuse()
    optimizer.step()  # also without any gradient
    assert optimizer.skipped == 2


def test_skipped_steps_are_counted_in_every_group():
    model = Three()
    optimizer = TritOptimizer(model)
    optimizer.refuse()
    optimizer.step()
    assert [(group["skipped"], group["step"]) for group in optimizer.param_groups] == [(1, 1)] * 3


def test_roles_and_ready_made_groups_do_not_mix():
    layer = TritLinear(8, 8)
    with pytest.raises(ValueError, match="groups carry their own settings"):
        TritOptimizer([{"params": [layer]}], roles={"matrix": {"rate": 0.1}})
