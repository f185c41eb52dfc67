"""The ledger, endless streams and training that reads on: equal to one call over everything, and to an unbroken run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritwise.data import Sampler
from tritwise.errors import UserError
from tritwise.models import ByteLM, DecodeState, ModelConfig
from tritwise.nn import Attention, KVLedger, Rotary, TritLinear
from tritwise.score import EndlessStream, score, score_stream
from tritwise.train import Config, train
from tritwise.train.checkpoint import CheckpointStore

KINDS = {
    "window": {"window": 5},
    "lstm": {"mixer": "lstm"},
    "experts": {"window": 4, "experts": 4, "max_moe_iters": 2},
    "n-grams": {"window": 3, "ngrams": 3, "ngram_rows": 64},
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def models(ctx: int, long: int, **shape: object) -> tuple[ByteLM, ByteLM]:
    """The same weights with a short context and a long one."""
    torch.manual_seed(0)
    model = ByteLM(ModelConfig(width=32, depth=2, ctx=ctx, **shape))  # type: ignore[arg-type]
    other = ByteLM(dataclasses.replace(model.config, ctx=long))
    other.load_state_dict(model.state_dict())
    return model.eval(), other.eval()


@given(
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=9),
    window=st.integers(1, 7),
    kv_heads=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_a_ledger_read_in_pieces_equals_one_call(chunks, window, kv_heads):
    """Positions far beyond the tables of positions, which hold 16."""
    torch.manual_seed(0)
    time, layer = sum(chunks), Attention(16, 2, kv_heads, linear=TritLinear, window=window)
    x, ledger = normal(2, time, 16), KVLedger(window)
    with torch.no_grad():
        parts = [layer(part, Rotary(8, 16), ledger) for part in x.split(chunks, dim=1)]
        whole = layer(x, Rotary(8, 100))
    assert ledger.used == time
    assert ledger.keys is not None and ledger.keys.shape[2] == min(window - 1, time)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_far_positions_turn_as_near_ones():
    """Only distances matter, a million positions on as well: in float32 they would be lost."""
    rotary, q, k = Rotary(16, 64), normal(1, 1, 1, 16), normal(1, 1, 1, 16, seed=1)
    near = (rotary(q, 40) * rotary(k, 33)).sum()
    far = (rotary(q, 1_000_040, endless=True) * rotary(k, 1_000_033, endless=True)).sum()
    torch.testing.assert_close(far, near, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="do not fit a context of 64"):
        rotary(q, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_an_endless_state_equals_one_long_call(kind):
    model, long = models(16, 100, **KINDS[kind])
    ids = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(1))
    state = model.new_state(2, endless=True)
    with torch.no_grad():
        found = torch.cat([model(part, state) for part in ids.split([1, 16, 3, 16, 16, 16, 16, 15, 1], dim=1)], dim=1)
        torch.testing.assert_close(found, long(ids), rtol=1e-4, atol=1e-4)
    assert state.used == 100


@pytest.mark.parametrize("kind", ["window", "experts"])
def test_the_streaming_score_is_the_windowed_score(kind, text):
    """A window that holds all that a byte can see: two layers of a window of 5 see 8 bytes before it."""
    model, _ = models(16, 16, **KINDS[kind])
    data = np.fromfile(text, np.uint8)[:1000]
    windowed, streamed = np.zeros(1000), np.zeros(1000)
    score(model, data, window=16, stride=8, into=windowed)
    told = score_stream(EndlessStream(model), data, into=streamed)
    assert told.bytes == 1000 and np.abs(windowed - streamed).max() < 1e-4
    assert np.abs(windowed - np.log(256)).max() > 0.1  # it does say something


def test_attention_without_a_window_has_no_endless_state():
    model, _ = models(16, 16)
    with pytest.raises(UserError, match=r"without a window cannot .*; train with --set window=64"):
        EndlessStream(model)


def test_gradients_stop_at_the_state():
    model, _ = models(16, 16, window=5)
    ids = torch.randint(0, 256, (2, 16))
    state = model.new_state(2, endless=True)
    model.loss(ids, ids, state=state).backward()
    assert state.caches[0].keys.requires_grad is False
    model.loss(ids, ids, state=state).backward()  # the graph of the first is gone


@pytest.mark.parametrize("kind", ["window", "lstm", "n-grams"])
def test_a_state_comes_back_from_its_tensors(kind):
    model, _ = models(16, 16, **KINDS[kind])
    ids = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(1))
    state = model.new_state(2, endless=True)
    with torch.no_grad():
        for part in ids[:, :32].split(16, dim=1):
            model(part, state)
        other = model.new_state(2, endless=True).restore({name: t.clone() for name, t in state.tensors().items()})
        assert isinstance(other, DecodeState) and other.used == 32
        assert torch.equal(model(ids[:, 32:], state), model(ids[:, 32:], other))


# --- training ---------------------------------------------------------------------------------------------------------


def test_rows_read_on():
    data = np.arange(101, dtype=np.uint8)
    sampler = Sampler(data, batch=3, ctx=8, seed=0, mode="stream")
    assert [sampler.begins(step) for step in range(9)] == [True, False, False, False] * 2 + [True]
    rows = torch.cat([sampler.batch_at(step)[0] for step in range(4)], dim=1)
    assert rows.tolist() == [list(range(first, first + 32)) for first in (0, 33, 66)]
    assert torch.equal(sampler.batch_at(4)[0], sampler.batch_at(0)[0])
    assert torch.equal(sampler.batch_at(2)[1], sampler.batch_at(2)[0] + 1)
    assert Sampler(data, batch=3, ctx=8, seed=0).begins(5)
    for wrong, message in (({"accum": 2}, "micro-batches; use accum 1"), ({"batch": 13}, "data too short")):
        with pytest.raises(UserError, match=message):
            Sampler(data, **{"batch": 3, "ctx": 8, "seed": 0, "mode": "stream", **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [{"window": 6}, {"mixer": "lstm"}], ids=["window", "lstm"])
def test_a_run_that_reads_on_resumes_bit_for_bit(shape, small_config: Callable[..., Config], tmp_path: Path):
    config = small_config(
        preserve_state=True, steps=8, save_interval=3, keep=0, eval_interval=0, sample_bytes=0, **shape
    )
    train(config, tmp_path / "whole")
    (folder,) = [tmp_path / "parts"]
    train(config, folder)
    for late in (folder / "checkpoints").glob("step_*[68].*"):
        late.unlink()
    train(config, folder, resume=True)
    one, two = (CheckpointStore(f / "checkpoints").load().tensors for f in (tmp_path / "whole", folder))
    assert one.keys() == two.keys() and any(name.startswith("stream.") for name in one)
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_what_was_read_before_matters(small_config: Callable[..., Config], tmp_path: Path):
    """The same rows, read on or from nothing each time: other registers."""
    config = small_config(preserve_state=True, window=6, steps=4, eval_interval=0, sample_bytes=0)
    losses = [train(config, tmp_path / "on")["val"]["nats"]]
    losses.append(
        train(
            dataclasses.replace(config, train=dataclasses.replace(config.train, preserve_state=False)), tmp_path / "off"
        )["val"]["nats"]
    )
    assert losses[0] != losses[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "attention without a window has no state to preserve; use --set window=64 or mixer=lstm"),
        ({"window": 4, "accum": 2}, "use accum=1, checkpoint=none, compile=auto"),
        ({"mixer": "lstm", "checkpoint": "block"}, "use accum=1, checkpoint=none, compile=auto"),
    ],
)
def test_settings_that_cannot_read_on_are_refused(changes, message, small_config):
    with pytest.raises(UserError, match=message):
        small_config(preserve_state=True, **changes)
