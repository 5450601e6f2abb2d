"""The broker of the embedded server: who asks it, and who cannot stop it."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from pytest_pgtoolset._broker import Broker, ask


@pytest.fixture
def started() -> list[str]:
    return []


@pytest.fixture
def broker(started: list[str]) -> Iterator[Broker]:
    def start() -> str:
        started.append("postgresql://server")
        return started[-1]

    broker = Broker(start)
    yield broker
    broker.close()


def test_started_once(broker: Broker, started: list[str]) -> None:
    """The server starts when the first worker asks, and every worker receives its URL."""
    assert not started
    for _ in range(3):
        assert ask(broker.address(), 60) == {"url": "postgresql://server"}
    assert len(started) == 1


@pytest.mark.parametrize(
    "request_", [b"", b"\n", b"wrong server\n", "t\u00f6ken close\n".encode(), b"\xff" * 5000]
)
def test_others_on_the_port(broker: Broker, started: list[str], request_: bytes) -> None:
    """Another process of the machine that connects receives nothing and does not end the broker."""
    with socket.create_connection(("127.0.0.1", broker.address()["port"]), 60) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        try:
            assert connection.recv(100) == b""
        except ConnectionResetError:
            pass  # it had not read everything
    assert not started
    assert "url" in ask(broker.address(), 60)


def test_server_that_does_not_start() -> None:
    """Each worker receives the reason."""

    def fail() -> str:
        raise OSError("no space")

    broker = Broker(fail)
    try:
        for _ in range(2):
            assert ask(broker.address(), 60) == {"error": "no space"}
    finally:
        broker.close()
