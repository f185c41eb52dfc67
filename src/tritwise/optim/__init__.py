"""Optimizers: the register rule, and float baselines. They know layers and roles, never a model."""

from tritwise.optim.groups import ROLE_RATES
from tritwise.optim.muon import Muon
from tritwise.optim.schedule import rate_factor
from tritwise.optim.trit import TritOptimizer

__all__ = ["ROLE_RATES", "Muon", "TritOptimizer", "rate_factor"]
