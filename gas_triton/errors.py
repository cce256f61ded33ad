"""Errors of its own that the package raises."""


class MissingPackageError(ImportError, ValueError):
    """An optional package is not installed; the message has the pip line that brings it.

    A ValueError too, as bad input is everywhere else: what was asked for cannot be had with what is installed.
    """


class NonFiniteError(ValueError):
    """Rows that a layer gave to its history hold NaN or infinity, or overflow the history's dtype."""
