"""Everything that turns a model into a file."""

from tritwise.ship.artifact import ArtifactInfo, read_artifact, read_tokenizer, shipped_bytes, write_artifact
from tritwise.ship.budget import WAYS, estimate, require_room, ship_within

__all__ = [
    "WAYS",
    "ArtifactInfo",
    "estimate",
    "read_artifact",
    "read_tokenizer",
    "require_room",
    "ship_within",
    "shipped_bytes",
    "write_artifact",
]
