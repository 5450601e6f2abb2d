"""Long work in the event loop, cut into slices."""

from __future__ import annotations

import asyncio

__all__ = ["SLICE_SIZE", "Yielder"]

#: Rows that are compared, and subscriptions that are served, before the clock is read.
SLICE_SIZE = 500

#: Seconds of work after which other tasks of the event loop run.
YIELD_AFTER = 0.005


class Yielder:
    """Lets other tasks run where this one has run for a while."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    async def yield_if_due(self) -> None:
        if self._loop.time() - self._since > YIELD_AFTER:
            await asyncio.sleep(0)
            self._since = self._loop.time()
