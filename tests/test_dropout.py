"""Dropout: what is dropped, that its masks follow from where and when alone, and that it acts in training only."""

import dataclasses

import pytest
import torch

from test_recurrence import draw
from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import dropout, noise_of
from tritwise.optim import TritOptimizer
from tritwise.registers import make_key, random_words, words_at
from tritwise.train import audit
from tritwise.train.optimizers import float_optimizers
from tritwise.train.stepper import Stepper

TINY = ModelConfig(width=32, depth=2, ctx=16, dropout=0.3)


def model_of(seed: int = 0, **changes) -> ByteLM:
    torch.manual_seed(seed)
    return ByteLM(dataclasses.replace(TINY, **changes))


def registers(model: ByteLM) -> list[torch.Tensor]:
    return [p.clone() for p in model.parameters()]


def trained(model: ByteLM, steps: int = 3, *, seed: int = 0, taken: int = 0, **how) -> list[torch.Tensor]:
    stepper = Stepper(model, [TritOptimizer(model, 0.1)], seed=seed, **how)
    stepper.taken = taken
    for step in range(taken, taken + steps):
        stepper.step_over([(draw(2, 16, seed=step), draw(2, 16, seed=step + 50))])
    return registers(model)


def test_words_are_the_mix_of_the_stream():
    first, second = (torch.tensor(part, dtype=torch.int32) for part in make_key(3, 1, 4, 1))
    index = torch.tensor([[0, 5], [99, 7]], dtype=torch.int32)
    found = words_at(index, first, second)
    assert found.dtype == torch.int32 and found.unique().numel() == 4
    # random_words mixes i * 0x9E3779B1 + first, which for i = 0 is 0 ^ first
    assert found[0, 0] == random_words(1, make_key(3, 1, 4, 1))[0]
    many = words_at(torch.arange(1 << 16, dtype=torch.int32), first, second)
    assert many.unique().numel() > (1 << 16) - 8
    for bit in range(32):
        assert ((many >> bit) & 1).double().mean().item() == pytest.approx(0.5, abs=0.01)


def test_compiled_it_is_the_same():
    x, noise = torch.randn(3, 40, 16), torch.tensor(noise_of(5, 6, 7))
    compiled = torch.compile(lambda x, noise: dropout(x * 2, 0.3, noise, 4), dynamic=False)
    assert torch.equal(compiled(x, noise), dropout(x * 2, 0.3, noise, 4))


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_an_audit_knows_the_number(weights):
    model = model_of(weights=weights)
    optimizers = [TritOptimizer(model, 0.1)] if weights == "trit" else float_optimizers(model, "adamw", 0.001)
    report = audit(model, optimizers)
    assert bool(report["float_trainable"]) is (weights == "float")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_is_dropped_and_the_mean_stays(dtype):
    x = torch.full((200, 500), 2.0, dtype=dtype)
    y = dropout(x, 0.25, torch.tensor(noise_of(0, 7, 0)), 3)
    assert y.dtype == dtype and y.shape == x.shape
    zeros = (y == 0).float().mean().item()
    assert zeros == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / x.numel()) ** 0.5)
    assert torch.equal(y[y != 0].unique(), torch.tensor([2.0 / 0.75], dtype=dtype))


def test_masks_differ_from_step_to_step_place_to_place_and_seed_to_seed():
    x = torch.ones(4096)
    noises = [noise_of(*where) for where in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 0))]
    assert all(-(2**63) <= noise < 2**63 for noise in noises)
    masks = [dropout(x, 0.5, torch.tensor(noise), place) == 0 for noise in noises for place in (0, 1)]
    for one in range(len(masks)):
        assert torch.equal(masks[one], masks[one].clone())
        for other in range(one):
            assert 0.4 < (masks[one] == masks[other]).float().mean() < 0.6


def test_only_a_loss_with_gradients_drops():
    model, plain = model_of(), model_of(dropout=0.0)
    ids, targets = draw(2, 16), draw(2, 16, seed=1)
    assert torch.equal(model(ids), plain(ids))
    with torch.no_grad():
        assert torch.equal(model.loss(ids, targets), plain.loss(ids, targets))
    assert model.noise is not None and "noise" not in model.state_dict()
    losses = []
    for step in (0, 1, 0):
        model.noise.fill_(noise_of(0, step, 0))
        losses.append(float(model.loss(ids, targets).detach()))
    assert losses[0] == losses[2] != losses[1] and losses[0] != float(plain.loss(ids, targets).detach())


