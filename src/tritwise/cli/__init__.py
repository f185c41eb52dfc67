"""The command line: `tritwise train score sample ship compress decompress audit report doctor bench`.

Errors that the user can put right come as one line on stderr with exit code 2. With --json the last line of stdout is
one JSON object, an error included; everything else goes to stderr.
"""

from tritwise.cli.app import main

__all__ = ["main"]
