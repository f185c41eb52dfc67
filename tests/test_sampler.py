"""The sampler: batches are pure functions of seed and step, an epoch reads every window once, resuming is checked."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.data import Sampler, open_bytes
from tritwise.errors import UserError


def noise(size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


def equal(left, right) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("mode", ["random", "epoch"])
def test_shapes_types_and_targets_one_byte_on(mode):
    data = noise(5000)
    sampler = Sampler(data, batch=6, ctx=33, seed=1, mode=mode)
    inputs, targets = sampler.batch_at(3)
    assert inputs.shape == targets.shape == (6, 33) and inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous() and targets.is_contiguous()
    for row, start in enumerate(sampler.starts_at(3)):
        assert inputs[row].tolist() == data[start : start + 33].tolist()
        assert targets[row].tolist() == data[start + 1 : start + 34].tolist()


def test_a_memory_map_gives_the_same_batches():
    data = open_bytes("shakespeare")
    assert equal(Sampler(data, 4, 64, 0).batch_at(9), Sampler(np.array(data), 4, 64, 0).batch_at(9))


@given(
    size=st.integers(2, 400),
    batch=st.integers(1, 9),
    ctx=st.integers(1, 50),
    seed=st.integers(0, 2**64 - 1),
    mode=st.sampled_from(["random", "epoch"]),
    steps=st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
)
@settings(max_examples=100, deadline=None)
def test_a_batch_depends_on_seed_and_step_alone(size, batch, ctx, seed, mode, steps):
    data = noise(size)
    if size < ctx + 1:
        with pytest.raises(UserError, match=f"data too short: {size} bytes, ctx {ctx} needs {ctx + 1}; give more data"):
            Sampler(data, batch, ctx, seed, mode)
        return
    straight, resumed = (Sampler(data, batch, ctx, seed, mode, accum=2) for _ in range(2))
    expected = {step: [straight.batch_at(step, micro) for micro in (0, 1)] for step in sorted(steps)}
    for step in steps:  # in another order, by a sampler that never saw the steps before
        for micro in (1, 0):
            assert equal(resumed.batch_at(step, micro), expected[step][micro])


def test_seed_step_and_micro_all_matter():
    data = noise(100_000)
    starts = {
        tuple(Sampler(data, 8, 16, seed).starts_at(step, micro))
        for seed in (0, 1)
        for step in (0, 1, 2**40)
        for micro in (0, 1)
    }
    assert len(starts) == 12


def test_golden_starts():
    # The stream is a promise: a checkpoint of today must go on with the same batches under every later numpy.
    data = np.zeros(1_003_854, np.uint8)
    assert Sampler(data, 4, 256, 0).starts_at(0).tolist() == [2167, 285482, 468797, 619728]
    assert Sampler(data, 4, 256, 0, "epoch").starts_at(0).tolist() == [108284, 358140, 622844, 700156]


def test_random_starts_are_uniform_to_the_last_byte():
    sampler = Sampler(noise(9 + 4), batch=9000, ctx=4, seed=5)
    counts = np.bincount(sampler.starts_at(0), minlength=9)
    assert len(counts) == 9, "a window must end inside the data"
    assert ((counts - 1000) ** 2 / 1000).sum() < 26.1  # chi-square with 8 degrees of freedom, p = 0.001


@given(
    windows=st.integers(1, 40),
    extra=st.integers(0, 200),
    batch=st.integers(1, 7),
    ctx=st.integers(1, 20),
    accum=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_every_epoch_reads_every_window_exactly_once(windows, extra, batch, ctx, accum, seed):
    data = noise(windows * ctx + 1 + extra)
    sampler = Sampler(data, batch, ctx, seed, "epoch", accum=accum)
    per_epoch = sampler.windows_per_epoch
    needed = -(-3 * per_epoch // (batch * accum))
    starts = [start for step in range(needed) for micro in range(accum) for start in sampler.starts_at(step, micro)]
    for epoch in range(3):
        mine = np.sort(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
        offset = mine[0]
        assert mine.tolist() == (offset + ctx * np.arange(per_epoch)).tolist()
        assert 0 <= offset < ctx and mine[-1] + ctx + 1 <= len(data)
        unread = len(data) - 1 - per_epoch * ctx
        assert unread < 2 * ctx


def test_epochs_differ_in_order_and_offset():
    sampler = Sampler(noise(64 * 101), batch=100, ctx=64, seed=0, mode="epoch")
    assert sampler.windows_per_epoch == 100
    first, second = sampler.starts_at(0), sampler.starts_at(1)
    assert first.min() % 64 != second.min() % 64
    assert (np.argsort(first) != np.argsort(second)).sum() > 80
    assert (np.argsort(first) != np.arange(100)).sum() > 80


def test_offsets_of_epochs_use_the_whole_range():
    sampler = Sampler(noise(8 * 3), batch=2, ctx=8, seed=3, mode="epoch")
    assert {int(sampler.starts_at(step).min()) for step in range(200)} == set(range(8))


@pytest.mark.parametrize(
    "change, match",
    [
        ({"batch": 0}, "batch must be at least 1: got 0"),
        ({"ctx": 0}, "ctx must be at least 1: got 0"),
        ({"accum": 0}, "accum must be at least 1: got 0"),
        ({"seed": -1}, "seed out of range: got -1"),
        ({"seed": 2**64}, "seed out of range"),
        ({"mode": "shuffled"}, "unknown sampler mode: 'shuffled'; use one of random, epoch"),
        ({"ctx": 1000}, "data too short: 1,000 bytes, ctx 1,000 needs 1,001; give more data or a smaller ctx"),
    ],
)
def test_bad_settings_are_refused(change, match):
    good = {"data": noise(1000), "batch": 2, "ctx": 8, "seed": 0}
    with pytest.raises(UserError, match=match):
        Sampler(**{**good, **change})


def test_state_survives_json_and_is_accepted_by_an_equal_sampler():
    state = json.loads(json.dumps(Sampler(noise(1000), 2, 8, 7, "epoch", accum=3).state()))
    Sampler(noise(1000), 2, 8, 7, "epoch", accum=3).check(state)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"data": noise(1001)}, "bytes was 1000, is 1001"),
        ({"data": noise(1000, seed=1)}, "digest was "),
        ({"batch": 3}, "batch was 2, is 3"),
        ({"ctx": 9}, "ctx was 8, is 9"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"mode": "epoch"}, "mode was random, is epoch"),
        ({"accum": 2}, "accum was 1, is 2"),
    ],
)
def test_resuming_with_anything_changed_is_refused(change, match):
    good = {"data": noise(1000), "batch": 2, "ctx": 8, "seed": 0}
    with pytest.raises(UserError, match=rf"cannot resume exactly: .*{match}.*; give the same data and settings"):
        Sampler(**{**good, **change}).check(Sampler(**good).state())
