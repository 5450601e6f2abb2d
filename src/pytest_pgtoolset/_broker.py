"""One embedded server for all workers of pytest-xdist: the controller starts it for the first one.

A worker connects to a port of the loopback interface, proves that it has the token that the
controller gave it through pytest-xdist, and receives the URL. Any process of the machine can
connect there, so the token itself is never sent, the answer proves that it comes from the
controller, and a connection without the token costs a few bytes for a few seconds and delays
nothing. A port leaves nothing behind when the controller is killed.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

#: Seconds for a client to send its request, which it has ready when it connects.
_REQUEST_TIMEOUT = 10.0

#: Bytes of a request: a nonce, a space, a proof and the end of the line.
_LONGEST_REQUEST = 32 + 1 + 64 + 1

#: Bytes of an answer: a URL, or the reason why there is none.
_LONGEST_ANSWER = 2**16

#: Connections that have proved nothing yet. One more, and the oldest is closed.
_MOST_STRANGERS = 32

#: Seconds before a worker tries again whose connection was closed in a crowd of strangers.
_PAUSE = 0.05


class Broker:
    """The controller's side.

    Args:
        start_server: returns the URL; called once, in a thread of its own.
    """

    def __init__(self, start_server: Callable[[], str]) -> None:
        self._start_server = start_server
        self._token = secrets.token_hex()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._port: int = self._listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._answer: asyncio.Task[bytes] | None = None
        #: The tasks of connections that have proved nothing yet, the oldest first.
        self._strangers: dict[asyncio.Task[Any] | None, None] = {}
        self._thread = threading.Thread(target=self._live, name="pgtoolset broker", daemon=True)
        self._thread.start()

    def address(self) -> dict[str, Any]:
        """Return what a worker passes to `ask`."""
        return {"port": self._port, "token": self._token}

    def close(self) -> None:
        """End the thread and close the port."""
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _live(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(
            self._meet, sock=self._listener, limit=_LONGEST_REQUEST, backlog=128
        )
        await self._closing.wait()
        server.close()  # the end of the runner cancels the tasks of the connections

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        self._strangers[task] = None
        if len(self._strangers) > _MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            assert oldest is not None
            oldest.cancel()
        try:
            nonce = await self._nonce(reader)
            self._strangers.pop(task, None)
            writer.write(await self._sealed_answer(nonce))
            async with asyncio.timeout(_REQUEST_TIMEOUT):
                await writer.drain()
            writer.close()
        except (OSError, EOFError, asyncio.LimitOverrunError, _StrangerError):
            pass
        except asyncio.CancelledError:
            pass  # the newest stranger has taken its place, or the broker is closing
        finally:
            self._strangers.pop(task, None)
            if not writer.is_closing():
                writer.transport.abort()

    async def _nonce(self, reader: asyncio.StreamReader) -> bytes:
        """Return the nonce of a request that proves the token."""
        async with asyncio.timeout(_REQUEST_TIMEOUT):
            line = await reader.readuntil(b"\n")
        nonce, _, proof = line.strip().partition(b" ")
        if not hmac.compare_digest(proof, _proof(self._token, b"ask", nonce)):
            raise _StrangerError
        return nonce

    async def _sealed_answer(self, nonce: bytes) -> bytes:
        if self._answer is None:
            self._answer = asyncio.create_task(asyncio.to_thread(self._url))
        answer = await asyncio.shield(self._answer)
        return _proof(self._token, b"answer", nonce, answer) + b" " + answer + b"\n"

    def _url(self) -> bytes:
        try:
            answer = {"url": self._start_server()}
        except BaseException as error:  # a SystemExit too: the workers receive the reason
            answer = {"error": (str(error) or type(error).__name__)[: _LONGEST_ANSWER // 16]}
        return json.dumps(answer).encode()


class _StrangerError(Exception):
    """A request that does not prove the token."""


def _proof(token: str, *parts: bytes) -> bytes:
    return hmac.new(token.encode(), b" ".join(parts), "sha256").hexdigest().encode()


def ask(address: dict[str, Any], timeout: float) -> dict[str, str]:
    """Return the controller's answer: `url`, or `error` with the reason.

    Args:
        address: what `Broker.address` returned in the controller.
        timeout: seconds, for the start of the server included.

    Raises:
        OSError: the controller has ended, another process has its port, or the time is over.
    """
    deadline = time.monotonic() + timeout
    nonce = secrets.token_hex(16).encode()
    request = nonce + b" " + _proof(address["token"], b"ask", nonce) + b"\n"
    while not (line := _exchanged(address["port"], request, deadline)):
        time.sleep(_PAUSE)
    proof, _, answer = line.strip().partition(b" ")
    if not hmac.compare_digest(proof, _proof(address["token"], b"answer", nonce, answer)):
        raise ConnectionError("another process answers on the port of the controller")
    found: dict[str, str] = json.loads(answer)
    return found


def _exchanged(port: int, request: bytes, deadline: float) -> bytes:
    """Send a request and return the answer, or nothing where the connection was closed."""
    with socket.create_connection(("127.0.0.1", port), _left(deadline)) as connection:
        line = b""
        with suppress(ConnectionResetError, BrokenPipeError):
            connection.sendall(request)
            while not line.endswith(b"\n") and len(line) <= _LONGEST_ANSWER:
                connection.settimeout(_left(deadline))
                chunk = connection.recv(4096)
                if not chunk:
                    return b""
                line += chunk
        return line if line.endswith(b"\n") else b""


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the controller has not answered in time")
    return left