def test_blocks_computed_again_drop_the_same():
    ids, targets = draw(2, 16), draw(2, 16, seed=1)
    grads = []
    for again in (False, True):
        model = model_of(weights="float")
        model.checkpoint = again
        model.noise.fill_(noise_of(0, 3, 0))  # type: ignore[union-attr]
        model.loss(ids, targets).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_training_goes_on_as_if_it_had_not_stopped():
    whole = trained(model_of(), 4)
    model = model_of()
    optimizer = TritOptimizer(model, 0.1)
    for first in (0, 2):
        stepper = Stepper(model, [optimizer])
        stepper.taken = first
        for step in range(first, first + 2):
            stepper.step_over([(draw(2, 16, seed=step), draw(2, 16, seed=step + 50))])
    assert all(torch.equal(a, b) for a, b in zip(whole, registers(model), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(whole, trained(model_of(), 4, seed=1), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(whole, trained(model_of(dropout=0.0), 4), strict=True))


@pytest.mark.gpu
def test_a_recorded_step_drops_anew_each_time():
    ends = []
    for graph in (False, True):
        model = model_of().cuda()
        stepper = Stepper(model, [TritOptimizer(model, 0.1)], graph=graph)
        for step in range(6):
            stepper.step_over([(draw(2, 16, seed=step).cuda(), draw(2, 16, seed=step + 50).cuda())])
        ends.append(registers(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("name", ["dropout", "ngram_dropout"])
@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_that_leaves_nothing_is_refused(share, name):
    with pytest.raises(UserError, match=f"^{name} is"):
        ModelConfig(**{name: share})


def test_rows_are_dropped_whole():
    y = dropout(torch.ones(50, 80, 3), 0.25, torch.tensor(noise_of(0, 7, 0)), 3, rows=True)
    assert torch.equal(y, y[..., :1].expand_as(y))
    assert set(y.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert (y[..., 0] == 0).float().mean().item() == pytest.approx(0.25, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)


TABLES = {"dropout": 0.0, "ngrams": 4, "ngram_rows": 512}


def test_lookups_are_dropped_in_training_and_nothing_else_is():
    model, plain = model_of(**TABLES, ngram_dropout=0.5), model_of(**TABLES)
    ids, targets = draw(2, 16), draw(2, 16, seed=1)
    assert torch.equal(model(ids), plain(ids))
    losses = []
    for step in (0, 1, 0):
        model.noise.fill_(noise_of(0, step, 0))  # type: ignore[union-attr]
        losses.append(model.loss(ids, targets).item())
    assert losses[0] == losses[2] != losses[1] and losses[0] != plain.loss(ids, targets).item()
    # What all lookups but one in 65536 are dropped from reads bytes alone, as does a model without tables.
    alone, bare = model_of(**TABLES, ngram_dropout=65535 / 65536), model_of(**TABLES)
    bare.ngrams = None
    alone.noise.fill_(noise_of(0, 0, 0))  # type: ignore[union-attr]
    assert alone.loss(ids, targets).item() == bare.loss(ids, targets).item()


def test_a_lookup_that_was_dropped_teaches_its_row_nothing():
    model = model_of(**TABLES, ngram_dropout=0.5, weights="float")
    ids = draw(1, 16)
    model.noise.fill_(noise_of(0, 3, 0))  # type: ignore[union-attr]
    model.loss(ids, draw(1, 16, seed=1)).backward()
    tables = model.ngrams.tables  # type: ignore[union-attr]
    met = [int((table.weight.grad != 0).any(1).sum()) for table in tables]
    assert len(set(met)) > 1 and all(2 <= rows <= 14 for rows in met)  # each table draws its own, of 16 lookups


def test_computed_again_and_compiled_the_same_lookups_are_dropped():
    ids, targets = draw(2, 16), draw(2, 16, seed=1)
    grads = []
    for how in ("plain", "again", "compiled"):
        model = model_of(**TABLES, ngram_dropout=0.4, weights="float")
        model.checkpoint = how == "again"
        model.noise.fill_(noise_of(0, 3, 0))  # type: ignore[union-attr]
        if how == "compiled":
            embedded = torch.compile(model.embedded, dynamic=False, backend="aot_eager")
            model.compiled = model._parts._replace(embedded=embedded)
        model.loss(ids, targets).backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*grads, strict=True))


@pytest.mark.gpu
def test_a_recorded_step_drops_other_lookups_each_time():
    ends = []
    for graph in (False, True):
        model = model_of(**TABLES, ngram_dropout=0.4).cuda()
        stepper = Stepper(model, [TritOptimizer(model, 0.1)], graph=graph)
        for step in range(6):
            stepper.step_over([(draw(2, 16, seed=step).cuda(), draw(2, 16, seed=step + 50).cuda())])
        ends.append(registers(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
