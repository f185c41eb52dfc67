"""The ARB model: tokens of media in the stream, every trained number an integer, and a diffusion part that learns."""

import itertools
import random

import pytest
import torch

from tritwise import TritOptimizer
from tritwise.data.collections import Example
from tritwise.encoders import Features
from tritwise.models import Arb, ByteLM, Denoiser, ModelConfig, PartsConfig, draw, skeleton
from tritwise.models.arb import IGNORED
from tritwise.models.denoiser import centred, pixels_of
from tritwise.train import audit
from tritwise.train.judge import confusion, tiled
from tritwise.train.stepper import Stepper
from tritwise.train.streams import evened
from tritwise.train.telling import collapsed, consensus, edits, marks, nearest, neighbours, tell, told_by_trunk

PARTS = PartsConfig(
    vision=True,
    audio=True,
    diffusion=True,
    ctc=True,
    vision_size=24,
    audio_size=20,
    vision_grid=1,
    picture=8,
    draw_width=32,
    draw_depth=1,
    classes="left|top",
)
SHAPE = {"width": 32, "depth": 1, "ctx": 32, "vocab": 288}


def model(**changes) -> Arb:
    torch.manual_seed(0)
    return Arb(ModelConfig(**SHAPE, **changes), PARTS)


def batch(kind: str, rows: int = 2):
    """A batch of a kind, as `Arb.loss` takes it."""
    g = torch.Generator().manual_seed(1)
    tokens, size = (2, 24) if kind == "vision" else (8, 20)
    ids = torch.randint(0, 256, (rows, tokens + 6), generator=g)
    targets = torch.full_like(ids, IGNORED)
    targets[:, tokens + 1 :] = ids[:, tokens + 1 :]
    features = torch.randn(rows, 2 if kind == "vision" else 32, size, generator=g)
    letters = (torch.randint(97, 120, (rows, 4), generator=g), torch.tensor([4] * rows))
    return (kind, ids, targets, features, *(letters if kind == "audio" else ()))


@pytest.mark.parametrize("weights", ["trit", "float"])
@pytest.mark.parametrize("parts", [None, PARTS])
def test_a_skeleton_has_the_names_and_sizes_of_its_model_and_none_of_its_numbers(weights, parts):
    shape = {"loops": 2, "value_tables": 1, "gains": True, "ngrams": 2, "experts": 2, "max_moe_iters": 2, "graph": True}
    config = ModelConfig(**SHAPE, weights=weights, **shape)
    torch.manual_seed(0)
    drawn = torch.get_rng_state()
    bare = skeleton(config, parts)
    assert torch.equal(torch.get_rng_state(), drawn)
    whole = ByteLM(config) if parts is None else Arb(config, parts)  # what was made without numbers spoils nothing
    assert bare.state_dict().keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        other = bare.state_dict()[name]
        assert other.is_meta and not tensor.is_meta and (other.shape, other.dtype) == (tensor.shape, tensor.dtype)
    assert torch.isfinite(whole.log_probs(torch.zeros(1, 8, dtype=torch.int64))).all()


@pytest.mark.parametrize("weights", ["trit", "float"])
def test_every_kind_of_batch_has_a_loss_that_falls(weights):
    net = model(weights=weights)
    if weights == "trit":
        optimizer = TritOptimizer(net, rate=0.03)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(2)
    pictures = torch.randn(8, 1, 8, 8, generator=g)
    noise, times = torch.randn(8, 1, 8, 8, generator=g), torch.rand(8, generator=g)
    batches = [batch("vision"), batch("audio"), ("text", *batch("vision")[1:3])]
    batches.append(("diffusion", pictures, noise, times, torch.arange(8) % 3))
    losses = []
    for _ in range(25):
        line = []
        for one in batches:
            loss = net.loss(*one)
            loss.backward()
            line.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(line)
    assert all(last < 0.9 * first for first, last in zip(losses[0], losses[-1], strict=True)), (losses[0], losses[-1])


