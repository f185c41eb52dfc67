"""Frozen encoders: features of tiny random networks, computed once, kept on the disk, checked when they come back."""

import builtins
import shutil

import numpy as np
import pytest
import torch

from tritwise.data.collections import open_collection
from tritwise.encoders import Features, features_of, load_encoder
from tritwise.encoders.frozen import BLOCK, FRAME
from tritwise.errors import UserError

pytest.importorskip("transformers")
pytest.importorskip("PIL")
pytest.importorskip("soundfile")


def test_tokens_of_an_image_are_the_class_token_and_cells_of_a_grid(tiny_vision):
    encoder = load_encoder(str(tiny_vision))
    one = np.zeros((40, 28, 3), np.uint8)
    one[:20] = 255
    features = encoder([one, one[::-1]])
    assert features.shape == (2, 10, 16) and encoder.size == 16 and encoder.pixels == 42
    side = {"height": 42, "width": 42}
    pixels = encoder.processor(images=[one], size=side, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        states = encoder.network(pixel_values=pixels, output_hidden_states=True).hidden_states[2]
        direct = encoder.network.layernorm(states)
    assert torch.allclose(features[:1], direct)  # three patches a side, three cells: nothing is averaged
    mean = load_encoder(str(tiny_vision), grid=1)([one])
    assert torch.allclose(mean[:, 1], direct[:, 1:].mean(dim=1), atol=1e-6)


def test_a_larger_view_has_more_patches_and_an_earlier_layer_other_features(tiny_vision):
    image = np.random.default_rng(0).integers(0, 255, (30, 30, 3), dtype=np.uint8)
    large = load_encoder(str(tiny_vision), grid=4, pixels=70)
    assert large([image]).shape == (1, 17, 16)
    last, first = load_encoder(str(tiny_vision)), load_encoder(str(tiny_vision), layer=1)
    assert (last([image]) - first([image])).abs().max() > 0.01
    assert last.settings() != first.settings()


def test_nothing_of_an_encoder_trains(tiny_vision, tiny_audio):
    for folder in (tiny_vision, tiny_audio):
        network = load_encoder(str(folder)).network
        assert not network.training and not any(p.requires_grad for p in network.parameters())


def test_a_vit_and_a_clip_are_read_too(tmp_path):
    import transformers as hub

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    shape |= {"image_size": 32, "patch_size": 8}
    hub.ViTModel(hub.ViTConfig(**shape)).save_pretrained(tmp_path / "vit")
    hub.CLIPVisionModel(hub.CLIPVisionConfig(**shape)).save_pretrained(tmp_path / "clip")
    for name, kind in (("vit", "ViTImageProcessor"), ("clip", "CLIPImageProcessor")):
        told = f'{{"image_processor_type": "{kind}", "size": {{"height": 32, "width": 32}}, "do_resize": true}}'
        (tmp_path / name / "preprocessor_config.json").write_text(told)
        encoder = load_encoder(str(tmp_path / name), grid=2, pixels=32)
        assert encoder([np.zeros((9, 9, 3), np.uint8)]).shape == (1, 5, 16)


def test_a_short_sound_is_heard_in_a_short_window(tiny_audio):
    encoder = load_encoder(str(tiny_audio))
    sounds = [np.sin(np.arange(n) / 9).astype(np.float32) for n in (100, FRAME * BLOCK, FRAME * BLOCK + 1)]
    found = encoder(sounds)
    assert [len(x) for x in found] == [BLOCK, BLOCK, 2 * BLOCK]
    alone = [encoder([sound])[0] for sound in sounds]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, alone, strict=True))
    assert (found[0] - found[1]).abs().max() > 0.01


def test_the_whole_window_is_what_the_library_says(tiny_audio):
    """At its full length our window changes nothing: the same features as of the network as it was loaded."""
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    encoder = load_encoder(str(tiny_audio))
    sound = np.sin(np.arange(96 * FRAME) / 7).astype(np.float32)
    options = {"sampling_rate": 16000, "max_length": 96 * FRAME, "return_tensors": "pt"}
    told = encoder.extractor([sound], **options)["input_features"]
    with torch.inference_mode():
        direct = WhisperEncoder.from_pretrained(tiny_audio)(told).last_hidden_state[0]
    assert torch.allclose(encoder([sound])[0], direct, atol=1e-5)


