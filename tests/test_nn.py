"""Layers: values and gradients against dense float64 autograd, the gradient port, copies, roles and initial values."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tritwise.models import ByteLM, ModelConfig
from tritwise.nn import (
    MLP,
    ROLES,
    FloatEmbedding,
    FloatLinear,
    NGramEmbedding,
    TritEmbedding,
    TritLinear,
    TritModule,
    of_trits,
    tensor_roles,
    trit_modules,
)
from tritwise.nn.ngram import WORD_REACH, word_codes
from tritwise.registers import scale_table, to_trits, zero_fraction


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def port_of(layer: TritModule) -> Tensor:
    assert layer.port is not None
    return layer.port


def grad_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def dense(layer: TritModule) -> Tensor:
    """The weight as float64 [rows, columns], from the definition: the leading trit, or the number that several make,
    times the scale of its group."""
    trits = (layer.register.double() / layer.lead).round()
    columns = torch.arange(layer.register.shape[1])
    return trits * scale_table()[layer.exponent.long() + 128].double()[:, columns // layer.group]


def varied(layer: TritModule) -> TritModule:
    """The same layer with other scales in every group, and registers over their whole range."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        layer.exponent.copy_(torch.randint(-20, 5, layer.exponent.shape, generator=generator))
        layer.register.copy_(torch.randint(-121, 122, layer.register.shape, generator=generator))
    return layer


def assert_close(found: Tensor, oracle: Tensor, tolerance: float = 2e-6) -> None:
    """Within `tolerance` of the oracle's size: errors of a sum go with its terms, not with what is left of it."""
    assert found.shape == oracle.shape
    assert (found.double() - oracle).norm() <= tolerance * oracle.norm()


LAYERS: list[tuple[Callable[[], TritModule], Callable[[], Tensor]]] = [
    (lambda: TritLinear(7, 5, group=3), lambda: normal(2, 7)),
    (lambda: TritEmbedding(9, 6, group=4), lambda: torch.tensor([[0, 8], [3, 3]])),
]


# --- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("leading", "inputs", "outputs", "group"), [((4,), 7, 5, 256), ((2, 3), 300, 9, 256), ((), 12, 8, 5)]
)
def test_linear_is_the_dense_layer(leading, inputs, outputs, group):
    layer = varied(TritLinear(inputs, outputs, group=group))
    x, upstream = normal(*leading, inputs).requires_grad_(), normal(*leading, outputs, seed=1)
    y = layer(x)
    y.backward(upstream)

    x64, weight = x.detach().double().requires_grad_(), dense(layer).requires_grad_()
    y64 = nn.functional.linear(x64, weight)
    y64.backward(upstream.double())
    assert_close(y.detach(), y64.detach())
    assert_close(grad_of(x), grad_of(x64))
    assert_close(grad_of(port_of(layer)), grad_of(weight))


@pytest.mark.parametrize(("shape", "rows", "columns", "group"), [((2, 5), 11, 6, 256), ((40,), 11, 6, 4)])
def test_embedding_is_the_dense_layer(shape, rows, columns, group):
    layer = varied(TritEmbedding(rows, columns, group=group))
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(2))
    upstream = normal(*shape, columns, seed=1)
    y = layer(ids)
    y.backward(upstream)

    weight = dense(layer).requires_grad_()
    y64 = nn.functional.embedding(ids, weight)
    y64.backward(upstream.double())
    assert y.dtype == torch.float32 and torch.equal(y.detach().double(), y64.detach())
    assert_close(grad_of(port_of(layer)), grad_of(weight))


def test_bfloat16_activations_stay_bfloat16():
    layer, x = varied(TritLinear(64, 32)), normal(4, 64).bfloat16().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.dtype == grad_of(x).dtype == torch.bfloat16
    assert_close(y.detach(), x.detach().double() @ dense(layer).T, 2**-8)
    assert grad_of(port_of(layer)).dtype == torch.float32


