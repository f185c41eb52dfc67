"""Runs of the ARB model from the command line, whole but small: the recipes in short, resume, finetuning, what was
trained used again, and every way in which a user can hold them wrong."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tritwise import load
from tritwise.cli.app import main
from tritwise.data.collections import Example
from tritwise.encoders import Features
from tritwise.errors import UserError
from tritwise.loading import class_called
from tritwise.train import RunFolder
from tritwise.train.media_config import MediaConfig
from tritwise.train.streams import generator_of, opening

image = pytest.importorskip("PIL.Image")
pytest.importorskip("soundfile")
pytest.importorskip("transformers")

QUICK = ["--steps", "12", "--batch", "4", "--log-interval", "4", "--eval-interval", "6", "--save-interval", "6"]
SMALL = [f"--set={word}" for word in ("width=32", "depth=1", "eval_examples=4", "draw_width=32", "draw_depth=1")]
SMALL += [f"--set={word}" for word in ("draw_steps=2", "eval_bytes=2000", "sample_bytes=0", "patch=4")]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A cache of this module's own."""
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    yield
    patch.undo()


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def captions(tmp_path_factory, image_pairs, tiny_vision) -> Path:
    """A run that has learned the names of four colours. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "vision"
    settings = ["--steps", "120", "--batch", "16", "--eval-interval", "60", "--ctx", "32", "--rate", "0.03"]
    run("train", "vision", "--data", image_pairs, "--encoder", tiny_vision, *settings, *SMALL, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def sounds(tmp_path_factory, sound_pairs, tiny_audio) -> Path:
    """A run that has learned to tell high tones from low ones, by its trunk and by its bridge. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "audio"
    settings = ["--steps", "220", "--batch", "8", "--eval-interval", "110", "--ctx", "32", "--rate", "0.015"]
    settings += ["--set=ctc=true"]
    run("train", "audio", "--data", sound_pairs, "--encoder", tiny_audio, *settings, *SMALL, "--out", folder)
    return folder


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, drawn_idx) -> Path:
    """A short run of the diffusion part. Read only."""
    folder = tmp_path_factory.mktemp("runs") / "diffusion"
    run("train", "diffusion", "--data", drawn_idx, *QUICK, *SMALL, "--set=judge_pictures=20", "--out", folder)
    return folder


def test_captions_are_learned_shipped_and_used(captions, image_pairs, cli):
    result = RunFolder(captions).read("result")
    assert result["val"]["vision"]["exact"] == 1.0 and result["val"]["vision"]["cer"] == 0.0
    assert {"exact", "cer"} <= set(result["val"]["vision"]["nearest"])
    assert RunFolder(captions).read("audit")["float_trainable"] == 0
    for place in (captions, captions / "model.tritwise"):
        words = ("--encoder", RunFolder(captions).config().parts.vision_encoder)
        told = cli("caption", image_pairs / "05.png", "--model", place, *words, "--json")
        assert told.code == 0 and told.json["text"] == "green", told.err
    model, blue = load(captions), np.full((50, 70, 3), (25, 25, 215), np.uint8)
    assert model.caption(blue) == "blue" == model.caption(blue, known=image_pairs)
    assert model.caption(blue, known=RunFolder(captions).config().media.images) == "blue"


def test_images_with_captions_have_a_say(captions, image_pairs, sound_pairs, cli, tmp_path):
    told = cli("caption", image_pairs / "05.png", "--model", captions, "--known", image_pairs, "--json")
    assert told.code == 0 and told.json["text"] == "green", told.err
    result = RunFolder(captions).read("result")["val"]["vision"]
    assert result["with_neighbours"] == {"exact": 1.0, "cer": 0.0, "neighbours": 4}
    refused = cli("caption", image_pairs / "05.png", "--model", captions, "--known", sound_pairs)
    assert refused.code == 2 and "image" in refused.err, refused.err
    x_TD = torch.zeros(4, 3)
    Features("vision", x_TD, [0, 2, 4], [Example("a.png", "a", "train")] * 2, (), {}).save(tmp_path / "other.json")
    refused = cli("caption", image_pairs / "05.png", "--model", captions, "--known", tmp_path / "other.json")
    assert refused.code == 2 and "another encoder or layer" in refused.err


def test_an_artifact_names_no_private_path(captions, image_pairs, cli):
    raw = (captions / "model.tritwise").read_bytes()
    assert str(captions.parent).encode() not in raw and str(image_pairs.parent).encode() not in raw
    told = cli("caption", image_pairs / "05.png", "--model", captions / "model.tritwise")
    assert told.code == 2 and "there is no encoder at vision" in told.err


