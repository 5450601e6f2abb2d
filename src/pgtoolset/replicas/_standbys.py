"""The standbys as this process knows them: how busy each is, which is away, which is behind."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from pgtoolset._deadlines import suspended
from pgtoolset._postgres.nodes import Position
from pgtoolset.protocols import SessionFactory

__all__ = ["Standby", "choose"]

logger = logging.getLogger("pgtoolset")

S_co = TypeVar("S_co", covariant=True)

#: Seconds for which a standby is left out: the first time, and at most, however often it fails.
FIRST_PAUSE = 1.0
LONGEST_PAUSE = 30.0


class _Pause:
    """A time for which a standby is left out. It doubles with each failure in a row."""

    __slots__ = ("_failures", "_until")

    def __init__(self) -> None:
        self._failures = 0
        self._until: float | None = None

    def begin(self) -> float:
        """Begin the next pause, unless one goes on; return its length in seconds."""
        if self.is_on and not self.is_over:
            return 0.0
        length: float = min(LONGEST_PAUSE, FIRST_PAUSE * 2**self._failures)
        self._failures = min(self._failures + 1, 10)
        self._until = time.monotonic() + length
        return length

    def end(self) -> None:
        self._failures = 0
        self._until = None

    @property
    def is_on(self) -> bool:
        """Whether the last failure has not been followed by a success."""
        return self._until is not None

    @property
    def is_over(self) -> bool:
        """Whether it is time to try again."""
        return self._until is not None and time.monotonic() >= self._until


class Standby(Generic[S_co]):
    """One standby.

    Attributes:
        name: for the log.
        session_maker: makes its sessions.
        open_blocks: the read blocks of this process that are open on it.
        replayed: the position that it has shown last.
        answered: when that was, by the monotonic clock.
        shows_timeline: whether our role sees the timeline that it streams.
    """

    def __init__(self, name: str, session_maker: SessionFactory[S_co]) -> None:
        self.name = name
        self.session_maker = session_maker
        self.open_blocks = 0
        self.replayed: Position | None = None
        self.answered = float("-inf")
        self.shows_timeline = True
        self._away = _Pause()
        self._behind = _Pause()
        self._probe: asyncio.Task[None] | None = None

    @property
    def is_away(self) -> bool:
        """Whether it has not answered since it failed."""
        return self._away.is_on

    @property
    def wants_probe(self) -> bool:
        """Whether it is away, and it is time to ask it again."""
        if not self._away.is_over:
            return False
        probe = self._probe
        return probe is None or probe.done() or probe.get_loop() is not asyncio.get_running_loop()

    def probe(self, work: Coroutine[Any, Any, None]) -> None:
        """Ask it once, beside the requests."""
        with suspended():  # the deadline of a request that happens to be the first
            self._probe = asyncio.get_running_loop().create_task(work)

    def note_away(self, error: BaseException | None) -> None:
        """Leave it out for a while: it could not be reached, or did not answer."""
        length = self._away.begin()
        if length:
            reason = "it has not answered in time" if error is None else _named(error)
            logger.warning("%s is left out of reading for %g s: %s", self.name, length, reason)

    def note_present(self, replayed: Position) -> None:
        """Note its answer: the position that it has replayed."""
        if self._away.is_on:
            self._away.end()
            logger.info("%s is read from again", self.name)
        self.replayed = replayed
        self.answered = time.monotonic()

    def note_behind(self) -> None:
        """Leave it out of waiting for a while: a position did not arrive in time."""
        self._behind.begin()

    def note_replayed(self) -> None:
        """Note that a position has arrived in time."""
        if self._behind.is_on:
            self._behind.end()

    def may_have(self, position: Position) -> bool:
        """Whether it is worth waiting here for a position.

        While it is known to be behind, one reader each time a pause is over finds out
        whether it still is.
        """
        if not self._behind.is_on:
            return True
        known = self.replayed
        if known is not None and known.timeline == position.timeline and known.lsn >= position.lsn:
            return True
        if self._behind.is_over:
            self._behind.begin()
            return True
        return False


def choose(
    standbys: Sequence[Standby[Any]], turn: int, is_suitable: Callable[[Standby[Any]], bool]
) -> Standby[Any] | None:
    """Return the suitable standby with the fewest open read blocks; in turn, where several have.

    Args:
        standbys: all of them.
        turn: a number that grows with each choice.
        is_suitable: asked from the least busy on, until it says yes.
    """
    count = len(standbys)
    in_turn = [standbys[(turn + offset) % count] for offset in range(count)]
    for standby in sorted(in_turn, key=lambda each: each.open_blocks):
        if not standby.is_away and is_suitable(standby):
            return standby
    return None


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
