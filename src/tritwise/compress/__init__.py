"""A file coded with a model's predictions: as small as the model's score says, and back to the last bit."""

from tritwise.compress.archive import Report, compress, decompress

__all__ = ["Report", "compress", "decompress"]