def test_sounds_are_learned_and_used(sounds, sound_pairs, cli):
    result = RunFolder(sounds).read("result")["val"]["audio"]
    assert result["exact"] == 1.0 and result["trunk"]["exact"] == 1.0, result
    told = cli("transcribe", sound_pairs / "17.flac", "--model", sounds)
    assert told.out == "high\n"


def test_the_report_shows_what_was_told(captions, sounds, drawn, cli):
    for folder, words in (
        (captions, ("Captions", "What it can do", "✓ “")),
        (sounds, ("Transcripts", "nearest", "✓ “low”")),
        (drawn, ("Pictures drawn", "Rows from above: zero, one", "step 12", "recognised")),
    ):
        out = folder.parent / f"report_{folder.name}"
        assert cli("report", folder, "--out", out).code == 0
        page = (out / "index.html").read_text()
        assert all(word in page for word in words), [word for word in words if word not in page]
        assert "nats/byte" not in page and page.count("data:image/png") >= 5


def test_pictures_are_drawn_of_what_is_asked_for(drawn, tmp_path, cli):
    result = RunFolder(drawn).read("result")["val"]["diffusion"]
    assert 0 <= result["recognised"] <= 1 and result["pictures"] == 20 and result["classifier_accuracy"] > 0.9
    words = ("--model", drawn, "--count", 6, "--steps", 2, "--out", tmp_path / "x.png", "--json")
    told = cli("generate", "the number one", *words)
    assert told.code == 0 and told.json["class"] == "one"
    assert image.open(tmp_path / "x.png").size == (4 * 9 + 1, 2 * 9 + 1)
    first = (tmp_path / "x.png").read_bytes()
    cli("generate", "1", *words)
    assert (tmp_path / "x.png").read_bytes() == first
    assert cli("generate", "cat", *words).code == 2


def test_a_class_is_known_by_number_name_or_within_words():
    names = ("boot", "ankle boot", "shirt", "t-shirt")
    asked = ["1", 0, "Ankle Boot", "an old ankle boot", "a t-shirt please"]
    assert [class_called(names, what) for what in asked] == [1, 0, 1, 1, 3]
    with pytest.raises(UserError, match="did you mean shirt"):
        class_called(names, "shrit")
    with pytest.raises(UserError, match="it knows boot"):
        class_called(names, "7")


def test_text_of_an_arb_model_and_finetuning_it(tmp_path, small_text, image_pairs, tiny_vision, cli):
    base = tmp_path / "text"
    run("train", "text", "--data", small_text, *QUICK, "--ctx", "32", *SMALL, "--out", base)
    assert RunFolder(base).read("result")["artifact"]["bpb_reread"] > 0
    told = cli("sample", base, "--bytes", 20, "--json")
    assert told.code == 0 and told.json["bytes"] == 20
    tuned = tmp_path / "tuned"
    words = ["--start", base, "--data", image_pairs, "--encoder", tiny_vision, *QUICK, "--set=eval_examples=4"]
    run("finetune", "vision", *words, "--steps", "6", "--out", tuned)
    assert RunFolder(tuned).read("result")["task"] == "vision"
    wrong = ["finetune", "vision", *words, "--out", tmp_path / "x"]
    assert "model is 64" not in cli(*wrong, "--set=width=64").err
    assert "does not fit" in cli(*wrong, "--set=width=64", "--out", tmp_path / "y").err


def test_a_run_without_text_ships_without_bits_per_byte(captions, tmp_path, cli):
    out = tmp_path / "model.tritwise"
    shipped = cli("ship", captions, "--out", out, "--json")
    assert shipped.code == 0 and shipped.json["bytes"] == out.stat().st_size
    assert "bits per byte" not in shipped.err and not {"bpb_before", "scored"} & set(shipped.json)
    refused = cli("ship", captions, "--out", out, "--budget", out.stat().st_size - 1)
    assert refused.code == 2 and "1 over the budget of" in refused.err and out.exists()


def test_image_runs_keep_to_their_budget_and_ship_float_weights_if_asked(image_pairs, tiny_vision, tmp_path, cli):
    words = ["train", "vision", "--data", image_pairs, "--encoder", tiny_vision, *QUICK, "--ctx", "32", *SMALL]
    over = cli(*words, "--set=budget=9000", "--out", tmp_path / "over")
    assert over.code == 2 and "over the budget of 9,000" in over.err
    floats = ["--set=weights=float", "--set=optimizer=adamw", "--rate=0.001", "--set=ship_as=auto"]
    run(*words, *floats, "--set=budget=60000", "--set=ship_small=500", "--out", tmp_path / "float")
    told = RunFolder(tmp_path / "float").read("result")
    assert told["artifact"]["way"] == "int8" and told["artifact"]["bytes"] <= 60_000
    trained, shipped = load(tmp_path / "float").model, load(tmp_path / "float/model.tritwise").model
    assert torch.equal(trained.vision.mean, shipped.vision.mean) and trained.vision.mean.any()
    features = torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(0))
    near, exact = shipped.hidden_of("vision", features), trained.hidden_of("vision", features)
    assert 0 < (near - exact).norm() < 0.05 * exact.norm()


