"""Tritwise: train, measure and ship language models whose weights are only ever -1, 0 or +1.

    import tritwise
    model = tritwise.load("runs/demo")            # a run folder or an artifact
    print(model.generate("ROMEO:", bytes=200))
    print(model.score("shakespeare", split="val").bpb)

`tritwise.TritLinear` is the layer and `tritwise.TritOptimizer` the optimizer to use in models of your own.
Names load when they are first used, so that `import tritwise` is quick and does not import torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from tritwise._version import __version__

if TYPE_CHECKING:
    from tritwise.errors import UserError as UserError
    from tritwise.loading import load as load
    from tritwise.models import ByteLM as ByteLM
    from tritwise.models import ModelConfig as ModelConfig
    from tritwise.nn import TritEmbedding as TritEmbedding
    from tritwise.nn import TritLinear as TritLinear
    from tritwise.ops import backend as backend
    from tritwise.optim import TritOptimizer as TritOptimizer

_HOMES = {
    "UserError": "errors",
    "load": "loading",
    "ByteLM": "models",
    "ModelConfig": "models",
    "TritEmbedding": "nn",
    "TritLinear": "nn",
    "backend": "ops",
    "TritOptimizer": "optim",
}

__all__ = [
    "ByteLM",
    "ModelConfig",
    "TritEmbedding",
    "TritLinear",
    "TritOptimizer",
    "UserError",
    "__version__",
    "backend",
    "load",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tritwise' has no attribute {name!r}")
    return getattr(importlib.import_module(f"tritwise.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
