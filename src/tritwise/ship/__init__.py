"""Everything that turns a model into a file."""

from tritwise.ship.artifact import ArtifactInfo, read_artifact, write_artifact

__all__ = ["ArtifactInfo", "read_artifact", "write_artifact"]
