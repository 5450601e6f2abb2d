"""install_error_handlers: which error has which answer, and what stands in it."""

import logging
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Annotated, Any

import asyncpg
import pytest
from fastapi import Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from pgtoolset import (
    CommitUnknownError,
    LockTimeoutError,
    PgToolsetError,
    PoolTimeoutError,
    RowDeletedError,
    RowNotFoundError,
    TransactionAbortedError,
    WaitTimeoutError,
    create_db_dependency,
    errors,
    lock_tables,
    run_transaction,
)
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.fastapi import install_error_handlers
from pgtoolset.testing import create_test_client
from tests.fastapi.api import Maker, check_problem, make_app
from tests.support import Item

#: The status of each SQLSTATE; 500 for what stays the server's own error.
STATUSES = {
    "23505": 409,  # unique_violation
    "23P01": 409,  # exclusion_violation
    "23503": 409,  # foreign_key_violation
    "23001": 409,  # restrict_violation
    "40001": 409,  # serialization_failure
    "40P01": 409,  # deadlock_detected
    "23514": 422,  # check_violation
    "23502": 422,  # not_null_violation
    "22000": 422,  # data_exception
    "22003": 422,  # numeric_value_out_of_range
    "22P02": 422,  # invalid_text_representation
    "55P03": 503,  # lock_not_available
    "23000": 500,  # integrity_constraint_violation
    "40000": 500,  # transaction_rollback
    "42P01": 500,  # undefined_table
    "42501": 500,  # insufficient_privilege
    "53100": 500,  # disk_full
    "53300": 500,  # too_many_connections
    "54000": 500,  # program_limit_exceeded
    "57014": 500,  # query_canceled
    "P0001": 500,  # raise_exception
    "XX000": 500,  # internal_error
}


@pytest.mark.parametrize("table", ["secret_now", "secret_later"])
async def test_sqlstates(session_maker: Maker, tables: None, table: str) -> None:
    """The SQLSTATE decides, of a statement and of the commit before the response alike."""
    async with create_test_client(make_app(session_maker)) as client:
        for state, status in STATUSES.items():
            body = {"sql": f"INSERT INTO {table} VALUES ('{state}')"}
            if status != 500:
                check_problem(await client.post("/run", json=body), status)
                continue
            with pytest.raises(DBAPIError) as caught:
                await client.post("/run", json=body)
            assert sqlstate_of(caught.value) == state


INSERT = "INSERT INTO secret_item (secret_id, secret_name{}) VALUES (2, 'secret'{})"


@pytest.mark.parametrize(
    ("sql", "status"),
    [
        pytest.param("INSERT INTO secret_owner VALUES (1)", 409, id="primary key"),
        pytest.param("UPDATE secret_item SET secret_name = 'x' || secret_name", 200, id="none"),
        pytest.param(
            "INSERT INTO secret_item (secret_id, secret_name) VALUES (2, 'secret value')",
            409,
            id="unique",
        ),
        pytest.param(INSERT.format(", secret_range", ", '[4, 9)'"), 409, id="exclusion"),
        pytest.param(INSERT.format(", secret_owner", ", 99"), 409, id="reference"),
        pytest.param("DELETE FROM secret_owner", 409, id="referenced"),
        pytest.param(INSERT.format(", secret_number", ", 100"), 422, id="check"),
        pytest.param("INSERT INTO secret_item (secret_id) VALUES (2)", 422, id="not null"),
        pytest.param("SELECT 'secret'::int", 422, id="text"),
        pytest.param("SELECT 1 / (secret_id - 1) FROM secret_item", 422, id="division"),
        pytest.param(INSERT.format(", secret_late", ", 'secret value'"), 409, id="late unique"),
        pytest.param(INSERT.format(", secret_late_range", ", '[4, 9)'"), 409, id="late exclusion"),
        pytest.param(INSERT.format(", secret_late_owner", ", 99"), 409, id="late reference"),
    ],
)
async def test_constraints(session_maker: Maker, tables: None, sql: str, status: int) -> None:
    """Constraints of PostgreSQL itself: what they check at once, and what they check at COMMIT."""
    async with create_test_client(make_app(session_maker)) as client:
        response = await client.post("/run", json={"sql": sql})
    if status == 200:
        assert response.json() == "done"
    else:
        check_problem(response, status)


@pytest.mark.parametrize(
    ("sql", "value"),
    [
        ("SELECT CAST(:value AS integer)", 2**40),
        ("SELECT CAST(:value AS integer)", 2**70),
        ("SELECT CAST(:value AS integer)", "secret"),
        ("SELECT CAST(:value AS text)", "secret\0"),
        ("SELECT CAST(CAST(:value AS text) AS date)", "secret"),
    ],
)
async def test_values(session_maker: Maker, sql: str, value: Any) -> None:
    """A value that the driver refuses before it sends it is a data error, as one of PostgreSQL."""
    async with create_test_client(make_app(session_maker)) as client:
        body = {"sql": sql, "parameters": {"value": value}}
        check_problem(await client.post("/run", json=body), 422)