@pytest.mark.parametrize("linear", [TritLinear, FloatLinear])
def test_mlp_and_its_gradients_against_the_formula(linear):
    torch.manual_seed(3)
    mlp, x = MLP(12, 20, linear=linear), normal(3, 12).requires_grad_()
    mlp(x).backward(normal(3, 12, seed=1))

    layers = [mlp.up, mlp.down]
    up, down = (
        (dense(m) if isinstance(m, TritModule) else m.weight.detach().double()).requires_grad_() for m in layers
    )
    x64 = x.detach().double().requires_grad_()
    squared = torch.relu(x64 @ up.T) ** 2
    y64 = squared / (squared.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ down.T
    y64.backward(normal(3, 12, seed=1).double())
    assert_close(mlp(x).detach(), y64.detach(), 1e-5)
    assert_close(grad_of(x), grad_of(x64), 1e-5)
    for layer, weight in zip(layers, (up, down), strict=True):
        found = port_of(layer) if isinstance(layer, TritModule) else layer.weight
        assert_close(grad_of(found), grad_of(weight), 1e-5)


def test_float_twins_are_torchs_own_layers():
    torch.manual_seed(4)
    linear, embedding = FloatLinear(6, 4), FloatEmbedding(5, 3)
    x, ids = normal(2, 6), torch.tensor([[1, 4]])
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight))
    assert linear(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(embedding(ids), embedding.weight[ids])


# --- the gradient port ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "inputs"), LAYERS)
def test_the_port_holds_no_weight_and_is_no_part_of_the_model(make, inputs):
    layer = make()
    port = port_of(layer)
    assert port.shape == layer.register.shape and port.dtype == torch.float32 and port.requires_grad
    assert port.stride() == (0, 0) and port.untyped_storage().nbytes() == 4
    layer(inputs()).sum().backward()
    assert port.count_nonzero() == 0
    assert [name for name, _ in layer.named_parameters()] == ["register", "exponent"]
    assert list(layer.state_dict()) == ["register", "exponent"] and not list(layer.buffers())
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {torch.int8}


@pytest.mark.parametrize(("make", "inputs"), LAYERS)
def test_the_consumer_is_given_each_gradient_once_and_keeps_it(make, inputs):
    layer, plain = make(), make()
    plain.load_state_dict(layer.state_dict())
    seen: list[tuple[TritModule, Tensor]] = []
    layer.consumer = lambda layer, grad: seen.append((layer, grad))
    for _ in range(2):
        layer(inputs()).sum().backward()
        assert port_of(layer).grad is None
    plain(inputs()).sum().backward()
    assert [m for m, _ in seen] == [layer, layer]
    assert all(torch.equal(grad, grad_of(port_of(plain))) for _, grad in seen)


@pytest.mark.parametrize(("make", "inputs"), LAYERS)
def test_without_a_consumer_gradients_add_up_in_the_port(make, inputs):
    layer = make()
    layer(inputs()).sum().backward()
    first = grad_of(port_of(layer)).clone()
    layer(inputs()).sum().backward()
    assert torch.equal(grad_of(port_of(layer)), 2 * first)


def test_a_layer_used_twice_in_one_backward_is_consumed_once():
    layer, x = TritLinear(4, 4), normal(3, 4)
    seen: list[Tensor] = []
    layer.consumer = lambda _, grad: seen.append(grad)
    (layer(x).sum() + 2 * layer(-x).sum()).backward()
    assert len(seen) == 1
    assert_close(seen[0], -x.double().sum(0).expand(4, 4))


@pytest.mark.parametrize(("make", "inputs"), LAYERS)
def test_a_frozen_layer_computes_the_same_and_has_no_gradient(make, inputs):
    layer = make()
    open_output = layer(inputs())
    assert layer.trainable(False) is layer and layer.port is None
    frozen_output = layer(inputs())
    assert torch.equal(open_output, frozen_output)
    assert open_output.requires_grad and not frozen_output.requires_grad


def test_a_frozen_layer_hands_the_gradient_on_and_can_be_opened_again():
    layer, x = TritLinear(5, 3), normal(2, 5).requires_grad_()
    seen: list[Tensor] = []
    layer.consumer = lambda _, grad: seen.append(grad)
    layer.trainable(False)
    layer(x).sum().backward()
    assert_close(grad_of(x), dense(layer).sum(0).expand(2, 5))
    assert seen == []
    layer.trainable()
    layer(x).sum().backward()
    assert len(seen) == 1


# --- copies and moves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "inputs"), LAYERS)
def test_a_deep_copy_has_its_own_registers_and_port_and_no_consumer(make, inputs):
    layer = make()
    layer.consumer = lambda *_: pytest.fail("the copy's gradient went to the original's optimizer")
    twin = copy.deepcopy(layer)
    assert layer.port is not None and layer.consumer is not None  # copying changes nothing
    assert twin.port is not layer.port and twin.consumer is None
    assert twin.register.data_ptr() != layer.register.data_ptr()
    assert torch.equal(twin(inputs()), layer(inputs()))
    twin(inputs()).sum().backward()
    assert grad_of(port_of(twin)).shape == layer.register.shape and port_of(layer).grad is None


def test_a_deep_copy_of_a_frozen_layer_is_frozen():
    assert copy.deepcopy(TritLinear(3, 3).trainable(False)).port is None


def test_a_deep_copy_of_a_model_computes_the_same():
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=8, ngrams=2, ngram_rows=16))
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))