def test_a_long_sound_is_read_in_windows(tiny_audio):
    encoder = load_encoder(str(tiny_audio))
    sound = np.sin(np.arange(96 * FRAME + 50) / 7).astype(np.float32)
    (found,) = encoder([sound])
    assert len(found) == 96 + BLOCK
    assert torch.allclose(found[:96], encoder([sound[: 96 * FRAME]])[0], atol=1e-5)


def test_features_are_computed_once(tiny_vision, image_pairs, tmp_path, monkeypatch):
    encoder, collection = load_encoder(str(tiny_vision)), open_collection(image_pairs)
    calls: list[tuple[int, int]] = []
    found = features_of(encoder, collection, cache=tmp_path, progress=lambda *done: calls.append(done))
    assert calls[-1] == (40, 40) and len(found) == 40 and found.size == 16 and found.length(3) == 10
    assert torch.allclose(found.of(7).float(), encoder([collection.read(7)])[0], atol=2e-3)
    assert set(found.previews) <= set(found.part("val")) and found.previews
    monkeypatch.setattr(type(encoder), "forward", lambda *_: pytest.fail("computed again"))
    again = features_of(encoder, collection, cache=tmp_path)
    assert torch.equal(again.of(39), found.of(39)) and again.examples == found.examples
    assert [torch.equal(again.previews[i], found.previews[i]) for i in found.previews] == [True] * len(found.previews)


def test_other_weights_layers_or_data_are_other_features(tiny_vision, image_pairs, tmp_path):
    collection = open_collection(image_pairs).first(8)
    cache = tmp_path / "cache"
    features_of(load_encoder(str(tiny_vision)), collection, cache=cache)
    features_of(load_encoder(str(tiny_vision), layer=1), collection, cache=cache)
    features_of(load_encoder(str(tiny_vision)), open_collection(image_pairs).first(9), cache=cache)
    assert len(list(cache.glob("*.json"))) == 3
    copied = shutil.copytree(tiny_vision, tmp_path / "copy")
    features_of(load_encoder(str(copied)), collection, cache=cache)  # a copy is the same encoder
    assert len(list(cache.glob("*.json"))) == 3


def test_damaged_features_are_noticed(tiny_audio, sound_pairs, tmp_path):
    encoder, collection = load_encoder(str(tiny_audio)), open_collection(sound_pairs)
    features_of(encoder, collection, cache=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    with pytest.raises(UserError, match="checksum does not match; delete it"):
        features_of(encoder, collection, cache=tmp_path)
    (tmp_path / "x.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="no features this version knows"):
        Features.load(tmp_path / "x.json")


def test_the_wrong_kind_of_media(tiny_vision, tiny_audio, image_pairs, sound_pairs, tmp_path):
    with pytest.raises(UserError, match=r"encodes images, and .* holds sounds"):
        features_of(load_encoder(str(tiny_vision)), open_collection(sound_pairs), cache=tmp_path)
    with pytest.raises(UserError, match=r"encodes sounds, and .* holds images"):
        features_of(load_encoder(str(tiny_audio)), open_collection(image_pairs), cache=tmp_path)


def test_what_is_no_encoder(tmp_path, tiny_vision, monkeypatch):
    with pytest.raises(UserError, match="there is no encoder at"):
        load_encoder(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UserError, match="is a gpt2, which is no encoder"):
        load_encoder(str(tmp_path))
    broken = shutil.copytree(tiny_vision, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="cannot load the encoder"):
        load_encoder(str(broken))
    with pytest.raises(UserError, match=r"layer is 7; .* has the layers 1 to 2"):
        load_encoder(str(tiny_vision), layer=7)
    with pytest.raises(UserError, match="grid is 4; 42 pixels hold 1 to 3"):
        load_encoder(str(tiny_vision), grid=4)
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] == "transformers":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="transformers is missing; pip install"):
        load_encoder(str(tiny_vision))
