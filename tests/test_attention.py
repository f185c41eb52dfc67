"""Attention: against a loop over heads and positions in float64, causality, windows, rotary positions, the cache."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tritwise import ops
from tritwise.nn import Attention, FloatLinear, KVCache, Rotary, TritLinear, TritModule
from tritwise.registers import scale_table

EPS = 1e-6


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight_of(layer: torch.nn.Module) -> Tensor:
    """The weight as float64, from the definition."""
    if not isinstance(layer, TritModule):
        return layer.weight.detach().double()  # type: ignore[operator, return-value]
    register = layer.register.double()
    trits = (register > 40).double() - (register < -40).double()
    return trits * scale_table()[layer.exponent.long() + 128].double()


def norm64(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + EPS).sqrt()


def turn64(x: Tensor, position: int, base: float = 10000.0) -> Tensor:
    """One head vector [D] turned by its position, as complex numbers: pair i is (x[i], x[i + D/2])."""
    half = x.shape[-1] // 2
    angle = position * base ** (-2 * torch.arange(half, dtype=torch.float64) / x.shape[-1])
    turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones(half, dtype=torch.float64), angle)
    return torch.cat((turned.real, turned.imag))


def oracle(x: Tensor, qkv: Tensor, out: Tensor, heads: int, kv_heads: int, window: int | None) -> Tensor:
    """x [T, C] float64 -> [T, C], one query of one head after the other."""
    time, width = x.shape
    size, rows = width // heads, x @ qkv.T
    parts = rows.view(time, heads + 2 * kv_heads, size)
    outputs = []
    for t in range(time):
        first = 0 if window is None else max(0, t - window + 1)
        seen, found = range(first, t + 1), []
        for head in range(heads):
            kv = head // (heads // kv_heads)
            q = turn64(norm64(parts[t, head]), t)
            keys = torch.stack([turn64(norm64(parts[s, heads + kv]), s) for s in seen])
            values = torch.stack([parts[s, heads + kv_heads + kv] for s in seen])
            found.append(torch.softmax(keys @ q / size**0.5, 0) @ values)
        outputs.append(norm64(torch.cat(found)))
    return torch.stack(outputs) @ out.T


@pytest.mark.parametrize("linear", [TritLinear, FloatLinear])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_against_a_loop_over_heads_and_positions(linear, heads, kv_heads, window):
    torch.manual_seed(heads + kv_heads)
    width, time = 8 * heads, 7
    layer = Attention(width, heads, kv_heads, linear=linear, window=window)
    rotary, x = Rotary(8, time), normal(2, time, width).requires_grad_()
    upstream = normal(2, time, width, seed=1)
    y = layer(x, rotary)
    y.backward(upstream)

    x64 = x.detach().double().requires_grad_()
    qkv, out = weight_of(layer.qkv), weight_of(layer.out)
    y64 = torch.stack([oracle(row, qkv, out, heads, kv_heads, window) for row in x64])
    y64.backward(upstream.double())
    assert x.grad is not None and x64.grad is not None
    assert (y.detach() - y64.detach()).norm() < 1e-5 * y64.norm()
    assert (x.grad - x64.grad).norm() < 1e-5 * x64.grad.norm()


# --- who sees whom --------------------------------------------------------------------------------------------------


def seen_by(layer: Attention, time: int) -> Tensor:
    """bool [T, T]: entry (t, s) says whether the output at t changes with the input at s."""
    width = layer.heads * layer.size
    rotary, x = Rotary(layer.size, time), normal(1, time, width)
    base, rows = layer(x, rotary), []
    for s in range(time):
        other = x.clone()
        other[0, s] = normal(width, seed=9)
        rows.append((layer(other, rotary) != base)[0].any(dim=1))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("window", [None, 1, 2, 5, 9, 100])
def test_a_position_sees_itself_and_the_window_before_it(window):
    time = 9
    layer = Attention(32, 2, 1, linear=TritLinear, window=window)
    distance = torch.arange(time)[:, None] - torch.arange(time)
    assert torch.equal(seen_by(layer, time), (distance >= 0) & (distance < (window or time)))


def test_a_window_as_long_as_the_text_is_no_window():
    plain = Attention(32, 2, 2, linear=TritLinear)
    x, rotary = normal(2, 6, 32), Rotary(16, 6)
    for window in (6, 7, 1000):
        layer = Attention(32, 2, 2, linear=TritLinear, window=window)
        layer.load_state_dict(plain.state_dict())
        assert torch.equal(layer(x, rotary), plain(x, rotary))


@pytest.mark.parametrize("window", [None, 3])
def test_grouped_heads_are_repeated_key_and_value_heads(window):
    torch.manual_seed(0)
    heads, kv_heads, size, width = 4, 2, 8, 32
    grouped = Attention(width, heads, kv_heads, linear=FloatLinear, window=window)
    full = Attention(width, heads, heads, linear=FloatLinear, window=window)
    rows = grouped.qkv.weight.detach().view(heads + 2 * kv_heads, size, width)
    q, k, v = rows.split([heads, kv_heads, kv_heads])
    repeated = torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).reshape(-1, width)
    full.load_state_dict({"qkv.weight": repeated, "out.weight": grouped.out.weight})
    x, rotary = normal(2, 7, width), Rotary(size, 7)
    torch.testing.assert_close(full(x, rotary), grouped(x, rotary), rtol=1e-4, atol=1e-5)


def test_query_key_and_value_get_directions_of_their_own_where_they_are_alike():
    assert Attention(32, 2, 2, linear=TritLinear).qkv.blocks == 3
    assert Attention(32, 2, 1, linear=TritLinear).qkv.blocks == 1  # 2:1:1 rows do not make equal matrices


def test_queries_and_keys_are_normalised():
    """Ten times the queries, keys and values change nothing: the values meet a norm as well, before `out`."""
    torch.manual_seed(0)
    layer = Attention(16, 2, 2, linear=FloatLinear)
    x, rotary = normal(1, 5, 16), Rotary(8, 5)
    base = layer(x, rotary)
    with torch.no_grad():
        layer.qkv.weight.mul_(10)
    torch.testing.assert_close(layer(x, rotary), base, rtol=1e-4, atol=1e-5)


def test_bfloat16():
    layer, x, rotary = Attention(64, 2, 1, linear=TritLinear, window=4), normal(2, 9, 64), Rotary(32, 9)
    y = layer(x.bfloat16(), rotary)
    assert y.dtype == torch.bfloat16
    assert (y.float() - layer(x, rotary)).norm() < 0.03 * layer(x, rotary).norm()


# --- rotary positions -----------------------------------------------------------------------------------------------


def test_rotation_against_complex_numbers():
    rotary, x = Rotary(6, 20), normal(2, 5, 3, 6)
    for start in (0, 1, 15):
        found = rotary(x, start).double()
        for b in range(2):
            for t in range(5):
                for head in range(3):
                    expected = turn64(x[b, t, head].double(), start + t)
                    torch.testing.assert_close(found[b, t, head], expected, rtol=1e-5, atol=1e-5)


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 59), st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_only_the_distance_of_positions_matters(m, n, shift, seed):
    rotary = Rotary(16, 100)
    q, k = normal(1, 1, 1, 16, seed=seed), normal(1, 1, 1, 16, seed=seed + 100)
    here = (rotary(q, m) * rotary(k, n)).sum()
    there = (rotary(q, m + shift) * rotary(k, n + shift)).sum()
    assert torch.allclose(here, there, atol=2e-5)


def test_rotation_keeps_lengths_and_moves_directions():
    rotary, x = Rotary(16, 50), normal(2, 50, 3, 16)
    y = rotary(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[:, 0], x[:, 0])  # position 0 is not turned
    assert ((y - x)[:, 1:].norm(dim=-1) > 0.1).all()


@pytest.mark.parametrize("start", [0, 3])
def test_gradient_of_the_rotation_against_autograd(start):
    rotary, x = Rotary(8, 12), normal(2, 7, 3, 8).requires_grad_()
    upstream = normal(2, 7, 3, 8, seed=1)
    kept = upstream.clone()
    (found,) = torch.autograd.grad(rotary(x, start), x, upstream)
    cos, sin = rotary.cos[start : start + 7, None], rotary.sin[start : start + 7, None]
    a, b = x[..., :4], x[..., 4:]
    plain = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    (expected,) = torch.autograd.grad(plain, x, upstream)
    torch.testing.assert_close(found, expected)
    assert torch.equal(upstream, kept)


def test_tables_are_constants_that_are_not_saved():
    rotary = Rotary(8, 12)
    assert rotary.roles == {"cos": "table", "sin": "table"}
    assert not list(rotary.parameters()) and not rotary.state_dict()
    assert rotary(normal(1, 3, 1, 8).bfloat16()).dtype == torch.bfloat16


# --- the cache ------------------------------------------------------------------------------------------------------


@given(
    chunks=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    window=st.sampled_from([None, 1, 3, 50]),
    kv_heads=st.sampled_from([1, 2]),
)
@settings(max_examples=40, deadline=None)
def test_reading_in_chunks_equals_reading_at_once(chunks, window, kv_heads):
    time = sum(chunks)
    layer, rotary = Attention(16, 2, kv_heads, linear=TritLinear, window=window), Rotary(8, 40)
    x, cache = normal(2, time, 16), KVCache(2, kv_heads, 40, 8, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        parts = [layer(part, rotary, cache) for part in x.split(chunks, dim=1)]
        whole = layer(x, rotary)
    assert cache.used == time
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_the_cache_hands_back_what_it_was_given():
    cache = KVCache(2, 3, 5, 4, torch.device("cpu"), torch.bfloat16)
    k, v = normal(2, 3, 5, 4).bfloat16(), normal(2, 3, 5, 4, seed=1).bfloat16()
    cache.append(k[:, :, :2], v[:, :, :2])
    keys, values = cache.append(k[:, :, 2:], v[:, :, 2:])
    assert torch.equal(keys, k) and torch.equal(values, v) and cache.used == 5


def test_a_full_cache_takes_no_more():
    cache = KVCache(1, 1, 2, 4, torch.device("cpu"), torch.float32)
    cache.append(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    with pytest.raises(AssertionError, match="the cache is full"):
        cache.append(torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))
    assert cache.used == 2


# --- as a GPU runs it -----------------------------------------------------------------------------------------------


def step_of(how: str, heads: int, kv_heads: int, exclusive: bool) -> list[Tensor]:
    """What attention gives, and the gradients of its input and its matrices."""
    torch.manual_seed(0)
    layer, rotary = Attention(16 * heads, heads, kv_heads, linear=FloatLinear), Rotary(16, 12)

    def run(x: Tensor) -> Tensor:
        return x + layer(x, rotary, exclusive=exclusive)

    x = normal(2, 9, 16 * heads).requires_grad_()
    if how == "checkpoint":
        y = checkpoint(run, x, use_reentrant=False)
    elif how == "eager":
        y = run(x)
    else:
        torch._dynamo.reset()
        y = torch.compile(run, backend=how, fullgraph=True)(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], normal(*y.shape, seed=1))]


@pytest.mark.parametrize("how", ["eager", "checkpoint", "aot_eager"])
@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(3, 3), (4, 2)])
def test_one_pass_for_all_heads_is_what_several_are(heads, kv_heads, exclusive, how, monkeypatch):
    expected = step_of("eager", heads, kv_heads, exclusive)
    calls: list[int] = []
    turned_heads = ops.turned_heads
    monkeypatch.setattr(ops, "turned_heads", lambda *given: calls.append(1) or turned_heads(*given))
    monkeypatch.setattr("tritwise.nn.attention.fuses", lambda parts: True)
    for found, exact in zip(step_of(how, heads, kv_heads, exclusive), expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-5)
    assert calls


def test_one_pass_multiplies_by_the_scales_of_the_next_matrix(monkeypatch):
    torch.manual_seed(0)
    layer, rotary = Attention(48, 3, 3, linear=TritLinear), Rotary(16, 9)
    layer.out.add_column_scales()
    layer.out.column_exponent.copy_(torch.arange(48) % 9 - 4)
    x, found = normal(2, 9, 48).requires_grad_(), []
    for fused in (False, True):
        monkeypatch.setattr("tritwise.nn.attention.fuses", lambda parts, fused=fused: fused)
        y = layer(x, rotary, exclusive=True)
        found.append([y, *torch.autograd.grad(y, [x, layer.qkv.port, layer.out.port], normal(2, 9, 48, seed=1))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_pass_reads_on_with_a_cache(monkeypatch):
    layer, rotary, x = Attention(32, 2, 1, linear=FloatLinear), Rotary(16, 9), normal(2, 9, 32)
    whole = layer(x, rotary)
    monkeypatch.setattr("tritwise.nn.attention.fuses", lambda parts: True)
    cache = KVCache(2, 1, 9, 16, x.device, x.dtype)
    found = torch.cat([layer(part, rotary, cache) for part in x.split((4, 1, 4), dim=1)], dim=1)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