@pytest.mark.parametrize("convert", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()])
def test_changing_the_float_type_leaves_registers_alone(convert):
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=8))
    before = {name: p.clone() for name, p in model.named_parameters()}
    ports = [layer.port for _, layer in trit_modules(model)]
    convert(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.int8 and torch.equal(parameter, before[name])
    assert [layer.port for _, layer in trit_modules(model)] == ports


def test_registers_refuse_to_become_floats():
    with pytest.raises(ValueError, match=r"move them with \.to\(device\)"):
        TritLinear(3, 3).type(torch.float32)


def test_moving_to_another_device_moves_the_port():
    layer = TritLinear(3, 3).to("meta")
    assert port_of(layer).device.type == "meta" and port_of(layer).shape == (3, 3)
    assert TritLinear(3, 3).trainable(False).to("meta").port is None


# --- initial values -------------------------------------------------------------------------------------------------


def test_trits_are_what_the_matmul_uses():
    layer = TritLinear(5, 7, group=2)
    with torch.no_grad():
        layer.exponent.zero_()
        layer.register[0] = torch.tensor([-121, -41, -40, 40, 41])
    trits = layer.trits()
    assert trits.dtype == torch.int8 and trits.shape == (7, 5)
    assert trits[0].tolist() == [-1, -1, 0, 0, 1]
    assert torch.equal(trits.float(), layer(torch.eye(5)).T)
    with torch.no_grad():
        layer.register.neg_()
    assert torch.equal(layer.trits(), -trits)  # of now, not of when they were first asked for


@pytest.mark.parametrize(("trits", "lead", "most"), [(2, 27, 4), (3, 9, 13), (4, 3, 40), (5, 1, 121)])
def test_a_weight_of_several_trits_is_the_number_that_they_make(trits, lead, most):
    layer = of_trits(TritLinear, trits)(243, 1, group=243)
    assert isinstance(layer, TritLinear) and (layer.weight_trits, layer.lead) == (trits, lead)
    with torch.no_grad():
        layer.exponent.zero_()
        layer.register[0] = torch.arange(-121, 122)
    places = 3 ** torch.arange(trits).flip(0)
    numbers = (to_trits(layer.register[0], trits) * places).sum(1)
    assert layer.trits().dtype == torch.int8 and torch.equal(layer.trits()[0].long(), numbers)
    assert torch.equal(layer(torch.eye(243)).squeeze(1), numbers.float())
    assert layer.trits().unique().tolist() == list(range(-most, most + 1))
    assert f"weight_trits={trits}" in repr(layer)


def test_manual_seed_fixes_the_registers():
    def registers(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return TritLinear(16, 16).register.detach()

    assert torch.equal(registers(1), registers(1))
    assert not torch.equal(registers(1), registers(2))
    torch.manual_seed(1)
    assert not torch.equal(TritLinear(16, 16).register, TritLinear(16, 16).register)  # two layers differ


@pytest.mark.parametrize("inputs", [16, 100, 384])
@pytest.mark.parametrize("linear", [TritLinear, FloatLinear, of_trits(TritLinear, 2), of_trits(TritLinear, 3)])
def test_linear_weights_start_with_deviation_one_over_root_fan_in(linear, inputs):
    torch.manual_seed(0)
    layer = linear(inputs, 400)
    weight = dense(layer) if isinstance(layer, TritModule) else layer.weight.detach().double()
    # Scales come in steps of 9 %, so the nearest is within 4.5 %; the rest is sampling.
    assert weight.std().item() == pytest.approx(1 / math.sqrt(inputs), rel=0.06)
    assert abs(weight.mean().item()) < 4 / math.sqrt(inputs * weight.numel())


@pytest.mark.parametrize("embedding", [TritEmbedding, FloatEmbedding, of_trits(TritEmbedding, 3)])
def test_embeddings_start_with_unit_deviation(embedding):
    torch.manual_seed(0)
    layer = embedding(256, 100)
    weight = dense(layer) if isinstance(layer, TritModule) else layer.weight.detach().double()
    assert weight.std().item() == pytest.approx(1.0, rel=0.06)


def test_just_over_half_the_weights_start_at_zero():
    torch.manual_seed(0)
    assert zero_fraction(TritLinear(300, 300).register) == pytest.approx(0.55, abs=0.015)


def test_reset_parameters_starts_again():
    layer = TritLinear(50, 50)
    before = layer.register.clone()
    layer.reset_parameters(span=1.4)
    assert not torch.equal(layer.register, before) and layer.register.abs().max() > 81
    layer.reset_parameters(span=0.4)  # every weight is zero: the scale stays finite
    assert zero_fraction(layer.register) == 1.0 and layer(normal(1, 50)).count_nonzero() == 0


@given(rows=st.integers(1, 12), columns=st.integers(1, 40), group=st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_shapes(rows, columns, group):
    layer = TritLinear(columns, rows, group=group)
    assert layer.register.shape == (rows, columns) and layer.exponent.shape == (rows, math.ceil(columns / group))
    assert len(set(layer.exponent.flatten().tolist())) == 1
    assert layer(torch.ones(columns)).shape == (rows,)


# --- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize("ngrams", [1, 3])
def test_every_tensor_of_a_byte_lm_has_a_role(weights, ngrams):
    model = ByteLM(ModelConfig(width=32, depth=2, ctx=8, weights=weights, ngrams=ngrams, ngram_rows=16))
    roles = tensor_roles(model)
    assert set(roles) == {n for n, _ in model.named_parameters()} | {n for n, _ in model.named_buffers()}
    assert set(roles.values()) <= set(ROLES)
    weight = "register" if weights == "trit" else "weight"
    assert roles[f"embed.{weight}"] == "embedding" and roles[f"head.{weight}"] == "head"
    assert roles[f"blocks.1.mlp.up.{weight}"] == "matrix" and roles["rotary.cos"] == "table"
    assert sum(role == "embedding" for role in roles.values()) == ngrams


class Gain(nn.Module):
    """A layer with a parameter, a buffer, and the roles that it is given."""

    def __init__(self, roles: dict[str, str] | None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))
        self.register_buffer("count", torch.zeros(3))
        if roles is not None:
            self.roles = roles


@pytest.mark.parametrize(
    ("roles", "culprit"),
    [
        (None, "inner.gain"),
        ({"count": "table"}, "inner.gain"),
        ({"gain": "vector"}, "inner.count"),
        ({"gain": "weights", "count": "table"}, "inner.gain"),
    ],
)
def test_a_tensor_without_a_role_is_named(roles, culprit):
    model = nn.ModuleDict({"first": TritLinear(3, 3), "inner": Gain(roles)})
    with pytest.raises(ValueError, match=rf"tensor {culprit} has no role; declare it in Gain\.roles"):
        tensor_roles(model)


def test_declared_roles_are_found_at_the_top_too():
    assert tensor_roles(Gain({"gain": "vector", "count": "table"})) == {"gain": "vector", "count": "table"}
    with pytest.raises(ValueError, match="tensor gain has no role"):
        tensor_roles(Gain({}))


def test_trit_modules_come_in_order_and_once():
    shared = TritLinear(3, 3)
    model = nn.ModuleDict({"b": shared, "a": nn.Linear(3, 3), "again": shared, "c": TritEmbedding(4, 3)})
    assert [name for name, _ in trit_modules(model)] == ["b", "c"]
    assert [name for name, _ in trit_modules(shared)] == [""]


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TritLinear(0, 3), "at least one row and one column, not 3 x 0"),
        (lambda: TritEmbedding(0, 3), "at least one row and one column, not 0 x 3"),
        (lambda: TritLinear(3, 3, role="weights"), "there is no role 'weights'; choose one of matrix, embedding"),
        (lambda: TritLinear(3, 8, blocks=3), "8 rows do not divide into 3 blocks"),
        (lambda: TritLinear(3, 3, weight_trits=6), "weight_trits is 6; choose one of 1, 2, 3, 4, 5"),
        (lambda: TritLinear(3, 3, group=0), "group is 0 and blocks is 1; both must be at least 1"),
        (lambda: TritLinear(3, 3, blocks=0), "group is 256 and blocks is 0; both must be at least 1"),
    ],
)
def test_what_cannot_be_built_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_blocks_and_role_are_kept():
    layer = TritLinear(4, 9, role="head", group=2, blocks=3)
    assert (layer.blocks, layer.role, layer.sparse) == (3, "head", False)
    assert "rows=9, columns=4, role=head, group=2, blocks=3" in repr(layer)
    assert TritEmbedding(4, 2, sparse=True).sparse and TritEmbedding(4, 2).role == "embedding"


