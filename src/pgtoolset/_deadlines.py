"""The deadline that counts in the present context, and how much of its time is left.

A context variable keeps it, so tasks that are started inside of the block have it too.
https://docs.python.org/3/library/contextvars.html
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from operator import attrgetter
from time import monotonic
from types import TracebackType

from pgtoolset.errors import DeadlineExceededError
from pgtoolset.types import SpentOn

_current: ContextVar[Deadline | None] = ContextVar("pgtoolset.deadline", default=None)

#: Set around statements that are sent after a deadline, too: those that end a transaction, say.
_is_suspended: ContextVar[bool] = ContextVar("pgtoolset.deadline.suspended", default=False)

_END = attrgetter("end")

#: Returns the deadline that was begun here last, whether it is over or not; `None` for nearly all
#: statements. It costs less than `current`, which is called only where there is one.
begun_deadline = _current.get


class Deadline:
    """The time of one block, from its begin on.

    Attributes:
        seconds: how long it is.
        end: when it is over, by `time.monotonic`.
        is_open: whether its block has not ended. A task that outlives the block is free again.
    """

    __slots__ = ("_outer", "end", "is_open", "seconds")

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.end = monotonic() + seconds
        self.is_open = True
        self._outer = _innermost_open()
        _current.set(self)

    def close(self) -> None:
        """End the block, from whatever context."""
        self.is_open = False
        _current.set(_innermost_open())

    def left(self) -> float:
        """Return the seconds that are left; 0 or less where the time is over."""
        return self.end - monotonic()

    def exceeded(self, spent_on: SpentOn, what: str) -> DeadlineExceededError:
        """Return the error for a deadline that is over.

        Args:
            spent_on: which part of the library has spent the rest of its time.
            what: what could not be done, as the second half of a sentence.
        """
        return DeadlineExceededError(
            f"the deadline of {self.seconds:g} s is over: {what}",
            spent_on=spent_on,
            seconds=self.seconds,
        )

    def around(self) -> Iterator[Deadline]:
        """Yield the deadlines of this block and of those around it that have not ended."""
        each: Deadline | None = self
        while each is not None:
            if each.is_open:
                yield each
            each = each._outer


def open_deadlines() -> Iterator[Deadline]:
    """Yield the deadlines of the blocks that are open here, the innermost first."""
    innermost = _current.get()
    return iter(()) if innermost is None else innermost.around()


def _innermost_open() -> Deadline | None:
    each = _current.get()
    while each is not None and not each.is_open:
        each = each._outer
    return each


def current() -> Deadline | None:
    """Return the deadline that counts: of several blocks the one that ends first."""
    innermost = _current.get()
    if innermost is None or _is_suspended.get():
        return None
    if innermost._outer is None:
        return innermost if innermost.is_open else None
    return min(innermost.around(), key=_END, default=None)


def is_suspended() -> bool:
    """Whether statements are sent now after a deadline, too."""
    return _is_suspended.get()


class suspended(AbstractContextManager[None]):
    """Let no deadline cut the statements of the block, which end a transaction, or resolve one."""

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _is_suspended.set(True)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        _is_suspended.reset(self._token)


def bounded(timeout: float | None) -> tuple[float | None, Deadline | None]:
    """Return a timeout, or the rest of a deadline where that is shorter, and that deadline."""
    deadline = current()
    if deadline is None:
        return timeout, None
    left = deadline.left()
    if timeout is not None and timeout <= left:
        return timeout, None
    return max(0.0, left), deadline
