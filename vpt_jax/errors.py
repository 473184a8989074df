"""The one exception that is meant for a person to read.

Library code raises `UsageError` for input that a user can mend: one sentence that names what was given and what to
do. The command-line programs print it without a traceback and exit with status 2.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """Input that the user can mend. The message is complete: what was given, what was expected, what to do."""


class MissingPlace(UsageError):
    """A network lacks what a method needs.

    Attributes:
      place: what is missing, in the words of the message: 'tokens', 'CLS token', ...
    """

    def __init__(self, place: str, message: str):
        super().__init__(message)
        self.place = place


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is not in a list of names, with the nearest ones.

    Args:
      kind: what the name stands for, as a user would call it (`'method'`, `'backbone'`).
      given: the name that was given.
      known: every name that would have been accepted.

    Returns:
      A `UsageError` to raise.
    """
    known = sorted(known)
    near = difflib.get_close_matches(str(given), known, n=3, cutoff=0.4)
    hint = f'did you mean {" or ".join(map(repr, near))}?' if near else f'known: {", ".join(known)}.'
    return UsageError(f'unknown {kind} {given!r}: {hint}')
