"""`OpenTelemetryObserver`: metrics and spans by the conventions for databases."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)

from pgtoolset import (
    TransactionAbortedError,
    advisory_lock,
    create_db_context,
    get_transaction,
    lock_tables,
)
from pgtoolset.observe import (
    CommitResolved,
    Event,
    LockWaited,
    PoolWaited,
    Retried,
    TransactionEnded,
    WatcherLooked,
    subscribe,
)
from pgtoolset.observe.otel import OpenTelemetryObserver
from tests.support import DRIVERNAME, Item, swallow_error

Points = dict[str, list[tuple[dict[str, Any], float]]]


class Telemetry:
    """Providers that keep what is recorded."""

    def __init__(self) -> None:
        self._reader = InMemoryMetricReader()
        self._exporter = InMemorySpanExporter()
        self.meters = MeterProvider([self._reader])
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))

    def observer(self, engine: AsyncEngine, **options: Any) -> OpenTelemetryObserver:
        return OpenTelemetryObserver(
            engine, tracer_provider=self.tracers, meter_provider=self.meters, **options
        )

    def spans(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def points(self) -> Points:
        """The points of each metric: attributes, and the sum or the value."""
        data: Any = self._reader.get_metrics_data()
        found: Points = {}
        for resource in data.resource_metrics:
            for scope in resource.scope_metrics:
                assert scope.scope.name == "pgtoolset"
                for metric in scope.metrics:
                    for point in metric.data.data_points:
                        value = point.sum if hasattr(point, "sum") else point.value
                        found.setdefault(metric.name, []).append((dict(point.attributes), value))
        return found


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def server(engine: AsyncEngine) -> dict[str, Any]:
    """The attributes of the engine's server."""
    url = engine.url
    found: dict[str, Any] = {"db.system.name": "postgresql", "db.namespace": url.database}
    if url.host:
        found["server.address"] = url.host
        if url.port not in (None, 5432):
            found["server.port"] = url.port
    return found


async def test_transactions(
    engine: AsyncEngine, telemetry: Telemetry, server: dict[str, Any]
) -> None:
    """A transaction is a span of its time below the current one, and a point of a histogram."""
    stop = subscribe(engine, telemetry.observer(engine))
    maker = async_sessionmaker(engine)
    tracer = telemetry.tracers.get_tracer("application")
    before = time.time_ns()
    with tracer.start_as_current_span("request") as request:
        async with maker() as session, get_transaction(session, isolation_level="SERIALIZABLE"):
            await session.execute(text("SELECT pg_sleep(0.02)"))
    after = time.time_ns()
    with pytest.raises(DBAPIError):
        async with create_db_context(maker)() as session:
            await session.execute(text("SELECT 1 / 0"))
    with pytest.raises(TransactionAbortedError):
        async with create_db_context(maker)() as session:
            await swallow_error(session)
    stop()
    stored, parent, refused, aborted = telemetry.spans()
    assert parent.name == "request"
    assert stored.name == f"TRANSACTION {engine.url.database}"
    assert stored.kind is SpanKind.CLIENT
    assert stored.parent is not None
    assert stored.parent.span_id == request.get_span_context().span_id
    assert stored.start_time is not None
    assert stored.end_time is not None
    assert before <= stored.start_time <= stored.end_time <= after
    assert stored.end_time - stored.start_time >= 20_000_000
    assert dict(stored.attributes or {}) == {
        **server,
        "db.operation.name": "TRANSACTION",
        "pgtoolset.transaction.outcome": "committed",
        "pgtoolset.transaction.isolation_level": "SERIALIZABLE",
        "pgtoolset.transaction.read_only": False,
    }
    assert stored.status.status_code is StatusCode.UNSET
    for span, outcome in ((refused, "rolled_back"), (aborted, "aborted")):
        assert span.parent is None
        assert span.status.status_code is StatusCode.ERROR
        assert span.attributes is not None
        assert span.attributes["pgtoolset.transaction.outcome"] == outcome
        assert span.attributes["db.response.status_code"] == "22012"
        assert span.attributes["error.type"] == "22012"
    points = telemetry.points()["pgtoolset.transaction.duration"]
    assert {each["pgtoolset.transaction.outcome"] for each, _ in points} == {
        *("committed", "rolled_back", "aborted")
    }


async def test_waits(
    engine: AsyncEngine, session_maker: Any, telemetry: Telemetry, server: dict[str, Any]
) -> None:
    """The wait for a connection has the name of the convention and that of the pool; a lock has
    its table, and no key of an advisory lock is recorded."""
    stop = subscribe(engine, telemetry.observer(engine, pool_name="shop"))
    async with session_maker() as session:
        async with lock_tables(session, [Item]):
            pass
        async with advisory_lock(session, "customer 7"):
            pass
    stop()
    points = telemetry.points()
    [(attributes, seconds)] = points["db.client.connection.wait_time"]
    assert attributes == {**server, "db.client.connection.pool.name": "shop"}
    assert seconds > 0
    locks = {each["pgtoolset.lock.kind"]: each for each, _ in points["pgtoolset.lock.wait_time"]}
    assert locks["tables"]["db.collection.name"].endswith("item")
    assert locks["tables"]["pgtoolset.lock.mode"] == "SHARE UPDATE EXCLUSIVE"
    assert locks["advisory"]["pgtoolset.lock.acquired"] is True
    assert "customer" not in str(points)


