"""Texts as messages, logs and terminals show them: without control characters and passwords.

Another session chooses its application name, its queries and the names of its tables, and a server
its messages. A terminal obeys the control characters in them, a reader of logs takes a line break
for a new entry, and a bidirectional override turns words around.
"""

from __future__ import annotations

import logging
import re

#: Before the password of a URL, which ends at the last `@` of the word. Percent-encoded, too.
_BEFORE_THE_PASSWORD = re.compile(r"(?://|%2F%2F)[^\s:/?#@%]*(?::|%3A)", re.IGNORECASE)
_WORD = re.compile(r"\S+")

#: Characters of a text that are looked at where fewer are shown: it may be endless, and hostile.
_LOOKED_AT = 2000

#: In a DSN, a query of a URL, a mapping or an ALTER ROLE: what follows the word.
_AFTER_THE_WORD = re.compile(
    r"""((?:password|passwd|pwd)(?:['"]?\s*(?:=|%3D)\s*|['"]\s*:\s*|\s+(?=')))"""
    r"""(?:'(?:[^'\\]|\\.|'')*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|$)|[^\s&'"][^\s&]*)""",
    re.IGNORECASE | re.DOTALL,
)

#: A URL whose scheme is mistyped or missing: `user:password@host`.
_WITHOUT_A_SCHEME = re.compile(r"[^\s:@]:[^\s@]*@|//[^\s@]*@")


def printable(text: str) -> str:
    """Return a text with each character that cannot be printed as its escape, `\\x1b` for ESC.

    These are the control characters (C0, DEL, C1), line and paragraph separators, bidirectional
    overrides, zero-width and private characters, and lone surrogates: what `str.isprintable` says.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def one_line(text: str, longest: int | None = None) -> str:
    """Return a text on one line, each run of white space as one space.

    Args:
        text: what another session or a server says.
        longest: the number of characters that are shown; a longer text ends with `...`.
    """
    line = safe(" ".join((text if longest is None else text[: _LOOKED_AT + longest]).split()))
    return line if longest is None or len(line) <= longest else f"{line[:longest]}..."


def safe(text: str) -> str:
    """Return a text for a message: without passwords and control characters, on one line."""
    return printable(without_passwords(text.replace("\r\n", " ").replace("\n", " ")))


def safe_lines(text: str) -> str:
    """Return a text of many lines, such as a traceback or a log, with each line made safe."""
    return "\n".join(printable(line) for line in without_passwords(text).split("\n"))


def without_passwords(text: str) -> str:
    """Return a text with `***` for each password in a URL or a DSN in it."""
    return _AFTER_THE_WORD.sub(r"\1***", _WORD.sub(_without_password, text))


def may_hold_password(text: str) -> bool:
    """Whether the beginning of a text may be a URL or a DSN, well-formed or not."""
    text = text[:_LOOKED_AT]
    return (
        "://" in text
        or "%3a%2f%2f" in text.lower()
        or _WITHOUT_A_SCHEME.search(text) is not None
        or without_passwords(text) != text
    )


def _without_password(word: re.Match[str]) -> str:
    text = word[0]
    before = _BEFORE_THE_PASSWORD.search(text) if "@" in text or "%40" in text else None
    if before is None:
        return text
    end = max(text.rfind("@"), text.rfind("%40"))
    return text if end < before.end() else f"{text[: before.end()]}***{text[end:]}"


class _SafeRecords(logging.Filter):
    """Makes the records of a logger safe, with the tracebacks in them."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        cleaned = safe(message)
        if cleaned != message:
            record.msg, record.args = cleaned, ()
        if record.exc_info and not record.exc_text:
            trace = logging.Formatter().formatException(record.exc_info)
            cleaned = safe_lines(trace)
            if cleaned != trace:  # otherwise the formatter of the application writes it
                record.exc_text = cleaned
        return True


def make_logs_safe() -> None:
    """Make each record of the logger of this library safe before a handler receives it."""
    logging.getLogger("pgtoolset").addFilter(_SafeRecords("pgtoolset"))
