"""What conversion raises. Every message says what was given, what was expected and what to do."""

from collections.abc import Sequence


class ConversionError(ValueError):
    """The input cannot be converted. The command line prints the message and exits with 2."""


class UnknownKeyError(ConversionError):
    """A checkpoint holds a key that no row of the key map names."""


class MissingKeyError(ConversionError):
    """A checkpoint lacks a key that the key map needs."""


class ShapeError(ConversionError):
    """A tensor's shape disagrees with the others, or with config.json."""


class CheckFailed(Exception):
    """Two models were compared and differ. The command line prints the message and exits with 1.

    Args:
        message: the first difference.
        rows: the report up to it.
    """

    def __init__(self, message: str, rows: Sequence = ()):
        super().__init__(message)
        self.rows = rows


class ConversionWarning(UserWarning):
    """The conversion goes on, but its user should know this."""
