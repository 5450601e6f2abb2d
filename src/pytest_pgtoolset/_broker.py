"""One embedded server for all the workers of pytest-xdist: the controller has it, and starts it
when one of them asks.

A worker connects to a port of the loopback interface, says the token that the controller gave it,
and is answered with the URL. A port leaves nothing behind when the controller is killed; the server
ends with the controller in any case.
"""

from __future__ import annotations

import json
import secrets
import socket
import threading
from collections.abc import Callable
from typing import Any

#: Seconds to wait for a worker to say what it wants. One that connects has it ready.
_PATIENCE = 10.0


class Broker:
    """Answers the workers of this run. `start_server` is called once, in the thread that
    answers."""

    def __init__(self, start_server: Callable[[], str]) -> None:
        self._start_server = start_server
        self._answer: dict[str, str] | None = None
        self._token = secrets.token_hex()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve, name="pgtoolset broker", daemon=True)
        self._thread.start()

    def address(self) -> dict[str, Any]:
        """What a worker needs for `ask`."""
        return {"port": self._listener.getsockname()[1], "token": self._token}

    def close(self) -> None:
        try:
            self._say("close")
        finally:
            self._thread.join()
            self._listener.close()

    def _say(self, word: str) -> None:
        with socket.create_connection(
            ("127.0.0.1", self.address()["port"]), _PATIENCE
        ) as connection:
            connection.sendall(f"{self._token} {word}\n".encode())

    def _serve(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                connection.settimeout(_PATIENCE)
                try:
                    token, _, word = connection.makefile().readline().strip().partition(" ")
                    if not secrets.compare_digest(token, self._token):
                        continue
                    if word == "close":
                        return
                    connection.sendall(json.dumps(self._url()).encode() + b"\n")
                except (OSError, UnicodeError):
                    continue  # whoever that was has gone

    def _url(self) -> dict[str, str]:
        if self._answer is None:
            try:
                self._answer = {"url": self._start_server()}
            except Exception as error:
                self._answer = {"error": str(error)}
        return self._answer


def ask(address: dict[str, Any], timeout: float) -> dict[str, str]:
    """The answer of the controller: `url`, or `error` with the reason why there is none."""
    with socket.create_connection(("127.0.0.1", address["port"]), timeout) as connection:
        connection.sendall(f"{address['token']} server\n".encode())
        answer: dict[str, str] = json.loads(connection.makefile().readline() or "{}")
        return answer
