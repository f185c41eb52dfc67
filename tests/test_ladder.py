"""The ladder: known figures on the bundled text, proper distributions, and agreement with slow plain n-gram models."""

import importlib
import lzma
import math
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tritwise.data import open_bytes
from tritwise.data.split import split
from tritwise.errors import UserError
from tritwise.score.ladder import NGram, count_ngrams, ladder, ngram_nats, xz_nats

module = importlib.import_module("tritwise.score.ladder")  # `tritwise.score.ladder` is the function
SMOOTHINGS = ("Witten–Bell", "Kneser–Ney")


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


@pytest.fixture(scope="module")
def parts():
    return split(open_bytes("shakespeare"), "90/10")


@pytest.fixture(scope="module")
def levels(parts):
    return count_ngrams(parts["train"], 5)


@pytest.fixture(scope="module")
def model(levels):
    return NGram(levels)


def plain_witten_bell(train: bytes, order: int) -> Callable[[bytes, int], float]:
    """p(byte | context) as Witten–Bell defines it, searching train for every context."""

    def probability(context: bytes, byte: int) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        k = len(context)
        followers = Counter(train[i + k] for i in range(len(train) - k) if train[i : i + k] == context)
        if not followers:
            return shorter
        return (followers[byte] + len(followers) * shorter) / (followers.total() + len(followers))

    return lambda context, byte: probability(context[max(0, len(context) - order + 1) :], byte)


def plain_kneser_ney(train: bytes, order: int) -> Callable[[bytes, int], float]:
    """p(byte | context) as Kneser–Ney defines it, from dictionaries: context -> byte -> count."""
    followers: list[dict[bytes, Counter[int]]] = []
    discounts: list[float] = []
    for k in range(1, order + 1):
        table: dict[bytes, Counter[int]] = {}
        if k == order:
            grams = [train[i : i + k] for i in range(len(train) - k + 1)]
        else:
            grams = [gram[1:] for gram in {train[i : i + k + 1] for i in range(len(train) - k)}]
        for gram in grams:
            table.setdefault(gram[:-1], Counter())[gram[-1]] += 1
        counts = [count for counter in table.values() for count in counter.values()]
        once, twice = counts.count(1) or 1, counts.count(2) or 1
        followers.append(table)
        discounts.append(once / (once + 2 * twice))

    def probability(context: bytes, byte: int) -> float:
        shorter = probability(context[1:], byte) if context else 1 / 256
        after, discount = followers[len(context)].get(context), discounts[len(context)]
        if after is None:
            return shorter
        kept = max(after[byte] - discount, 0)
        return kept / after.total() + discount * len(after) / after.total() * shorter

    return lambda context, byte: probability(context[max(0, len(context) - order + 1) :], byte)


PLAIN = {"Witten–Bell": plain_witten_bell, "Kneser–Ney": plain_kneser_ney}


def test_the_rows_on_the_bundled_text(parts):
    rows = {row["name"]: row for row in ladder(parts["train"], parts["val"], orders=(2, 3, 4, 5))}
    assert list(rows) == ["uniform", "unigram", "bigram", "trigram", "4-gram", "5-gram", "5-gram KN", "xz"]
    known = {"unigram": 3.347, "bigram": 2.486, "trigram": 2.049, "4-gram": 1.774, "5-gram": 1.669}
    for name, nats in known.items():
        assert rows[name]["nats"] == pytest.approx(nats, abs=0.001)
    assert rows["5-gram KN"]["nats"] == pytest.approx(1.579, abs=0.002)
    assert rows["xz"]["nats"] == pytest.approx(1.746, abs=0.02)
    for row in rows.values():
        assert row["bpb"] == pytest.approx(row["nats"] / math.log(2))
        assert "only the last" not in row["note"]
    assert rows["uniform"]["bpb"] == 8


def test_the_default_rows(parts):
    train, val = parts["train"][-20_000:], parts["val"][:2000]
    rows = ladder(train, val)
    assert [row["name"] for row in rows] == ["uniform", "unigram", "5-gram", "5-gram KN", "xz"]
    assert rows[2]["nats"] == pytest.approx(ngram_nats(train, val, 5))
    assert rows[3]["nats"] == pytest.approx(ngram_nats(train, val, 5, "Kneser–Ney"))
    assert [row["note"] for row in rows[2:4]] == ["interpolated Witten–Bell", "interpolated Kneser–Ney"]


def test_the_longest_order_alone_has_a_kneser_ney_row(parts):
    train, val = parts["train"][-20_000:], parts["val"][:2000]
    names = [row["name"] for row in ladder(train, val, orders=(3, 2))]
    assert names == ["uniform", "unigram", "bigram", "trigram", "trigram KN", "xz"]
    assert [row["name"] for row in ladder(train, val, orders=())] == ["uniform", "unigram", "xz"]


