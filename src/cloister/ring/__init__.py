"""Fixed-point encoding and exact arithmetic in Z_m, in int8 planes; holds no secrets. Normative: spec/pad.md.

Importing this loads no torch; each name is loaded from its private module at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.ring._fixed_point import dequantize, quantize_rows, row_room
    from cloister.ring._formats import FAITHFUL, FAST, FORMATS, MAX_FEATURES, LimbFormat, ResidueFormat, RingFormat
    from cloister.ring._products import product
    from cloister.ring._weights import QuantizedWeight, quantize_weight

_HOME = {
    "FAITHFUL": "_formats",
    "FAST": "_formats",
    "FORMATS": "_formats",
    "MAX_FEATURES": "_formats",
    "LimbFormat": "_formats",
    "ResidueFormat": "_formats",
    "RingFormat": "_formats",
    "dequantize": "_fixed_point",
    "quantize_rows": "_fixed_point",
    "row_room": "_fixed_point",
    "product": "_products",
    "QuantizedWeight": "_weights",
    "quantize_weight": "_weights",
}

__all__ = [
    "FAITHFUL",
    "FAST",
    "FORMATS",
    "MAX_FEATURES",
    "LimbFormat",
    "QuantizedWeight",
    "ResidueFormat",
    "RingFormat",
    "dequantize",
    "product",
    "quantize_rows",
    "quantize_weight",
    "row_room",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
