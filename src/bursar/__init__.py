"""bursar: the accountant of deep-learning training.

``bursar.step(model, batch)`` and ``with bursar.tracing() as t:`` write the ledger of a training step without a GPU;
``bursar.solve(...)`` solves a whole run. Importing bursar does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from bursar.ledger import Ledger
    from bursar.meter.live import Meter
    from bursar.rules import rule
    from bursar.run import Run, solve
    from bursar.trace import tracing
    from bursar.workload.formula import formula
    from bursar.workload.step import step

_WHERE = {
    "Ledger": ("bursar.ledger", "Ledger"),
    "Meter": ("bursar.meter.live", "Meter"),
    "formula": ("bursar.workload.formula", "formula"),
    "Run": ("bursar.run", "Run"),
    "rule": ("bursar.rules", "rule"),
    "solve": ("bursar.run", "solve"),
    "step": ("bursar.workload.step", "step"),
    "tracing": ("bursar.trace", "tracing"),
}
_NEED_TORCH = {
    "Meter": "a meter stands in a torch training loop",
    "formula": "formulas are derived from traces of the model's own code",
    "step": "a step is traced by running the model's own code",
    "tracing": "a trace runs torch on fake tensors",
}


def __getattr__(name: str) -> Any:
    """Load what is asked for when it is asked for. Raises MissingExtra where it needs torch and torch is missing."""
    if name not in _WHERE:
        raise AttributeError(f"module 'bursar' has no attribute {name!r}")
    import importlib

    module, attribute = _WHERE[name]
    try:
        found = getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name == "torch" and name in _NEED_TORCH:
            from bursar.errors import MissingExtra

            raise MissingExtra("torch", _NEED_TORCH[name]) from error
        raise
    globals()[name] = found
    return found


__all__ = ["Ledger", "Meter", "Run", "__version__", "formula", "rule", "solve", "step", "tracing"]