# --- n-gram embeddings ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("embedding", [TritEmbedding, FloatEmbedding, of_trits(TritEmbedding, 3)])
def test_ngram_embedding_is_a_sum_of_one_row_of_each_table(embedding):
    torch.manual_seed(0)
    layer = NGramEmbedding(64, 5, 3, embedding=embedding)
    asked: list[Tensor] = []
    for table in layer.tables:
        table.register_forward_hook(lambda _module, inputs, _output: asked.append(inputs[0]))
    ids = torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1))
    out = layer(ids, 9)
    assert len(asked) == 2 and all(slot.shape == (2, 9) for slot in asked)
    assert torch.equal(out, layer.tables[0](asked[0]) + layer.tables[1](asked[1]))


@pytest.mark.parametrize(("embedding", "linear"), [(TritEmbedding, TritLinear), (FloatEmbedding, FloatLinear)])
def test_narrow_rows_of_all_tables_go_through_one_matrix(embedding, linear):
    torch.manual_seed(0)
    layer = NGramEmbedding(64, 20, 3, embedding=embedding, linear=linear, inner=5)
    asked: list[Tensor] = []
    for table in layer.tables:
        table.register_forward_hook(lambda _module, inputs, _output: asked.append(inputs[0]))
    out = layer(torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(1)), 9)
    assert out.shape == (2, 9, 20) and isinstance(layer.up, linear)
    first, second = (table(ids) for table, ids in zip(layer.tables, tuple(asked), strict=True))
    assert first.shape == (2, 9, 5) and torch.equal(out, layer.up(torch.cat((first, second), dim=-1)))


