"""The course of a run: depth, rate and momentum by steps and by time, warming before the clock, means of weights."""

import dataclasses

import pytest
import torch
from torch import Tensor

from tritwise.errors import UserError
from tritwise.files import read_json_lines
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritLinear
from tritwise.optim import TritOptimizer, rate_factor
from tritwise.train import Config, TrainConfig, finish, loop, override, train
from tritwise.train.average import Average, changed_trits
from tritwise.train.course import Course, Phase, plan_of_depth
from tritwise.train.finish import ship_run
from tritwise.train.optimizers import build_optimizers, set_momentum
from tritwise.train.stepper import Stepper
from tritwise.train.warm import warm_up

PLAN = "0.40:2,0.65:3,1.0:4"
RECURRENT = ModelConfig(width=32, depth=2, ctx=16, loops=2, loop_embedding=True, repeat_skip=True, ngrams=2)


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


# --- plans and courses ----------------------------------------------------------------------------------------------


def test_a_plan_is_read():
    assert plan_of_depth(PLAN, 4) == (Phase(0.4, 2), Phase(0.65, 3), Phase(1.0, 4))
    assert plan_of_depth("", 3) == (Phase(1.0, 3),)
    assert plan_of_depth(" .5:1, 1:3", 3) == (Phase(0.5, 1), Phase(1.0, 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "no list of SHARE:REPEATS"),
        ("0.4:2;1:3", "no list of SHARE:REPEATS"),
        ("0.4:2,", "no list of SHARE:REPEATS"),
        ("-0.4:2,1:3", "no list of SHARE:REPEATS"),
        ("0.6:2,0.4:3,1:4", "rising shares"),
        ("0.4:2,0.4:3,1:4", "rising shares"),
        ("0:1,1:2", "rising shares"),
        ("0.4:2,0.9:3", "the last of them 1"),
        ("0.4:2,1:5", "repeats 5 times, and the model 4; set loops=5"),
        ("0.4:0,1:4", "must repeat 1 to 4 times"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(text, message):
    with pytest.raises(UserError, match=message):
        plan_of_depth(text, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loops": 4, "depth_plan": "0.4:4,1:2"},
            "ends with 2 repeats, .* scored with 4; end it with 1:4",
        ),
        ({"weight_decay": 0.1}, "weight_decay is of float optimizers"),
    ],
)
def test_what_makes_no_sense_is_refused_of_new_runs_alone(changes, message, small_config, tmp_path):
    config = small_config(**changes)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.MonkeyPatch.context() as patch:  # as a version did that did not ask
        patch.setattr(Config, "require_sense", lambda self: None)
        train(override(config, {"steps": 4}), tmp_path / "run")
    assert train(override(config, {"steps": 6}), tmp_path / "run", resume=True)["steps"] == 6
    assert ship_run(tmp_path / "run", tmp_path / "model")["bytes"]


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_depth_by_steps_changes_where_the_plan_says(steps):
    course = Course(steps, depth_plan=PLAN, loops=4)
    loops = [course.loops(step, 1e9) for step in range(steps)]  # seconds do not matter
    assert loops.index(3) == 0.4 * steps and loops.index(4) == round(0.65 * steps)
    assert loops == sorted(loops) and loops[0] == 2 and course.depths == [2, 3, 4]
    assert not course.full(steps // 2, 0) and course.full(steps - 1, 0)
    assert not course.over(steps - 1, 1e9) and course.over(steps, 0)


def test_by_time_everything_goes_by_time():
    course = Course(10**6, seconds=100, warmup=10, decay=0.5, depth_plan=PLAN, loops=4)
    assert [course.loops(5, s) for s in (0, 39.9, 40, 64.9, 65, 99, 200)] == [2, 2, 3, 3, 4, 4, 4]
    assert [course.factor(500, s) for s in (0, 50, 75, 100, 130)] == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert course.factor(4, 1) == 5 / 11  # the warm-up goes by steps
    assert not course.over(10, 99.9) and course.over(10, 100) and course.over(10**6, 0)
    assert [course.part(*at) for at in ((5, 1), (50, 30), (50, 60))] == ["rises", "stays", "falls"]


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_by_steps_the_factor_is_as_it_was(decay):
    course = Course(40, warmup=5, decay=decay, loops=1)
    assert [course.factor(s, 1e9) for s in range(40)] == [rate_factor(s, 40, 5, decay) for s in range(40)]


def test_momentum_rises():
    course = Course(1000, momentum=0.95, momentum_start=0.85, momentum_warmup=500)
    assert [course.momentum(s) for s in (0, 250, 500, 900)] == pytest.approx([0.85, 0.90, 0.95, 0.95])
    assert Course(1000).momentum(0) is None
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(RECURRENT, weights="float", ngrams=1))
    muon, adam = build_optimizers(model, TrainConfig(optimizer="muon", momentum=0.95))
    set_momentum([muon, adam], 0.7)
    assert muon.param_groups[0]["momentum"] == 0.7 and adam.param_groups[0]["betas"] == (0.9, 0.95)


