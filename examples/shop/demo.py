"""Starts PostgreSQL and the shop, takes the tour and keeps serving.

    python -m examples.shop.demo

Environment:
    DATABASE_URL: a PostgreSQL to use, in a schema of the demo's own; without it an embedded one is
        started.
    PORT: where to serve; without it on any free port.
    DEMO_ONCE: 1 to end after the tour.

The exit code is 0 when Ctrl-C or SIGTERM ends the serving, and with DEMO_ONCE=1 when every step of
the tour proved what it says; 1 when a step did not, or the demo could not start; above 128 when a
signal ended the tour.
"""

import asyncio
import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.schema import CreateSchema, DropSchema

from examples.shop.app import create_app
from examples.shop.console import Console
from examples.shop.db import POOL_SIZE
from examples.shop.scene import jam
from examples.shop.serving import CannotStart, listen, serving
from examples.shop.settings import Settings
from examples.shop.tour import STEPS, take_tour
from pgtoolset.errors import EmbeddedServerError
from pgtoolset.testing import EmbeddedServer

GOODBYE = """
Still serving. Open the page of the shop, in two windows beside each other:

  {address}

or talk to it; {address}/docs lists its requests (FastAPI loads the scripts of that page
from a CDN)

  curl {address}/products
  curl {address}/orders --json '{{"customer_id": 1, "lines": [{{"sku": "beans", "quantity": 2}}]}}'
  curl -N {address}/orders/1/events

One session holds a lock, and another waits for it:

  {pgtoolset} locks {url}

Ctrl-C stops it."""


def main() -> int:
    """Run the demo and return its exit code."""
    once = os.environ.get("DEMO_ONCE", "") not in ("", "0")
    # Until the demo listens to both, SIGTERM too unwinds what has been started, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with listen(os.environ.get("PORT") or "0") as listener, database() as settings:
            return asyncio.run(demo(settings, listener, Console(), once=once))
    except (CannotStart, EmbeddedServerError) as error:
        print(f"The demo cannot start. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


async def demo(settings: Settings, listener: socket.socket, console: Console, *, once: bool) -> int:
    """Serve, take the tour, and unless `once` or something was not proved, wait for a signal."""
    async with own_schema(settings) as version:
        stopped = stop_signal()
        app = create_app(settings)
        app.state.visitors.tour_is_under_way = True
        async with serving(app, listener) as address:
            console.say(
                f"A shop on pgtoolset: {address}, PostgreSQL {version}, a pool of {POOL_SIZE} "
                "connections"
            )
            start = time.monotonic()
            tour = asyncio.create_task(take_tour(address, settings, console))
            waited: list[asyncio.Future[Any]] = [tour, stopped]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not tour.done():
                tour.cancel()
                await asyncio.wait([tour])
                console.say("\nInterrupted.")
                return 128 + stopped.result()
            if not tour.result():
                console.say("\nThe tour ends here: this step did NOT prove what it says.")
                return 1
            console.say(
                f"\nAll {len(STEPS)} steps proved what they say, in "
                f"{time.monotonic() - start:.1f} s."
            )
            app.state.visitors.tour_is_under_way = False
            if not once:
                async with jam(settings):
                    console.say(
                        GOODBYE.format(
                            address=address, pgtoolset=command(), url=shown_url(settings)
                        )
                    )
                    await stopped
                console.say("\nStopped.")
    return 0


def command() -> str:
    """`pgtoolset` of the environment that the demo runs in."""
    script = Path(sys.executable).with_name("pgtoolset")
    if script.exists():
        return shlex.quote(os.path.relpath(script))
    return f"{shlex.quote(sys.executable)} -m pgtoolset.cli"


def shown_url(settings: Settings) -> str:
    """The database as an argument in a shell. A password stays where the user has put it."""
    if os.environ.get("DATABASE_URL"):
        return '"$DATABASE_URL"'
    return shlex.quote(settings.url.render_as_string(hide_password=False))


def stop_signal() -> asyncio.Future[int]:
    """The first SIGINT or SIGTERM from now on, in place of a KeyboardInterrupt somewhere in the
    middle."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(number: int) -> None:
        if not stopped.done():
            stopped.set_result(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    return stopped


@contextmanager
def database() -> Iterator[Settings]:
    """The database that DATABASE_URL names, or one on an embedded server that ends with the
    block."""
    url = os.environ.get("DATABASE_URL")
    if url:
        try:
            settings = Settings.from_url(url)
        except (SQLAlchemyError, ValueError) as error:
            raise CannotStart(str(error)) from error
        yield settings
    else:
        with EmbeddedServer() as server:
            yield Settings.from_url(server.url())


@asynccontextmanager
async def own_schema(settings: Settings) -> AsyncIterator[str]:
    """Create the schema, drop it at the end with all that is in it; yields the version of the
    server."""
    engine = create_async_engine(settings.url, poolclass=NullPool)
    try:
        async with engine.begin() as connection:
            version = str(await connection.scalar(text("SHOW server_version")))
            await connection.execute(CreateSchema(settings.schema))
    except (
        Exception
    ) as error:  # the driver's own, SQLAlchemy's, the operating system's: the first contact decides
        raise CannotStart(
            f"{settings.url.render_as_string()}: {type(error).__name__}: {error}"
        ) from error
    try:
        yield version.split()[0]
    finally:
        try:
            async with engine.begin() as connection:
                # The connection of a request that outlasted the shutdown would make the DROP wait.
                await connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE "
                        "application_name = :name"
                    ),
                    {"name": settings.application_name},
                )
                # Nor is somebody else's lock on a table of the shop a reason to wait for ever.
                await connection.execute(text("SET LOCAL lock_timeout = '5s'"))
                await connection.execute(DropSchema(settings.schema, cascade=True))
        except (
            Exception
        ) as error:  # of the same kinds; the tour and the serving have ended well without it
            print(
                f"Schema {settings.schema} is left behind: {type(error).__name__}: {error}",
                file=sys.stderr,
            )


if __name__ == "__main__":
    sys.exit(main())
