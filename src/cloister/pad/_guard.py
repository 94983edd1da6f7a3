"""What everything that holds a pad, or leads to one, has in common: it stays in its process, and there is one of it."""

from __future__ import annotations

import os
from typing import NoReturn

from cloister.errors import PadReuseError

_n_forks = 0


def _count_fork() -> None:
    global _n_forks  # noqa: PLW0603  # a fork concerns the whole process
    _n_forks += 1


# The count sees forks of which the process id tells nothing (a recycled id), the id those that Python did not make.
os.register_at_fork(after_in_child=_count_fork)


class ProcessBound:
    """Base of what must not exist twice: a copy, a pickle or a forked child would use the same pads again.

    Subclasses have `__slots__`, so there is no `__dict__` to save and put back, and keep what changes in one cell that
    all references share, so that old references put back do not turn it back.
    """

    __slots__ = ("_home",)

    def __init__(self) -> None:
        self._home = (os.getpid(), _n_forks)

    def _stay_home(self) -> None:
        """Refuse to work in a forked child. To be called before any lock: another thread may have held it at the fork.

        Raises:
            PadReuseError: this is not the process that made the object.
        """
        if self._home != (os.getpid(), _n_forks):
            raise PadReuseError(
                f"a {type(self).__name__} was used in a forked process",
                hint="make new keys in the process that uses them",
            )

    def _refuse_copy(self, *_: object) -> NoReturn:
        raise PadReuseError(f"a {type(self).__name__} cannot be copied, pickled or restored")

    # copy, deepcopy and pickle all end here.
    __reduce__ = __getstate__ = __setstate__ = _refuse_copy
