"""Configs: refused in one line or whole, changed by key, written to JSON and read back equal."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tritwise.errors import UserError
from tritwise.models import ModelConfig, PartsConfig
from tritwise.recipes import RECIPES, recipe, shakespeare, tiny
from tritwise.train import Config, TrainConfig, override
from tritwise.train.config import flat
from tritwise.train.media_config import MediaConfig


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_json(name: str):
    config = recipe(name)
    assert config.recipe == name
    assert Config.from_dict(json.loads(json.dumps(config.as_dict()))) == config


def test_recipes_are_functions_that_return_a_config():
    assert recipe("tiny") == tiny() and recipe("shakespeare") == shakespeare()
    with pytest.raises(UserError, match=r"no recipe 'tinny'; did you mean tiny\?"):
        recipe("tinny")
    with pytest.raises(UserError, match="no recipe 'x'; choose one of shakespeare, tiny"):
        recipe("x")


def test_flat_holds_every_setting_once():
    fields = [
        field.name
        for part in (ModelConfig, TrainConfig, PartsConfig, MediaConfig)
        for field in dataclasses.fields(part)
    ]
    assert sorted(fields) == sorted(flat(Config()))


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("steps", "batch", "accum", "log_interval") for value in (0, -1)]
    + [
        (name, -1)
        for name in (
            "seed",
            "interval",
            "warmup",
            "eval_bytes",
            "stride",
            "eval_interval",
            "save_interval",
            "keep",
            "sample_bytes",
        )
    ]
    + [
        (name, value)
        for name in ("rate", "scale_rate", "embedding_rate", "head_rate", "weight_decay", "momentum", "decay")
        for value in (math.nan, math.inf, -math.inf, -0.1)
    ]
    + [("momentum", 1.0), ("decay", 1.01), ("optimizer", "sgd"), ("direction", "up"), ("device", "tpu")]
    + [("dtype", "float16"), ("compile", "yes"), ("checkpoint", "layer"), ("loss_chunk", -1)]
    + [("split", "90"), ("split", "90/20"), ("split", "")],
)
def test_a_value_that_cannot_work_is_refused_by_name(name: str, value: object):
    with pytest.raises(UserError) as caught:
        TrainConfig(**{name: value})
    message = str(caught.value)
    assert name in message and ";" in message and "\n" not in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 0.0),
        ("momentum", 0.0),
        ("decay", 0.0),
        ("decay", 1.0),
        ("eval_interval", 0),
        ("keep", 0),
        ("warmup", 0),
    ],
)
def test_the_edge_of_what_works_is_allowed(name: str, value: float):
    assert getattr(TrainConfig(**{name: value}), name) == value


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(UserError, match=r"adamw does not train trit weights; use .* weights=float"):
        Config(train=TrainConfig(optimizer="adamw"))
    with pytest.raises(UserError, match="trit does not train float weights; use"):
        Config(model=ModelConfig(weights="float"))
    with pytest.raises(UserError, match="vocab is 300; a model of bytes needs 256"):
        Config(model=ModelConfig(vocab=300))
    for setting in ("compact", "fp8"):
        with pytest.raises(UserError, match="compact and fp8 are for weights of one trit; set weight_trits=1"):
            Config(model=ModelConfig(weight_trits=2), train=TrainConfig(**{setting: True}))
    with pytest.raises(UserError, match="stride is 65; the score's window moves by at most ctx, 64"):
        Config(model=ModelConfig(ctx=64), train=TrainConfig(stride=65))
    assert Config(model=ModelConfig(ctx=64), train=TrainConfig(stride=64)).train.stride == 64
    assert Config(model=ModelConfig(weights="float"), train=TrainConfig(optimizer="muon")).model.weights == "float"


def test_override_reads_strings_as_the_type_of_the_setting():
    changed = override(
        tiny(), {"steps": " 7 ", "rate": "1e-3", "save": "no", "split": "80/10/10", "width": "64", "softcap": 30}
    )
    assert (changed.train.steps, changed.train.rate, changed.train.save) == (7, 1e-3, False)
    assert (changed.train.split, changed.model.width, changed.model.softcap) == ("80/10/10", 64, 30.0)
    assert isinstance(changed.model.softcap, float)
    assert override(tiny(), {}) == tiny()


@pytest.mark.parametrize(
    ("key", "value", "wanted"),
    [
        ("steps", "abc", "a whole number"),
        ("steps", "1.5", "a whole number"),
        ("steps", "", "a whole number"),
        ("steps", True, "a whole number"),
        ("rate", "fast", "a number"),
        ("rate", False, "a number"),
        ("save", "maybe", "true or false"),
        ("split", True, "text"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: object, wanted: str):
    with pytest.raises(UserError, match=f"{key} is .*; it must be {wanted}"):
        override(tiny(), {key: value})


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(UserError, match=r"no setting 'widht'; did you mean width\?"):
        override(tiny(), {"widht": 1})
    with pytest.raises(UserError, match="no setting 'qqqq'; known keys: accum, active_experts, audio, audio_digest"):
        override(tiny(), {"qqqq": 1})


def test_what_follows_from_a_changed_value_is_derived_again():
    assert tiny().model.heads == 1
    wide = override(tiny(), {"width": 256})
    assert (wide.model.heads, wide.model.kv_heads) == (4, 4)
    assert override(wide, {"heads": 8}).model.kv_heads == 8
    assert override(wide, {"heads": 8, "kv_heads": 2}).model.kv_heads == 2
    assert override(wide, {"width": 64, "heads": 4}).model.heads == 4


@given(st.sampled_from(sorted(flat(Config()))), st.text(max_size=6))
def test_any_text_for_any_key_is_taken_or_refused_in_one_line(key: str, value: str):
    try:
        changed = override(tiny(), {key: value})
    except UserError as error:
        assert "\n" not in str(error) and ";" in str(error)
    else:
        assert Config.from_dict(json.loads(json.dumps(changed.as_dict()))) == changed


@pytest.mark.parametrize(
    "damage",
    [
        lambda values: values.pop("format"),
        lambda values: values.pop("model"),
        lambda values: values.update(train=None),
        lambda values: values["model"].update(widht=3),
        lambda values: values["model"].update(width="wide"),
        lambda values: values["train"].update(rate=None),
        lambda values: values.update(format=2),
    ],
)
def test_a_damaged_or_newer_config_is_refused(damage):
    values = tiny().as_dict()
    damage(values)
    with pytest.raises(UserError, match=r"; (train again|upgrade tritwise)"):
        Config.from_dict(values)
    with pytest.raises(UserError, match="train again"):
        Config.from_dict(["not", "an", "object"])  # type: ignore[arg-type]
