"""The audit: a ternary run holds no trained float, the float baseline is told apart, and no float can hide."""

import json

import pytest
import torch
from torch import Tensor, nn

from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import TritLinear, trit_modules
from tritwise.optim import Muon, TritOptimizer
from tritwise.train.audit import audit, peak_bytes


def train_step(model: ByteLM, optimizers: list[torch.optim.Optimizer]) -> None:
    ids = torch.randint(256, (2, model.config.ctx), generator=torch.Generator().manual_seed(0))
    model.loss(ids, ids.roll(-1, 1)).backward()
    for optimizer in optimizers:
        optimizer.step()


def ternary(width: int = 32, **changes) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(width=width, depth=2, ctx=8, **changes))


def names(report: dict) -> list[str]:
    return [row["name"] for row in report["tensors"]]


@pytest.mark.parametrize("scale_rate", [0.0, 0.05])
@pytest.mark.parametrize("ngrams", [1, 3])
def test_a_ternary_run_holds_no_trained_float(scale_rate, ngrams):
    model = ternary(128, ngrams=ngrams, ngram_rows=512)
    optimizer = TritOptimizer(model, scale_rate=scale_rate)
    train_step(model, [optimizer])
    report = audit(model, [optimizer])
    assert report["float_trainable"] == 0 and report["float_state_bytes"] == 0
    assert 2.0 < report["state_bytes_per_weight"] <= 2.05
    weights = sum(layer.register.numel() for _, layer in trit_modules(model))
    scales = sum(layer.exponent.numel() for _, layer in trit_modules(model))
    rows = sum(layer.register.shape[0] for _, layer in trit_modules(model))
    assert report["weights"] == weights
    momentum = weights + rows + (scales + len(list(trit_modules(model))) if scale_rate else 0)
    exponents = 2 * scales if scale_rate else scales  # with the evidence for their next step
    assert report["bytes_by_role"]["scale"] == exponents and report["bytes_by_role"]["momentum"] == momentum
    assert report["state_bytes"] == weights + exponents + momentum == sum(report["bytes_by_role"].values())
    assert report["state_bytes_per_weight"] == round(report["state_bytes"] / weights, 4)


def test_every_tensor_is_listed_once():
    model = ternary(ngrams=2, ngram_rows=16)
    optimizer = TritOptimizer(model, scale_rate=0.05)
    train_step(model, [optimizer])
    report = audit(model, [optimizer])
    layers = [name for name, _ in trit_modules(model)]
    keys = ("momentum", "row_exponent", "scale_momentum", "scale_row_exponent", "scale_evidence")
    expected = {
        *(name for name, _ in model.named_parameters()),
        *(name for name, _ in model.named_buffers()),
        *(f"{layer}.{key}" for layer in layers for key in keys),
        *(f"{layer}.port" for layer in layers),
    }
    assert len(names(report)) == len(expected) and set(names(report)) == expected
    rows = {row["name"]: row for row in report["tensors"]}
    assert rows["head.register"] == {
        "name": "head.register",
        "role": "head",
        "dtype": "int8",
        "shape": [256, 32],
        "numbers": 256 * 32,
        "bytes": 256 * 32,
        "trainable": True,
        "state": False,
    }
    assert rows["head.momentum"]["role"] == "momentum" and rows["head.momentum"]["state"]
    assert rows["rotary.cos"]["role"] == "table" and not rows["rotary.cos"]["trainable"]
    assert {row["dtype"] for row in report["tensors"] if row["trainable"]} == {"int8"}


def test_ports_are_listed_with_the_memory_they_take():
    model = ternary()
    ports = [row for row in audit(model)["tensors"] if row["role"] == "port"]
    assert len(ports) == len(list(trit_modules(model)))
    assert all(row["bytes"] == 4 and not row["trainable"] and row["dtype"] == "float32" for row in ports)
    for _, layer in trit_modules(model):
        layer.trainable(False)
    assert not any(row["role"] == "port" for row in audit(model)["tensors"])


def test_it_is_plain_json():
    model = ternary()
    optimizer = TritOptimizer(model)
    train_step(model, [optimizer])
    report = audit(model, [optimizer])
    assert json.loads(json.dumps(report)) == report


def test_before_any_step_there_is_no_state():
    model = ternary()
    report = audit(model, [TritOptimizer(model)])
    assert not any(row["state"] for row in report["tensors"]) and report["state_bytes_per_weight"] < 1.1
    assert audit(model)["tensors"] == report["tensors"]