async def test_stored_value_that_python_cannot_hold(session_maker: Maker) -> None:
    """A stored value that Python's types cannot hold is not the client's mistake."""
    async with create_test_client(make_app(session_maker)) as client:
        with pytest.raises((DBAPIError, ValueError)):
            await client.post("/run", json={"sql": "SELECT date '20000-01-01'"})


def lock_timeout() -> LockTimeoutError:
    return LockTimeoutError("secret", tables=["secret"], mode="EXCLUSIVE", timeout=1)


class OwnNotFoundError(RowNotFoundError):
    """Of an application."""


ERRORS: list[Any] = [
    pytest.param(lambda: RowNotFoundError("secret"), 404, id="RowNotFoundError"),
    pytest.param(lambda: RowDeletedError("secret"), 404, id="RowDeletedError"),
    pytest.param(lambda: OwnNotFoundError("secret"), 404, id="a subclass"),
    pytest.param(lock_timeout, 503, id="LockTimeoutError"),
    pytest.param(lambda: PoolTimeout("secret"), 503, id="TimeoutError of the pool"),
    pytest.param(lambda: PoolTimeoutError("secret"), 503, id="PoolTimeoutError"),
    pytest.param(lambda: WaitTimeoutError("secret"), 504, id="WaitTimeoutError"),
]


def raising(make: Callable[[], Exception], **options: Any) -> FastAPI:
    app = FastAPI()
    install_error_handlers(app, **options)

    @app.get("/")
    async def fail() -> None:
        raise make()

    return app


@pytest.mark.parametrize(("make", "status"), ERRORS)
async def test_errors_of_the_library(make: Callable[[], Exception], status: int) -> None:
    """Errors of this library, and of SQLAlchemy's pool, have the answer of their class."""
    async with create_test_client(raising(make)) as client:
        check_problem(await client.get("/"), status)


#: Those of which the answer is a problem.
ANSWERED = (RowNotFoundError, LockTimeoutError, WaitTimeoutError)


OTHERS = [
    each
    for each in map(errors.__dict__.__getitem__, errors.__all__)
    if not issubclass(each, (*ANSWERED, PoolTimeout)) and each.__name__ != "DeadlineExceededError"
]


@pytest.mark.parametrize("class_", OTHERS)
async def test_other_errors_of_the_library(class_: type[PgToolsetError]) -> None:
    """Every other error is the server's, whatever its cause and its SQLSTATE are."""
    error: Any = class_.__new__(class_)  # each takes arguments of its own
    error.__cause__ = RowNotFoundError("secret")
    error.sqlstate = "23505"
    async with create_test_client(raising(lambda: error)) as client:
        with pytest.raises(class_):
            await client.get("/")


async def test_full_pool(database_url: str) -> None:
    """A request that gets no connection of the pool in time may try again."""
    engine = create_async_engine(database_url, pool_size=1, max_overflow=0, pool_timeout=0.01)
    app = make_app(async_sessionmaker(engine))
    async with engine.connect(), create_test_client(app) as client:
        check_problem(await client.post("/run", json={"sql": "SELECT 1"}), 503)
    await engine.dispose()


async def test_locked_table(session_maker: Maker, other: asyncpg.Connection) -> None:
    """A lock that is not free in time, taken by this library or by a statement."""
    app = make_app(session_maker)

    @app.post("/lock")
    async def lock() -> None:
        async with session_maker() as session, lock_tables(session, [Item], timeout=0.01):
            pass

    async with create_test_client(app) as client, other.transaction():
        await other.execute("LOCK TABLE item")
        check_problem(await client.post("/lock"), 503)
        check_problem(await client.post("/run", json={"sql": "LOCK TABLE item NOWAIT"}), 503)


async def test_retries_used_up(session_maker: Maker, tables: None) -> None:
    """A serialization failure that is left after all attempts is a conflict."""
    app = make_app(session_maker)
    attempts: list[int] = []

    async def work(session: AsyncSession) -> None:
        attempts.append(1)
        await session.execute(text("INSERT INTO secret_now VALUES ('40001')"))

    @app.post("/retry")
    async def retry() -> None:
        await run_transaction(session_maker, work, attempts=2)

    async with create_test_client(app) as client:
        check_problem(await client.post("/retry"), 409)
    assert len(attempts) == 2


async def test_swallowed_error(session_maker: Maker, tables: None) -> None:
    """An endpoint that swallows a violation and reports success is wrong, and not its client."""
    app = make_app(session_maker)

    @app.post("/swallow")
    async def swallow(
        session: Annotated[AsyncSession, Depends(create_db_dependency(session_maker))],
    ) -> None:
        with suppress(IntegrityError):
            await session.execute(text("INSERT INTO secret_owner VALUES (1)"))

    async with create_test_client(app) as client:
        with pytest.raises(TransactionAbortedError):
            await client.post("/swallow")