# --- before the clock -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weights", "optimizer"), [("trit", "trit"), ("float", "muon")])
def test_warming_leaves_every_bit_as_it_was(weights, optimizer):
    runs = []
    for warmed in (False, True):
        torch.manual_seed(0)
        model = ByteLM(dataclasses.replace(RECURRENT, weights=weights))
        optimizers = build_optimizers(model, TrainConfig(optimizer=optimizer, interval=1))
        stepper = Stepper(model, optimizers, guard=True)
        course = []
        for step in range(4):
            if warmed and step in (0, 2):  # before the first step, and as after a resume
                warm_up(stepper, model, optimizers, [(draw(2, 16, seed=9), draw(2, 16, seed=8))], [1, 2])
            loss = stepper.step_over([(draw(2, 16, seed=step), draw(2, 16, seed=step + 50))], 1 + step // 2)
            course.append(loss.item())
        runs.append((course, [p.detach().clone() for p in model.parameters()], [o.state_dict() for o in optimizers]))
    (losses, weights_, states), (again, others, other_states) = runs
    assert losses == again and all(torch.equal(*pair) for pair in zip(weights_, others, strict=True))
    for one, two in zip(states, other_states, strict=True):
        assert one["param_groups"] == two["param_groups"]
        for index, state in one["state"].items():
            assert all(torch.equal(value, two["state"][index][key]) for key, value in state.items())


def test_nothing_is_compiled_inside_the_clock(small_config, tmp_path, monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compile(f, backend="aot_eager", **how))
    torch._dynamo.reset()
    config = small_config(compile="true", loops=2, depth_plan="0.5:1,1:2", steps=6, sample_bytes=0)
    result = train(config, tmp_path / "run")
    assert result["compiled_in_clock"] == 0
    events = [line["message"] for line in read_json_lines(tmp_path / "run/metrics.jsonl") if line["kind"] == "event"]
    assert events[0].startswith("warmed 1, 2 repeats in ") and events[1] == "2 repeats from step 3, share 0.500"


def test_a_run_by_time_ends_in_time(small_config, tmp_path):
    config = small_config(
        steps=10**6, seconds=1.0, warmup=0, decay=0.5, loops=2, depth_plan="0.5:1,1:2", eval_interval=0
    )
    result = train(config, tmp_path / "run")
    assert 1.0 <= result["trained_seconds"] < 3 and 2 < result["steps"] < 10**6
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    evals = [line for line in lines if line["kind"] == "eval"]
    assert [(line["loops"], line["phase"]) for line in evals] == [(2, "falls")]
    assert evals[0]["rate"] < config.train.rate
    rates = [line["rate"] for line in lines if line["kind"] == "train"]
    assert rates == sorted(rates, reverse=True)


def test_the_time_left_survives_a_resume(small_config, stop_at, tmp_path):
    config = small_config(steps=10**6, seconds=0.8, warmup=0, decay=1.0, eval_interval=0)
    assert train(config, tmp_path / "run", display=stop_at(2))["interrupted"]
    result = train(config, tmp_path / "run", resume=True)
    assert 0.8 <= result["trained_seconds"] < 3 and "interrupted" not in result
    again = train(config, tmp_path / "run", resume=True)  # as if its scores had been cut off
    assert (again["val"], again["steps"]) == (result["val"], result["steps"]) and "warm_seconds" not in again
    lines = read_json_lines(tmp_path / "run/metrics.jsonl")
    rates = [line["rate"] for line in lines if line["kind"] == "train"]
    assert rates == sorted(rates, reverse=True)  # on from where it was, not anew


# --- clipping -------------------------------------------------------------------------------------------------------


def test_gradients_are_clipped_together():
    torch.manual_seed(0)
    model = ByteLM(dataclasses.replace(RECURRENT, weights="float"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [p.detach().clone() for p in model.parameters()]
    Stepper(model, [optimizer], clip=0.3).step(draw(4, 16), draw(4, 16, seed=2))
    moved = torch.cat([(p - q).flatten() for p, q in zip(model.parameters(), before, strict=True)]).norm()
    assert moved.item() == pytest.approx(0.3, rel=1e-3)


def test_ternary_gradients_have_nothing_to_clip(small_config):
    with pytest.raises(UserError, match="clip is for float gradients"):
        small_config(clip=0.3)


# --- means ----------------------------------------------------------------------------------------------------------


def test_a_mean_of_registers_is_their_rounded_mean_in_integers():
    torch.manual_seed(0)
    layer, average = TritLinear(4, 3), Average()
    for value in (10, 11, -121):
        layer.register.data.fill_(value)
        layer.exponent.data.fill_(value // 2)
        average.add(layer)
    mean = average.of(layer)
    assert mean.register.unique().tolist() == [-33] and mean.exponent.unique().tolist() == [-17]  # -33.3, -17.0
    assert layer.register.unique().tolist() == [-121]
    assert {t.dtype for t in average.state()[0].values()} == {torch.int32}
    assert changed_trits(layer, mean) == 1.0 and changed_trits(layer, layer) == 0.0
    average.add(mean)
    again = Average()
    again.restore(*average.state(), torch.device("cpu"))
    assert again.count == 4 and torch.equal(again.of(layer).register, average.of(layer).register)


def test_a_mean_of_floats_is_the_mean():
    layer, average = torch.nn.Linear(2, 2, bias=False), Average()
    for value in (1.0, 2.0, 6.0):
        layer.weight.data.fill_(value)
        average.add(layer)
    assert average.of(layer).weight.unique().tolist() == [3.0]


def test_a_mean_is_scored_beside_the_weights_it_does_not_replace(small_config, tmp_path):
    plain = train(small_config(), tmp_path / "plain")
    config = override(small_config(), {"average_every": 3, "average_from": 0.5})
    result = train(config, tmp_path / "averaged")
    assert result["averaged"]["count"] == 3  # after steps 6, 9 and 12, the last
    assert result["val"] == plain["val"] and "averaged" not in plain
    assert 0 < result["averaged"]["changed_trits"] < 0.5
    assert result["averaged"]["bpb"] != result["val"]["bpb"] == result["averaged"]["bpb_unaveraged"]


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_the_mean_ships_where_it_scores_better(weights, small_config, tmp_path, monkeypatch):
    changes = {} if weights == "trit" else {"weights": "float", "optimizer": "adamw", "rate": 0.01, "ship_as": "int8"}
    config = override(small_config(), {"average_every": 3, "average_from": 0.5, "ship_average": True, **changes})
    result = train(config, tmp_path / "run")
    told = result["averaged"]
    assert told["shipped"] == (told["bpb"] < told["bpb_unaveraged"])
    known = result["before"]["bpb"] if "before" in result else result["val"]["bpb"]
    assert known == min(told["bpb"], told["bpb_unaveraged"])
    assert result["val"]["bpb"] == result["artifact"]["bpb_reread"]
    again = ship_run(tmp_path / "run", tmp_path / "again")
    assert again["bpb_reread"] == result["val"]["bpb"] and again["bpb_before"] == known
    # The other one ships if it scores better: scores turned upside down choose it.
    true = finish.score
    monkeypatch.setattr(finish, "score", lambda *a, **k: (s := true(*a, **k))._replace(bpb=-s.bpb))
    assert ship_run(tmp_path / "run", tmp_path / "other")["bpb_before"] == -max(told["bpb"], told["bpb_unaveraged"])


def test_momentum_of_ternary_weights_follows_the_course(small_config, tmp_path, state_of):
    one = train(small_config(momentum_start=0.2, momentum_warmup=12), tmp_path / "one")
    two = train(small_config(), tmp_path / "two")
    assert one["val"] != two["val"]
    assert isinstance(TritOptimizer(TritLinear(4, 4)).param_groups[0]["momentum"], float)


class Device:
    """A clock, and a device that works on its own: a step takes it a second, and the host asks for one at once."""

    def __init__(self) -> None:
        self.now, self.done, self.before = 0.0, 0.0, 0.0

    def perf_counter(self) -> float:
        return self.now

    def ask(self) -> None:
        self.before, self.done = self.done, max(self.now, self.done) + 1.0

    def wait(self, _: torch.device) -> None:
        self.now = max(self.now, self.done)

    def keep(self) -> None:
        self.now = max(self.now, self.before)


@pytest.mark.parametrize("interval", [1, 2, 100])
def test_no_step_is_done_outside_the_clock(interval, small_config, tmp_path, monkeypatch):
    device, step_over = Device(), Stepper.step_over

    def asked(self, *given):
        device.ask()
        return step_over(self, *given)

    monkeypatch.setattr(Stepper, "step_over", asked)
    monkeypatch.setattr(loop, "time", device)
    monkeypatch.setattr(loop, "wait_for", device.wait)
    monkeypatch.setattr(loop.Pace, "keep", lambda self: device.keep())
    monkeypatch.setattr(loop, "warm_up", lambda *given: None)
    settings = {"seconds": 12.0, "steps": 1000, "log_interval": interval, "eval_interval": 0, "save_interval": 0}
    result = train(small_config(**settings), tmp_path / "run")
    # One step more may be on its way when the time is up.
    assert result["trained_seconds"] == 12.0 and result["steps"] == (13 if interval == 100 else 12)
