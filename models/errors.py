"""The one exception for mistakes a user can mend."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: the message is one line naming the field, its value and what is allowed.

    Command line programs print it on standard error and exit with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the known name nearest to `name`, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def check_choice(field: str, value: str, allowed: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `allowed`."""
    allowed = sorted(allowed)
    if value not in allowed:
        raise InputError(
            f"{field}: {value!r} is not known{nearest(value, allowed)}; "
            f"allowed: {', '.join(allowed)}"
        )
