"""The run folder: where a run's files lie, and the manifest that says how it came to be."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from tritwise._version import __version__
from tritwise.errors import UserError
from tritwise.files import make_folder, read_json, write_json
from tritwise.ops import backend_table
from tritwise.train.checkpoint import CheckpointStore
from tritwise.train.config import Config, flat, override

# What a resumed run may change without becoming another run. Changing steps or seconds changes the
# schedule of the rate; another device or loss_chunk, compiling or fp8 rounds in another way.
RESUMABLE = frozenset(
    (
        "steps",
        "seconds",
        "budget",
        "ship_as",
        "ship_small",
        "ship_average",
        "log_interval",
        "eval_interval",
        "save_interval",
        "keep",
        "save",
        "sample_bytes",
        "eval_bytes",
        "device",
        "compile",
        "checkpoint",
        "loss_chunk",
        "fp8",
    )
)


class RunFolder:
    """Paths and files of one run. See DESIGN, "A run folder holds"."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    @property
    def metrics(self) -> Path:
        """One JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def artifact(self) -> Path:
        """The shipped model."""
        return self.path / "model.tritwise"

    @property
    def tokenizer(self) -> Path:
        """What a model of tokens reads with: a copy."""
        return self.path / "tokenizer.model"

    def store(self, keep: int = 2) -> CheckpointStore:
        """The run's checkpoints."""
        return CheckpointStore(self.path / "checkpoints", keep)

    def begin(self, *, resume: bool) -> None:
        """Make the folder, or find it again.

        Raises UserError if a new run would overwrite one, or if there is nothing to resume.
        """
        begun = (self.path / "config.json").exists() or bool(self.store().steps())
        if begun and not resume:
            raise UserError(f"{self.path} already holds a run; add --resume to go on with it, or choose another --out")
        if resume and not begun:
            raise UserError(f"{self.path} holds no run to resume; leave out --resume to start one")
        make_folder(self.path)

    def config(self) -> Config:
        """The run's config. Raises UserError if the folder holds no run."""
        if not self.path.exists():
            raise UserError(f"there is no run at {self.path}; check the path, or make one with tritwise train --out")
        if not (self.path / "config.json").exists():
            raise UserError(f"{self.path} is no run folder: it has no config.json; name the --out of a training run")
        return Config.from_dict(self.read("config"))

    def resumed(self, recipe: str | None, changes: dict[str, Any]) -> Config:
        """The run's config with `changes`, to go on with it. Raises UserError for a change that makes another run."""
        config = self.config()
        if recipe not in (None, config.recipe):
            raise UserError(f"{self.path} is a run of {config.recipe}, not {recipe}; leave out --recipe to resume it")
        changed = override(config, changes)
        before, after = flat(config), flat(changed)
        fixed = [key for key in before if before[key] != after[key] and key not in RESUMABLE]
        if fixed:
            raise UserError(f"{fixed[0]} cannot change in the middle of a run; start a new one with another --out")
        return changed

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Write NAME.json, atomically."""
        write_json(self.path / f"{name}.json", value)

    def read(self, name: str) -> dict[str, Any]:
        """Read NAME.json. Raises UserError if it is missing or damaged."""
        return read_json(self.path / f"{name}.json")

    def write_manifest(self, config: Config, device: torch.device) -> None:
        """Say what made this run: versions, hardware, backends, seed, command."""
        self.write("manifest", manifest(config, device))


def manifest(config: Config, device: torch.device) -> dict[str, Any]:
    """Versions, hardware, backend table, seed and command of this process, as plain JSON."""
    return {
        **surroundings(device),
        "backends": backend_table(),
        "seed": config.train.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
    }


def surroundings(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of this process: what can be said of any measurement, as plain JSON."""
    return {
        "tritwise": __version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def cpu_name() -> str:
    """The processor's model name where the system tells, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that this package runs from; None for an installed package."""
    folder = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in folder.parents):
        return None
    try:
        told = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
            env=os.environ | {"GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return told.stdout.strip()