# --- the float baseline ---------------------------------------------------------------------------------------------


def test_the_float_model_with_adamw_takes_twelve_bytes_a_weight():
    model = ternary(64, weights="float")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train_step(model, [optimizer])
    report, weights = audit(model, [optimizer]), sum(p.numel() for p in model.parameters())
    assert report["weights"] == weights
    # The weight, its two moments, and one step counter a tensor.
    counters = len(list(model.parameters()))
    assert report["float_trainable"] == 3 * weights + counters
    assert report["float_state_bytes"] == report["state_bytes"] == 4 * (3 * weights + counters)
    assert report["state_bytes_per_weight"] == pytest.approx(12.0, abs=0.01)
    assert report["bytes_by_role"]["optimizer"] == 4 * (2 * weights + counters)


def test_several_optimizers_are_added_up():
    model = ternary(weights="float")
    matrices = [layer.weight for layer in model.modules() if getattr(layer, "roles", {}).get("weight") == "matrix"]
    others = [model.embed.weight, model.head.weight]
    optimizers = [Muon(matrices), torch.optim.SGD(others, lr=0.1)]
    train_step(model, optimizers)
    report = audit(model, optimizers)
    moved, kept = sum(p.numel() for p in matrices), sum(p.numel() for p in others)
    assert report["float_trainable"] == 2 * moved + kept  # Muon keeps one number a weight, plain SGD none


# --- floats that hide -----------------------------------------------------------------------------------------------


class Sneaky(nn.Module):
    """A ternary layer beside a float one whose tensors are given the roles `roles`."""

    def __init__(self, hidden: nn.Module, roles: dict[str, str]) -> None:
        super().__init__()
        self.layer, self.hidden = TritLinear(8, 8), hidden
        hidden.roles = roles  # type: ignore[assignment]


@pytest.mark.parametrize("role", ["matrix", "vector", "scale", "table"])
def test_a_float_layer_is_found_whatever_role_it_claims(role):
    model = Sneaky(nn.Linear(8, 8), {"weight": role, "bias": role})
    report = audit(model)
    assert report["float_trainable"] == 72 and report["float_state_bytes"] == 288


def test_a_float_layer_without_roles_is_refused():
    with pytest.raises(ValueError, match=r"tensor hidden\.weight has no role"):
        audit(Sneaky(nn.Linear(8, 8), {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_float_buffers_that_claim_to_be_weights_are_found(dtype):
    class Shadow(nn.Module):
        copy: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("copy", torch.zeros(8, 8, dtype=dtype))

    report = audit(Sneaky(Shadow(), {"copy": "matrix"}))
    assert report["float_trainable"] == 64 and report["float_state_bytes"] == 64 * dtype.itemsize


def test_float_optimizer_state_is_found():
    model = ternary()
    optimizer = TritOptimizer(model)
    train_step(model, [optimizer])
    optimizer.state[model.head.register]["master"] = torch.zeros(256, 32)
    report = audit(model, [optimizer])
    assert report["float_trainable"] == 256 * 32 and report["float_state_bytes"] == 4 * 256 * 32
    row = next(row for row in report["tensors"] if row["name"] == "head.master")
    assert row["role"] == "optimizer" and row["state"] and row["trainable"]


def test_a_momentum_in_floats_is_found_by_its_type_not_its_name():
    model = ternary()
    optimizer = TritOptimizer(model)
    train_step(model, [optimizer])
    state = optimizer.state[model.head.register]
    state["momentum"] = state["momentum"].float()
    assert audit(model, [optimizer])["float_trainable"] == 256 * 32


def test_what_an_optimizer_trains_outside_the_model_is_found():
    model, stray = ternary(), nn.Parameter(torch.ones(5))
    stray.grad = torch.ones(5)
    optimizer = torch.optim.SGD([stray], lr=0.1, momentum=0.9)
    assert audit(model, [optimizer])["float_trainable"] == 5
    optimizer.step()
    report = audit(model, [optimizer])
    assert report["float_trainable"] == 10 and report["float_state_bytes"] == 40
    assert names(report).count("(not in the model)") == 1 and "(not in the model).momentum_buffer" in names(report)


def test_the_peak_of_memory_is_a_number_of_bytes():
    assert 50e6 < peak_bytes() < 1e12  # torch alone takes more than 50 MB
