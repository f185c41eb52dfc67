"""Models: what is trained. They build layers and never an optimizer."""

from tritwise.models.byte_lm import ByteLM, DecodeState
from tritwise.models.config import ModelConfig
from tritwise.models.generate import generate

__all__ = ["ByteLM", "DecodeState", "ModelConfig", "generate"]
