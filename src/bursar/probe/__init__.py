"""Is the initialisation healthy? The signal through every layer, forward and backward, against theory.

`measure.py` runs the model and fills the rows, `theory.py` says what to expect after each torch function, `schemes.py`
holds the initialisers, `verdict.py` names the layer and the fix, `check.py` holds the initialisers to their formulas.
"""

from __future__ import annotations

from bursar.probe.measure import compare, probe
from bursar.probe.schemes import SCHEMES, Place, Scheme, fan, initialise, scheme

__all__ = ["SCHEMES", "Place", "Scheme", "compare", "fan", "initialise", "probe", "scheme"]