def test_finetuning_starts_from_the_weights_of_the_run(captions, tmp_path, state_of):
    words = ["--start", captions, "--steps", "1", "--batch", "4", "--set=rate=0", "--set=eval_examples=4"]
    run("finetune", "vision", *words, "--out", tmp_path / "tuned")
    before, after = state_of(captions), state_of(tmp_path / "tuned")
    names = [name for name in before if name.startswith("model.")]
    assert names and all(torch.equal(before[name], after[name]) for name in names)


def test_a_mixture_learns_every_kind(tmp_path, small_text, image_pairs, sound_pairs, tiny_vision, tiny_audio):
    folder = tmp_path / "mixture"
    words = ["--text", small_text, "--images", image_pairs, "--sounds", sound_pairs, "--ctx", "32", *SMALL]
    words += ["--vision-encoder", tiny_vision, "--audio-encoder", tiny_audio, "--accum", "3"]
    words += ["--steps", "30", "--batch", "4", "--log-interval", "10", "--eval-interval", "30", "--set=ngrams=2"]
    run("pretrain", "--mixture", "text=1,vision=1,audio=2", *words, "--out", folder)
    logged = [line["losses"] for line in lines_of(folder) if line["kind"] == "train"]
    assert all(set(line) == {"text", "vision", "audio"} for line in logged)
    assert all(logged[-1][kind] < 0.9 * logged[0][kind] for kind in logged[0]), logged
    assert set(RunFolder(folder).read("result")["val"]) == {"text", "vision", "audio"}
    assert RunFolder(folder).read("audit")["float_trainable"] == 0


@pytest.mark.parametrize("accum", [1, 3])
def test_an_image_run_by_the_clock_is_warmed_before_it(accum, tmp_path, image_pairs, tiny_vision):
    """Captions differ in length, so that there are more shapes to warm than a step has micro-batches."""
    words = ["--data", image_pairs, "--encoder", tiny_vision, "--ctx", "32", "--batch", "2", *SMALL]
    words += ["--steps", "4", "--set=seconds=1000", "--accum", accum]
    run("train", "vision", *words, "--out", tmp_path / "run")
    said = [line["message"] for line in lines_of(tmp_path / "run") if line["kind"] == "event"]
    assert any("before the clock" in message for message in said)
    assert RunFolder(tmp_path / "run").read("result")["steps"] == 4


def test_a_resumed_run_ends_as_an_uninterrupted_one(tmp_path, image_pairs, tiny_vision, assert_same_state):
    words = ["--data", image_pairs, "--encoder", tiny_vision, *QUICK, "--ctx", "32", *SMALL]
    run("train", "vision", *words, "--out", tmp_path / "whole")
    run("train", "vision", *words, "--out", tmp_path / "parts")
    store = RunFolder(tmp_path / "parts").store()
    for file in store.folder.glob("step_00000012*"):
        file.unlink()
    run("train", "--resume", "--out", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "pictures")


def test_accumulating_is_the_mean_of_all_micro_batches(image_pairs, tiny_vision, tmp_path):
    """The loss of a step of two micro-batches is the mean of theirs, and both of them reach the momentum."""
    from tritwise.recipes import recipe
    from tritwise.train import override
    from tritwise.train.device import build_model
    from tritwise.train.optimizers import build_optimizers
    from tritwise.train.stepper import Stepper
    from tritwise.train.tasks import open_task

    changes = {"images": str(image_pairs), "vision_encoder": str(tiny_vision), "width": 32, "depth": 1, "batch": 4}
    config = override(recipe("vision"), {**changes, "ctx": 32, "accum": 2, "hide": 0, "noise": 0})
    task = open_task(config, print)
    cpu = torch.device("cpu")
    momenta = []
    for micros in ((0, 1), (0, 0)):
        torch.manual_seed(0)
        model = build_model(task.config, cpu)
        (optimizer,) = build_optimizers(model, task.config.train)
        batches = [task.batch(cpu, 0, micro) for micro in micros]
        alone = [model.loss(*batch).item() for batch in batches]
        total = Stepper(model, [optimizer], 2).step_over(batches)
        assert math.isclose(float(total), sum(alone) / 2, rel_tol=1e-5)
        momenta.append(optimizer.state[model.trunk.head.register]["momentum"].clone())
    assert not torch.equal(*momenta)


