"""The one exception a command line turns into a message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the person at the keyboard can fix; its text says what and how."""
