"""What the tour prints, and how a step says that it did not prove what it claims."""

import asyncio
import os
import sys
import textwrap
import time
from collections.abc import Awaitable, Callable

WIDTH = 88
BOLD, DIM, GREEN, RED = "1", "2", "32", "1;31"


class NotProved(Exception):
    """The evidence of a step is not what it should be."""

    def __init__(self, what: str, *, expected: object, seen: object) -> None:
        super().__init__(f"{what}: expected {expected}, seen {seen}")
        self.what = what
        self.expected = expected
        self.seen = seen


def expect(what: str, seen: object, expected: object) -> None:
    """Raise `NotProved` where `seen` is not `expected`."""
    if seen != expected:
        raise NotProved(what, expected=repr(expected), seen=repr(seen))


async def eventually(
    what: str, look: Callable[[], Awaitable[object]], expected: object, *, deadline: float = 30.0
) -> None:
    """Look again and again until what is seen is `expected`; raise `NotProved` after `deadline`
    seconds."""
    end = time.monotonic() + deadline
    while (seen := await look()) != expected:
        if time.monotonic() > end:
            raise NotProved(what, expected=f"{expected!r} within {deadline:g} s", seen=repr(seen))
        await asyncio.sleep(0.02)


class Console:
    """Prints short aligned lines, in colour on a terminal that wants it."""

    def __init__(self) -> None:
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def title(self, number: int, title: str) -> None:
        print(f"\n{self._paint(f'{number}  {title}', BOLD)}", flush=True)

    def did(self, text: str) -> None:
        self._line("did", DIM, text)

    def saw(self, text: str) -> None:
        self._line("saw", DIM, text)

    def proves(self, text: str) -> None:
        self._line("proves", GREEN, text)

    def failed(self, failure: Exception) -> None:
        """Say what a step had to see and what it saw instead."""
        while isinstance(failure, ExceptionGroup):
            failure = failure.exceptions[
                0
            ]  # of a task group; the others are mostly its consequences
        if isinstance(failure, NotProved):
            self._line("FAILED", RED, failure.what)
            self._line("expect", RED, str(failure.expected))
            self._line("seen", RED, str(failure.seen))
        else:
            self._line("FAILED", RED, f"{type(failure).__name__}: {failure}".rstrip(": "))

    def say(self, text: str = "") -> None:
        """Print a line that is no part of a step."""
        print(text, flush=True)

    def _line(self, label: str, colour: str, text: str) -> None:
        lines = textwrap.wrap(text, WIDTH - 11, break_on_hyphens=False) or [""]
        print(f"   {self._paint(label.ljust(6), colour)}  {lines[0]}")
        for line in lines[1:]:
            print(" " * 11 + line)
        sys.stdout.flush()

    def _paint(self, text: str, colour: str) -> str:
        return f"\033[{colour}m{text}\033[0m" if self._colour else text
