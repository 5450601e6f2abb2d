"""Time for doubles: the clock of the event loop, or a clock that a test moves."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Protocol

__all__ = ["Clock", "LoopClock", "ManualClock", "Timer"]

#: Iterations of the event loop after which each task that was woken waits for something again.
_TURNS = 20


class Timer(Protocol):
    """A call that is due later, unless it is cancelled."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """Measures seconds, and calls a function after some of them."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer: ...


class LoopClock:
    """The clock of the event loop that is running: a timeout of 5 seconds takes 5 seconds."""

    def time(self) -> float:
        return asyncio.get_running_loop().time()

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        return asyncio.get_running_loop().call_later(delay, callback)


class ManualClock:
    """A clock that only `advance` moves, so that no test waits for a timeout.

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
        """Return the seconds by which the clock was moved so far."""
        return self._now

    def call_later(self, delay: float, callback: Callable[[], object]) -> Timer:
        """Call `callback` once the clock has been moved by `delay` seconds."""
        timer = _ManualTimer(callback)
        heapq.heappush(self._timers, (self._now + delay, next(self._count), timer))
        return timer

    async def advance(self, seconds: float) -> None:
        """Move the clock: each timer in between is called in order, and the tasks it wakes run.

        Args:
            seconds: at least 0. With 0 the tasks that are ready run.

        Raises:
            ValueError: `seconds` is negative.
        """
        if not seconds >= 0:
            raise ValueError(f"seconds must be at least 0, not {seconds!r}")
        # Tasks that were started just now run until they wait, so that their timers are set by the
        # old time.
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