@given(st.lists(st.integers(0, 255), min_size=1, max_size=12), st.integers(1, 5000), st.integers(2, 6))
@settings(max_examples=60, deadline=None)
def test_hashes_of_any_bytes_are_in_range(text, rows, longest):
    layer = NGramEmbedding(rows, 1, longest, embedding=Recorder)
    layer(torch.tensor([text]), len(text))
    for table in layer.tables:
        assert isinstance(table, Recorder)
        assert table.seen.shape == (1, len(text)) and table.seen.min() >= 0 and table.seen.max() < rows


class Recorder(nn.Module):
    """Stands for an embedding and remembers the ids it is asked for."""

    def __init__(self, rows: int, width: int, *, group: int, sparse: bool) -> None:
        super().__init__()
        self.seen = torch.empty(0)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        self.seen = ids
        return ids[..., None].to(dtype)


def slots(text: list[int], longest: int, rows: int = 1 << 20) -> list[list[int]]:
    layer = NGramEmbedding(rows, 1, longest, embedding=Recorder)
    layer(torch.tensor([text]), len(text))
    return [table.seen[0].tolist() for table in layer.tables if isinstance(table, Recorder)]


def test_a_hash_depends_on_exactly_the_last_n_ids():
    text = [10, 20, 30, 40, 50, 60, 70, 80]
    base = slots(text, 4)
    for place in range(len(text)):
        changed = slots([*text[:place], 99, *text[place + 1 :]], 4)
        for n, (old, new) in enumerate(zip(base, changed, strict=True), start=2):
            moved = [t for t in range(len(text)) if old[t] != new[t]]
            assert moved == [t for t in range(len(text)) if place <= t < place + n]


