"""Test-time training: a byte is scored before it is learned from, once; the model that was given stays as it is; and
with the guard no text and no rate makes it worse than the bound."""

import math
from copy import deepcopy

import numpy as np
import pytest
import torch

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig, generate
from tritwise.nn import trit_modules
from tritwise.score import stream_of
from tritwise.score.adapt import RATES, Adapted
from tritwise.score.learning import Learning, score_learning
from tritwise.score.mix import Mixed
from tritwise.score.protocol import START
from tritwise.score.switch import WORST_BITS

KINDS = {"trit": ("trit", "all", 0.01), "scales": ("trit", "scales", 0.05), "adamw": ("float", "all", 0.003)}


def model_of(weights: str = "trit") -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(ModelConfig(width=32, depth=1, ctx=16, weights=weights)).eval()


def adapted(kind: str = "trit", model: ByteLM | None = None, **settings) -> Adapted:
    weights, train, rate = KINDS[kind]
    return Adapted(model or model_of(weights), **({"train": train, "rate": rate} | settings))


def noise(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, length, dtype=np.uint8)


def tensor(data: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(data.astype(np.int64))


def nats_of(rows: torch.Tensor, data: np.ndarray) -> np.ndarray:
    return -rows.double().gather(1, tensor(data)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("kind", KINDS)
def test_what_moves_is_a_copy(kind):
    model = model_of(KINDS[kind][0])
    before = deepcopy(model.state_dict())
    stream = adapted(kind, model)
    with torch.inference_mode():
        stream.read(tensor(noise(100)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(layer.consumer is None for _, layer in trit_modules(model))
    moved = {name for name, tensor in stream._copy.state_dict().items() if not torch.equal(tensor, before[name])}
    if kind == "scales":
        assert moved and all(name.endswith("exponent") for name in moved)
    elif kind == "trit":
        assert {name for name in before if name.endswith("register")} <= moved
    else:
        assert moved == before.keys()
    numbers = sum(before[name].numel() for name in before if kind != "scales" or name.endswith("exponent"))
    assert f"{numbers:,} numbers" in stream.declared["adaptation"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_future_byte_never_changes_an_earlier_row(kind):
    data = noise(44)
    rows = adapted(kind).read(tensor(data))
    for changed in (0, 7, 8, 15, 30, 43):
        other = data.copy()
        other[changed] ^= 0x55
        same = (adapted(kind).read(tensor(other)) == rows).all(dim=1)
        assert same[: changed + 1].all()
        if changed < 43:
            assert not same[changed + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_score_first_then_learn_and_each_byte_once(kind):
    """Against a loop of its own: pieces of 8 in a window of 16, without caches."""
    data = noise(40)
    stream = adapted(kind, guard=False, piece=8, stride=8)
    twin = adapted(kind, guard=False)  # only its copy and its optimizer are used
    text, found, seen_from, told = np.concatenate([[START], data]), [], 0, torch.empty(0)
    for first in range(0, 40, 8):
        for at in range(first, first + 8):
            # The row of a piece's first byte was told before the step: by the old weights, from all that they held.
            if at > first or first == 0:
                with torch.no_grad():
                    row = twin._copy.log_probs(tensor(text[max(seen_from, at - 15) : at + 1])[None])[0, -1]
            else:
                row = told
            found.append(row)
        with torch.no_grad():
            told = twin._copy.log_probs(tensor(text[max(seen_from, first - 7) : first + 9])[None])[0, -1]
        window = text[max(0, first + 8 - 16) : first + 9]
        rows = twin._copy.log_probs(tensor(window[:-1])[None])[0]
        loss = -rows.gather(1, tensor(window[1:])[:, None])[-8:].mean()
        kept = [layer.register.clone() for _, layer in trit_modules(twin._copy)]
        loss.backward()
        twin._optimizer.step()
        twin._optimizer.zero_grad()
        if kind == "scales":
            for (_, layer), register in zip(trit_modules(twin._copy), kept, strict=True):
                layer.register.data.copy_(register)
        seen_from = first + 1
    rows = stream.read(tensor(data))
    assert stream.steps == 5
    torch.testing.assert_close(rows, torch.stack(found), rtol=1e-3, atol=1e-3)
    plain = stream_of(model_of(KINDS[kind][0]), window=16, stride=8)
    assert torch.equal(rows[:8], plain.read(tensor(data[:8])))
    told, after = plain.read(tensor(data[8:10]))
    assert torch.equal(rows[8], told) and not torch.allclose(rows[9], after)


@pytest.mark.parametrize("guard", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_repeated_passage_is_a_gain(kind, guard):
    data = np.tile(noise(12), 30)
    cost = nats_of(adapted(kind, guard=guard).read(tensor(data)), data)
    known = nats_of(stream_of(model_of(KINDS[kind][0])).read(tensor(data)), data)
    assert cost.mean() < known.mean() - 0.1
    assert cost[-120:].mean() < known[-120:].mean() - 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_the_guard_bounds_what_a_rate_can_spoil(kind):
    model = model_of(KINDS[kind][0])
    written = bytes(generate(model, b"\n", 250, temperature=1.0))  # nobody knows better than the model what comes next
    data = np.frombuffer(written, np.uint8)
    known = nats_of(stream_of(model).read(tensor(data)), data)
    excess = {}
    for guard in (True, False):
        cost = nats_of(adapted(kind, rate=0.3, guard=guard).read(tensor(data)), data)
        excess[guard] = np.cumsum(cost - known) / np.arange(1, 251) / math.log(2)
    assert excess[False][-1] > 0.05
    assert excess[True].max() < 0.002 and excess[True].max() <= WORST_BITS + 1e-5


@pytest.mark.parametrize("mix", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_replays_the_encoder(kind, mix):
    """What is told before a byte is known is what the encoder, in the same pieces, priced it with: bit for bit."""
    data = np.tile(noise(15), 3)

    def stream():
        one = adapted(kind, seed=7)
        return Mixed(one, slots=64, piece=10) if mix else one

    encoder, decoder, decoded = stream(), stream(), []
    rows = torch.cat([encoder.read(tensor(data[i : i + 1])) for i in range(len(data))])
    for row, byte in zip(rows, data, strict=True):
        told = decoder.log_probs()
        assert torch.equal(told, row)
        decoded.append(int(byte))  # a coder finds the byte from `told`
        decoder.read(torch.tensor(decoded[-1:]))
    np.testing.assert_allclose(rows.double().exp().sum(dim=1), 1, atol=1e-5)
    encoder.reset()
    again = torch.cat([encoder.read(tensor(data[i : i + 1])) for i in range(len(data))])
    assert torch.equal(again, rows)
    encoder.reset()
    torch.testing.assert_close(encoder.read(tensor(data)), rows, rtol=1e-2, atol=1e-2)


def test_reading_nothing_and_resetting_early():
    stream = adapted()
    assert stream.read(torch.empty(0, dtype=torch.int64)).shape == (0, 256)
    first = stream.read(tensor(noise(5)))
    stream.reset()
    assert torch.equal(stream.read(tensor(noise(5))), first) and stream.steps == 0


def test_an_adapted_and_mixed_score_passes_the_guards():
    data = np.tile(noise(60), 4)
    result = score_learning(model_of(), data, Learning(adapt="scales", mix=True), stride=8)
    assert (result.window, result.stride, result.bytes) == (16, 8, 240)
    declared = result.declared
    assert declared["adaptation"].startswith("test-time training of scales: ")
    assert f"after every 8 bytes at rate {RATES['scales']:g}; logistic mixing" in declared["adaptation"]
    assert declared["adapt_steps"] == 30 and declared["adapt_seconds"] > 0 and declared["extra_bytes"] == 0
    assert declared["adapt_worst_bpb"] == WORST_BITS


class Weightless:
    """A Predictor without weights."""

    context = 16

    def log_probs(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.full((*ids.shape, 256), -math.log(256))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": "head"}, "there is nothing called 'head' to train; choose all or scales"),
        ({"train": "scales", "model": model_of("float")}, "only a ternary model has scales to train"),
        ({"model": Weightless()}, "Weightless has no weights to train"),
        ({"piece": 17}, "piece 17 does not fit the window; choose 1 to 16"),
        ({"rate": -0.1}, "rate is -0.1"),
        ({"rate": math.inf}, "rate is inf"),
        ({"window": 17}, "window 17 does not fit the model"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        adapted(**settings)
