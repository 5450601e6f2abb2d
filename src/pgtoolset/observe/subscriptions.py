"""`subscribe`: an observer receives each event of an engine."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._arguments import check_observer, check_pool
from pgtoolset._endings import observe
from pgtoolset.events import Observer

__all__ = ["subscribe"]


def subscribe(engine: AsyncEngine | Engine, observer: Observer) -> Callable[[], None]:
    """Call `observer` with each event of an engine from now on; return what ends that.

    The observer is called in the event loop, between two steps of the task that the event is about.
    It must be quick and must not block: put longer work into a queue. An error that it raises is
    logged (logger `pgtoolset`), and the transaction goes on, after `asyncio.CancelledError` too.
    `KeyboardInterrupt` and `SystemExit` are raised in the event loop, in its next step, so that
    they end the program and not a COMMIT.

    The transactions that begin from now on are reported. The engines that `execution_options()`
    makes of this one have the same observers, and so have its pools after `engine.dispose()`. Each
    of several observers is called, in the order of the subscriptions. Without an observer nothing
    is measured. The engine keeps the observer alive, and nothing keeps the engine.

    Args:
        engine: the engine, or the `sync_engine` below it.
        observer: a plain function of one event, or another `Observer`.

    Returns:
        A function without parameters that ends the subscription. To call it again does nothing.

    Raises:
        TypeError: an argument is something else, or the observer is an async function.
        UnsupportedDriverError: the engine's database or driver is not supported.

    Example:
        >>> def observer(event):
        ...     if isinstance(event, TransactionEnded) and event.outcome != "committed":
        ...         print(event.outcome, event.sqlstate, event.seconds)
        >>> unsubscribe = subscribe(engine, observer)

    See docs/observability.md.
    """
    check_pool(engine)
    check_observer("observer", observer)
    return observe(engine.dialect, observer)
