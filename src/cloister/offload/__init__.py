"""Frozen linear layers on an untrusted accelerator, over masked features, with every answer checked; spec/pad.md.

Importing this loads no torch; each name is loaded from its private module at first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister._lazy import lazy_exports

if TYPE_CHECKING:
    from cloister.offload._accelerator import Accelerator, AcceleratorCall
    from cloister.offload._address import parse_address
    from cloister.offload._awaited import AwaitedAccelerator, accelerator_port
    from cloister.offload._client import Timeouts
    from cloister.offload._helper import RemotePadHelper
    from cloister.offload._helper_link import read_helper_key
    from cloister.offload._helper_server import serve_pad_helper
    from cloister.offload._linear import FrozenLinear, OffloadedGroup, OffloadedLinear
    from cloister.offload._local import LocalAccelerator
    from cloister.offload._probe import KernelCosts, least_seconds, measure_kernels
    from cloister.offload._process import dial_accelerator, serve_accelerator
    from cloister.offload._real_rows import only_real_rows
    from cloister.offload._remote import RemoteAccelerator
    from cloister.offload._session import OffloadSession

_HOME = {
    "Accelerator": "_accelerator",
    "AcceleratorCall": "_accelerator",
    "AwaitedAccelerator": "_awaited",
    "FrozenLinear": "_linear",
    "KernelCosts": "_probe",
    "LocalAccelerator": "_local",
    "OffloadSession": "_session",
    "OffloadedGroup": "_linear",
    "OffloadedLinear": "_linear",
    "RemoteAccelerator": "_remote",
    "RemotePadHelper": "_helper",
    "Timeouts": "_client",
    "accelerator_port": "_awaited",
    "dial_accelerator": "_process",
    "least_seconds": "_probe",
    "measure_kernels": "_probe",
    "only_real_rows": "_real_rows",
    "parse_address": "_address",
    "read_helper_key": "_helper_link",
    "serve_accelerator": "_process",
    "serve_pad_helper": "_helper_server",
}

__all__ = [
    "Accelerator",
    "AcceleratorCall",
    "AwaitedAccelerator",
    "FrozenLinear",
    "KernelCosts",
    "LocalAccelerator",
    "OffloadSession",
    "OffloadedGroup",
    "OffloadedLinear",
    "RemoteAccelerator",
    "RemotePadHelper",
    "Timeouts",
    "accelerator_port",
    "dial_accelerator",
    "least_seconds",
    "measure_kernels",
    "only_real_rows",
    "parse_address",
    "read_helper_key",
    "serve_accelerator",
    "serve_pad_helper",
]

__getattr__, __dir__ = lazy_exports(__name__, _HOME)