def test_each_event(telemetry: Telemetry) -> None:
    """Each event, and each outcome of it, is recorded under its own attributes, without a
    password."""
    url = make_url(f"{DRIVERNAME}://me:hunter2@db.example.com:6432/shop")
    observer = telemetry.observer(create_async_engine(url))
    events: list[Event] = [
        PoolWaited("acquired", 1.0),
        PoolWaited("timed_out", 2.0),
        PoolWaited("deadline", 3.0),
        PoolWaited("cancelled", 4.0),
        PoolWaited("failed", 5.0),
        LockWaited("rows", ("public.item",), "UPDATE", False, 6.0),
        LockWaited("tables", ("public.a", "public.b"), "SHARE", True, 7.0),
        Retried(1, "DBAPIError", "40001", 0.1),
        Retried(2, "KeyError", None, 0.1),
        CommitResolved("stored", 8.0),
        TransactionEnded("lost", 9.0),
        TransactionEnded("unknown", 10.0),
        TransactionEnded("rolled_back", 11.0),
        WatcherLooked(12.0, 13, 14, 15.0, 16.0, True),
    ]
    for event in events:
        observer(event)
    server = {
        "db.system.name": "postgresql",
        "db.namespace": "shop",
        "server.address": "db.example.com",
        "server.port": 6432,
    }
    pool = {**server, "db.client.connection.pool.name": "db.example.com:6432/shop"}
    points = telemetry.points()
    assert points["db.client.connection.wait_time"] == [(pool, 1.0)]
    assert points["db.client.connection.timeouts"] == [(pool, 2)]
    rows, tables = points["pgtoolset.lock.wait_time"]
    assert rows[0]["db.collection.name"] == "public.item"
    assert rows[0]["pgtoolset.lock.acquired"] is False
    assert "db.collection.name" not in tables[0]
    assert points["pgtoolset.transaction.retries"] == [
        ({**server, "error.type": "40001"}, 1),
        ({**server, "error.type": "KeyError"}, 1),
    ]
    assert points["pgtoolset.commit.resolution.duration"] == [
        ({**server, "pgtoolset.commit.outcome": "stored"}, 8.0)
    ]
    ended = {
        each["pgtoolset.transaction.outcome"]: each.get("error.type")
        for each, _ in points["pgtoolset.transaction.duration"]
    }
    assert ended == {"lost": "lost", "unknown": "unknown", "rolled_back": None}
    assert [span.status.status_code for span in telemetry.spans()] == [
        *(StatusCode.ERROR, StatusCode.ERROR, StatusCode.UNSET)
    ]
    assert points["pgtoolset.watcher.look.duration"] == [
        ({**server, "pgtoolset.watcher.failed": True}, 12.0)
    ]
    assert points["pgtoolset.watcher.lag"] == [(server, 16.0)]
    assert points["pgtoolset.watcher.waiters"] == [(server, 13)]
    assert "hunter2" not in str((points, [span.to_json() for span in telemetry.spans()]))


async def test_many_at_once(engine: AsyncEngine, session_maker: Any, telemetry: Telemetry) -> None:
    """Concurrent tasks each have their transaction below their own span."""
    stop = subscribe(engine, telemetry.observer(engine))
    tracer = telemetry.tracers.get_tracer("application")

    async def request(number: int) -> None:
        with tracer.start_as_current_span(str(number)):
            session: AsyncSession = session_maker()
            async with session, get_transaction(session):
                await session.execute(text("SELECT 1"))

    await asyncio.gather(*map(request, range(10)))
    stop()
    spans = telemetry.spans()
    parents = [span.parent.span_id for span in spans if span.parent is not None]
    requests = [span.get_span_context().span_id for span in spans if span.parent is None]  # type: ignore[union-attr]
    assert len(parents) == 10
    assert sorted(parents) == sorted(requests)


PROGRAM = """
import sys
sys.modules["opentelemetry"] = None
import pgtoolset, pgtoolset.observe
assert pgtoolset.observe.subscribe
try:
    import pgtoolset.observe.otel
except ImportError as error:
    print(error)
"""


@pytest.mark.once
def test_without_opentelemetry() -> None:
    """Only `pgtoolset.observe.otel` needs OpenTelemetry; without it the error says what to
    install."""
    output = subprocess.run(
        [sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True
    ).stdout
    assert output.startswith("OpenTelemetry is not installed, and pgtoolset.observe.otel needs it")
    assert 'pip install "pgtoolset[otel]"' in output


@pytest.mark.once
def test_import_is_lazy() -> None:
    """`pgtoolset.observe` imports no OpenTelemetry."""
    program = "import sys, pgtoolset.observe; print('opentelemetry' in sys.modules)"
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert output == "False\n"
