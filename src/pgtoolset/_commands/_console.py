"""Output for people: colours on a terminal where Rich is installed, and plain text anywhere else.

Both print the same text. https://no-color.org/ and https://rich.readthedocs.io/
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from pgtoolset._commands._command import OutputError

__all__ = ["STYLES", "clear", "is_coloured", "is_terminal", "put", "show"]

#: The styles of words that have one meaning everywhere.
STYLES: Mapping[str, str] = {
    "error": "bold red",
    "warning": "bold yellow",
    "info": "cyan",
    "ok": "bold green",
    "name": "bold",
    "aside": "dim",
}

_CLEAR = "\033[H\033[2J"

#: Terminals that show escape sequences as they are.
_DUMB = frozenset({"dumb", "unknown"})


def is_terminal() -> bool:
    """Return whether a person reads the output."""
    return bool(sys.stdout) and sys.stdout.isatty()  # `None` where it is closed


def is_coloured() -> bool:
    """Return whether colours are wanted: the output is a terminal, and NO_COLOR is not set."""
    return is_terminal() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in _DUMB


def clear() -> None:
    """Clear a terminal before the next report."""
    if is_terminal() and os.environ.get("TERM") not in _DUMB:
        put(_CLEAR, end="")


def put(text: str, *, end: str = "\n") -> None:
    """Print a text as it is, at once.

    Raises:
        BrokenPipeError: the reader has seen enough.
        OutputError: it cannot be written, as where a disk is full.
    """
    with _writing():
        print(text, end=end, flush=True)


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f"the output cannot be written: {error.strerror or error}") from None


def show(
    line: str, styles: Mapping[str, str] | None = None, *, indent: int = 0, wraps: bool = False
) -> None:
    """Print a line.

    Args:
        line: without control characters.
        styles: styles by the regular expressions that find their words in the line.
        indent: columns to the left.
        wraps: whether a terminal breaks the line between words, below its indent.
    """
    rich = _rich() if is_coloured() else None
    if rich is None:
        put(f"{'':{indent}}{line}")
        return
    console_of, text_of, padded = rich
    text = text_of(line)
    for pattern, style in (styles or {}).items():
        text.highlight_regex(pattern, STYLES.get(style, style))
    # `file` and the colours are given: Rich would take more from the environment.
    console = console_of(file=sys.stdout, force_terminal=True, color_system="standard")
    with _writing():
        console.print(padded(text, (0, 0, 0, indent)) if wraps else text, soft_wrap=not wraps)


def _rich() -> Any:
    try:
        from rich.console import Console
        from rich.padding import Padding
        from rich.text import Text
    except ImportError:
        return None
    return Console, Text, Padding
