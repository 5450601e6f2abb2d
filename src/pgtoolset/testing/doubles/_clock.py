"""Time for doubles: that of the event loop, or one that stands still until a test moves it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

__all__ = ["Clock", "LoopClock", "ManualClock", "Timer"]

#: Turns of the event loop after which everything that was woken has gone as far as it can without
#: time passing.
_TURNS = 20


class Timer(Protocol):
    """Something that will be called, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Tells the seconds, and calls when some have passed."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer: ...


class LoopClock:
    """The clock of the event loop that is running: a timeout of 5 seconds takes 5 seconds."""

    def time(self) -> float:
        return asyncio.get_running_loop().time()

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)


class ManualClock:
    """A clock that stands still until `advance` moves it, so that no test waits for a timeout.

    Example:
        >>> clock = ManualClock()
        >>> rung: list[str] = []
        >>> timer = clock.call_later(5, lambda: rung.append("five seconds"))
        >>> await clock.advance(4.9)
        >>> assert not rung
        >>> await clock.advance(0.1)
        >>> assert rung == ["five seconds"]
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._count = itertools.count()
        self._timers: list[tuple[float, int, _ManualTimer]] = []

    def time(self) -> float:
        """The seconds that the clock has been moved so far."""
        return self._now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` once the clock has been moved by `delay` seconds."""
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._now + delay, next(self._count), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass: each timer in between goes off in its turn, and who it wakes gets to
        run.

        Args:
            seconds: how many, at least 0. With 0 the tasks that are ready get to run.

        Raises:
            ValueError: time does not run backwards.
        """
        if not seconds >= 0:
            raise ValueError(f"a clock is advanced by 0 seconds or more, not by {seconds!r}")
        # What was started just now is let to where it waits, so that its timers are set by the old
        # time.
        await _settle()
        # Rounded to far below any timeout, so that 4.9 and 0.1 are 5.
        end = round(self._now + seconds, 9)
        while self._timers and self._timers[0][0] <= end:
            at, _, timer = heapq.heappop(self._timers)
            if timer.callback is not None:
                self._now = max(self._now, at)
                timer.callback()
                await _settle()
        self._now = end


class _ManualTimer:
    def __init__(self, callback: Callable[[], object]) -> None:
        self.callback: Callable[[], object] | None = callback

    def cancel(self) -> None:
        self.callback = None


async def _settle() -> None:
    for _ in range(_TURNS):
        await asyncio.sleep(0)
