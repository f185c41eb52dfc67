"""TritOptimizer while it runs: settings that change, state that is forgotten, many gradients at once, slow scales, and
what is different on a GPU."""

import copy
import gc
import itertools
import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tritwise.nn import TritEmbedding, TritLinear, TritModule, trit_modules
from tritwise.ops import gpu
from tritwise.optim import TritOptimizer, consuming
from tritwise.optim.moves import RecordedMoves
from tritwise.optim.moving import Moving
from tritwise.train.optimizers import keep_initial_rates, set_rates


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Four(nn.Module):
    """One layer of each role, and a table of which only the rows in use are trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = TritEmbedding(12, 16)
        self.table = TritEmbedding(9, 16, sparse=True, group=8)
        self.body = TritLinear(16, 18, blocks=3)
        self.head = TritLinear(18, 12, role="head", group=6)
        self.head.add_column_scales()
        self.table.add_column_scales()


def layers_of(model: nn.Module) -> list[TritModule]:
    return [layer for _, layer in trit_modules(model)]


def gradients(model: nn.Module, seed: int) -> list[Tensor]:
    """One for each layer; that of the table is zero in some rows."""
    found = [normal(*layer.register.shape, seed=seed) for layer in layers_of(model)]
    found[1][seed % 9 :: 3] = 0
    return found


def train(model: nn.Module, optimizer: TritOptimizer, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.consume(layers_of(model), gradients(model, step))
        optimizer.step()


def everything(model: nn.Module, optimizer: TritOptimizer) -> dict[str, Tensor]:
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, layer in trit_modules(model):
        found |= {f"{name}.{key}": t.clone() for key, t in optimizer.state.get(layer.register, {}).items()}
    return found


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def groups_of(optimizer: TritOptimizer) -> list[dict]:
    return copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])


# --- configure ------------------------------------------------------------------------------------------------------


def test_settings_of_all_groups_change():
    optimizer = TritOptimizer(Four(), rate=0.02)
    settings = {"momentum": 0.5, "scale_rate": 0.1, "direction": "sign", "steps": 5, "interval": 2, "seed": 9}
    optimizer.configure(**settings)
    assert [{name: group[name] for name in settings} for group in optimizer.param_groups] == [settings] * 3


def test_settings_of_one_role_change():
    optimizer = TritOptimizer(Four(), rate=0.02)
    before = groups_of(optimizer)
    optimizer.configure("head", direction="rms", interval=3)
    assert groups_of(optimizer) == [*before[:2], before[2] | {"direction": "rms", "interval": 3}]
    optimizer.configure(role="matrix")
    assert groups_of(optimizer)[1] == before[1]


def test_a_new_rate_is_that_of_matrices_or_of_the_role_named_and_schedules_start_from_it():
    optimizer = TritOptimizer(Four(), rate=0.02)
    keep_initial_rates([optimizer])
    optimizer.configure(rate=0.3)
    expected = [group["lr"] for group in TritOptimizer(Four(), rate=0.3).param_groups]
    assert [group["initial_lr"] for group in optimizer.param_groups] == expected and expected[1] == 0.3
    optimizer.configure("head", rate=0.1)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [*expected[:2], 0.1]
    set_rates([optimizer], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [expected[0] / 2, 0.15, 0.05]


def test_changed_settings_are_used_at_once():
    model, other = Four(), Four()
    optimizer, fresh = TritOptimizer(model, 0.02, momentum=0.9), TritOptimizer(other, 0.3, momentum=0.5, seed=4)
    optimizer.configure(rate=0.3, momentum=0.5, seed=4)
    train(model, optimizer, 0, 3)
    train(other, fresh, 0, 3)
    assert_equal(everything(model, optimizer), everything(other, fresh))


LISTED = "rate, momentum, nesterov, scale_rate, direction, steps, row_memory, interval, seed"


@pytest.mark.parametrize(
    ("role", "settings", "message"),
    [
        ("vector", {"rate": 0.1}, "no group has the role 'vector'; choose one of embedding, head, matrix"),
        (None, {"momentun": 0.5, "rate": 0.1}, f"there is no setting 'momentun'; choose one of {LISTED}"),
        (None, {"lr": 0.5}, f"there is no setting 'lr'; choose one of {LISTED}"),
        ("head", {"roles": {}}, f"there is no setting 'roles'; choose one of {LISTED}"),
        ("matrix", {"momentum": 0.5, "rate": -1.0}, "rate is -1.0; it must be 0 or more and finite"),
        (None, {"rate": 0.5, "scale_rate": math.inf}, "scale_rate is inf; it must be 0 or more and finite"),
        ("head", {"rate": 0.5, "direction": "up"}, "there is no direction 'up'; choose one of newton_schulz"),
        (None, {"steps": 4, "interval": 0}, "steps and interval must be at least 1"),
    ],
)
def test_what_cannot_work_changes_nothing(role, settings, message):
    optimizer = TritOptimizer(Four())
    before = groups_of(optimizer)
    with pytest.raises(ValueError) as caught:
        optimizer.configure(role, **settings)
    assert str(caught.value).startswith(message)
    assert groups_of(optimizer) == before


def test_groups_made_by_hand_have_no_role():
    optimizer = TritOptimizer([{"params": [TritLinear(4, 4)]}])
    with pytest.raises(ValueError, match="the role 'head'; choose one of none: groups made by hand"):
        optimizer.configure("head", rate=0.1)
    optimizer.configure(rate=0.1)
    assert optimizer.param_groups[0]["lr"] == 0.1


# --- reset_runtime_state --------------------------------------------------------------------------------------------


def test_after_a_reset_it_is_a_fresh_optimizer():
    settings = {"rate": 0.1, "scale_rate": 0.2, "interval": 2, "seed": 3}
    model = Four()
    optimizer = TritOptimizer(model, **settings)
    train(model, optimizer, 0, 3)
    optimizer.refuse()
    optimizer.step()
    optimizer.consume(layers_of(model), gradients(model, 77))  # waits for a step that never comes
    other = copy.deepcopy(model)
    optimizer.reset_runtime_state()
    assert_equal(dict(model.named_parameters()), dict(other.named_parameters()))  # what was learned stays
    assert (optimizer.step_count, optimizer.skipped, optimizer.flips, len(optimizer.state)) == (0, 0, 0, 0)
    fresh = TritOptimizer(other, **settings)
    assert groups_of(optimizer) == groups_of(fresh)
    train(model, optimizer, 5, 8)
    train(other, fresh, 5, 8)
    assert_equal(everything(model, optimizer), everything(other, fresh))
    assert optimizer.flips == fresh.flips > 0


def test_a_reset_forgets_a_gradient_that_was_no_number():
    layer = TritLinear(4, 4)
    optimizer = TritOptimizer(layer, rate=1.0)
    optimizer.consume([layer], [torch.full((4, 4), math.nan)])
    optimizer.reset_runtime_state()
    before = layer.register.clone()
    optimizer.consume([layer], [normal(4, 4)])
    optimizer.step()
    assert optimizer.skipped == 0 and not torch.equal(layer.register, before)


# --- many gradients at once -----------------------------------------------------------------------------------------


def test_many_gradients_at_once_are_one_after_the_other():
    """Two micro-batches of each layer, with learned scales and a sparse table among them; then with a NaN in one."""
    results, skipped = [], []
    for at_once in (True, False):
        model = Four()
        optimizer, layers = TritOptimizer(model, 0.1, scale_rate=0.2, roles={"head": {"momentum": 0.5}}), None
        layers = layers_of(model)
        for step in range(4):
            for micro in range(2):
                grads = gradients(model, 10 * step + micro)
                if (step, micro) == (2, 1):
                    grads[2][3, 5] = math.nan
                if at_once:
                    optimizer.consume(layers, grads)
                else:
                    for layer, grad in zip(reversed(layers), reversed(grads), strict=True):
                        optimizer.consume([layer], [grad])
            optimizer.step()
        results.append(everything(model, optimizer))
        skipped.append(optimizer.skipped)
    assert_equal(*results)
    assert skipped == [1, 1]


def test_the_layers_it_trains_are_named_group_by_group():
    model = Four()
    optimizer = TritOptimizer([{"params": [model.head]}, {"params": [model.body, model.embed]}])
    assert optimizer.layers == [model.head, model.body, model.embed]


# --- slow scales ----------------------------------------------------------------------------------------------------


def test_slow_scales_go_with_the_gradient_and_do_not_wander():
    """100 steps of 0.005 octaves are 4 exponents of 1/8 octave. Each step is a 25th of an exponent: rounded to whole
    ones its noise would add up to 2 exponents, kept as evidence to 0.02."""
    steps, moved = 100, []
    for seed in range(6):
        layer = TritLinear(16, 8, group=4)
        with torch.no_grad():
            layer.register.fill_(81)
            layer.exponent.zero_()
        optimizer = TritOptimizer(layer, rate=1e-9, scale_rate=0.005, momentum=0.9, seed=seed)
        for _ in range(steps):
            optimizer.consume([layer], [torch.ones(8, 16)])
            optimizer.step()
        evidence = optimizer.state[layer.register]["scale_evidence"].view(8, 4)
        assert (layer.exponent == -4).all() and evidence.any()
        moved.append(-(layer.exponent.double() + evidence.double() / 256))
    found = torch.stack(moved)
    assert found.mean().item() == pytest.approx(steps * 0.005 * 8, rel=0.005)
    assert 0 < found.std().item() < 0.05


# --- as on a GPU ----------------------------------------------------------------------------------------------------


def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors say that they are on a GPU: layers move in lots, and the host does not look whether anything did."""
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda tensor: True), raising=True)


