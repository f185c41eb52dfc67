"""What a model reads: bytes through a memory map or tokens of shards, splits, an exact sampler, the vocabulary.

The function `split` stays in `tritwise.data.split`: lifted up here it would hide the module of the same name.
"""

from tritwise.data.sampler import Sampler
from tritwise.data.source import Source, describe, open_bytes
from tritwise.data.split import Split
from tritwise.data.vocabulary import VOCABULARY, Special

__all__ = ["VOCABULARY", "Sampler", "Source", "Special", "Split", "describe", "open_bytes"]