def test_a_step_that_is_no_number_moves_nothing_and_counts(image_pairs, tiny_vision, tmp_path, monkeypatch):
    from tritwise.train.streams import MediaStream

    real = MediaStream.batch_at

    def spoiled(self, step, micro=0):
        batch = real(self, step, micro)
        return (*batch[:3], batch[3] * (math.nan if step == 3 else 1.0))

    monkeypatch.setattr(MediaStream, "batch_at", spoiled)
    words = ["--data", image_pairs, "--encoder", tiny_vision, *QUICK, "--ctx", "32", *SMALL]
    run("train", "vision", *words, "--out", tmp_path / "run")
    trained = [line for line in lines_of(tmp_path / "run") if line["kind"] == "train"]
    assert [line["skipped"] for line in trained] == [1, 1, 1]
    assert all(math.isfinite(line["loss"]) for line in trained)


def test_batches_are_functions_of_their_place():
    assert torch.equal(torch.rand(3, generator=generator_of(1, 2)), torch.rand(3, generator=generator_of(1, 2)))
    assert not torch.equal(torch.rand(3, generator=generator_of(1, 2)), torch.rand(3, generator=generator_of(12, "")))
    assert opening("audio", 2).tolist() == [275, 277, 277, 276]


def test_what_a_user_can_get_wrong(captions, drawn, image_pairs, sound_pairs, tiny_vision, tiny_audio, tmp_path, cli):
    train = ["--out", tmp_path / "run", *QUICK, *SMALL]
    for words, said in (
        (["train", "smell"], "cannot train 'smell'; choose text"),
        (["train", "vision", "--encoder", tiny_vision], "no images were given to learn vision from"),
        (["train", "vision", "--data", image_pairs], "no vision encoder was named"),
        (["train", "vision", "--data", image_pairs, "--encoder", tiny_audio], "is an encoder of audio"),
        (["train", "vision", "--data", image_pairs, "--encoder", "./none"], "there is no encoder at ./none"),
        (["train", "audio", "--data", image_pairs, "--encoder", tiny_audio], "holds images, not sounds"),
        (["train", "vision", "--data", sound_pairs, "--encoder", tiny_vision], "holds sounds, not images"),
        (["train", "diffusion", "--data", image_pairs, "--set=channels=0"], "channels is 0; it must be at least 1"),
        (["train", "text", "--encoder", tiny_vision], "--encoder is for vision and audio"),
        (["train", "vision", "--recipe", "tiny"], "give one of them"),
        (["train", "vision", "--set=vocab=256"], "an ARB model needs 288"),
        (["pretrain", "--mixture", "text=1,smell=1"], "give weights above 0 of text"),
        (["pretrain", "--mixture", "text"], "mixture has 'text'"),
        (["finetune", "vision"], "no --start was given"),
    ):
        told = cli(*words, *train)
        assert told.code == 2 and said in told.err and told.err.count("\n") <= 2, (words, told.err)
    for words, said in (
        (["caption", image_pairs / "none.png", "--model", captions], "does not exist"),
        (["caption", sound_pairs / "00.flac", "--model", captions], "is no image but .flac"),
        (["transcribe", sound_pairs / "00.flac", "--model", captions], "has no audio part"),
        (["generate", "one", "--model", captions], "has no diffusion part"),
        (["finetune", "vision", "--start", drawn, "--data", image_pairs, *train], "no vision encoder was named"),
    ):
        told = cli(*words)
        assert told.code == 2 and said in told.err, (words, told.err)


def test_another_encoder_than_in_training_is_refused(captions, image_pairs, tiny_vision, tmp_path, cli):
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(tiny_vision, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    save_file(weights | {name: weights[name] + 1}, other / "model.safetensors", metadata={"format": "pt"})
    told = cli("caption", image_pairs / "05.png", "--model", captions, "--encoder", other)
    assert told.code == 2 and "is not the encoder that the model learned with" in told.err


def test_a_byte_model_is_no_start_and_has_no_parts(trained, image_pairs, cli, tmp_path):
    told = cli("finetune", "vision", "--start", trained, "--data", image_pairs, "--out", tmp_path / "x")
    assert told.code == 2 and "is a byte model of 256 symbols" in told.err
    told = cli("caption", image_pairs / "05.png", "--model", trained)
    assert told.code == 2 and "has no vision part; train one with tritwise train vision" in told.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "smell"}, "choose one of text"),
        ({"hide": 1.0}, "between 0 and 0.9"),
        ({"noise": math.nan}, "between 0 and 10"),
        ({"draw_steps": 0}, "at least 1"),
        ({"task": "mixture", "mixture": "text=-1"}, "above 0"),
    ],
)
def test_settings_that_cannot_work(changes, said):
    with pytest.raises(UserError, match=said):
        MediaConfig(**changes)
