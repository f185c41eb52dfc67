"""The ladder: known figures on the bundled text, proper distributions, and agreement with a slow plain n-gram model."""

import lzma
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.data import open_bytes
from tritwise.data.split import split
from tritwise.errors import UserError
from tritwise.score import ladder as module
from tritwise.score.ladder import NGram, ladder, ngram_nats, xz_nats


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.fixture(scope="module")
def parts():
    return split(open_bytes("shakespeare"), "90/10")


@pytest.fixture(scope="module")
def model(parts):
    return NGram(parts["train"], 5)


def plain_probability(train: bytes, context: bytes, byte: int) -> float:
    """The module's formula, written as it stands."""
    if context:
        shorter = plain_probability(train, context[1:], byte)
    else:
        shorter = 1 / 256
    k = len(context)
    followers = Counter(train[i + k] for i in range(len(train) - k) if train[i : i + k] == context)
    if not followers:
        return shorter
    return (followers[byte] + len(followers) * shorter) / (followers.total() + len(followers))


def test_the_rows_on_the_bundled_text(parts):
    rows = {row["name"]: row for row in ladder(parts["train"], parts["val"], orders=(2, 3, 4, 5))}
    assert list(rows) == ["uniform", "unigram", "bigram", "trigram", "4-gram", "5-gram", "xz"]
    known = {"unigram": 3.347, "bigram": 2.486, "trigram": 2.049, "4-gram": 1.774, "5-gram": 1.669}
    for name, nats in known.items():
        assert rows[name]["nats"] == pytest.approx(nats, abs=0.001)
    assert rows["xz"]["nats"] == pytest.approx(1.746, abs=0.02)
    for row in rows.values():
        assert row["bpb"] == pytest.approx(row["nats"] / math.log(2))
        assert "only the last" not in row["note"]
    assert rows["uniform"]["bpb"] == 8


def test_the_default_rows(parts):
    train, val = parts["train"][-20_000:], parts["val"][:2000]
    rows = ladder(train, val)
    assert [row["name"] for row in rows] == ["uniform", "unigram", "5-gram", "xz"]
    assert rows[2]["nats"] == pytest.approx(ngram_nats(train, val, 5))


def test_each_order_up_to_five_is_better_on_the_bundled_text(model, parts):
    nats = [model.nats(parts["val"], order) for order in range(1, 6)]
    assert nats == sorted(nats, reverse=True)
    for order in (1, 3):  # the lower orders inside a model are the models of those orders
        assert ngram_nats(parts["train"], parts["val"], order) == pytest.approx(nats[order - 1], rel=1e-12)


def test_probabilities_add_up_to_one(model, parts):
    val = parts["val"].tobytes()
    seen = [val[i : i + 4] for i in range(0, 2000, 100)]
    unseen = [b"", b"t", b"\xff", b"the\xff", b"\xffthe", b"\0\0\0\0", b"zqzq", b"longer than any context"]
    for context in seen + unseen:
        p = model.distribution(context)
        assert p.shape == (256,) and p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)
    assert model.distribution(b"xxxxthe ").tolist() == model.distribution(b"the ").tolist()


@given(
    train=st.lists(st.integers(253, 255) | st.integers(0, 1), max_size=60).map(bytes),
    val=st.lists(st.integers(253, 255) | st.integers(0, 2), min_size=1, max_size=20).map(bytes),
    order=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_agrees_with_the_formula_on_any_bytes(train, val, order):
    model = NGram(array(train), order)
    slow = [plain_probability(train, val[max(0, i - order + 1) : i], val[i]) for i in range(len(val))]
    assert model.nats(array(val)) == pytest.approx(-sum(map(math.log, slow)) / len(val), rel=1e-9)
    context = val[-order:]
    kept = context[max(0, len(context) - order + 1) :]
    expected = [plain_probability(train, kept, byte) for byte in range(256)]
    assert model.distribution(context) == pytest.approx(expected, rel=1e-9)
    assert model.distribution(context).sum() == pytest.approx(1, abs=1e-12)


def test_nats_are_the_mean_of_the_distributions(model, parts):
    val = parts["val"][:300].tobytes()
    each = [-math.log(model.distribution(val[:i])[val[i]]) for i in range(len(val))]
    assert model.nats(array(val)) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_looking_up_in_chunks_changes_nothing(model, parts, monkeypatch):
    whole = model.nats(parts["val"][:5000])
    monkeypatch.setattr(module, "CHUNK", 333)
    assert model.nats(parts["val"][:5000]) == pytest.approx(whole, rel=1e-12)


def test_without_train_bytes_the_model_is_uniform():
    assert ngram_nats(array(b""), array(b"any"), 5) == pytest.approx(math.log(256))


def test_xz_is_the_growth_of_the_file(parts):
    train, val = parts["train"][:50_000], parts["val"][:5000]
    preset = 9 | lzma.PRESET_EXTREME
    alone, both = (len(lzma.compress(data.tobytes(), preset=preset)) for data in (train, np.append(train, val)))
    assert xz_nats(train, val) == pytest.approx((both - alone) * 8 * math.log(2) / 5000)
    # Random bytes cost 8 bits each, and next to nothing when train holds them, however far back.
    noise = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8)
    far = np.concatenate([noise, np.zeros(9 << 20, np.uint8)])
    assert xz_nats(far[20_000:], noise) == pytest.approx(math.log(256), rel=0.02)
    assert xz_nats(far, noise) < 0.05


def test_a_long_train_is_cut_and_the_note_says_so(parts, monkeypatch):
    monkeypatch.setattr(module, "NGRAM_TRAIN_LIMIT", 10_000)
    monkeypatch.setattr(module, "XZ_TRAIN_LIMIT", 7000)
    train, val = parts["train"][:30_000], parts["val"][:1000]
    rows = {row["name"]: row for row in ladder(train, val)}
    assert rows["5-gram"]["nats"] == pytest.approx(ngram_nats(train[-10_000:], val, 5))
    assert rows["xz"]["nats"] == pytest.approx(xz_nats(train[-7000:], val))
    assert "only the last 10,000 of 30,000 train bytes" in rows["unigram"]["note"]
    assert "only the last 10,000 of 30,000 train bytes" in rows["5-gram"]["note"]
    assert "only the last 7,000 of 30,000 train bytes" in rows["xz"]["note"]


@pytest.mark.parametrize("order", [0, 9])
def test_orders_out_of_range_are_refused(order):
    with pytest.raises(UserError, match=f"n-gram order out of range: got {order}; give 1 to 8"):
        NGram(array(b"abc"), order)


def test_an_empty_val_is_refused():
    with pytest.raises(UserError, match="nothing to score: the val part is empty"):
        ladder(array(b"abc"), array(b""))
