"""The trusted process: its hardening, memory for its keys, and what it and its host say to each other."""

from __future__ import annotations

from cloister.enclave._detect import available_layers
from cloister.enclave._harden import REQUIRED_LAYERS, harden
from cloister.enclave._hostport import (
    MAX_FRAME_BYTES,
    MAX_SOCKET_PATH_BYTES,
    HostServer,
    bind_host_socket,
    host_call,
)
from cloister.enclave._secret import SecretBytes

__all__ = [
    "MAX_FRAME_BYTES",
    "MAX_SOCKET_PATH_BYTES",
    "REQUIRED_LAYERS",
    "HostServer",
    "SecretBytes",
    "available_layers",
    "bind_host_socket",
    "harden",
    "host_call",
]
