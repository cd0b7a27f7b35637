"""Train Sphere Confidence Face models: margin-softmax backbone, then a confidence network under the SCF loss.

from scf_fast import SCF, SCFLoss, KLDiracVMF
"""

import importlib

__version__ = "0.1.0"

__all__ = ["SCF", "KLDiracVMF", "SCFLoss"]
_HOMES = {"SCF": "scf_fast.model", "SCFLoss": "scf_fast.losses", "KLDiracVMF": "scf_fast.losses"}


def __getattr__(name: str):
    """The public classes, imported when asked for: the command line must not wait for what it does not use."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
