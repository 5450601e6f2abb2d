"""The broker of the embedded server: who asks it, and who can neither stop nor delay it."""

from __future__ import annotations

import hmac
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_pgtoolset import _broker
from pytest_pgtoolset._broker import Broker, ask

#: An hour: a request that is served within it was not waited for.
NEVER = 3600.0


@pytest.fixture
def started() -> list[str]:
    return []


@pytest.fixture
def broker(started: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    # No connection of these tests ends by itself, so what passes was not delayed by another.
    monkeypatch.setattr(_broker, "_REQUEST_TIMEOUT", NEVER)

    def start() -> str:
        started.append("postgresql://server")
        return started[-1]

    broker = Broker(start)
    yield broker
    broker.close()
    assert not broker._thread.is_alive()


def connected(broker: Broker) -> socket.socket:
    return socket.create_connection(("127.0.0.1", broker.address()["port"]), 60)


@contextmanager
def hung_up() -> Iterator[None]:
    """The broker may close the connection at any moment of this block; it must not be silent."""
    try:
        yield
    except TimeoutError:
        raise
    except OSError:
        pass


def answer_to(broker: Broker, *chunks: bytes) -> bytes:
    """What a client receives that sends these bytes and no more."""
    answer = b""
    with connected(broker) as connection, hung_up():
        for chunk in chunks:
            connection.sendall(chunk)
        connection.shutdown(socket.SHUT_WR)
        while chunk := connection.recv(4096):
            answer += chunk
    return answer


def test_started_once(broker: Broker, started: list[str]) -> None:
    """The server starts when the first worker asks, and every worker receives its URL."""
    assert not started
    for _ in range(3):
        assert ask(broker.address(), 60) == {"url": "postgresql://server"}
    assert len(started) == 1


def test_asked_by_many_at_once() -> None:
    """Workers that ask while the server starts receive its URL when it has started, and strangers
    who come meanwhile are refused."""
    begun, ready = threading.Event(), threading.Event()

    def start() -> str:
        begun.set()
        assert ready.wait(60)
        return "postgresql://server"

    broker = Broker(start)
    try:
        with ThreadPoolExecutor() as threads:
            answers = [threads.submit(ask, broker.address(), 60) for _ in range(5)]
            assert begun.wait(60)
            assert answer_to(broker, b"wrong server\n") == b""
            ready.set()
            assert [each.result() for each in answers] == [{"url": "postgresql://server"}] * 5
    finally:
        broker.close()


HOSTILE = [
    (b"",),
    (b"\n",),
    (b" \n",),
    (b"wrong server\n",),
    ("t\u00f6ken close\n".encode(),),
    (b"0" * 32 + b" " + "\u00e9".encode() * 32 + b"\n",),
    (b"\xff" * 5000,),
    (b"x" * 2**20,),
    (b"x" * 2**20 + b"\n",),
    (b"\0" * 97 + b"\n",),
]


@pytest.mark.parametrize("chunks", HOSTILE)
def test_strangers(broker: Broker, started: list[str], chunks: tuple[bytes, ...]) -> None:
    """A stranger receives nothing, starts nothing and does not end the broker."""
    assert answer_to(broker, *chunks) == b""
    assert not started
    assert ask(broker.address(), 60) == {"url": "postgresql://server"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(chunks=st.lists(st.binary(max_size=300), max_size=5), is_cut=st.booleans())
def test_any_bytes(broker: Broker, chunks: list[bytes], is_cut: bool) -> None:
    """No bytes, in whatever pieces and however the connection ends, stop the broker."""
    if is_cut:
        with connected(broker) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            with hung_up():
                for chunk in chunks:
                    connection.sendall(chunk)
    else:
        assert answer_to(broker, *chunks) == b""
    assert ask(broker.address(), 60) == {"url": "postgresql://server"}


@pytest.mark.parametrize("number", [5, 50, 200])
def test_silent_connections(broker: Broker, number: int) -> None:
    """Any number of connections that say nothing, or not all of a request, delay no worker."""
    with ExitStack() as stack:
        for each in range(number):
            connection = stack.enter_context(connected(broker))
            with hung_up():  # it was closed for a newer one
                connection.sendall(b"a drop"[: each % 7])
        assert ask(broker.address(), 60) == {"url": "postgresql://server"}


def test_number_of_strangers(broker: Broker) -> None:
    """The oldest of too many strangers is closed, the youngest is not."""
    with ExitStack() as stack:
        most = _broker._MOST_STRANGERS
        strangers = [stack.enter_context(connected(broker)) for _ in range(most + 3)]
        for each in strangers[:3]:
            with hung_up():
                assert each.recv(1) == b""
        strangers[-1].sendall(b"wrong\n")
        with hung_up():
            assert strangers[-1].recv(1) == b""
        assert len(broker._strangers) <= most


def test_slow_stranger(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a request counts from the connection on, and not from its last byte."""
    monkeypatch.setattr(_broker, "_REQUEST_TIMEOUT", 0.2)
    with connected(broker) as connection:
        connection.settimeout(0.05)
        is_closed = False
        while not is_closed:
            try:
                connection.sendall(b"x")
                is_closed = connection.recv(1) == b""
            except TimeoutError:
                continue
            except OSError:
                is_closed = True
    assert ask(broker.address(), 60) == {"url": "postgresql://server"}


def test_request_that_was_overheard(broker: Broker) -> None:
    """The token is never sent, and a proof is of no use with another nonce."""
    address = broker.address()
    nonce = b"0" * 32
    proof = hmac.new(address["token"].encode(), b"ask " + nonce, "sha256").hexdigest().encode()
    good = answer_to(broker, nonce + b" " + proof + b"\n")
    assert b"postgresql://server" in good
    assert address["token"].encode() not in nonce + proof + good
    assert answer_to(broker, b"1" * 32 + b" " + proof + b"\n") == b""
    assert answer_to(broker, nonce + b" " + good.partition(b" ")[0] + b"\n") == b""


@pytest.mark.parametrize("reply", [b"x" * 64 + b' {"url": "postgresql://evil"}\n', b"{}\n", b"\n"])
def test_another_process_on_the_port(broker: Broker, reply: bytes) -> None:
    """A worker takes no URL from a process that does not have the token."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor() as threads:
        port = listener.getsockname()[1]
        answer = threads.submit(ask, broker.address() | {"port": port}, 60)
        with listener.accept()[0] as connection:
            connection.sendall(reply)
            with pytest.raises(ConnectionError, match="another process"):
                answer.result()


def test_controller_that_has_ended() -> None:
    """A worker that asks too late gets an error at once, and one that gets no answer in time."""
    broker = Broker(lambda: "postgresql://server")
    broker.close()
    with pytest.raises(ConnectionRefusedError):
        ask(broker.address(), NEVER)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(TimeoutError):
            ask({"port": silent.getsockname()[1], "token": ""}, 0.1)


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt("no space")])
def test_server_that_does_not_start(error: BaseException) -> None:
    """Each worker receives the reason, whatever was raised."""

    def fail() -> str:
        raise error

    broker = Broker(fail)
    try:
        for _ in range(2):
            assert ask(broker.address(), 60) == {"error": "no space"}
    finally:
        broker.close()
