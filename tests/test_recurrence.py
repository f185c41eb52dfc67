"""Depth recurrence: layers of every depth, an unrolled model as oracle, each part switched on, decoding, training."""

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tritwise import load
from tritwise.bench import entries
from tritwise.data import open_bytes
from tritwise.errors import UserError
from tritwise.models import AtDepth, Block, ByteLM, Layer, ModelConfig, generate
from tritwise.nn import FloatVector, TritVector, rms_norm, tensor_roles, trit_modules
from tritwise.nn.attention import without_own
from tritwise.optim import TritOptimizer
from tritwise.score import score
from tritwise.ship import read_artifact, write_artifact
from tritwise.train import audit, train

PARTS = entries.PARTS | {"exclusive": 2}
PLAIN = ModelConfig(width=32, depth=4, ctx=16, prelude=1, coda=1, loops=3)
FULL = dataclasses.replace(PLAIN, **PARTS)
AT_REST = ("loop_embedding", "value_tables", "repeat_skip", "input_mix", "gains")  # of no effect before they learn


def build(config: ModelConfig, **changes: object) -> ByteLM:
    torch.manual_seed(0)
    return ByteLM(dataclasses.replace(config, **changes)).eval()  # type: ignore[arg-type]


def stirred(config: ModelConfig, **changes: object) -> ByteLM:
    """A model whose learned vectors are not at their base."""
    model = build(config, **changes)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, TritVector):
                module.register.copy_(torch.randint(-40, 41, module.register.shape, generator=generator))
            elif isinstance(module, FloatVector):
                module.weight.copy_(torch.randn(module.weight.shape, generator=generator) * 0.3)
    return model


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


# --- layers ---------------------------------------------------------------------------------------------------------


def test_layers_keep_their_number_at_every_depth():
    assert [tuple(layer) for layer in PLAIN.layers()] == [
        (0, 0, 0),
        (1, 1, 0),
        (2, 2, 0),
        (1, 3, 1),
        (2, 4, 1),
        (1, 5, 2),
        (2, 6, 2),
        (3, 7, 0),
    ]
    assert PLAIN.layers(1) == [Layer(0, 0, 0), Layer(1, 1, 0), Layer(2, 2, 0), Layer(3, 7, 0)]
    assert ModelConfig(depth=2, loops=2).layers() == [Layer(0, 0, 0), Layer(1, 1, 0), Layer(0, 2, 1), Layer(1, 3, 1)]


@given(depth=st.integers(1, 5), prelude=st.integers(0, 3), coda=st.integers(0, 3), loops=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_depth_runs_a_part_of_the_deepest(depth, prelude, coda, loops):
    try:
        config = ModelConfig(depth=depth, prelude=prelude, coda=coda, loops=loops)
    except UserError as error:
        assert prelude + coda >= depth and "leave none" in str(error)
        return
    deepest = config.layers()
    assert [layer.number for layer in deepest] == list(range(prelude + config.core * loops + coda))
    for fewer in range(1, loops + 1):
        layers = config.layers(fewer)
        assert set(layers) <= set(deepest) and len(layers) == prelude + coda + config.core * fewer
        assert {layer.block for layer in layers} == set(range(depth))
    with pytest.raises(UserError, match=f"repeats its core 1 to {loops} times, not {loops + 1}"):
        config.layers(loops + 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loops": 0}, "loops is 0; it must be at least 1"),
        ({"prelude": -1}, "prelude is -1; it must be at least 0"),
        ({"value_tables": -1}, "value_tables is -1; it must be at least 0"),
        ({"leak": 1.5}, "leak is 1.5; it is a slope between 0 and 1"),
        ({"depth": 2, "prelude": 1, "coda": 1}, "prelude 1 and coda 1 leave none of 2 blocks to repeat"),
    ],
)
def test_depths_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)


# --- against an unrolled model, and against a formula ---------------------------------------------------------------