def test_equal_ngrams_hash_alike_and_order_matters():
    pairs, triples = slots([1, 2, 3, 9, 1, 2, 3, 2, 1], 3)
    assert pairs[1] == pairs[5] and triples[2] == triples[6]
    assert pairs[1] != pairs[8]  # (1, 2) and (2, 1)


def test_before_the_start_is_no_byte():
    # A pair that starts with nothing is another pair than any that starts with byte 0.
    assert slots([7], 2)[0][0] not in {slots([first, 7], 2)[0][1] for first in range(256)}


def test_golden_hashes():
    """A shipped model was trained with these rows: another hash is another model."""
    assert slots(list(b"Tritwise\xff"), 3, 4096) == [
        [1942, 955, 845, 3660, 879, 1215, 216, 1888, 1241],
        [3217, 513, 920, 3203, 1457, 844, 3727, 801, 3195],
    ]


def words_at(text: str | bytes, words: int) -> list[int]:
    """The code of each byte's word."""
    raw = text if isinstance(text, bytes) else text.encode()
    return word_codes(torch.tensor([list(raw)]), words)[0].tolist()


def word_slowly(text: bytes, place: int, words: int) -> bytes:
    """What such a code stands for, told byte by byte; empty if it goes back to the start of the text."""
    start, left = place, words
    while place - start < WORD_REACH[words]:
        if start == 0:
            return b""
        byte = text[start - 1]
        left -= byte < 128 and not chr(byte).isalpha()
        if left == 0:
            break
        start -= 1
    return text[start : place + 1].lower()  # of bytes this is that of ASCII


@given(st.text("aAbÄß, .1", min_size=1, max_size=60), st.sampled_from([1, 2]))
@settings(max_examples=200, deadline=None)
def test_codes_tell_words_apart_and_nothing_else(text, words):
    raw = text.encode()
    pairs = {(word_slowly(raw, place, words), code) for place, code in enumerate(words_at(raw, words))}
    pairs = {(name, code) for name, code in pairs if name}
    assert len({name for name, _ in pairs}) == len({code for _, code in pairs}) == len(pairs)


def test_a_word_is_its_letters_in_any_case_up_to_what_is_none():
    one = words_at("The cat, the hat (The cat) Café café", 1)
    text = "The cat, the hat (The cat) Café café".encode()
    ends = [place for place in range(len(text)) if text[place : place + 1] in b" ,()"]
    assert one[2] == one[11] == one[20]  # The, the, The
    assert one[6] == one[24] != one[15]  # cat, cat; hat
    assert one[3] == one[12] and one[3] not in (one[2], one[7])  # "the " is a word with its end, told by which
    assert one[31] == one[37] and one[31] != one[30]  # letters beyond ASCII
    assert len({one[place] for place in ends}) > 3
    two = words_at("the cat the dog the cat", 2)
    assert two[6] == two[22] and two[6] != two[14] and two[2] != two[10]
    assert words_at("a" * 40, 1)[15:] == [words_at("a" * 40, 1)[15]] * 25  # no further than it reaches


