"""One embedded server for all workers of pytest-xdist: the controller starts it for the first one.

A worker connects to a port of the loopback interface, sends the token that the controller gave it,
and receives the URL. A port leaves nothing behind when the controller is killed, and the server
ends with the controller.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

#: Seconds for a client to connect or to send its request, which it has ready when it connects.
_REQUEST_TIMEOUT = 10.0

#: Bytes of a request: any process of this machine can connect.
_LONGEST_REQUEST = 1024


class Broker:
    """The controller's side.

    Args:
        start_server: returns the URL; called once, in the thread that answers the workers.
    """

    def __init__(self, start_server: Callable[[], str]) -> None:
        self._start_server = start_server
        self._answer: dict[str, str] | None = None
        self._token = secrets.token_hex()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="pgtoolset broker", daemon=True)
        self._thread.start()

    def address(self) -> dict[str, Any]:
        """Return what a worker passes to `ask`."""
        return {"port": self._listener.getsockname()[1], "token": self._token}

    def close(self) -> None:
        """End the thread and close the port."""
        try:
            self._send("close")
        finally:
            self._thread.join()
            self._listener.close()

    def _send(self, request: str) -> None:
        with _connected(self.address(), _REQUEST_TIMEOUT) as connection:
            connection.sendall(f"{self._token} {request}\n".encode())

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(_REQUEST_TIMEOUT)
                try:
                    line = connection.makefile("rb").readline(_LONGEST_REQUEST)
                    token, _, request = line.strip().partition(b" ")
                    if not secrets.compare_digest(token, self._token.encode()):
                        continue  # not a worker of this run
                    if request == b"close":
                        return
                    connection.sendall(json.dumps(self._url()).encode() + b"\n")
                except OSError:
                    continue  # the client has gone

    def _url(self) -> dict[str, str]:
        if self._answer is None:
            try:
                self._answer = {"url": self._start_server()}
            except Exception as error:
                self._answer = {"error": str(error)}
        return self._answer


def ask(address: dict[str, Any], timeout: float) -> dict[str, str]:
    """Return the controller's answer: `url`, or `error` with the reason.

    Args:
        address: what `Broker.address` returned in the controller.
        timeout: seconds, for the start of the server included.
    """
    with _connected(address, timeout) as connection:
        connection.sendall(f"{address['token']} server\n".encode())
        answer: dict[str, str] = json.loads(connection.makefile().readline() or "{}")
        return answer


def _connected(address: dict[str, Any], timeout: float) -> socket.socket:
    return socket.create_connection(("127.0.0.1", address["port"]), timeout)
