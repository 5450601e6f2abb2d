"""An observer for OpenTelemetry: metrics and spans by its conventions for databases.

It needs `opentelemetry-api` (extra `otel`). What exports them is the application's choice.
https://opentelemetry.io/docs/specs/semconv/db/
"""

from __future__ import annotations

import time
from typing import TypeAlias

from sqlalchemy import URL, Engine
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._arguments import check_pool, check_provider, check_text
from pgtoolset.events import (
    CommitResolved,
    Event,
    LockWaited,
    PoolWaited,
    Retried,
    TransactionEnded,
    WatcherLooked,
)

try:
    from opentelemetry.metrics import Histogram, MeterProvider, get_meter
    from opentelemetry.trace import SpanKind, Status, StatusCode, TracerProvider, get_tracer
except ModuleNotFoundError as _error:
    if (_error.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise ImportError(
        "OpenTelemetry is not installed, and pgtoolset.observe.otel needs it: run "
        'pip install "opentelemetry-api>=1.30" or pip install "pgtoolset[otel]"'
    ) from _error

__all__ = ["OpenTelemetryObserver"]

Attributes: TypeAlias = dict[str, str | int | bool]

_SCOPE = "pgtoolset"

#: Of the instrumentation scope: the version of the conventions.
_SCHEMA = "https://opentelemetry.io/schemas/1.34.0"

#: The bounds of histograms that the conventions advise for durations of a database.
_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 10)

_DEFAULT_PORT = 5432

_NANOSECONDS = 1_000_000_000

#: The outcomes of transactions that are errors, also where no SQLSTATE says so.
_FAILED = frozenset({"aborted", "lost", "unknown"})


