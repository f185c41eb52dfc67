"""Models: what is trained. They build layers and never an optimizer."""

from tritwise.models.block import Block
from tritwise.models.byte_lm import AtDepth, ByteLM, DecodeState
from tritwise.models.config import Layer, ModelConfig
from tritwise.models.generate import generate

__all__ = ["AtDepth", "Block", "ByteLM", "DecodeState", "Layer", "ModelConfig", "generate"]
