"""Choice of a backend: context manager over environment variable over priority, refusals with a reason, the table."""

import warnings
from types import ModuleType
from typing import Any

import pytest
import torch

from tritwise import ops
from tritwise.errors import UserError
from tritwise.ops import backends
from tritwise.ops.linear import reference
from tritwise.registers import make_key

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def only_the_references(monkeypatch) -> None:
    """Each test starts from tables of its own that hold the references, with no wish and nothing said or run."""
    tables = {operation: {"reference": table["reference"]} for operation, table in backends._backends.items()}
    monkeypatch.setattr(backends, "_backends", tables)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)


def add(operation: str, name: str, **options: Any) -> ModuleType:
    """A fake backend that answers 7."""
    module = ModuleType(name)
    module.forward = lambda x, register, *_: torch.full((*x.shape[:-1], len(register)), 7.0)  # type: ignore[attr-defined]
    backends.implement(operation, name, module, **options)
    return module


def run_linear() -> float:
    """1.0 from the reference, 7.0 from a fake."""
    register = torch.full((1, 1), 81, dtype=torch.int8)
    return ops.linear(torch.ones(1, 1), register, torch.zeros(1, 1, dtype=torch.int8)).item()


def test_every_operation_has_a_reference():
    assert sorted(backends._backends) == [
        "activation",
        "combine",
        "direction",
        "embedding",
        "graph",
        "heads",
        "linear",
        "nibble",
        "scales",
        "update",
    ]
    for operation in backends._backends:
        assert ops.backends_of(operation) == ["reference"]


def test_backends_that_cannot_run_here_are_left_out_and_said(left_out):
    """The tests of operations leave them out in silence; here they are skipped with the reason: pytest -rs."""
    operation, reasons = left_out
    assert reasons.pop("reference") is None
    native = {"cpu"} if operation in ("linear", "embedding", "update") else set()
    assert set(reasons) == {"triton"} | native | ({"tilelang"} if operation == "linear" else set())
    missing = {name: reason for name, reason in reasons.items() if reason}
    assert "cpu" not in missing or "compiler" in missing["cpu"], missing
    if missing:
        pytest.skip("; ".join(f"{operation}: {name} is left out: {reason}" for name, reason in missing.items()))


def test_priority():
    low, high = add("linear", "slow", priority=-5), add("linear", "fast", priority=5)
    assert ops.backends_of("linear") == ["fast", "reference", "slow"]
    assert backends.choose("linear", CPU) is high
    assert run_linear() == 7.0
    assert low is not high


def test_the_context_manager_asks_for_a_backend():
    add("linear", "fake", priority=5)
    with ops.backend("reference"):
        assert run_linear() == 1.0
        with ops.backend("fake"):
            assert run_linear() == 7.0
        assert run_linear() == 1.0
    assert run_linear() == 7.0


def test_the_wish_ends_with_an_exception():
    add("linear", "fake", priority=-5)
    with pytest.raises(RuntimeError), ops.backend("fake"):
        raise RuntimeError
    assert run_linear() == 1.0


def test_the_environment_variable_asks_for_a_backend(monkeypatch):
    add("linear", "fake", priority=-5)
    monkeypatch.setenv("TRITWISE_BACKEND", "fake")
    assert run_linear() == 7.0
    with ops.backend("reference"):  # stronger than the variable
        assert run_linear() == 1.0
    monkeypatch.setenv("TRITWISE_BACKEND", "")
    assert run_linear() == 1.0


def test_a_backend_need_not_implement_every_operation(monkeypatch):
    """The others are chosen as if nobody had asked: not by way of the reference, and a fallback is said."""
    add("linear", "fake", priority=-5)
    fast = add("embedding", "fast", priority=5)
    add("update", "broken", priority=5, refuses=lambda device: "out of order")
    monkeypatch.setenv("TRITWISE_BACKEND", "fake")
    assert run_linear() == 7.0
    assert backends.choose("embedding", CPU) is fast
    with pytest.warns(UserWarning, match="update falls back from broken on cpu: out of order"):
        backends.choose("update", CPU)
    assert ops.backend_table() == {"embedding": "fast", "linear": "fake", "update": "reference"}


def test_an_unknown_name_is_refused(monkeypatch):
    with pytest.raises(UserError, match=r"no backend 'cuda9'; choose one of: reference"), ops.backend("cuda9"):
        pytest.fail("the block must not run")
    monkeypatch.setenv("TRITWISE_BACKEND", "cuda9")
    with pytest.raises(UserError, match="cuda9"):
        run_linear()


def test_asked_for_and_impossible_raises_with_the_reason(monkeypatch):
    add("linear", "fake", priority=5, refuses=lambda device: f"{device.type} has no trits")
    with (
        ops.backend("fake"),
        pytest.raises(UserError, match="backend 'fake' cannot run linear on cpu: cpu has no trits"),
    ):
        run_linear()
    monkeypatch.setenv("TRITWISE_BACKEND", "fake")
    with pytest.raises(UserError, match="no trits"):
        run_linear()


def test_a_fallback_is_said_once():
    add("linear", "fake", priority=5, refuses=lambda device: "out of order")
    with pytest.warns(UserWarning, match="linear falls back from fake on cpu: out of order") as caught:
        assert run_linear() == 1.0
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_linear() == 1.0
        assert backends.choose("linear", CPU) is reference
    assert ops.backend_table()["linear"] == "reference"


def test_a_backend_that_was_not_needed_says_nothing():
    add("linear", "fake", priority=-5, refuses=lambda device: "out of order")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_linear() == 1.0


def test_no_backend_at_all():
    add("nothing", "fake", refuses=lambda device: "never")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="no backend can run nothing on cpu"):
        backends.choose("nothing", CPU)


def test_refusal_is_by_device():
    add("linear", "fake", priority=5, refuses=lambda device: None if device.type == "cuda" else "needs CUDA")
    assert backends.choose("linear", torch.device("cuda")) is not reference
    with pytest.warns(UserWarning, match="needs CUDA"):
        assert backends.choose("linear", CPU) is reference


def test_a_backend_for_other_devices_is_passed_over_in_silence():
    other = add("linear", "fake", priority=5, devices=("cuda", "xpu"), refuses=lambda device: pytest.fail("asked"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_linear() == 1.0
    fake = add("linear", "fake", priority=5, devices=("cpu",))
    assert backends.choose("linear", CPU) is fake is not other


def test_one_reason_is_said_once_for_all_operations():
    for operation in ("linear", "update"):
        add(operation, "fake", priority=5, refuses=lambda device: "out of order")
    with pytest.warns(UserWarning, match="out of order") as caught:
        backends.choose("linear", CPU)
        backends.choose("update", CPU)
    assert len(caught) == 1


def test_the_table_names_what_ran_last():
    assert ops.backend_table() == {}
    run_linear()
    momentum, exponent = torch.ones(2, 3, dtype=torch.int8), torch.zeros(2, 1, dtype=torch.int8)
    ops.direction(momentum, exponent)
    assert ops.backend_table() == {"direction": "reference", "linear": "reference"}
    ops.move_registers(momentum, torch.ones(2, 3), 1.0, make_key(0))
    add("linear", "fake", priority=-5)
    with ops.backend("fake"):
        run_linear()
    table = ops.backend_table()
    assert list(table.items()) == [("direction", "reference"), ("linear", "fake"), ("update", "reference")]
    table.clear()  # a copy
    assert ops.backend_table()
