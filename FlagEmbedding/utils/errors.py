"""Errors a user can cause and mend. An entry point prints their text as one line and exits with 2."""

from __future__ import annotations


class UserError(Exception):
    """Something the user gave cannot be used. The text says what was expected, what came, what to do."""


class DataError(UserError):
    """A file or folder is missing, broken or does not fit."""


class UsageError(UserError):
    """Options that are wrong or contradict each other."""
