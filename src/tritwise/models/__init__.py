"""Models: what is trained. They build layers and never an optimizer."""

from tritwise.models.arb import Arb, skeleton
from tritwise.models.arb_parts import PartsConfig
from tritwise.models.block import Block
from tritwise.models.byte_lm import AtDepth, ByteLM, DecodeState
from tritwise.models.config import Layer, ModelConfig
from tritwise.models.denoiser import Denoiser, draw
from tritwise.models.generate import generate

__all__ = [
    "Arb",
    "AtDepth",
    "Block",
    "ByteLM",
    "DecodeState",
    "Denoiser",
    "Layer",
    "ModelConfig",
    "PartsConfig",
    "draw",
    "generate",
    "skeleton",
]
