"""TCP for the embedded server: a loopback port that stays its own, and a password."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import sys
from base64 import b64encode

HOST = "127.0.0.1"

#: As PostgreSQL's default of scram_iterations.
_ITERATIONS = 4096


class Loopback:
    """A port and a password.

    On Linux the port is reserved until `close`: a socket is bound to it and does not listen, and
    PostgreSQL, which sets SO_REUSEADDR as well, can listen there, at each start.

    Args:
        port: 0 for a free one.

    Raises:
        OSError: another process has the port.

    Attributes:
        port: the port.
        password: the password of the role postgres.
    """

    def __init__(self, port: int = 0) -> None:
        self.password = secrets.token_urlsafe(24)
        self._reservation = socket.socket()
        try:
            self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._reservation.bind((HOST, port))
            self.port: int = self._reservation.getsockname()[1]
        except OSError:
            self.close()
            raise
        if sys.platform != "linux":
            self.close()

    def __repr__(self) -> str:
        return f"Loopback({self.port})"  # without the password

    def verifier(self) -> str:
        """Return the verifier that PostgreSQL stores, which does not reveal the password.

        https://www.postgresql.org/docs/current/catalog-pg-authid.html
        """
        salt = secrets.token_bytes(16)
        salted = hashlib.pbkdf2_hmac("sha256", self.password.encode(), salt, _ITERATIONS)
        client = hmac.digest(salted, b"Client Key", "sha256")
        stored = hashlib.sha256(client).digest()
        server = hmac.digest(salted, b"Server Key", "sha256")
        salt_, stored_, server_ = (b64encode(each).decode() for each in (salt, stored, server))
        return f"SCRAM-SHA-256${_ITERATIONS}:{salt_}${stored_}:{server_}"

    def is_taken(self) -> bool:
        """Return whether another process listens on the port, and give it up."""
        self.close()
        with socket.socket() as probe:
            try:
                probe.bind((HOST, self.port))
            except OSError:
                return True
        return False

    def close(self) -> None:
        """Give the port up."""
        self._reservation.close()
