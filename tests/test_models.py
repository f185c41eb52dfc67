"""The byte LM: its config, shapes, causality, decoding in pieces, n-grams, and one step of training in both modes."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tritwise.errors import UserError
from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import FloatEmbedding, FloatLinear, TritEmbedding, TritLinear, trit_modules
from tritwise.optim import TritOptimizer

TINY = ModelConfig(width=32, depth=2, ctx=16)


def tiny(**changes: object) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(dataclasses.replace(TINY, **changes)).eval()  # type: ignore[arg-type]


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


class Recorded(FloatLinear):
    """A linear layer of another kind, with a constructor of its own."""

    def __init__(self, inputs: int, outputs: int, *, role: str = "matrix", group: int = 256, blocks: int = 1) -> None:
        super().__init__(inputs, outputs, role=role, group=group, blocks=blocks)
        self.made_with = (inputs, outputs, role, group, blocks)


class RecordedTable(TritEmbedding):
    """An embedding of another kind."""


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_other_layers_may_take_the_places(weights):
    config = dataclasses.replace(TINY, weights=weights, ngrams=2, ngram_rows=16, group=8)
    plain = {"trit": (TritLinear, TritEmbedding), "float": (FloatLinear, FloatEmbedding)}[weights]
    for linear, embedding in ((Recorded, None), (None, RecordedTable), (Recorded, RecordedTable)):
        model = ByteLM(config, linear=linear, embedding=embedding)
        found = {type(m) for m in model.modules() if isinstance(m, FloatLinear | TritLinear)}
        assert found == {linear or plain[0]}
        tables = [m for m in model.modules() if isinstance(m, FloatEmbedding | TritEmbedding)]
        assert {type(m) for m in tables} == {embedding or plain[1]} and len(tables) > 1
        loss = model.loss(draw(2, 16), draw(2, 16, seed=2))
        assert loss.shape == () and 4 < loss.item() < 8
    assert model.head.made_with == (32, 256, "head", 8, 1)
    assert model.blocks[0].attention.qkv.made_with == (32, 96, "matrix", 8, 3)


# --- the config -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "heads", "size"),
    [(2, 1, 2), (32, 1, 32), (64, 2, 32), (96, 3, 32), (128, 2, 64), (192, 3, 64), (512, 8, 64)],
)
def test_heads_are_derived_from_the_width(width, heads, size):
    config = ModelConfig(width=width)
    assert (config.heads, config.kv_heads, config.head_size) == (heads, heads, size)


def test_what_is_given_is_not_derived():
    config = ModelConfig(width=64, heads=4, kv_heads=2)
    assert (config.heads, config.kv_heads, config.head_size) == (4, 2, 16)
    assert ModelConfig(**dataclasses.asdict(config)) == config  # a saved config gives the same one


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 0}, "width is 0; it must be at least 1"),
        ({"depth": 0}, "depth is 0; it must be at least 1"),
        ({"ctx": 0}, "ctx is 0; it must be at least 1"),
        ({"mlp_ratio": -1}, "mlp_ratio is -1; it must be at least 1"),
        ({"vocab": 0}, "vocab is 0; it must be at least 1"),
        ({"group": 0}, "group is 0; it must be at least 1"),
        ({"ngrams": 0}, "ngrams is 0; it must be at least 1"),
        ({"ngram_rows": 0}, "ngram_rows is 0; it must be at least 1"),
        ({"ngram_width": -1}, "ngram_width is -1; it must be at least 0 (0 derives it)"),
        ({"word_tables": 3}, "word_tables is 3; choose 0 to 2"),
        ({"heads": -1}, "heads is -1; it must be at least 0 (0 derives it)"),
        ({"kv_heads": -2}, "kv_heads is -2; it must be at least 0 (0 derives it)"),
        ({"window": -1}, "window is -1; it must be at least 0 (0 derives it)"),
        ({"softcap": 0.0}, "softcap is 0.0; it must be above 0 and finite"),
        ({"softcap": math.nan}, "softcap is nan; it must be above 0 and finite"),
        ({"softcap": math.inf}, "softcap is inf; it must be above 0 and finite"),
        ({"weights": "int4"}, "weights is 'int4'; choose trit or float"),
        ({"weight_trits": 6}, "weight_trits is 6; choose 1 to 5"),
        (
            {"weights": "float", "weight_trits": 2},
            "weight_trits is for ternary weights; use weights=trit, or leave it out",
        ),
        ({"mixer": "rnn"}, "mixer is 'rnn'; choose attention or lstm"),
        ({"experts": -1}, "experts is -1; it must be at least 0 (0 derives it)"),
        ({"experts": 4, "active_experts": 5}, "active_experts is 5; choose 1 to the number of experts, 4"),
        ({"max_moe_iters": 5}, "max_moe_iters is 5; choose 1 to 4"),
        ({"width": 100}, "width 100 does not divide into 3 heads of an even size; choose a multiple of 64"),
        ({"width": 33}, "width 33 does not divide into 1 heads of an even size; choose a multiple of 64"),
        ({"width": 64, "heads": 64}, "width 64 does not divide into 64 heads of an even size; choose a multiple of 64"),
        ({"width": 64, "heads": 4, "kv_heads": 3}, "4 heads do not divide into 3 kv_heads; choose a divisor"),
        ({"width": 64, "heads": 2, "kv_heads": 4}, "2 heads do not divide into 4 kv_heads; choose a divisor"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as caught:
        ModelConfig(**changes)
    assert str(caught.value) == message


@given(
    width=st.integers(1, 200),
    heads=st.integers(0, 8),
    kv_heads=st.integers(0, 8),
    ngrams=st.integers(1, 3),
    window=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_every_config_is_refused_or_works(width, heads, kv_heads, ngrams, window):
    try:
        config = ModelConfig(
            width=width, depth=1, ctx=5, heads=heads, kv_heads=kv_heads, ngrams=ngrams, ngram_rows=8, window=window
        )
    except UserError:
        return
    logits = ByteLM(config)(draw(2, 5))
    assert logits.shape == (2, 5, 256) and logits.isfinite().all()


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ngrams": 3, "ngram_rows": 64, "window": 4},
        {"width": 64, "heads": 4, "kv_heads": 2, "mlp_ratio": 2},
        {"vocab": 300, "group": 7},
    ],
)
def test_shapes_and_first_loss(weights, changes):
    model = tiny(weights=weights, **changes)
    ids, targets = draw(4, 16), draw(4, 16, seed=2)
    logits = model(ids)
    assert logits.shape == (4, 16, model.config.vocab) and logits.dtype == torch.float32
    loss = model.loss(ids, targets)
    assert loss.shape == () and loss.dtype == torch.float32
    flat = nn.functional.cross_entropy(logits.double().flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(flat.item(), rel=1e-5)
    assert abs(loss.item() - math.log(model.config.vocab)) < 1.0
    assert model.context == 16


def test_float_mode_is_the_same_model_with_float_weights():
    trit, plain = tiny(ngrams=2, ngram_rows=32), tiny(ngrams=2, ngram_rows=32, weights="float")
    twins = {TritLinear: FloatLinear, TritEmbedding: FloatEmbedding}
    names = {name: type(module) for name, module in trit.named_modules()}
    assert {name: twins.get(kind, kind) for name, kind in names.items()} == {
        name: type(module) for name, module in plain.named_modules()
    }
    for name, layer in trit_modules(trit):
        assert plain.get_submodule(name).weight.shape == layer.register.shape
    assert {p.dtype for p in trit.parameters()} == {torch.int8}
    assert {p.dtype for p in plain.parameters()} == {torch.float32}


def test_float_and_trit_compute_the_same_from_the_same_weights():
    """The float model is given the ternary one's weights: every difference is a difference of structure."""
    trit, plain = tiny(ngrams=3, ngram_rows=32, window=5), tiny(ngrams=3, ngram_rows=32, window=5, weights="float")
    with torch.no_grad():
        for name, layer in trit_modules(trit):
            rows, columns = layer.register.shape
            weight = layer(torch.arange(rows)) if isinstance(layer, TritEmbedding) else layer(torch.eye(columns)).T
            plain.get_submodule(name).weight.copy_(weight)
    ids = draw(2, 12)
    torch.testing.assert_close(plain(ids), trit(ids), rtol=1e-4, atol=1e-4)


