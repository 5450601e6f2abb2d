"""uvicorn in a thread of this process, on a real socket."""

import asyncio
import logging
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from examples.shop.app import end_streams


class CannotStart(Exception):
    """The demo cannot start. The message says what is missing."""


def listen(port: str) -> socket.socket:
    """A socket on 127.0.0.1; with port 0 the kernel chooses a free one."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", int(port)))
    except (OverflowError, ValueError) as error:
        listener.close()
        raise CannotStart(f"PORT={port}: a port is a number from 0 to 65535.") from error
    except OSError as error:
        listener.close()
        raise CannotStart(f"PORT={port}: {error}") from error
    return listener


class Server(uvicorn.Server):
    """uvicorn, which waits for open responses when it stops, and so must be told to end streams
    first."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if isinstance(self.config.app, FastAPI):
            await end_streams(self.config.app)
        await super().shutdown(sockets)


@asynccontextmanager
async def serving(app: FastAPI, listener: socket.socket) -> AsyncIterator[str]:
    """Serve until the block ends, in an event loop of its own; yields the address."""
    server = Server(
        uvicorn.Config(
            app,
            lifespan="on",
            ws="none",
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=3,
        )
    )
    # In a thread, uvicorn leaves the signals to us.
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="uvicorn")
    host, port = listener.getsockname()
    thread.start()
    try:
        while not server.started:
            if not thread.is_alive():
                raise CannotStart("the application did not start; its log says why")
            await asyncio.sleep(0.02)
        yield f"http://{host}:{port}"
    finally:
        # A stream that a client still reads is cancelled after the timeout, and uvicorn would log
        # that as an error.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        server.should_exit = True
        await asyncio.to_thread(thread.join)
