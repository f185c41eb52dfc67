"""Muon, the float baseline: against singular values in float64, what it refuses, learning, and its state."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tritwise.nn import FloatLinear
from tritwise.optim import Muon


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def polynomial(x: Tensor, steps: int) -> Tensor:
    """Newton-Schulz on the singular values alone: U p(S) V^T with p(s) = 3.4445 s - 4.7750 s^3 + 2.0315 s^5."""
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(6, 6), (4, 20), (20, 4), (1, 5)])
@pytest.mark.parametrize(("steps", "decay"), [(5, 0.0), (3, 0.1)])
def test_three_steps_against_the_rule_written_out(shape, steps, decay):
    weight = nn.Parameter(normal(*shape))
    optimizer = Muon([weight], lr=0.1, momentum=0.9, steps=steps, weight_decay=decay)
    w, mean = weight.detach().double(), torch.zeros(shape).double()
    for step in range(3):
        grad = normal(*shape, seed=step + 1)
        weight.grad = grad.clone()
        optimizer.step()
        assert torch.equal(weight.grad, grad)  # the gradient is the caller's
        g = grad.double()
        mean = 0.9 * mean + 0.1 * g
        update = polynomial(0.1 * g + 0.9 * mean, steps)
        w = w * (1 - 0.1 * decay) - 0.1 * math.sqrt(max(1, shape[0] / shape[1])) * update
    assert (weight.detach() - w).norm() < 1e-4 * w.norm()


def test_it_moves_matrices_only():
    with pytest.raises(ValueError, match=r"Muon moves matrices, not a tensor of shape \(3,\); give it to AdamW"):
        Muon([nn.Parameter(torch.ones(3))])
    with pytest.raises(ValueError, match=r"not a tensor of shape \(2, 3, 4\)"):
        Muon([nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 3, 4))])


def test_a_parameter_without_gradient_is_left_alone():
    one, two = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2, 3))
    optimizer = Muon([one, two], weight_decay=0.5)
    one.grad = normal(2, 3)
    optimizer.step()
    assert not torch.equal(one, torch.ones(2, 3)) and torch.equal(two, torch.ones(2, 3)) and two not in optimizer.state


def regression() -> tuple[FloatLinear, Tensor, Tensor]:
    torch.manual_seed(0)
    layer, x = FloatLinear(16, 12), normal(64, 16)
    return layer, x, x @ normal(12, 16, seed=1).T


def test_it_lowers_the_loss():
    layer, x, target = regression()
    optimizer = Muon(layer.parameters(), lr=0.1)

    def closure() -> float:
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        return loss.item()

    losses = [optimizer.step(closure) for _ in range(60)]
    assert all(isinstance(loss, float) for loss in losses)
    assert losses[-1] is not None and losses[0] is not None and losses[-1] < losses[0] / 10
    assert optimizer.step() is None


def test_a_loaded_state_goes_on_alike():
    def run(resume: bool) -> Tensor:
        layer, x, target = regression()
        optimizer = Muon(layer.parameters(), lr=0.05)
        for step in range(6):
            if resume and step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = Muon(layer.parameters(), lr=9.0)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            (layer(x) - target).square().mean().backward()
            optimizer.step()
        return layer.weight.detach()

    assert torch.equal(run(True), run(False))


def test_groups_have_their_own_settings():
    fast, slow = nn.Parameter(torch.zeros(4, 4)), nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([{"params": [fast], "lr": 0.2}, {"params": [slow]}], lr=0.1)
    fast.grad = slow.grad = normal(4, 4)
    optimizer.step()
    torch.testing.assert_close(fast.detach(), 2 * slow.detach())
    assert list(optimizer.state[fast]) == ["momentum"] and optimizer.state[fast]["momentum"].dtype == torch.float32


def mixed(device: str = "cpu") -> list[dict[str, Any]]:
    """Two groups, one of blocks, with matrices of three shapes."""
    shapes = [(24, 8), (8, 8), (32, 8), (8, 32)] * 2
    weights = [nn.Parameter(normal(*shape, seed=i).to(device)) for i, shape in enumerate(shapes)]
    return [{"params": weights[::4], "blocks": 3}, {"params": [w for i, w in enumerate(weights) if i % 4]}]


def moved(device: str, records: bool, there: bool = False) -> tuple[list[Tensor], Muon]:
    """Weights and momenta after eight steps of falling rates; at one of them a matrix has no gradient, and at another
    gradients are no numbers: it is left out, or with `there` held back by found_inf."""
    optimizer = Muon(mixed(device), weight_decay=0.1)
    optimizer.records_moves = records
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(8):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (1 + step)
        for index, p in enumerate(params):
            p.grad = None if (step, index) == (5, 2) else normal(*p.shape, seed=10 * step + index).to(device)
        if there:
            optimizer.found_inf = torch.full((), float(step == 6), device=device)
        if step == 6:
            for p in params:
                p.grad[0, 0] = math.nan  # type: ignore[index]
        if there or step != 6:
            optimizer.step()
    return [t.detach().cpu() for p in params for t in (p, optimizer.state[p]["momentum"])], optimizer


def test_a_step_that_is_held_back_leaves_every_bit():
    for found, expected in zip(moved("cpu", False, there=True)[0], moved("cpu", False)[0], strict=True):
        assert torch.equal(found, expected) and found.isfinite().all()


@pytest.mark.parametrize("there", [False, True])
def test_recorded_moves_read_each_step_anew(there, monkeypatch):
    """With a stand-in that replays by calling again what was recorded first, on tensors that stay where they are."""
    made: dict[Any, Any] = {}

    class Again:
        def __init__(self, device: torch.device) -> None: ...

        def make(self, key: Any, version: int, go: Tensor, move: Any, recording: Any, tell: Any) -> dict[Any, Tensor]:
            first = made.setdefault(key, move)
            tell()
            return first(go)

    monkeypatch.setattr("tritwise.optim.muon.RecordedMoves", Again)
    monkeypatch.setattr("tritwise.optim.muon._lies_on_a_gpu", lambda stacks: True)
    (expected, _), (found, _) = moved("cpu", False), moved("cpu", True, there)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert len(made) == 2  # with every matrix, and with all but one


@pytest.mark.gpu
@pytest.mark.parametrize("there", [False, True])
def test_on_a_gpu_recorded_moves_have_the_bits_of_others(there):
    (expected, plain), (found, recorded) = moved("cuda", False), moved("cuda", True, there)
    assert plain._moves is None and recorded._moves is not None and len(recorded._moves._made) == 2
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
