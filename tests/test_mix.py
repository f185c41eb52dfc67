"""Mixing with counts: distributions whatever the weights, from the past alone, the same bits however a text is cut,
a gain where text repeats itself, and never worse than the neural model by more than the bound."""

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tritwise.data import open_bytes
from tritwise.errors import UserError
from tritwise.score import score_stream, stream_of
from tritwise.score.counts import DISCOUNT, KINDS, Counts
from tritwise.score.learning import Learning, learning_stream, score_learning
from tritwise.score.mix import LIMIT, LOG_EVERY, Mixed
from tritwise.score.switch import WORST_BITS, Switch

WORST_NATS = WORST_BITS * math.log(2)


class Bigram:
    """A Predictor for which a byte depends on the one before it: log-probabilities [256, V]."""

    context = 64

    def __init__(self, seed: int = 0, sharp: float = 2.0, symbols: int = 256) -> None:
        logits = sharp * torch.randn(256, symbols, generator=torch.Generator().manual_seed(seed))
        self.table = torch.log_softmax(logits, dim=1)

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def mixed(model: Bigram | None = None, **settings) -> Mixed:
    return Mixed(stream_of(model or Bigram()), **({"slots": 1 << 10, "piece": 16} | settings))


def noise(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def tensor(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data.astype(np.int64))


def nats_of(rows: torch.Tensor, data: np.ndarray) -> np.ndarray:
    return -rows.double().gather(1, tensor(data)[:, None])[:, 0].numpy()


# Counts


def plain(text: bytes, context: bytes, byte: int) -> float:
    """p(byte | context) as counts.py defines it, searching the text for every context; newlines stand before it."""
    shorter = plain(text, context[1:], byte) if context else 1 / 256
    k, padded = len(context), b"\n" * len(context) + text
    followers = Counter(padded[i + k] for i in range(len(text)) if padded[i : i + k] == context)
    if not followers:
        return shorter
    kept = max(followers[byte] - DISCOUNT, 0) + DISCOUNT * len(followers) * shorter
    return kept / followers.total()


@given(st.lists(st.sampled_from(b"ab\n\0"), min_size=1, max_size=60).map(bytes), st.integers(1, 20))
@settings(max_examples=25, deadline=None)
def test_counts_agree_with_a_search_of_the_text(text, piece):
    counts, before = Counts(4), np.full(4, ord("\n"), np.uint8)
    for start in range(0, len(text), piece):
        ids = np.frombuffer(text[start : start + piece], np.uint8)
        contexts = counts.contexts(before, ids)
        counts.learn(contexts[:-1], ids)
        before = np.concatenate([before, ids])[-4:]
    p_KTV, known = counts.probabilities(counts.contexts(before, before[:0]))
    context = bytes(before)
    for k in range(5):
        expected = [plain(text, context[4 - k :], byte) for byte in range(256)]
        np.testing.assert_allclose(p_KTV[k, 0], expected, rtol=1e-5)
    padded = b"\n\n\n\n" + text
    assert known[0] == max(
        k for k in range(5) if context[4 - k :] in {padded[i : i + k] for i in range(4 - k, len(padded) - k)}
    )


@pytest.mark.parametrize("length", [300, 5000])
@pytest.mark.parametrize("symbols", [2, 256])
def test_counts_are_distributions_even_where_rows_are_fought_for(length, symbols):
    counts = Counts(5, slots=64)
    counts.prime(noise(length) & (symbols - 1))
    data = noise(200, seed=1) & (symbols - 1)
    p_KTV, _ = counts.probabilities(counts.contexts(data[:5], data[5:]))
    assert p_KTV.min() > 0
    np.testing.assert_allclose(p_KTV.sum(axis=2, dtype=np.float64), 1, atol=1e-5)


def test_counts_that_overflow_fade():
    counts = Counts(4, slots=64)
    counts.prime(np.tile(np.frombuffer(b"ab", np.uint8), 200_000))
    contexts = counts.contexts(np.frombuffer(b"abab", np.uint8), np.empty(0, np.uint8))
    p_KTV, known = counts.probabilities(contexts)
    assert known[0] == 4 and (p_KTV[1:, 0, ord("a")] > 0.99).all()
    counts.prime(np.tile(np.frombuffer(b"ababc", np.uint8), 200))
    assert counts.probabilities(contexts)[0][4, 0, ord("c")] > 0.3


def test_a_row_keeps_the_commonest_followers():
    counts = Counts(3, slots=64)
    others = [b"abc" + bytes([128 + i]) for i in range(KINDS + 1)]
    for piece in (b"abcx" * 50, *[other * (3 + i) for i, other in enumerate(others)]):
        counts.prime(np.frombuffer(piece, np.uint8))
    p = counts.probabilities(counts.contexts(np.frombuffer(b"abc", np.uint8), np.empty(0, np.uint8)))[0][3, 0]
    shown = {int(byte) for byte in np.argsort(-p)[:KINDS]}
    assert shown == {ord("x"), *range(128 + 2, 128 + KINDS + 1)}  # the two rarest have lost their places


# The switch


@given(st.integers(0, 2**32), st.integers(1, 60), st.floats(0.1, 40))
@example(1186, 50, 38.0)  # 100 nats and more for a byte
@settings(max_examples=50, deadline=None)
def test_the_bound_of_the_switch(seed, length, sharp):
    rng = np.random.default_rng(seed)
    trusted, candidate = (sharp * rng.standard_normal((length, 256)) for _ in range(2))
    trusted, candidate = (
        (x - np.log(np.exp(x).sum(1, keepdims=True))).astype(np.float32) for x in (trusted, candidate)
    )
    ids = candidate.argmin(axis=1) if seed % 2 else rng.integers(0, 256, length)
    rows = Switch().blend(trusted, candidate, ids)
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    taken, place = np.cumsum(-rows[np.arange(length), ids], dtype=np.float64), np.arange(1, length + 1)
    base = np.cumsum(-trusted[np.arange(length), ids], dtype=np.float64)
    # A mixture is rounded to float32 once more than the trusted row: by half a unit of its last place at most.
    rounded = np.cumsum(np.spacing(np.abs(rows[np.arange(length), ids])) / 2, dtype=np.float64)
    assert (taken <= base + place * (WORST_NATS + 2e-6) + rounded).all()  # after every byte, not only at the end


def test_a_switch_follows_the_better_one_there_and_back():
    trusted = np.full((400, 256), math.log(0.1 / 254), np.float32)
    trusted[:, :2] = math.log(0.45)
    candidate = np.full((400, 256), -np.inf, np.float32)
    candidate[:, 1] = 0.0  # sure of 1
    switch = Switch()
    there = switch.blend(trusted, candidate, np.ones(400, np.int64))
    assert switch.trusted < 0.01 and -there[50:, 1].mean() < 0.01
    back = switch.blend(trusted, candidate, np.zeros(400, np.int64))  # impossible for the candidate
    assert switch.trusted > 0.99 and -back[:, 0].mean() < -math.log(0.45) + 0.03


# Mixing


def test_rows_sum_to_one_whatever_the_weights():
    stream = mixed(Bigram(sharp=20.0))
    data = np.tile(noise(60), 6)
    rng = np.random.default_rng(3)
    for start in range(0, len(data), 24):
        stream._w_SE[:] = rng.uniform(-LIMIT, LIMIT, stream._w_SE.shape)
        stream._switch.trusted = float(rng.uniform(0, 1))
        rows = stream.read(tensor(data[start : start + 24]))
        assert rows.isfinite().all()
        np.testing.assert_allclose(rows.double().exp().sum(dim=1), 1, atol=2e-5)
        np.testing.assert_allclose(float(stream.log_probs().double().exp().sum()), 1, atol=2e-5)


def test_a_future_byte_never_changes_an_earlier_row():
    data = np.tile(noise(50), 4)
    rows = mixed().read(tensor(data))
    for changed in (0, 15, 16, 99, 199):
        other = data.copy()
        other[changed] ^= 0x55
        again = mixed().read(tensor(other))
        same = (again == rows).all(dim=1)
        assert same[: changed + 1].all()
        if changed < 199:
            assert not same[changed + 1]


def test_the_same_bits_however_a_text_is_cut():
    data = np.tile(noise(90), 4)
    whole = mixed().read(tensor(data))
    stream = mixed()
    for size in (7, 16, 33, 361):
        stream.reset()
        cut = torch.cat([stream.read(tensor(data[i : i + size])) for i in range(0, len(data), size)])
        assert torch.equal(cut, whole)
    stream.reset()
    for byte, row in zip(data, whole, strict=True):  # as a decoder: what is told before the byte is known
        assert torch.equal(stream.log_probs(), row)
        assert torch.equal(stream.read(torch.tensor([byte]))[0], row)
    assert stream.read(torch.empty(0, dtype=torch.int64)).shape == (0, 256)


def test_a_repeated_passage_is_a_gain_and_the_weights_say_why():
    data = np.tile(noise(LOG_EVERY), 3)
    stream = mixed(Bigram(sharp=0.1), slots=1 << 14, piece=128)
    nats = nats_of(stream.read(tensor(data)), data)
    first, *_, last = np.split(nats, 3)
    assert first.mean() > 0.99 * math.log(256) and last.mean() < 1
    names, rows = stream.weight_names, np.array(stream.weights)
    assert names[:4] == ["read", "mixture", "neural", "order 0"] and rows.shape == (3, len(names))
    assert rows[0, 2:].tolist() == [1.0, *[0.0] * 6]  # the neural model alone
    assert rows[-1, 1] > 0.99 and rows[-1, -1] > 0.1 > rows[0, 1]
    assert (np.diff(rows[:, 0]) >= LOG_EVERY).all()


@pytest.mark.parametrize("sharp", [0.0, 2.0])
def test_never_worse_where_counts_are_useless(sharp):
    model = Bigram(sharp=sharp)
    rng, data = np.random.default_rng(5), np.empty(6000, np.uint8)
    before, table = ord("\n"), model.table.double().exp().numpy()
    for i in range(len(data)):  # a text of which the model knows all that can be known
        before = data[i] = rng.choice(256, p=table[before] / table[before].sum())
    stream = mixed(model, slots=1 << 14, piece=128)
    cost = nats_of(stream.read(tensor(data)), data)
    known = nats_of(stream_of(model).read(tensor(data)), data)
    excess = np.cumsum(cost - known) / np.arange(1, len(data) + 1) / math.log(2)
    assert excess.max() < 0.002 and excess.max() <= WORST_BITS + 1e-5


def test_bytes_of_the_train_text_can_be_counted_first():
    train = noise(2000)
    data = train[500:700]
    stream = mixed(train=train, slots=1 << 14)
    first = stream.read(tensor(data))
    assert nats_of(first, data)[100:].mean() < nats_of(mixed(slots=1 << 14).read(tensor(data)), data)[100:].mean() - 0.5
    assert stream.declared["mix_train_bytes"] == 2000 and mixed().declared["mix_train_bytes"] == 0
    stream.reset()
    assert torch.equal(stream.read(tensor(data)), first)


def test_spare_symbols_of_a_model_get_nothing():
    rows = mixed(Bigram(symbols=300)).read(tensor(noise(40)))
    assert rows.shape == (40, 256)
    np.testing.assert_allclose(rows.double().exp().sum(dim=1), 1, atol=1e-5)


def test_a_mixed_stream_passes_the_guards():
    data = open_bytes("shakespeare")[:6000]
    alone = score_stream(stream_of(Bigram()), data)
    result = score_learning(Bigram(), data, Learning(mix=True), train=data[:100], window=32, separator=b"\n\n\n\n")
    assert result.bpb < alone.bpb - 1
    declared = result.declared
    assert declared["adaptation"].startswith("logistic mixing with counts of orders 0 to 5")
    assert declared["extra_bytes"] == 104 and declared["mix_worst_bpb"] == WORST_BITS
    assert declared["mix_seconds"] > 0 and (result.window, result.stride) == (32, 16)
    assert declared["mix_weights"][0] == mixed().weight_names


def test_without_learning_a_stream_is_the_plain_one():
    data = noise(200)
    plain_rows = stream_of(Bigram(), window=32).read(tensor(data))
    assert torch.equal(learning_stream(Bigram(), Learning(), window=32).read(tensor(data)), plain_rows)
    assert score_learning(Bigram(), data, Learning(), window=32).declared["adaptation"] == "none"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"order": 8}, "order of counts out of range: got 8; give 0 to 7"),
        ({"order": -1}, "order of counts out of range"),
        ({"piece": 0}, "piece is 0"),
        ({"rate": -1.0}, "rate is -1.0"),
        ({"rate": math.nan}, "rate is nan"),
        ({"slots": 1000}, "slots are 1000; give a power of two"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        mixed(**settings)


def test_rates_without_training():
    with pytest.raises(UserError, match="piece and rate are of test-time training"):
        learning_stream(Bigram(), Learning(rate=0.1))
