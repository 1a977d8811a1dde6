"""Errors that are the user's to fix: the command line prints them as one line, without a traceback, and exits with 2.

Everything else keeps its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave us. The message says what is wrong, where, and what to do."""