def test_each_order_up_to_five_is_better_on_the_bundled_text(model, parts):
    nats = [model.nats(parts["val"], order) for order in range(1, 6)]
    assert nats == sorted(nats, reverse=True)
    for order in (1, 3):  # the lower orders inside a model are the models of those orders
        assert ngram_nats(parts["train"], parts["val"], order) == pytest.approx(nats[order - 1], rel=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_probabilities_add_up_to_one(levels, parts, smoothing):
    model = NGram(levels, smoothing)
    val = parts["val"].tobytes()
    seen = [val[i : i + 4] for i in range(0, 2000, 100)]
    unseen = [b"", b"t", b"\xff", b"the\xff", b"\xffthe", b"\0\0\0\0", b"zqzq", b"longer than any context"]
    for context in seen + unseen:
        p = model.distribution(context)
        assert p.shape == (256,) and p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)
    assert model.distribution(b"xxxxthe ").tolist() == model.distribution(b"the ").tolist()


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
@given(
    train=st.lists(st.integers(253, 255) | st.integers(0, 1), max_size=60).map(bytes),
    val=st.lists(st.integers(253, 255) | st.integers(0, 2), min_size=1, max_size=20).map(bytes),
    order=st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_agrees_with_the_formula_on_any_bytes(smoothing, train, val, order):
    model, plain = NGram(count_ngrams(array(train), order), smoothing), PLAIN[smoothing](train, order)
    slow = [plain(val[:i], val[i]) for i in range(len(val))]
    assert model.nats(array(val)) == pytest.approx(-sum(map(math.log, slow)) / len(val), rel=1e-9)
    context = val[-order:]
    assert model.distribution(context) == pytest.approx([plain(context, byte) for byte in range(256)], rel=1e-9)
    assert model.distribution(context).sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_agrees_with_the_formula_on_text(parts, smoothing):
    train, val = parts["train"][:4000], parts["val"][:200]
    plain, text = PLAIN[smoothing](train.tobytes(), 5), val.tobytes()
    slow = -sum(math.log(plain(text[:i], text[i])) for i in range(len(text))) / len(text)
    assert ngram_nats(train, val, 5, smoothing) == pytest.approx(slow, rel=1e-9)


def test_kneser_ney_leaves_room_for_new_bytes_when_no_count_is_one():
    # Every pair of four bytes, many times over: no n-gram is rare, so a plain n1 / (n1 + 2 n2) would discount nothing.
    train = array(bytes(a for first in range(4) for second in range(4) for a in (first, second)) * 20)
    model = NGram(count_ngrams(train, 2), "Kneser–Ney")
    for context in (b"", b"\1", b"\7"):
        p = model.distribution(context)
        assert p.min() > 0 and p.sum() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_nats_are_the_mean_of_the_distributions(levels, parts, smoothing):
    model = NGram(levels, smoothing)
    val = parts["val"][:300].tobytes()
    each = [-math.log(model.distribution(val[:i])[val[i]]) for i in range(len(val))]
    assert model.nats(array(val)) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_looking_up_in_chunks_changes_nothing(model, parts, monkeypatch):
    whole = model.nats(parts["val"][:5000])
    monkeypatch.setattr(module, "CHUNK", 333)
    assert model.nats(parts["val"][:5000]) == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("smoothing", SMOOTHINGS)
def test_without_train_bytes_the_model_is_uniform(smoothing):
    assert ngram_nats(array(b""), array(b"any"), 5, smoothing) == pytest.approx(math.log(256))


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


def test_what_is_too_long_is_cut_and_the_note_says_so(parts, monkeypatch):
    monkeypatch.setattr(module, "NGRAM_TRAIN_LIMIT", 10_000)
    monkeypatch.setattr(module, "XZ_TRAIN_LIMIT", 7000)
    monkeypatch.setattr(module, "XZ_VAL_LIMIT", 900)
    train, val = parts["train"][:30_000], parts["val"][:1000]
    rows = {row["name"]: row for row in ladder(train, val)}
    assert rows["5-gram"]["nats"] == pytest.approx(ngram_nats(train[-10_000:], val, 5))
    assert rows["5-gram KN"]["nats"] == pytest.approx(ngram_nats(train[-10_000:], val, 5, "Kneser–Ney"))
    assert rows["xz"]["nats"] == pytest.approx(xz_nats(train[-7000:], val[:900]))
    for name in ("unigram", "5-gram", "5-gram KN"):
        assert rows[name]["note"].endswith("; only the last 10,000 of 30,000 train bytes")
    cut = "; only the last 7,000 of 30,000 train bytes; only the first 900 of 1,000 val bytes"
    assert rows["xz"]["note"].endswith(cut)


@pytest.mark.parametrize("order", [0, 9])
def test_orders_out_of_range_are_refused(order):
    with pytest.raises(UserError, match=f"n-gram order out of range: got {order}; give 1 to 8"):
        count_ngrams(array(b"abc"), order)


def test_an_empty_val_is_refused():
    with pytest.raises(UserError, match="nothing to score: the val part is empty"):
        ladder(array(b"abc"), array(b""))