@pytest.mark.parametrize(
    ("retry_after", "header"),
    [
        (1, "1"),
        (0.2, "1"),
        (1.5, "2"),
        ("500ms", "1"),
        ("2min", "120"),
        (timedelta(seconds=30), "30"),
    ],
)
async def test_retry_after(retry_after: Any, header: str) -> None:
    """`Retry-After` has whole seconds, and at least one."""
    async with create_test_client(raising(lock_timeout, retry_after=retry_after)) as client:
        assert (await client.get("/")).headers["retry-after"] == header


TEXTS = {"secret_unique": "This name is taken.", "secret_check": "At most 99."}


@pytest.mark.parametrize(
    ("sql", "status", "constraint"),
    [
        (
            "INSERT INTO secret_item (secret_id, secret_name) VALUES (2, 'secret value')",
            409,
            "secret_unique",
        ),
        (INSERT.format(", secret_number", ", 100"), 422, "secret_check"),
    ],
)
async def test_allowed_constraints(
    session_maker: Maker, tables: None, sql: str, status: int, constraint: str
) -> None:
    """A constraint that is allowed has the text of the application, and its name, in the body."""
    async with create_test_client(make_app(session_maker, constraints=TEXTS)) as client:
        response = await client.post("/run", json={"sql": sql})
        assert response.status_code == status
        body = response.json()
        assert body["detail"] == TEXTS[constraint]
        assert body["constraint"] == constraint
        other = await client.post("/run", json={"sql": "INSERT INTO secret_owner VALUES (1)"})
        check_problem(other, 409)


async def test_types(session_maker: Maker, tables: None) -> None:
    """With `type_base` a client tells apart what has the same status."""
    base = "https://example.com/problems/"
    kinds = {}
    async with create_test_client(make_app(session_maker, type_base=base)) as client:
        for state, status in STATUSES.items():
            if status != 500:
                sql = f"INSERT INTO secret_now VALUES ('{state}')"
                body = (await client.post("/run", json={"sql": sql})).json()
                assert body["type"].startswith(base)
                kinds[state] = body["type"].removeprefix(base)
    assert kinds["23505"] == "already-exists"
    assert kinds["40001"] == kinds["40P01"] == "concurrent-request"
    assert len(set(kinds.values())) == 8


async def test_log(session_maker: Maker, tables: None, caplog: pytest.LogCaptureFixture) -> None:
    """The log has the class, the SQLSTATE and the constraint, and no message: it quotes values."""
    caplog.set_level("DEBUG", "pgtoolset")
    async with create_test_client(make_app(session_maker)) as client:
        for state in ("23505", "55P03"):
            await client.post("/run", json={"sql": f"INSERT INTO secret_now VALUES ('{state}')"})
    records = [each for each in caplog.records if "is answered with" in each.getMessage()]
    assert [each.levelno for each in records] == [logging.DEBUG, logging.WARNING]
    for record, state in zip(records, ("23505", "55P03"), strict=True):
        message = record.getMessage()
        assert message.startswith("POST /run is answered with ")
        assert state in message
        assert "secret_message" not in message
        assert "secret_detail" not in message
        assert record.exc_info is None


async def test_unknown_commit_stays_an_error() -> None:
    """A commit whose outcome is unknown is not a conflict, and nothing says that it failed."""
    error = CommitUnknownError("secret", phase="end")
    async with create_test_client(raising(lambda: error)) as client:
        with pytest.raises(CommitUnknownError):
            await client.get("/")


async def test_request_validation_is_unchanged(session_maker: Maker) -> None:
    """FastAPI's own answer to a request that is not valid stays as it is."""
    plain = FastAPI()
    plain.router.routes.extend(make_app(session_maker).router.routes)
    answers = []
    for app in (plain, make_app(session_maker)):
        async with create_test_client(app) as client:
            answers.append(await client.post("/run", json={"sql": 5}))
    assert [each.status_code for each in answers] == [422, 422]
    assert answers[0].content == answers[1].content
    assert answers[0].headers == answers[1].headers


@pytest.mark.parametrize("app", ["x", None, FastAPI, object(), 5])
def test_no_application(app: Any) -> None:
    """What is not an application is a `TypeError`."""
    with pytest.raises(TypeError, match=r"^app must be a FastAPI application, not"):
        install_error_handlers(app)


async def test_started_application() -> None:
    """An application that has started takes no handlers, so it is an error and not without
    effect."""
    app = FastAPI()
    async with create_test_client(app):
        with pytest.raises(RuntimeError, match="has started"):
            install_error_handlers(app)
