"""Training: one loop, checkpoints, evaluation, the run folder, and the audit."""

from tritwise.train.audit import audit
from tritwise.train.config import Config, TrainConfig, override
from tritwise.train.loop import train
from tritwise.train.restore import load_run
from tritwise.train.run import RunFolder

__all__ = ["Config", "RunFolder", "TrainConfig", "audit", "load_run", "override", "train"]
