"""Text files as people write them: with a byte order mark or without, any system's line ends."""

import re
from pathlib import Path

from model import InputError


def read_lines(path: Path, what: str, utf16: bool = False) -> list[str]:
    """The lines of a UTF-8 text file, the last line end left out; `what` names it in a sentence.

    utf16: Windows's "Unicode" is read too; else it is named. Raises InputError for a file that is
    missing, or not such a text.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(f"{what} {path} is missing: put it there.") from None
    except OSError as error:
        raise InputError(f"{what} {path} cannot be read ({error.strerror or error}).") from None
    encoding = "utf-8-sig"
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    elif b"\0" in data[:2]:  # a digit or letter of ASCII and its empty other half
        encoding = "utf-16-le" if data[1:2] == b"\0" else "utf-16-be"
    try:
        if encoding != "utf-8-sig" and not utf16:
            raise UnicodeError("it looks like UTF-16")
        text = data.decode(encoding)
    except UnicodeError as error:
        reason = getattr(error, "reason", error)
        raise InputError(f"{what} {path} is not UTF-8 text ({reason}): save it as UTF-8.") from None
    if "\0" in text:
        raise InputError(f"{what} {path} is no text (it holds zero bytes): save it as UTF-8.")
    lines = re.split(r"\r\n|\r|\n", text)  # splitlines() would split at ten other characters too
    return lines[:-1] if not lines[-1] else lines
