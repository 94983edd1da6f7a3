"""The modes of a pad, what each assumes, in words that a security officer can sign, and directions; spec/pad.md."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum


class PadMode(StrEnum):
    """Where a pad r and the term u = W r that takes it off again come from."""

    OTP = "otp"
    OTP2 = "otp-2"
    LATTICE = "lattice"


class Direction(StrEnum):
    """Which product of a layer: y = x W^T, or dx = g W with the transpose of the same integers."""

    FORWARD = "forward"
    BACKWARD = "backward"


ASSUMPTIONS: Mapping[PadMode, str] = {
    PadMode.OTP: (
        "One-time pad: each masked number is uniform and used once, so the accelerator learns nothing but shapes, "
        "order and timing, as long as AES-256 and the system's random generator are sound and the enclave's memory "
        "cannot be rolled back."
    ),
    PadMode.OTP2: (
        "One-time pad from two accelerators: as the mode otp, and in addition the operators of the two accelerators "
        "do not put together what they see; if they do, they have the features in the clear."
    ),
    PadMode.LATTICE: (
        "Homomorphic pad: the features are hidden by Module-LWR, a computational and heuristic assumption, at "
        "parameters that nobody outside has reviewed, with one vector shared by many secrets and with later inputs "
        "that depend on earlier roundings; shapes, order and timing are visible, no raw output of an offloaded layer "
        "may leave the enclave, and the enclave's memory cannot be rolled back."
    ),
}
"""One sentence each; every run prints that of its mode, and its report has it."""
