"""Models: what is trained. They build layers and never an optimizer."""

from tritwise.models.arb import Arb
from tritwise.models.arb_parts import PartsConfig
from tritwise.models.byte_lm import ByteLM
from tritwise.models.config import ModelConfig
from tritwise.models.denoiser import Denoiser, draw
from tritwise.models.generate import generate

__all__ = ["Arb", "ByteLM", "Denoiser", "ModelConfig", "PartsConfig", "draw", "generate"]
