"""Frozen encoders of images and sounds, from `transformers` (extra `hf`), and their features on the disk."""

from tritwise.encoders.features import Features, features_of
from tritwise.encoders.frozen import AudioEncoder, VisionEncoder, load_encoder

__all__ = ["AudioEncoder", "Features", "VisionEncoder", "features_of", "load_encoder"]
