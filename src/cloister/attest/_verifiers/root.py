"""Which root may vouch for which type of evidence: one rule for every vendor."""

from __future__ import annotations

from collections.abc import Collection

from cloister.attest._policy import Policy
from cloister.errors import PolicyRejectedError


def check_root(
    declared: str,
    root_sha256: str,
    policy: Policy,
    *,
    vendor: str,
    genuine: Collection[str],
    pinned: Collection[str],
    key: str,
    real: tuple[str, ...],
    software: tuple[str, ...],
) -> str:
    """Refuse before any signature is looked at: nothing under an unpinned root is worth a look.

    Args:
        declared: the type that the evidence says it is of.
        root_sha256: hex SHA-256 of the root that it brings; proves nothing until it is compared here.
        policy: says whether simulated evidence is allowed.
        vendor: the vendor's name, for messages.
        genuine: the vendor's own roots; any other is simulated.
        pinned: the roots that the policy pins.
        key: where it pins them, under [roots].
        real, software: the types that evidence under a genuine root, and under another, has to declare.

    Returns:
        one line for a person.

    Raises:
        PolicyRejectedError: with every reason.
    """
    reasons: list[str] = []
    simulated = root_sha256 not in genuine
    if root_sha256 not in pinned:
        reasons.append(f"root {root_sha256} is not pinned in [roots].{key}")
    if simulated and not policy.allow_simulated:
        reasons.append(f"the root is not {vendor}'s, and the policy does not allow simulated evidence")
    if declared not in (software if simulated else real):
        actual = f"not {vendor}'s" if simulated else f"{vendor}'s"
        reasons.append(f'evidence is declared "{declared}", and its root is {actual}')
    if reasons:
        raise PolicyRejectedError(reasons[0], reasons=reasons, hint="the policy decides which roots are trusted")
    if simulated:
        return f"root {root_sha256[:16]}… is pinned; it is SIMULATED, and the policy allows simulated evidence"
    return f"root {root_sha256[:16]}… is pinned; it is {vendor}'s"
