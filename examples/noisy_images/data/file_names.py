"""Names of files and classes in a form that can be printed, written and drawn, and read back."""

import re
import unicodedata
from collections.abc import Sequence

_ESCAPE = re.compile(r"\\\\|\\x[0-9a-f]{2}|\\u[0-9a-f]{4}")


def printable(name: str) -> str:
    r"""Return a file's name in a form that every encoding of Unicode can write; `original` gives the name back.

    A byte that is not UTF-8, which Python holds as a lone surrogate, becomes `\xNN`; control characters and line
    separators become `\uNNNN`, and a backslash is doubled.

    >>> print(printable("caf\udce9.png"))
    caf\xe9.png
    """
    # Nearly all names need no second look.
    return name if name.isprintable() and "\\" not in name else "".join(map(_escaped, name))


def original(name: str) -> str:
    r"""Return the file's name that `printable` was given.

    >>> original(printable("caf\udce9.png")) == "caf\udce9.png"
    True
    """
    return _ESCAPE.sub(lambda match: _unescaped(match.group()), name)


def _escaped(letter: str) -> str:
    if letter == "\\":
        return "\\\\"
    if "\udc80" <= letter <= "\udcff":
        return f"\\x{ord(letter) - 0xDC00:02x}"
    if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp"):
        return f"\\u{ord(letter):04x}"
    return letter


def _unescaped(code: str) -> str:
    if code == "\\\\":
        return "\\"
    number = int(code[2:], 16)
    return chr(number + 0xDC00 if code[1] == "x" else number)


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Return the first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(str(name) for name in names[:most]) + more