def test_repeats_are_the_unrolled_model_bit_for_bit_and_gradients_add_up():
    looped = build(PLAIN)
    flat = build(PLAIN, depth=8, prelude=0, coda=0, loops=1)
    order = [layer.block for layer in PLAIN.layers()]
    weights = {name: value for name, value in looped.state_dict().items() if not name.startswith("blocks.")}
    for index, block in enumerate(order):
        own = looped.blocks[block].state_dict()
        weights |= {f"blocks.{index}.{name}": value for name, value in own.items()}
    flat.load_state_dict(weights)
    ids, targets = draw(3, 16), draw(3, 16, seed=2)
    losses = [model.loss(ids, targets) for model in (looped, flat)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for index in (1, 2):
        parts = [flat.blocks[at].mlp.up.port.grad for at, block in enumerate(order) if block == index]
        assert len(parts) == 3
        torch.testing.assert_close(looped.blocks[index].mlp.up.port.grad, sum(parts), rtol=1e-4, atol=1e-7)


def by_hand(model: ByteLM, ids: Tensor, loops: int) -> Tensor:
    """The forward pass as section "Model" of the specification says it, with vectors as dense tables."""
    c = model.config
    x = x0 = rms_norm(model.embed(ids))
    past: dict[int, Tensor] = {}
    effective = c.prelude + c.core * loops + c.coda
    for layer in range(effective):
        repeat, block, number = 0, layer, layer
        if layer >= c.prelude:
            repeat, offset = divmod(layer - c.prelude, c.core)
            block = c.prelude + offset
        if layer >= c.prelude + c.core * loops:
            repeat, block = 0, layer - c.core * (loops - 1)
            number = layer + c.core * (c.loops - loops)
        x = x + model.loop_embedding()[number]
        for e, table in enumerate(model.value_tables):
            x = x + model.value_scale()[2 * number + e] * table(ids)
        if repeat > 0:
            x = x + model.repeat_skip()[(repeat - 1) * c.core + block - c.prelude] * past[block]
        b = model.blocks[block]
        x = b.mix()[0] * x + b.mix()[1] * x0
        x = x + b.gain()[0] * b.attention(rms_norm(x), model.rotary, exclusive=layer >= effective - c.exclusive)
        h = b.mlp.up(rms_norm(x))
        x = x + b.gain()[1] * b.mlp.down(rms_norm(torch.where(h > 0, h, 0.5 * h) ** 2))
        past[block] = x
    return c.softcap * torch.tanh(model.head(rms_norm(x)) / c.softcap)


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_all_parts_together_are_the_formula(weights, loops):
    model, ids = stirred(FULL, weights=weights), draw(2, 16)
    torch.testing.assert_close(model(ids, loops=loops), by_hand(model, ids, loops), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize("part", PARTS)
def test_every_part_does_something_and_learns(part, weights):
    config = dataclasses.replace(PLAIN, weights=weights)
    plain, model = build(config), build(config, **{part: PARTS[part]})
    if part in AT_REST:
        model.load_state_dict(plain.state_dict(), strict=False)
        assert torch.equal(model(draw(2, 16)), plain(draw(2, 16)))  # as if it were not there, before it learns
    moved = stirred(config, **{part: PARTS[part]})
    moved.load_state_dict(plain.state_dict(), strict=False)
    assert not torch.allclose(moved(draw(2, 16)), plain(draw(2, 16)), atol=1e-3)
    model.loss(draw(2, 16), draw(2, 16, seed=2)).backward()
    vectors = [module for module in model.modules() if isinstance(module, TritVector | FloatVector)]
    assert bool(vectors) == (part in AT_REST)
    for module in vectors:
        grad = module.port.grad if isinstance(module, TritVector) else module.weight.grad
        assert grad.shape == module().shape and (grad.abs().sum(1) > 0).all()


def test_a_shallower_pass_leaves_what_deeper_ones_learned_alone():
    model = build(FULL)
    model.loss(draw(2, 16), draw(2, 16, seed=2), loops=1).backward()
    used = model.loop_embedding.port.grad.abs().sum(1) > 0
    assert used.tolist() == [True, True, True, False, False, False, False, True]


def test_without_own_takes_the_part_along_the_own_value_away():
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(2, 6, 5, 8, generator=generator)
    v = torch.randn(2, 3, 5, 8, generator=generator)
    v[0, 0, 0] = 0  # nothing to take away
    found = without_own(y, v)
    wide = v.repeat_interleave(2, dim=1)
    assert (found * wide).sum(-1).abs().max() < 1e-4
    unit = torch.nn.functional.normalize(wide, dim=-1)
    torch.testing.assert_close(found, y - (y * unit).sum(-1, keepdim=True) * unit)


# --- reading and scoring at every depth -----------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"heads": 4, "kv_heads": 2, "ngrams": 3, "ngram_rows": 32, "window": 6}])
@pytest.mark.parametrize("loops", [1, 2, 3])
def test_decoding_in_pieces_equals_one_call_and_the_future_stays_unseen(changes, loops):
    model, ids = stirred(FULL, **changes), draw(2, 16)
    whole = model(ids, loops=loops)
    state = model.new_state(2, loops)
    assert len(state.caches) == len(FULL.layers(loops))
    parts = torch.cat([model(piece, state) for piece in ids.split((5, 1, 9, 1), dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    other = ids.clone()
    other[:, 9:] = 7
    assert torch.equal(model(other, loops=loops)[:, :9], whole[:, :9])


def test_a_view_at_a_depth_is_scored_and_sampled_from():
    model, text = stirred(FULL), draw(200).numpy().astype("uint8")
    view = model.at(2)
    assert isinstance(view, AtDepth) and view.context == 16
    deep, shallow = score(model, text), score(view, text)
    assert abs(deep.nats - shallow.nats) > 1e-3
    streamed = score(view, text, mode="stream")
    assert streamed.nats == pytest.approx(shallow.nats, abs=1e-5)
    nats = -view.log_probs(torch.tensor([[10, *text[:15].tolist()]]))[0].gather(1, torch.tensor(text[:16, None]).long())
    into = torch.empty(200).numpy()
    score(view, text, into=into)
    assert into[:16] == pytest.approx(nats[:, 0].detach().numpy(), abs=1e-4)
    assert bytes(generate(view, b"ab", 20, seed=1)) != bytes(generate(model, b"ab", 20, seed=1))
    with pytest.raises(UserError, match="1 to 3 times, not 4"):
        model.at(4)


# --- training -------------------------------------------------------------------------------------------------------


def test_no_part_brings_a_trainable_float():
    model = build(FULL)
    optimizer = TritOptimizer(model, rate=0.02)
    ids, targets = draw(4, 16), draw(4, 16, seed=2)
    start = {name: layer.exponent.clone() for name, layer in trit_modules(model)}
    losses = []
    for _ in range(8):
        loss = model.loss(ids, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    report = audit(model, [optimizer])
    assert report["float_trainable"] == 0 and report["bytes_by_role"]["vector"] > 0
    assert "vector" in set(tensor_roles(model).values())
    for name, layer in trit_modules(model):
        if isinstance(layer, TritVector):
            assert layer.register.any(), name
            assert torch.equal(layer.exponent, start[name])


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_checkpointed_blocks_give_the_same_gradients(weights):
    models = [stirred(FULL, weights=weights) for _ in range(2)]
    models[1].checkpoint, models[1].loss_chunk = True, 8
    ids, targets = draw(2, 16), draw(2, 16, seed=2)
    for model in models:
        model.loss(ids, targets, 2).backward()
    grads = [
        [
            *(layer.port.grad for _, layer in trit_modules(model)),
            *(p.grad for p in model.parameters() if p.requires_grad),
        ]
        for model in models
    ]
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_compiled_losses_at_every_depth_are_the_eager_ones():
    model = stirred(FULL, depth=1, prelude=0, coda=0, loops=2)
    compiled = torch.compile(model.loss, backend="aot_eager", dynamic=False, fullgraph=True)
    ids, targets = draw(2, 16), draw(2, 16, seed=2)
    for loops in (1, 2):
        eager, grads = model.loss(ids, targets, loops), []
        for loss in (eager, compiled(ids, targets, loops)):
            loss.backward()
            grads.append(model.loop_embedding.port.grad)
            model.loop_embedding.port.grad = None
            assert loss.item() == pytest.approx(eager.item(), rel=1e-5)
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_a_vector_is_fixed_point_and_learns_by_the_register_rule():
    vector = TritVector(3, 8, (0.0, 1.0, -0.5))
    with torch.no_grad():
        vector.register.copy_(torch.arange(-12, 12).view(3, 8))
    expected = torch.arange(-12, 12).view(3, 8) / 64 + torch.tensor([0.0, 1.0, -0.5])[:, None]
    assert torch.equal(vector(), expected) and torch.equal(vector().bfloat16()[0].float(), expected[0])
    assert torch.equal(vector.trits(), vector.register)
    for compact in (False, True):  # whatever the settings of matrices are
        torch.manual_seed(0)
        learner = TritVector(2, 16)
        optimizer = TritOptimizer(learner, rate=0.03, scale_rate=0.1, compact=compact)
        optimizer.configure(scale_rate=0.1)
        target = torch.linspace(-0.8, 0.8, 32).view(2, 16)
        for step in range(120):
            for group in optimizer.param_groups:
                group["lr"] = 0.03 * (1 - step / 120)
            (0.5 * (learner() - target) ** 2).sum().backward()
            optimizer.step()
        assert (learner() - target).abs().max() < 0.06
        assert learner.exponent.unique().tolist() == [-48]
    with pytest.raises(ValueError, match="2 bases do not fit 3 rows"):
        FloatVector(3, 4, (0.0, 1.0))
    assert torch.equal(FloatVector(2, 3, 0.25)(), torch.full((2, 3), 0.25))


def test_a_block_without_an_input_mixes_with_itself():
    torch.manual_seed(0)
    config = dataclasses.replace(FULL, gains=False)
    block, x = ByteLM(config).blocks[1], torch.randn(1, 4, 32)
    assert isinstance(block, Block)
    rotary = ByteLM(config).rotary
    assert torch.equal(block(x, rotary), block(x, rotary, None, x))


def test_a_shipped_model_has_the_same_logits_at_every_depth(tmp_path):
    model = stirred(FULL)
    info = write_artifact(model, tmp_path / "model.tritwise")
    reread, _ = read_artifact(tmp_path / "model.tritwise")
    assert set(info.streams) == {"trits", "scales", "vectors"}
    for loops in (1, 2, 3):
        assert torch.equal(model(draw(2, 16), loops=loops), reread(draw(2, 16), loops=loops))
    numbers = sum(m.register.numel() for m in model.modules() if isinstance(m, TritVector))
    assert info.streams["vectors"] <= numbers and info.weights == sum(
        layer.register.numel() for _, layer in trit_modules(model)
    )


def test_a_model_is_scored_and_sampled_at_another_depth(cli, small_config, trained, tmp_path):
    """--loops reaches forward: what comes out is the model at that depth, and nothing else is told for other models."""
    run = tmp_path / "deep"
    train(small_config(depth=3, prelude=1, coda=1, loops=3, loop_embedding=True), run)
    model, data = load(run).model, open_bytes(small_config().train.data)[-300:]
    assert isinstance(model, ByteLM)
    whole = cli("score", run, "--json").json
    assert cli("score", run, "--loops", 3, "--json").json["bpb"] == whole["bpb"]
    shallow = cli("score", run, "--loops", 1, "--json").json
    assert shallow["bpb"] == score(model.at(1), data).bpb != whole["bpb"]
    streamed = cli("score", run, "--loops", 1, "--mode", "stream", "--json").json
    assert streamed["bpb"] == score(model.at(1), data, mode="stream").bpb
    for loops in (1, 2, 3):
        told = cli("sample", run, "--prompt", "To", "--bytes", 12, "--loops", loops, "--json").json["text"]
        assert told.encode() == bytes(generate(model.at(loops), b"To", 12)).decode(errors="replace").encode()
    for words, said in (
        (("score", run, "--loops", 4), "1 to 3 times, not 4"),
        (("score", trained, "--loops", 2), "does not repeat; leave --loops out"),
        (("sample", trained, "--loops", 1), "does not repeat; leave --loops out"),
        (("score", "ngram:3", "--data", "shakespeare", "--loops", 2), "does not repeat"),
        (("score", run, "--loops", 2, "--adapt", "all"), "leave --loops out"),
    ):
        done = cli(*words)
        assert done.code == 2 and said in done.err and done.err.count("\n") == 1


@pytest.mark.parametrize("part", [None, *PARTS])
def test_gradients_in_bfloat16_are_those_of_float32(part):
    """None: all parts. A part that divides by something near zero makes noise of its rounding, and training diverges:
    what the first position finds exclusively is nothing, and was once made as large as the rest."""
    changes = PARTS if part is None else {part: PARTS[part]}
    exact, ids = (
        build(ModelConfig(width=64, depth=3, prelude=1, coda=1, loops=2, ctx=32, weights="float"), **changes),
        draw(8, 33),
    )
    rounded = copy.deepcopy(exact)
    rounded.dtype = torch.bfloat16
    for model in (exact, rounded):
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
    for (name, one), (_, other) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
        assert (one.grad - other.grad).norm() <= 0.03 * one.grad.norm(), name