def test_golden_words():
    """A shipped model was trained with these rows: another hash is another model."""
    first = [117, 11107, 6268, 3872, 6438, 27077, 59371, 20577, 62289, 33, 117, 11107, 6268, 3872]
    second = [45366, 44443, 41715, 31933, 60805, 31721, 44598, 65291, 40002, 40966, 45399, 44476, 41748, 31966]
    for words, told in ((1, first), (2, second)):
        assert [code % 65521 for code in words_at("Tritwise, trit", words)] == told


def test_tables_of_words_come_after_those_of_ngrams():
    layer = NGramEmbedding(1 << 20, 1, 3, words=2, embedding=Recorder)
    ids = torch.tensor([list(b"to be or not to be")])
    layer(ids, ids.shape[1])
    seen = [table.seen[0].tolist() for table in layer.tables if isinstance(table, Recorder)]
    assert len(seen) == 4 and seen[:2] == slots(ids[0].tolist(), 3)
    assert seen[2][1] == seen[2][14] and seen[3][17] == seen[3][4] and seen[3][1] != seen[3][14]
    only = NGramEmbedding(64, 4, 1, words=1, embedding=TritEmbedding)
    assert len(only.tables) == 1 and only(ids, 5).shape == (1, 5, 4)


def test_all_pairs_of_bytes_spread_evenly():
    rows = 4096
    text = [b for first in range(256) for second in range(256) for b in (first, second)]
    used = torch.tensor(slots(text, 2, rows)[0][1::2])  # each of the 65 536 pairs once
    counts = torch.bincount(used, minlength=rows).double()
    assert counts.mean() == 16 and counts.var().item() < 2 * 16  # a random function gives a variance of 16


def test_ngram_context_stands_before_the_embedded_ids():
    ids = torch.randint(256, (2, 40), generator=torch.Generator().manual_seed(3))
    for words, context in ((0, 3), (1, 15), (2, 23)):
        layer = NGramEmbedding(128, 4, 4, words=words, embedding=TritEmbedding)
        assert torch.equal(layer(ids, 40)[:, -4:], layer(ids[:, -4 - context :], 4))  # no more context counts
    letters = torch.full((1, 40), ord("x"))
    assert not torch.equal(layer(letters, 40)[:, -1:], layer(letters[:, -23:], 1))  # and no less


def test_a_short_ngram_embedding_is_refused():
    with pytest.raises(AssertionError, match="longest >= 2"):
        NGramEmbedding(8, 4, 1, embedding=TritEmbedding)(torch.tensor([[1]]), 1)


# --- scales of columns ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_scales_weigh_what_the_columns_meet(kind, dtype):
    torch.manual_seed(0)
    layer = TritLinear(12, 7, group=5) if kind == "linear" else TritEmbedding(7, 12, group=5)
    varied(layer)
    x = normal(3, 12).to(dtype) if kind == "linear" else torch.tensor([[6, 0, 3]])
    plain = layer(x)
    layer.add_column_scales()
    assert torch.equal(layer(x), plain)  # they start at 1
    exponent = torch.arange(-8, 16, 2, dtype=torch.int8)
    layer.column_exponent.copy_(exponent)
    scales = scale_table()[exponent.long() + 128]
    if kind == "linear":
        weighed, layer.column_exponent = x * scales.to(dtype), None
        expected = layer(weighed)
        layer.column_exponent = nn.Parameter(exponent, requires_grad=False)
        assert torch.equal(layer(x), expected)
    else:
        assert torch.equal(layer(x), plain * scales)
    assert tensor_roles(layer)["column_exponent"] == "scale"
    layer.reset_parameters()
    assert not layer.column_exponent.any()


def test_every_layer_of_a_model_gets_column_scales_and_copies_keep_them():
    model = ByteLM(ModelConfig(width=32, depth=1, ctx=8, column_scales=True, ngrams=2, ngram_rows=11))
    layers = [layer for _, layer in trit_modules(model)]
    assert all(layer.column_exponent.shape == layer.register.shape[1:] for layer in layers)
    ids = torch.randint(0, 256, (2, 8))
    for layer in layers:
        layer.column_exponent.copy_(torch.randint(-5, 6, layer.column_exponent.shape))
    assert torch.equal(copy.deepcopy(model)(ids), model(ids))
    other = ByteLM(model.config)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids), model(ids))
