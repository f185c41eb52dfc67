"""Recipes of ARB runs, each of at most five minutes on two cores; data and encoders come by --data and --encoder.

Balanced directions, scales that learn and rates that fall over all steps are for captions and pictures: pictures, which
are numbers and not symbols, need them most (docs/LOG.md). Rows are not steadied (row_memory), as they were not when
these recipes were measured. Images are seen at 112 pixels, which costs a quarter of the time of DINOv2's own 224 and is
enough for icons; photographs want more (`--set vision_pixels=224`).
"""

import dataclasses
from typing import Any

from tritwise.data.vocabulary import VOCABULARY
from tritwise.errors import UserError
from tritwise.models import ModelConfig, PartsConfig
from tritwise.train import Config, TrainConfig
from tritwise.train.media_config import KINDS, MediaConfig

SCALED: dict[str, Any] = {"direction": "balanced", "scale_rate": 0.005, "decay": 1.0, "row_memory": 0.0}


def text() -> Config:
    """The trunk of an ARB model, on text alone: about two minutes."""
    return Config(
        "text",
        ModelConfig(width=128, depth=2, ctx=64, vocab=VOCABULARY),
        TrainConfig(steps=800, batch=32, decay=0.7, interval=4, eval_interval=400, save_interval=400),
        PartsConfig(),
        MediaConfig(task="text"),
    )


def vision() -> Config:
    """Captions of images through a frozen encoder: about three minutes for the emoji set, with its features."""
    return Config(
        "vision",
        ModelConfig(width=128, depth=2, ctx=96, vocab=VOCABULARY, column_scales=True),
        TrainConfig(steps=600, batch=32, rate=0.03, **SCALED, eval_interval=200, save_interval=200),
        PartsConfig(vision=True, vision_pixels=112),
        MediaConfig(task="vision"),
    )


def audio() -> Config:
    """Transcripts of short sounds through a frozen encoder: about a minute for spoken digits."""
    return Config(
        "audio",
        ModelConfig(width=128, depth=2, ctx=96, vocab=VOCABULARY),
        TrainConfig(steps=300, batch=32, decay=0.7, row_memory=0.0, eval_interval=100, save_interval=100),
        PartsConfig(audio=True),
        MediaConfig(task="audio"),
    )


def diffusion() -> Config:
    """Small grey pictures of named classes by flow matching: about four minutes for Fashion-MNIST."""
    return Config(
        "diffusion",
        ModelConfig(width=64, depth=1, ctx=64, vocab=VOCABULARY, column_scales=True),
        TrainConfig(steps=500, batch=64, rate=0.015, **SCALED, eval_interval=250, save_interval=250),
        PartsConfig(diffusion=True),
        MediaConfig(task="diffusion", judge_pictures=100, draw_steps=10),
    )


def mixture() -> Config:
    """Text, captions and transcripts in one network: about four minutes for Shakespeare, emoji and spoken digits."""
    return Config(
        "mixture",
        ModelConfig(width=128, depth=2, ctx=96, vocab=VOCABULARY),
        TrainConfig(
            steps=700, batch=32, decay=0.7, row_memory=0.0, eval_interval=350, save_interval=350, eval_bytes=16384
        ),
        PartsConfig(vision_pixels=112),
        MediaConfig(task="mixture", mixture="text=1,vision=1,audio=1"),
    )


def finetuned(config: Config, what: str, start: str) -> Config:
    """The config of a run that goes on from the run of `config`, at `start`, with data of the kind `what`.

    The model keeps its shape, the training is that of the kind's recipe at half the rate.
    Raises UserError for another kind, or a run that is no ARB run.
    """
    if what not in KINDS:
        raise UserError(f"cannot finetune {what!r}; choose one of {', '.join(KINDS)}")
    if not config.media.task:
        raise UserError(f"{start} is a byte model of 256 symbols; start from a run of train text, vision, audio, …")
    own = {"text": text, "vision": vision, "audio": audio, "diffusion": diffusion}[what]()
    settings = dataclasses.replace(
        own.train,
        data=config.train.data,
        rate=own.train.rate / 2 if config.train.optimizer == "trit" else config.train.rate / 2,
        optimizer=config.train.optimizer,
    )
    media = dataclasses.replace(
        own.media, start=start, images=config.media.images, sounds=config.media.sounds, pictures=config.media.pictures
    )
    return Config(what, config.model, settings, config.parts, media)
