"""What `cryptography` may raise for a certificate or list from outside: not all of it is a ValueError."""

from __future__ import annotations

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

# Catch these around every access, not only around loading: names, dates, keys and extensions are parsed when they are
# first asked for.
PARSE_ERRORS = (
    ValueError,
    TypeError,
    OverflowError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    # A program that turns warnings into errors gets a refusal like any other.
    Warning,
)
