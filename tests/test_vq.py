"""Vector quantisation: nearest codes, the gradient straight through, both losses, revival of dead codes, and usage."""

import math

import pytest
import torch
from torch import Tensor

from tritwise.nn import FloatEmbedding, TritEmbedding, TritVQ, rms_norm, tensor_roles, trit_modules
from tritwise.optim import TritOptimizer
from tritwise.registers import scale_values


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(codes: int = 12, width: int = 6, **changes: object) -> TritVQ:
    torch.manual_seed(0)
    return TritVQ(codes, width, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("embedding", [TritEmbedding, FloatEmbedding])
def test_codes_are_the_nearest(embedding):
    vq, z = make(embedding=embedding).eval(), normal(3, 5, 6)
    found = vq(z)
    table = vq.decode(torch.arange(12)).double()
    expected = (z.double()[..., None, :] - table).square().sum(-1).argmin(-1)
    assert torch.equal(found.codes, expected) and found.codes.shape == (3, 5)
    torch.testing.assert_close(found.vectors, table.float()[expected])
    assert torch.equal(vq.nearest(z), expected) and torch.equal(vq.decode(expected), table.float()[expected])


def test_a_ternary_codebook_holds_trits_and_a_scale():
    vq = make()
    codes = vq.decode(torch.arange(12))
    assert torch.equal(codes, vq.codebook.trits() * scale_values(vq.codebook.exponent))
    assert {tensor.dtype for tensor in (*vq.parameters(), *vq.buffers())} == {torch.int8, torch.int64}
    assert set(tensor_roles(vq).values()) == {"embedding", "scale", "count"}


def test_gradients_go_straight_through_and_pull_both_sides():
    vq = make(commitment=0.5, embedding=FloatEmbedding).eval()
    z, upstream = normal(20, 6).requires_grad_(), normal(20, 6, seed=1)
    found = vq(z)
    assert torch.equal(torch.autograd.grad(found.vectors, z, upstream, retain_graph=True)[0], upstream)
    z_grad, table_grad = torch.autograd.grad(found.loss, (z, vq.codebook.weight))
    error = z.detach() - found.vectors.detach()
    torch.testing.assert_close(found.loss.detach(), 1.5 * error.square().mean())
    torch.testing.assert_close(z_grad, 0.5 * 2 * error / error.numel())
    expected = torch.zeros(12, 6).index_add_(0, found.codes, -2 * error / error.numel())
    torch.testing.assert_close(table_grad, expected)


def test_a_new_codebook_begins_where_the_vectors_are():
    """Far from where codes start: after one batch every code that is used lies close to a vector."""
    for embedding in (TritEmbedding, FloatEmbedding):
        centres = 50 * normal(40, 16)
        vq, z = make(64, 16, embedding=embedding), centres[torch.arange(500) % 40]
        before = (vq.eval()(z).vectors - z).square().mean()
        after = (vq.train()(z).vectors - z).square().mean()
        assert after < 0.5 * before and int(vq.step) == 1


def test_a_revived_code_is_the_nearest_ternary_vector():
    vq = make(4, 3, group=2)
    z = torch.tensor([[1.0, -0.1, 8.0]]).repeat(5, 1)
    vq(z)  # one code may win; the others take the place of a vector
    for row, exponent in zip(vq.codebook.trits().tolist(), vq.codebook.exponent, strict=True):
        if row == [1, 0, 1]:
            scales = scale_values(exponent)
            assert scales[0] == pytest.approx(1.224 * math.sqrt(1.01 / 2), rel=0.06)
            assert scales[1] == pytest.approx(1.224 * 8, rel=0.06)
            return
    raise AssertionError(vq.codebook.trits())


def test_codes_that_are_needed_stay_and_dead_ones_come_back():
    vq, z = make(8, 4, patience=3), normal(400, 4)
    vq(z)
    one = z[:1].repeat(50, 1)
    kept = vq.nearest(one)[0].item()
    row = vq.codebook.register[kept].clone()
    for _ in range(3):
        vq(one)
    assert int(vq.idle.max()) == 3 and int(vq.idle[kept]) == 0
    vq(one)  # the fourth step without them
    assert torch.equal(vq.codebook.register[kept], row)
    assert int(vq.idle.max()) == 0
    torch.testing.assert_close(vq.decode(torch.arange(8)), vq.decode(torch.full((8,), (kept + 1) % 8)), atol=9, rtol=9)


def test_nothing_changes_while_it_is_not_trained():
    vq, z = make(patience=1), normal(9, 6)
    kept = [tensor.clone() for tensor in vq.state_dict().values()]
    vq.eval()(z)
    with torch.no_grad():
        vq.train()(z)
    assert all(torch.equal(a, b) for a, b in zip(vq.state_dict().values(), kept, strict=True))


def test_a_copy_revives_the_same_codes():
    first, second, z = make(), make(), normal(99, 6)
    first(z)
    second.load_state_dict(first.state_dict())
    for seed in range(4):
        batch = normal(5, 6, seed=seed)
        assert torch.equal(first(batch).codes, second(batch).codes)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_usage():
    vq = make(4)
    assert vq.usage(torch.tensor([0, 1, 2, 3] * 5)) == (1.0, pytest.approx(4.0))
    assert vq.usage(torch.tensor([[2, 2], [2, 2]])) == (0.25, pytest.approx(1.0))
    used, perplexity = vq.usage(torch.tensor([0, 0, 0, 1]))
    assert used == 0.5 and perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))


def test_training_uses_most_codes_and_lowers_the_error():
    vq, generator = make(32, 8, patience=10), torch.Generator().manual_seed(0)
    optimizer = TritOptimizer(vq, rate=0.02)
    centres = rms_norm(normal(32, 8))
    errors = []
    for step in range(120):
        optimizer.configure(rate=0.02 * (1 - step / 120))
        z = rms_norm(centres[torch.randint(32, (256,), generator=generator)] + 0.1 * normal(256, 8, seed=step))
        found = vq(z)
        found.loss.backward()
        optimizer.step()
        errors.append(float((found.vectors - z).square().mean()))
    assert vq.usage(found.codes).used > 0.6
    assert sum(errors[-10:]) < 0.7 * sum(errors[:10]) and len(list(trit_modules(vq))) == 1
