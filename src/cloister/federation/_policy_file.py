"""A party's policy as its file says it now: an operator may tighten it while a run goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path

from cloister.attest import Policy
from cloister.errors import ConfigError


class PolicyFile:
    """Gives the policy that its file holds at the time of the call; a policy that came from no file never changes.

    Compared by hash, so that neither a coarse nor a wrong file time hides a change.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __repr__(self) -> str:
        return f"PolicyFile({self._policy.source!r})"

    def __call__(self) -> Policy:
        """The policy now.

        Raises:
            ConfigError: the file is gone or wrong. There is no falling back to what it said before.
        """
        source = self._policy.source
        if not source:
            return self._policy
        try:
            blob = Path(source).read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read the policy: {error.strerror}", source=source) from None
        if hashlib.sha384(blob).digest() != self._policy.sha384:
            self._policy = Policy.parse(blob, source=source)
        return self._policy