def test_activations_of_every_part_have_the_model_s_type():
    net = model()
    ids = torch.randint(0, 256, (2, 8), generator=torch.Generator().manual_seed(5))
    z, t, label = torch.randn(2, 1, 8, 8), torch.tensor([0.3, 0.8]), torch.tensor([0, 1])
    assert net.diffusion is not None
    wide = net(ids), net.hidden_of("audio", batch("audio")[3]), net.diffusion(z, t, label)
    net.dtype = torch.bfloat16
    narrow = net(ids), net.hidden_of("audio", batch("audio")[3]), net.diffusion(z, t, label)
    assert [x.dtype for x in narrow] == [torch.float32, torch.bfloat16, torch.float32]
    for a, b in zip(wide, narrow, strict=True):
        assert 0 < (a - b.float()).abs().max() < 0.1 * a.abs().max()


@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_rows_padded_to_even_lengths_cost_the_same(kind):
    net = model()
    name, *tensors = batch(kind)
    longer = evened(tensors, 24)
    assert [t.shape[1] for t in longer[:2]] == [24, 24] and longer[2] is tensors[2]
    assert kind == "vision" or longer[3].shape == (2, 32)
    assert torch.allclose(net.loss(name, *longer), net.loss(name, *tensors), atol=1e-5)
    assert [t.shape[1] for t in evened(tensors, 64)[:2]] == [32, 32]


@pytest.mark.gpu
def test_recorded_steps_over_several_kinds_are_those_of_eager_ones():
    """A mixture on a GPU: one recording for each kind, each moving the layers that it trains, and one state."""
    found = []
    for graph in (True, False):
        net = model().to("cuda")
        optimizer = TritOptimizer(net, rate=0.03)
        stepper = Stepper(net, [optimizer], graph=graph)
        plain = [("vision", *batch("vision")[1:]), ("text", *batch("vision")[1:3])]
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
        plain.append(("diffusion", noise.flip(0), noise, torch.tensor([0.2, 0.7]), torch.tensor([0, 2])))
        moved = [tuple(part.cuda() if isinstance(part, torch.Tensor) else part for part in one) for one in plain]
        losses = [float(stepper.step_over([moved[at % 3]])) for at in range(9)]
        assert stepper.records_whole_steps == graph and len(stepper._replays) == (3 if graph else 0)
        found.append((losses, {name: p.detach().cpu() for name, p in net.named_parameters()}))
    assert found[0][0] == found[1][0] and found[0][0][-3] < found[0][0][0]
    assert [name for name, p in found[0][1].items() if not torch.equal(p, found[1][1][name])] == []


@pytest.mark.parametrize("columns", [False, True])
def test_no_trained_number_is_a_float(columns):
    net = model(column_scales=columns)
    assert all((layer.column_exponent is not None) == columns for layer in (net.vision.into, net.diffusion.out))
    optimizer = TritOptimizer(net)
    for one in (batch("vision"), batch("audio")):
        net.loss(*one).backward()
    optimizer.step()
    found = audit(net, [optimizer])
    assert found["float_trainable"] == 0 and found["float_state_bytes"] == 0
    assert {row["dtype"] for row in found["tensors"] if row["trainable"]} == {"int8"}
    assert audit(model(weights="float"))["float_trainable"] > 0  # so that the check can fail


def test_parts_are_there_only_if_they_are_asked_for():
    bare = Arb(ModelConfig(**SHAPE), PartsConfig())
    assert bare.vision is None and bare.audio is None and bare.spell is None and bare.diffusion is None
    assert [name for name, _ in bare.named_children()] == ["trunk"]


def test_tokens_of_an_image_take_the_places_of_their_slots():
    """What stands in the slots does not matter, the features do, and nothing before the image sees it."""
    net = model().eval()
    kind, ids, _, features = batch("vision")
    with torch.inference_mode():
        logits = net.logits_after(kind, ids, net.hidden_of(kind, features))
        other = ids.clone()
        other[:, 1:3] = 7
        assert torch.equal(net.logits_after(kind, other, net.hidden_of(kind, features)), logits)
        changed = net.logits_after(kind, ids, net.hidden_of(kind, features.flip(1)))
        assert torch.equal(changed[:, 0], logits[:, 0]) and not torch.allclose(changed[:, 5], logits[:, 5])
        assert torch.allclose(net(ids)[:, 0], logits[:, 0], atol=1e-5)  # and the rest is the trunk


