"""Wait until something holds."""

import asyncio
import time
from collections.abc import Awaitable, Callable


async def until(
    holds: Callable[[], bool] | Callable[[], Awaitable[bool]],
    seconds: float,
    failure: Callable[[], str],
) -> None:
    """Look again and again until something holds.

    Args:
        holds: whether it does; a plain function or a coroutine function.
        seconds: the limit.
        failure: what to say after it.

    Raises:
        TimeoutError: it did not hold within the time.
    """
    end = time.monotonic() + seconds
    while True:
        held = holds()
        if held if isinstance(held, bool) else await held:
            return
        if time.monotonic() > end:
            raise TimeoutError(f"{failure()} (waited {seconds:g} s)")
        await asyncio.sleep(0.05)