class OpenTelemetryObserver:
    """Records the events of an engine as metrics and spans of OpenTelemetry.

    A transaction becomes a span of kind CLIENT from its first statement to its end, a child of the
    span that is current as it ends. Metrics have `db.system.name`, `db.namespace`, and the address
    of the server as the engine's URL has it. No SQL, no value, and no key of an advisory lock is
    recorded.

    Args:
        engine: whose URL names the database and the server.
        tracer_provider: makes the spans; that of the application by default.
        meter_provider: makes the metrics; that of the application by default.
        pool_name: `db.client.connection.pool.name`, which tells the pools of an application apart;
            by default `host:port/database`.

    Raises:
        TypeError: an argument is something else.
        UnsupportedDriverError: the engine's database or driver is not supported.

    Example:
        >>> from pgtoolset.observe.otel import OpenTelemetryObserver
        >>> unsubscribe = subscribe(engine, OpenTelemetryObserver(engine))

    See docs/observability.md and https://opentelemetry.io/docs/specs/semconv/db/database-metrics/
    """

    def __init__(
        self,
        engine: AsyncEngine | Engine,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        pool_name: str | None = None,
    ) -> None:
        check_pool(engine)
        check_provider("tracer_provider", "get_tracer", tracer_provider)
        check_provider("meter_provider", "get_meter", meter_provider)
        check_text("pool_name", pool_name)
        self._of_server = _server_of(engine.url)
        self._of_pool = {"db.client.connection.pool.name": pool_name or _pool_of(engine.url)}
        database = self._of_server.get("db.namespace")
        self._span_name = "TRANSACTION" if database is None else f"TRANSACTION {database}"
        self._tracer = get_tracer(_SCOPE, None, tracer_provider, _SCHEMA)
        self._make_instruments(meter_provider)

    def _make_instruments(self, meter_provider: MeterProvider | None) -> None:
        meter = get_meter(_SCOPE, "", meter_provider, _SCHEMA)

        def seconds(name: str, description: str) -> Histogram:
            return meter.create_histogram(
                name, "s", description, explicit_bucket_boundaries_advisory=_BOUNDS
            )

        self._waits = seconds(
            "db.client.connection.wait_time",
            "The time it took to obtain an open connection from the pool.",
        )
        self._timeouts = meter.create_counter(
            "db.client.connection.timeouts",
            "{timeout}",
            "Connection timeouts that have occurred trying to obtain a connection from the pool.",
        )
        self._transactions = seconds(
            "pgtoolset.transaction.duration",
            "The time from the first statement of a transaction to its end.",
        )
        self._locks = seconds(
            "pgtoolset.lock.wait_time",
            "The time that lock_tables, lock_rows and advisory_lock have waited for locks.",
        )
        self._retries = meter.create_counter(
            "pgtoolset.transaction.retries",
            "{retry}",
            "Attempts of run_transaction that have failed and are followed by another one.",
        )
        self._resolved = seconds(
            "pgtoolset.commit.resolution.duration",
            "The time it took to find out what became of a COMMIT whose answer was lost.",
        )
        self._looks = seconds(
            "pgtoolset.watcher.look.duration", "The time of a look of a RowWatcher at its rows."
        )
        self._lag = meter.create_gauge(
            "pgtoolset.watcher.lag", "s", "How old what waiters had seen was at the last look."
        )
        self._waiters = meter.create_gauge(
            "pgtoolset.watcher.waiters", "{waiter}", "Waiters that a RowWatcher serves."
        )

    def __call__(self, event: Event, /) -> None:
        """Record an event."""
        match event:
            case TransactionEnded():
                self._record_transaction(event)
            case PoolWaited():
                self._record_pool(event)
            case LockWaited():
                self._record_lock(event)
            case Retried():
                error = event.sqlstate or event.error
                self._retries.add(1, {**self._of_server, "error.type": error})
            case CommitResolved():
                outcome = {"pgtoolset.commit.outcome": event.outcome}
                self._resolved.record(event.seconds, {**self._of_server, **outcome})
            case WatcherLooked():
                self._record_look(event)

    def _record_transaction(self, event: TransactionEnded) -> None:
        ended_at = time.time_ns()
        attributes = {**self._of_server, "pgtoolset.transaction.outcome": event.outcome}
        error = event.sqlstate or (event.outcome if event.outcome in _FAILED else None)
        if event.sqlstate is not None:
            attributes["db.response.status_code"] = event.sqlstate
        if error is not None:
            attributes["error.type"] = error
        self._transactions.record(event.seconds, attributes)
        attributes["db.operation.name"] = "TRANSACTION"
        attributes["pgtoolset.transaction.read_only"] = event.read_only
        if event.isolation_level is not None:
            attributes["pgtoolset.transaction.isolation_level"] = event.isolation_level
        span = self._tracer.start_span(
            self._span_name,
            kind=SpanKind.CLIENT,
            attributes=attributes,
            start_time=ended_at - int(event.seconds * _NANOSECONDS),
        )
        if error is not None:
            span.set_status(Status(StatusCode.ERROR))
        span.end(ended_at)

    def _record_pool(self, event: PoolWaited) -> None:
        attributes = {**self._of_server, **self._of_pool}
        if event.outcome == "acquired":
            self._waits.record(event.seconds, attributes)
        elif event.outcome in ("timed_out", "deadline"):
            self._timeouts.add(1, attributes)

    def _record_lock(self, event: LockWaited) -> None:
        attributes = {
            **self._of_server,
            "pgtoolset.lock.kind": event.kind,
            "pgtoolset.lock.mode": event.mode,
            "pgtoolset.lock.acquired": event.acquired,
        }
        if event.kind != "advisory" and len(event.names) == 1:
            attributes["db.collection.name"] = event.names[0]
        self._locks.record(event.seconds, attributes)

    def _record_look(self, event: WatcherLooked) -> None:
        self._looks.record(
            event.seconds, {**self._of_server, "pgtoolset.watcher.failed": event.failed}
        )
        self._lag.set(event.lag, self._of_server)
        self._waiters.set(event.waiters, self._of_server)


def _server_of(url: URL) -> Attributes:
    attributes: Attributes = {"db.system.name": "postgresql"}
    if url.database:
        attributes["db.namespace"] = url.database
    if url.host:
        attributes["server.address"] = url.host
        if url.port not in (None, _DEFAULT_PORT):
            attributes["server.port"] = url.port
    return attributes


def _pool_of(url: URL) -> str:
    server = f"{url.host}:{url.port or _DEFAULT_PORT}" if url.host else ""
    return f"{server}/{url.database or ''}"