@pytest.mark.parametrize("kind", ["vision", "audio"])
def test_telling_many_is_telling_each(kind):
    net = model().eval()
    features = batch(kind, rows=3)[3]
    hidden = net.hidden_of(kind, features)
    together = told_by_trunk(net, kind, hidden, 12)
    assert together == [told_by_trunk(net, kind, hidden[row : row + 1], 12)[0] for row in range(3)]
    if kind == "audio":
        assert tell(net, kind, features) == [tell(net, kind, features[row : row + 1])[0] for row in range(3)]


def test_captions_are_the_consensus_of_draws_that_do_not_depend_on_the_company():
    net = model().eval()
    features = batch("vision", rows=3)[3]
    hidden = net.hidden_of("vision", features)
    drawn = told_by_trunk(net, "vision", hidden, 6, samples=4)
    assert len(drawn) == 12 and len(set(drawn)) > 3  # draws, not one answer
    assert drawn == [t for row in hidden for t in told_by_trunk(net, "vision", row[None], 6, samples=4)]
    assert tell(net, "vision", features, 6, samples=4) == [consensus(drawn[at : at + 4]) for at in (0, 4, 8)]


def test_a_consensus_has_the_fewest_edits_to_all():
    texts = ["red flag", "blue flag", "blue flags", "blue frog", "red flag"]
    least = min(texts, key=lambda text: sum(edits(text, other) for other in texts))
    assert consensus(texts) == least == "blue flag"
    assert consensus(["bat", "bat", "bad"], ["cad", "cad"]) == "bad" and consensus(["bat"] * 3, ["hat", "cat"]) == "bat"
    assert consensus(["", "a", "ab"]) == "a" and consensus(["b"]) == "b"


def test_greedy_telling_takes_the_likeliest_symbol_each_time():
    net = model().eval()
    features = batch("vision", rows=1)[3]
    text = told_by_trunk(net, "vision", net.hidden_of("vision", features), 3)[0]
    from tritwise.train.streams import opening

    ids = torch.from_numpy(opening("vision", 2))[None]
    found = b""
    with torch.inference_mode():
        for _ in range(3):
            logits = net.logits_after("vision", ids, net.hidden_of("vision", features))[0, -1]
            best = int(torch.cat((logits[:256], logits[258:259])).argmax())
            if best == 256:
                break
            found += bytes([best])
            ids = torch.cat((ids, torch.tensor([[best]])), dim=1)
    assert text == found.decode("utf-8", errors="replace")


def test_the_velocity_follows_from_what_the_network_tells():
    """If f is exact, z + (1 - t) v is the picture: for every t, also at the ends."""
    x, noise = torch.randn(5, 1, 8, 8), torch.randn(5, 1, 8, 8)
    times = torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])
    t = times[:, None, None, None]
    s = torch.sqrt(t**2 + (1 - t) ** 2)

    class Exact(Denoiser):
        def forward(self, z, t_B, label_B):
            return ((1 - t) * x - t * noise) / s

    exact = Exact(PARTS)
    z = t * x + (1 - t) * noise
    label = torch.zeros(5, dtype=torch.int64)
    assert torch.allclose(exact.velocity(z, times, label), x - noise, atol=1e-5)
    assert float(exact.loss(x, noise, times, label)) < 1e-10
    assert torch.allclose(exact.velocity(z, times, label, guidance=2.0), x - noise, atol=1e-5)


def test_pictures_depend_on_seed_and_place_alone():
    net = Denoiser(PARTS).eval()
    done: list[int] = []
    three = draw(net, [0, 1, 2], steps=3, seed=4, progress=lambda step, _: done.append(step))
    assert three.shape == (3, 1, 8, 8) and three.dtype == torch.uint8 and done == [1, 2, 3]
    assert torch.equal(draw(net, [0, 1], steps=3, seed=4), three[:2])
    assert not torch.equal(draw(net, [0, 1], steps=3, seed=5), three[:2])
    pixels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pixels_of(centred(pixels)), pixels)