@pytest.mark.parametrize("together", [1 << 25, 1, 300])
def test_layers_that_move_in_lots_have_the_bits_of_layers_that_move_alone(together, monkeypatch):
    results = []
    for pretend in (False, True):
        with monkeypatch.context() as patch:
            if pretend:
                pretend_gpu(patch)
                patch.setattr("tritwise.optim.moving._TOGETHER", together)
            torch.manual_seed(0)
            model = nn.ModuleList([TritLinear(16, 8), TritLinear(8, 16), TritEmbedding(9, 6, sparse=True, group=3)])
            optimizer = TritOptimizer(model, 0.1, interval=2, scale_rate=0.05)
            for step in range(3):
                optimizer.consume(layers_of(model), [normal(*m.register.shape, seed=step) for m in layers_of(model)])
                optimizer.step()
            results.append(everything(model, optimizer) | {"flips": torch.tensor(optimizer.flips)})
    assert_equal(*results)
    assert results[0]["flips"] > 0


def test_skipped_steps_are_counted_when_someone_asks(monkeypatch):
    pretend_gpu(monkeypatch)
    model = Four()
    optimizer = TritOptimizer(model, 0.2, scale_rate=0.5)
    train(model, optimizer, 0, 1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    for bad in range(2):
        grads = gradients(model, 1 + bad)
        grads[2][0, 0] = math.nan
        optimizer.consume(layers_of(model), grads)
        optimizer.step()
        assert_equal(dict(model.named_parameters()), before)
        assert optimizer.flips == 0
    assert [group["skipped"] for group in optimizer.param_groups] == [0] * 3  # the host has not looked
    assert [group["skipped"] for group in optimizer.state_dict()["param_groups"]] == [2] * 3
    assert optimizer.skipped == 2
    train(model, optimizer, 3, 4)
    assert optimizer.skipped == 2 and optimizer.flips > 0


# --- gradients that wait ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("own", [{}, {"compact": True}])
def test_gradients_that_wait_for_others_give_the_bits_of_those_that_do_not(own, device, monkeypatch):
    """Micro-batches, a refused one, more than may wait, and what is forgotten while it waits."""
    results, calls = [], []
    for room in (0, 4 * 1200, 1 << 26):
        monkeypatch.setattr(consuming, "WAITING", room)
        monkeypatch.setattr(TritOptimizer, "_gathers", staticmethod(lambda grad, room=room: grad.nbytes < room))
        torch.manual_seed(0)
        layers = [TritLinear(16, 9, blocks=3), TritLinear(40, 24), TritLinear(24, 16), TritLinear(9, 6, group=3)]
        model = nn.ModuleList(layers).to(device)
        optimizer = TritOptimizer(model, 0.1, scale_rate=0.1, seed=5, **own)
        taken, real = [], optimizer.consume
        optimizer.consume = lambda layers, grads, real=real, taken=taken: (
            taken.append(len(layers)),
            real(layers, grads),
        )
        for step in range(4):
            for micro in range(2):
                for number, layer in enumerate(layers):
                    grad = normal(*layer.register.shape, seed=100 * step + 10 * micro + number).to(device)
                    if (step, micro, number) == (2, 1, 1):
                        grad[0, 0] = math.nan
                    layer.consumer(layer, grad)
            assert optimizer.waiting_bytes <= room
            optimizer.step()
            assert optimizer.waiting_bytes == 0
        assert optimizer.skipped == 1
        results.append(everything(model, optimizer))
        calls.append(max(taken))
        layers[0].consumer(layers[0], torch.full((9, 16), math.nan, device=device))
        optimizer.reset_runtime_state()
        assert optimizer.waiting_bytes == 0
    assert calls == [1, 3, 4]
    for found in results[1:]:
        assert_equal(found, results[0])


# --- lots -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [False, True])
def test_layers_of_several_groups_move_in_one_call_each_by_its_own_rate(records, monkeypatch):
    results, calls = [], []
    real = Moving._move
    for alone in (True, False):
        monkeypatch.setattr(TritOptimizer, "_moves_alone", staticmethod(lambda register, alone=alone: alone))
        lots: list[int] = []
        monkeypatch.setattr(
            TritOptimizer,
            "_move",
            lambda self, layers, *rest, lots=lots: lots.append(len(layers)) or real(self, layers, *rest),
        )
        torch.manual_seed(0)
        roles = ["embedding", "matrix", "head", "matrix", "matrix"]
        model = nn.ModuleList([TritLinear(16, 12, role=role) for role in roles])
        own = {
            "embedding": {"direction": "balanced", "rate": 0.4},
            "head": {"direction": "balanced", "scale_rate": 0.3},
        }
        optimizer = TritOptimizer(model, 0.1, scale_rate=0.1, roles=own, seed=5)
        for step in range(3):
            grads = [normal(12, 16, seed=10 * step + number) for number in range(len(roles))]
            with optimizer.recording() if records else nullcontext():
                if records:
                    optimizer.before_replay()
                with optimizer.ahead(-1) if records else nullcontext():
                    optimizer.consume(layers_of(model), grads)
                    optimizer.step()
        results.append(everything(model, optimizer))
        calls.append(lots[: len(lots) // 3])
    assert calls == [[1] * 5, [5]]
    assert_equal(*results)


# --- recorded ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, {"row_memory": 0.8}, {"compact": True}, {"interval": 2}])
def test_a_step_that_reads_keys_and_rates_from_the_device_has_the_bits_of_any_other(own):
    results = []
    for records in (False, True):
        torch.manual_seed(0)
        model = nn.ModuleList([TritLinear(16, 9, blocks=3), TritEmbedding(9, 6, group=3)])
        for layer in layers_of(model):
            layer.add_column_scales()
        optimizer = TritOptimizer(model, 0.1, scale_rate=0.1, seed=5, **own)
        keep_initial_rates([optimizer])
        assert optimizer.recordable
        for step in range(6):
            set_rates([optimizer], 1 / (1 + step))
            grads = [normal(*layer.register.shape, seed=step) for layer in layers_of(model)]
            if records:
                with optimizer.recording() as changed:
                    assert {id(t) for t in changed} >= {id(p) for p in model.parameters()}
                    optimizer.before_replay()
                    with optimizer.ahead(-1):  # what was recorded is a step of this phase
                        optimizer.consume(layers_of(model), grads)
                        optimizer.step()
            else:
                optimizer.consume(layers_of(model), grads)
                optimizer.step()
        assert optimizer.step_count == 6 and optimizer.flips > 0
        results.append(everything(model, optimizer))
    assert_equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("own", [{}, {"interval": 3}, {"row_memory": 0.8}, {"compact": True, "interval": 2}])
def test_recorded_moves_have_the_bits_of_any_other(own):
    """Over several micro-batches, a refused step, changed rates and a changed setting."""
    results = []
    for records in (False, True):
        torch.manual_seed(0)
        layers = [TritLinear(16, 9, blocks=3), TritLinear(40, 24), TritLinear(40, 24), TritLinear(9, 6, group=3)]
        for layer in layers[1:3]:
            layer.add_column_scales()
        model = nn.ModuleList(layers).cuda()
        optimizer = TritOptimizer(model, 0.1, scale_rate=0.1, seed=5, **own)
        keep_initial_rates([optimizer])
        optimizer.records_moves, flips = records, []
        for step in range(14):
            set_rates([optimizer], 1 / (1 + step))
            if step == 9:
                optimizer.configure(momentum=0.5)
            for micro in range(2):
                grads = [normal(*layer.register.shape, seed=2 * step + micro).cuda() for layer in layers_of(model)]
                if (step, micro) == (6, 1):
                    grads[1][0, 0] = math.nan
                optimizer.consume(layers_of(model), grads)
            optimizer.step()
            flips.append(optimizer.flips)
        assert optimizer.step_count == 14 and optimizer.skipped == 1 and max(flips) > 0
        assert (optimizer._moves is not None) is records
        results.append((flips, everything(model, optimizer)))
    assert results[0][0] == results[1][0]
    assert_equal(results[0][1], results[1][1])


def test_moves_are_made_once_and_recorded_the_second_time(monkeypatch):
    """With stand-ins for streams and graphs: what is called when, and that a recording is of one key and version."""
    told: list[str] = []

    class Graph:
        def replay(self) -> None:
            told.append("replay")

    class Stream:
        def __init__(self, device: object = None) -> None: ...

        def wait_stream(self, other: object) -> None: ...

    @contextmanager
    def noting(what: str) -> Iterator[None]:
        told.append(f"{what} begins")
        yield
        told.append(f"{what} ends")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: noting("stream"))
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream: noting(f"graph in {pool}"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda handles=itertools.count(): next(handles))
    layer, moves = TritLinear(4, 4), RecordedMoves(torch.device("cpu"))
    kept: list[Tensor] = []

    def move(go: Tensor) -> dict[TritModule, Tensor]:
        told.append("move")
        kept.append(go)
        return {layer: torch.tensor(len(kept))}

    def make(key: int, version: int, go: bool) -> int:
        given = move, lambda: noting("recording"), lambda: told.append("tell")
        flips = moves.make(key, version, torch.tensor(go), *given)
        return int(flips[layer])

    eager = ["stream begins", "tell", "recording begins", "move", "recording ends", "stream ends"]

    def recorded(pool: int) -> list[str]:
        inside = [f"graph in {pool} begins", "move", f"graph in {pool} ends"]
        return ["stream begins", "recording begins", *inside, "recording ends", "stream ends", "tell", "replay"]

    for key, version, go, flips, expected in (
        (0, 1, True, 1, eager),
        (0, 1, False, 2, recorded(0)),
        (0, 1, True, 2, ["tell", "replay"]),
        (1, 1, True, 3, eager),  # other layers move
        (0, 1, False, 2, ["tell", "replay"]),
        (1, 1, False, 4, recorded(0)),  # its memory is that of the first
        (0, 2, True, 5, eager),  # settings have changed
        (0, 2, True, 6, recorded(1)),
    ):
        told.clear()
        assert make(key, version, go) == flips and told == expected
    assert kept[1] is kept[3] is kept[5] and bool(
        kept[1]
    )  # what a recording reads lies still, and is written before a replay
    moves.make(0, 2, torch.tensor(False), move, lambda: noting("recording"), lambda: None)
    assert not kept[1]


@pytest.mark.parametrize("collects", [True, False])
def test_no_garbage_is_collected_while_a_graph_is_recorded(collects, monkeypatch):
    """What was garbage before is gone before; afterwards, and after an error, collecting goes on if it did."""

    class Loop:
        def __init__(self) -> None:
            self.itself = self

    class Recording(nullcontext[None]):
        def __init__(self, *_: object, **given: object) -> None:
            super().__init__()
            alive.append(garbage() is not None)

    alive: list[bool] = []
    monkeypatch.setattr(torch.cuda, "graph", Recording)
    graph: Any = None
    try:
        for error in (False, True):
            garbage = weakref.ref(Loop())
            gc.enable() if collects else gc.disable()
            with nullcontext() if not error else pytest.raises(ValueError), gpu.recorded(graph, graph, graph):
                assert not gc.isenabled()
                if error:
                    raise ValueError
            assert gc.isenabled() is collects
    finally:
        gc.enable()
    assert alive == [False, False]


def test_what_cannot_be_recorded_says_so():
    assert not TritOptimizer(Four(), 0.1).recordable  # a sparse table
    linear = [TritLinear(16, 8)]
    assert TritOptimizer(linear, 0.1).recordable
    optimizer = TritOptimizer([{"params": [TritLinear(16, 8)], "rate": 0.1}, {"params": linear, "rate": 0.1}], 0.1)
    optimizer.param_groups[0]["step"] = 1  # whose layers have other turns than those of the other group
    assert not optimizer.recordable


def test_phases_are_the_turns_of_all_groups_together():
    groups = [{"params": [TritLinear(16, 8)], "rate": 0.1, "interval": interval} for interval in (1, 4, 6)]
    optimizer = TritOptimizer(groups, 0.1)
    assert (optimizer.phases, optimizer.phase) == (12, 0)
    for group in optimizer.param_groups:
        group["step"] = 25
    with optimizer.ahead(3):
        assert optimizer.phase == 4
    assert optimizer.phase == 1 and optimizer.step_count == 25


@pytest.mark.parametrize("how", ["configure", "load", "forget", "add"])
def test_whatever_makes_a_recording_stale_changes_the_version(how):
    optimizer = TritOptimizer([TritLinear(16, 8)], 0.1)
    before = optimizer.version
    {
        "configure": lambda: optimizer.configure(momentum=0.5),
        "load": lambda: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        "forget": optimizer.reset_runtime_state,
        "add": lambda: optimizer.add_param_group({"params": [TritLinear(4, 4)]}),
    }[how]()
    assert optimizer.version > before