def test_the_shape_follows_the_config():
    model = tiny(width=64, depth=3, heads=4, kv_heads=2, mlp_ratio=3, vocab=99, ngrams=3, ngram_rows=50, group=16)
    shapes = {name: tuple(layer.register.shape) for name, layer in trit_modules(model)}
    assert shapes == {
        "embed": (99, 64),
        "ngrams.tables.0": (50, 64),
        "ngrams.tables.1": (50, 64),
        **{f"blocks.{n}.attention.qkv": ((4 + 2 + 2) * 16, 64) for n in range(3)},
        **{f"blocks.{n}.attention.out": (64, 64) for n in range(3)},
        **{f"blocks.{n}.mlp.up": (192, 64) for n in range(3)},
        **{f"blocks.{n}.mlp.down": (64, 192) for n in range(3)},
        "head": (99, 64),
    }
    assert {layer.group for _, layer in trit_modules(model)} == {16}
    assert {block.attention.window for block in tiny(window=5).blocks} == {5}


def test_the_size_of_the_embedding_does_not_matter():
    """The sum of the embeddings is normalised before the first block."""
    model, ids = tiny(ngrams=2, ngram_rows=32), draw(2, 16)
    assert model.ngrams is not None
    base = model(ids)
    with torch.no_grad():
        for table in (model.embed, *model.ngrams.tables):
            table.exponent.add_(16)  # four times as large
    torch.testing.assert_close(model(ids), base, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"window": 3}, {"mixer": "lstm"}, {"graph": True}, {"ngrams": 4, "ngram_rows": 64}),
        {"ngrams": 4, "ngram_rows": 64, "ngram_width": 8},
        {"word_tables": 2, "ngram_rows": 64},
    ],
)
def test_the_future_never_changes_the_past(changes):
    model, ids = tiny(**changes), draw(1, 16)
    base = model(ids)
    for t in range(16):
        other = ids.clone()
        other[0, t] = (ids[0, t] + 77) % 256
        changed = (model(other) != base).any(dim=-1)[0]
        assert not changed[:t].any() and changed[t]