def test_the_diffusion_part_learns_what_its_classes_look_like(drawn_idx):
    """Bright left halves and bright upper halves: after a few hundred steps the pictures drawn are of their class."""
    from tritwise.data.collections import open_collection
    from tritwise.train.streams import PictureStream, pictures_in

    pictures, labels = pictures_in(open_collection(drawn_idx), "train", 1)
    stream = PictureStream(pictures, labels, 2, batch=32, seed=0)
    torch.manual_seed(0)
    net = Denoiser(PARTS)
    optimizer = TritOptimizer(net, rate=0.02)
    for step in range(150):
        _, *tensors = stream.batch_at(step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 150) * (1 if group["role"] == "matrix" else 2)
        net.loss(*tensors).backward()
        optimizer.step()
    drawn = draw(net, [0, 0, 0, 1, 1, 1], steps=8, guidance=1.0).float()
    left, top = drawn[:, 0, 4:, :4].mean(dim=(1, 2)), drawn[:, 0, :4, 4:].mean(dim=(1, 2))
    assert (left[:3] > top[:3] + 60).all() and (top[3:] > left[3:] + 60).all(), (left, top)


def test_edits_and_marks():
    assert [edits(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("abc", ""), ("flaw", "lawn"))] == [
        3,
        3,
        3,
        2,
    ]
    assert marks(["one", "to"], ["one", "two"]) == {"exact": 0.5, "cer": 1 / 6}
    assert marks([], []) == {"exact": 0.0, "cer": 0.0}


def test_edits_are_those_of_the_whole_table():
    g = random.Random(0)
    texts = ["".join(g.choice("ab é") for _ in range(g.randrange(9) * g.randrange(10))) for _ in range(60)]
    for told, meant in itertools.pairwise(texts):
        row = list(range(len(meant) + 1))
        for number, letter in enumerate(told, start=1):
            before, row = row, [number]
            for place, other in enumerate(meant):
                row.append(min(before[place] + (letter != other), before[place + 1] + 1, row[place] + 1))
        assert edits(told, meant) == row[-1]


def test_what_ctc_spells_is_collapsed():
    blank = 256
    assert collapsed([blank, 104, 104, blank, 104, 105, 105, 270]) == "hhi"
    assert collapsed([]) == ""


def test_nearest_is_by_cosine():
    known = torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    asked = torch.tensor([[9.0, 1.0], [0.1, 0.2]])
    assert nearest(asked, known) == [[0], [1]] and nearest(asked, known, 3) == [[0, 1], [1, 0]]


def test_neighbours_are_of_the_train_part():
    x_TD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.9, 0.1]])
    examples = [
        Example(f"{n}.png", f"image {n}", split, 0) for n, split in enumerate(("train", "train", "train", "val"))
    ]
    known = Features("vision", x_TD, [0, 1, 2, 3, 4], examples, (), {})
    assert neighbours(torch.tensor([[[1.0, 0.2]]]), known) == [["image 0", "image 2", "image 1"]]


def test_confusions_count_what_is_no_class():
    assert confusion(("a", "b"), ["a", "a", "b"], ["a", "x", "a"])["counts"] == [[1, 0, 1], [1, 0, 0]]


def test_tiles():
    page = tiled(torch.stack([torch.full((1, 2, 3), shade, dtype=torch.uint8) for shade in (1, 2, 3)]), 2)
    assert page.shape == (7, 9) and page[1, 1] == 1 and page[1, 5] == 2 and page[4, 1] == 3 and page[0, 0] == 128
    assert tiled(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), 1).shape == (4, 4, 3)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"audio_stride": 5}, "must divide 32"),
        ({"picture": 9, "patch": 4}, "must divide the side"),
        ({"patch": 0}, "at least 1"),
        ({"bridge_depth": -1}, "at least 0"),
    ],
)
def test_shapes_that_cannot_be_built(changes, said):
    with pytest.raises(ValueError, match=said):
        PartsConfig(**changes)
