"""Layers whose matrices are decoded ahead: what reads them and what does not, and that none is left afterwards."""

import copy
import weakref

import pytest
import torch
from torch import Tensor, nn

from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import FloatLinear, TritEmbedding, TritLinear, decoded, trit_modules, use_fp8
from tritwise.ops import Operand

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(3))


def model_of(dtype: torch.dtype = torch.float32, **settings: object) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(**{"width": 32, "depth": 2, "ctx": 16, "group": 1 << 16} | settings), dtype)


def passed(model: ByteLM) -> list[Tensor]:
    """The loss, and the gradient of every ternary layer."""
    loss = model.loss(IDS, IDS)
    loss.backward()
    found = [loss.detach()]
    for _, layer in trit_modules(model):
        assert layer.port is not None and layer.port.grad is not None
        found.append(layer.port.grad)
        layer.port.grad = None
    return found


def linears(model: nn.Module) -> list[TritLinear]:
    return [layer for layer in model.modules() if isinstance(layer, TritLinear) and layer.decodes_ahead]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"group": 8},
        {"column_scales": True, "loops": 3, "prelude": 1},  # a block that is run several times reads its own again
        {"graph": True, "experts": 3, "max_moe_iters": 2},
        {"mixer": "lstm"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("savings", [{}, {"checkpoint": True, "loss_chunk": 5}])
def test_a_model_has_the_same_gradients(settings, dtype, savings):
    model = model_of(dtype, **settings)
    for name, value in savings.items():
        setattr(model, name, value)
    expected = passed(model)
    with decoded(model, dtype):
        assert all(layer.operand.serves(dtype) for layer in linears(model))
        found = passed(model)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize(("least", "rounding"), [(80, 6), (16, 8)])
def test_a_model_that_rounds_to_float8_has_the_same_gradients(least, rounding, checkpoint, dtype):
    model = model_of(dtype)
    model.checkpoint = checkpoint
    assert use_fp8(model, least=least) == rounding
    expected = passed(model)
    with decoded(model, dtype):
        found = passed(model)
        halves = (
            [layer.operand.trits8 is None for layer in linears(model)],
            [layer.operand.turned8 is None for layer in linears(model)],
        )
    told = [tuple(not none for none in each) for each in zip(*halves, strict=True)]
    assert told == [layer.rounds for layer in linears(model)] and told[-1] == (False, False)  # the head's
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_lies_decoded_is_read_where_gradients_are_recorded_and_nowhere_else():
    layer, x = TritLinear(24, 16), torch.randn(3, 24)
    before, names = layer(x).detach(), set(layer.state_dict())
    with decoded(layer, torch.float32):
        assert set(layer.state_dict()) == names and not list(layer.buffers())
        layer.register.zero_()  # which nobody may do, and which shows what is read
        assert torch.equal(layer(x), before) and before.any()
        assert not layer(x.bfloat16()).any(), "of another type"
        for no_gradients in (torch.no_grad, torch.inference_mode):
            with no_gradients():
                assert not layer(x).any()
    assert not layer(x).any()


def test_none_is_left_afterwards_not_even_after_an_error():
    model = nn.Sequential(TritEmbedding(7, 16), TritLinear(16, 16), nn.Sequential(TritLinear(16, 8), FloatLinear(8, 8)))
    for error in (None, ZeroDivisionError):
        places: list[weakref.ref[Tensor]] = []
        try:
            with decoded(model, torch.float32):
                places += [weakref.ref(layer.operand.weight) for layer in linears(model)]
                model(torch.tensor([1, 2])).sum().backward()
                if error is not None:
                    raise error
        except ZeroDivisionError:
            pass
        assert len(places) == 2 and all(place() is None for place in places)
        assert all(layer.operand == Operand() for layer in linears(model))


def test_a_frozen_layer_and_a_copy():
    model = nn.Sequential(TritLinear(16, 16), TritLinear(16, 16).trainable(False))
    x = torch.randn(3, 16, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None and model[0].port.grad is not None
    expected, x.grad, model[0].port.grad = (x.grad, model[0].port.grad), None, None
    with decoded(model, torch.float32):
        model(x).sum().backward()
        copies = linears(copy.deepcopy(model))
    assert torch.equal(x.grad, expected[0]) and torch.equal(model[0].port.grad, expected[1])
    assert [layer.operand for layer in copies] == [Operand()] * 2


def test_a_model_of_floats_has_nothing_to_decode():
    model = model_of(weights="float")
    with decoded(model, torch.float32):
        assert not linears(model) and model.loss(IDS, IDS).isfinite()