def test_windows_stack_over_depth():
    """With window w, depth d reaches back d * (w - 1) bytes, and no further."""
    model, ids = tiny(window=3), draw(1, 16)
    other = ids.clone()
    other[0, 0] = (ids[0, 0] + 77) % 256
    assert (model(other) != model(ids)).any(dim=-1)[0].tolist() == [True] * 5 + [False] * 11


def test_rows_of_a_batch_do_not_mix():
    model, ids = tiny(ngrams=2, ngram_rows=64), draw(3, 10)
    for row in range(3):
        torch.testing.assert_close(model(ids)[row], model(ids[row : row + 1])[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("softcap", [0.5, 15.0])
def test_logits_stay_within_the_softcap(softcap):
    model = tiny(softcap=softcap)
    with torch.no_grad():
        plain = model.head(torch.full((1, 1, 32), 100.0))
        model.head.exponent.fill_(60)  # a head two hundred times as loud
    logits = model(draw(2, 16))
    assert logits.abs().max() <= softcap and logits.abs().max() > 0.99 * softcap and logits.isfinite().all()
    assert plain.abs().max() > softcap
    torch.testing.assert_close(tiny(softcap=1e6)(draw(2, 16)), tiny(softcap=1e7)(draw(2, 16)), rtol=1e-4, atol=1e-3)


def test_log_probs_are_normalised():
    model, ids = tiny(), draw(2, 16)
    found = model.log_probs(ids)
    assert found.shape == (2, 16, 256) and found.dtype == torch.float32
    torch.testing.assert_close(found.double().exp().sum(-1), torch.ones(2, 16).double(), rtol=1e-5, atol=0)
    picked = found.gather(2, draw(2, 16, seed=2)[..., None]).mean()
    torch.testing.assert_close(-picked, model.loss(ids, draw(2, 16, seed=2)))


def test_bfloat16_activations_come_close():
    torch.manual_seed(0)
    model = ByteLM(TINY, dtype=torch.bfloat16)
    logits, exact = model(draw(2, 16)), tiny()(draw(2, 16))
    assert logits.dtype == torch.float32
    assert (logits - exact).norm() < 0.05 * exact.norm()
    state = model.new_state(2)
    assert state.caches[0].keys.dtype == torch.bfloat16
    model.loss(draw(2, 16), draw(2, 16, seed=2)).backward()
    assert all(m.port is not None and m.port.grad is not None for _, m in trit_modules(model))


def test_seeds():
    def registers(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return [layer.register.detach() for _, layer in trit_modules(ByteLM(TINY))]

    one, same, other = registers(1), registers(1), registers(2)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# --- decoding in pieces ---------------------------------------------------------------------------------------------


@given(
    chunks=st.lists(st.integers(1, 7), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) <= 16),
    ngrams=st.sampled_from([1, 2, 5]),
    window=st.sampled_from([0, 4]),
    batch=st.sampled_from([1, 3]),
)
@settings(max_examples=30, deadline=None)
def test_decoding_in_chunks_equals_one_call(chunks, ngrams, window, batch):
    model = tiny(ngrams=ngrams, ngram_rows=64, window=window, depth=1)
    ids, state = draw(batch, sum(chunks)), model.new_state(batch)
    with torch.no_grad():
        parts, used = [], 0
        for part in ids.split(chunks, dim=1):
            parts.append(model(part, state))
            used += part.shape[1]
            assert state.used == used
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "changes", [{"mixer": "lstm"}, {"graph": True, "ngrams": 3, "ngram_rows": 64}, {"experts": 4, "max_moe_iters": 3}]
)
def test_other_parts_decode_in_chunks_too(changes):
    """An LSTM, a graph that reaches back into earlier calls, experts that are asked for one byte or many."""
    model = tiny(**changes)
    ids, state = torch.randint(97, 100, (3, 16), generator=torch.Generator().manual_seed(1)), model.new_state(3)
    with torch.no_grad():
        parts = [model(part, state) for part in ids.split([1, 6, 2, 7], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(ids), rtol=1e-4, atol=1e-4)
        other = ids.clone()
        other[:, 11:] = 7
        torch.testing.assert_close(model(other)[:, :11], model(ids)[:, :11], rtol=1e-4, atol=1e-4)
    assert state.used == 16


def test_a_byte_meets_as_many_weights_with_experts_as_without():
    plain, mixed = tiny(), tiny(experts=8)
    one, many = (
        sum(p.numel() for p in m.mlp.parameters() if p.shape[1] > 1) for m in (plain.blocks[0], mixed.blocks[0])
    )
    experts = mixed.blocks[0].mlp.experts
    idle = sum(p.numel() for e in experts[2:] for p in e.parameters() if p.shape[1] > 1)
    assert many - idle == one


def test_a_state_reads_up_to_the_context():
    model = tiny(ngrams=2, ngram_rows=64)
    state = model.new_state()
    assert state.used == 0
    with torch.no_grad():
        model(draw(1, 16), state)
        assert state.used == 16 and state.history_BP.shape == (1, 1)
        with pytest.raises(ValueError, match="17 positions do not fit a context of 16"):
            model(draw(1, 1), state)


# --- n-grams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_ngrams_use_the_last_n_bytes_and_no_others(weights):
    """What is added to the byte's own embedding depends on the n - 1 bytes before it, whatever came earlier."""
    model = tiny(ngrams=3, ngram_rows=4096, weights=weights)
    assert model.ngrams is not None
    ids = draw(1, 10)
    base = model.ngrams(ids, 10)
    for place in range(10):
        other = ids.clone()
        other[0, place] = (ids[0, place] + 1) % 256
        changed = (model.ngrams(other, 10) != base).any(dim=-1)[0]
        assert changed.nonzero()[:, 0].tolist() == [t for t in range(10) if place <= t < place + 3]


def test_without_ngrams_there_is_no_table():
    assert tiny(ngrams=1).ngrams is None
    model = tiny(ngrams=4, ngram_rows=64)
    assert model.ngrams is not None and len(model.ngrams.tables) == 3
    assert all(table.sparse and table.role == "embedding" for table in model.ngrams.tables)


def test_every_byte_value_can_be_read():
    model = tiny(ngrams=3, ngram_rows=5, depth=1)
    for ids in (torch.full((1, 8), 255), torch.zeros(1, 8, dtype=torch.int64), torch.arange(256).view(16, 16)):
        assert model(ids).isfinite().all()


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize(
    "changes",
    [
        *({}, {"mixer": "lstm"}, {"graph": True}, {"experts": 2, "max_moe_iters": 2}),
        *({"ngrams": 3, "ngram_rows": 64}, {"ngrams": 3, "ngram_rows": 64, "ngram_width": 8, "ngram_dropout": 0.1}),
    ],
    ids=["plain", "lstm", "graph", "experts", "ngrams", "narrow ngrams"],
)
def test_a_few_steps_on_one_batch_lower_its_loss(weights, changes):
    model = tiny(weights=weights, **changes)
    if weights == "trit":
        optimizer: torch.optim.Optimizer = TritOptimizer(model, rate=0.1)
    else:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids, targets = draw(4, 16), draw(4, 16, seed=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    first = model.loss(ids, targets)
    first.backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not name.endswith("exponent")}
    for _ in range(9):
        optimizer.zero_grad()
        model.loss(ids, targets).backward()
        optimizer.step()
    assert model.loss(ids, targets).item() < first.item() - 0.5


@pytest.mark.parametrize("ctx", [1, 16])
def test_more_than_the_context_is_refused_in_words(ctx: int):
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=ctx))
    model(torch.zeros(1, ctx, dtype=torch.int64))
    with pytest.raises(ValueError, match=f"{ctx + 1} positions do not fit a context of {ctx}; read them in windows"):
        model(torch.zeros(1, ctx + 1, dtype=torch.int64))
