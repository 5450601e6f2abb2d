"""Checked by mypy and pyright, never run: what the public functions are typed as."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Annotated, Any, Literal, assert_type

from fastapi import Depends
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import (
    DeadlineExceededError,
    RetryAttempt,
    create_db_context,
    create_db_dependency,
    deadline,
    get_transaction,
    on_commit,
    run_transaction,
)
from pgtoolset.protocols import (
    DatabaseContext,
    DatabaseDependency,
    ManagedSession,
    SessionFactory,
    StartableTransaction,
    TransactionalSession,
)


class MySession(AsyncSession):
    def mine(self) -> int:
        return 1


maker = async_sessionmaker[AsyncSession]()
my_maker = async_sessionmaker(class_=MySession)

factory: SessionFactory[MySession] = my_maker
transactional: TransactionalSession = maker()
managed: ManagedSession = maker()

get_db = create_db_dependency(session_maker=maker)
get_my_db = create_db_dependency(my_maker)
db_context = create_db_context(session_maker=maker)
my_db_context = create_db_context(my_maker)

assert_type(get_db, DatabaseDependency[AsyncSession])
assert_type(get_my_db(), AsyncGenerator[MySession, None])
assert_type(db_context, DatabaseContext[AsyncSession])
assert_type(my_db_context(), AbstractAsyncContextManager[MySession])

Db = Annotated[MySession, Depends(get_my_db)]


async def use(session: AsyncSession, mine: MySession) -> None:
    async with my_db_context() as opened:
        assert_type(opened, MySession)
        assert_type(opened.mine(), int)
    async with asynccontextmanager(get_db)() as plain:
        assert_type(plain, AsyncSession)
    async for each in get_my_db():
        assert_type(each, MySession)
    async with get_transaction(session=mine, isolation_level="SERIALIZABLE") as same:
        assert_type(same, MySession)

    async def work(session: MySession) -> str:
        return str(session.mine())

    async def callback() -> int:
        return 1

    assert_type(await run_transaction(my_maker, work, attempts=3, read_only=True), str)
    seen: list[RetryAttempt] = []

    async def observe(attempt: RetryAttempt) -> None:
        assert_type(attempt.number, int)
        assert_type(attempt.error, Exception)
        assert_type(attempt.pause, float)

    def is_busy(error: Exception) -> bool:
        return isinstance(error, BlockingIOError)

    await run_transaction(my_maker, work, retry_on=is_busy, on_retry=seen.append)
    await run_transaction(my_maker, work, retry_on=None, on_retry=observe)
    await run_transaction(my_maker, work, resolve_commit=timedelta(seconds=5))
    async with get_transaction(mine, resolve_commit=5) as same:
        assert_type(same, MySession)
    async with create_db_context(my_maker, resolve_commit="5s")() as opened:
        assert_type(opened, MySession)
    async for each in create_db_dependency(my_maker, resolve_commit=None)():
        assert_type(each, MySession)
    with deadline("2s"), deadline(2), deadline(timedelta(seconds=2)):
        pass
    async with create_db_context(my_maker, deadline="5s")() as opened:
        assert_type(opened, MySession)
    async for each in create_db_dependency(my_maker, deadline=None)():
        assert_type(each, MySession)
    over = DeadlineExceededError("over", spent_on="pool", seconds=1)
    assert_type(over.spent_on, Literal["pool", "lock", "statement", "retry", "wait"])
    settings: Mapping[str, str | int | float | bool | timedelta] = {"app.tenant_id": 7}
    await run_transaction(my_maker, work, settings=settings)
    async with get_transaction(mine, settings=lambda: {"lock_timeout": "1s"}) as same:
        assert_type(same, MySession)
    async with create_db_context(my_maker, settings=settings, require=["a"])() as opened:
        assert_type(opened, MySession)

    async def of_request(tenant: str) -> dict[str, str]:
        return {"app.tenant_id": tenant}

    async for each in create_db_dependency(my_maker, settings=of_request, require=("a",))():
        assert_type(each, MySession)
    on_commit(session, callback)
    on_commit(session, lambda: None)


class Double:
    """All that get_transaction asks for: no import of ours is needed to write one."""

    def in_transaction(self) -> bool:
        return False

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[None]:
        yield

    @asynccontextmanager
    async def begin_nested(self) -> AsyncIterator[None]:
        yield


class Started:
    def __await__(self) -> Any:
        yield

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, exc_type: Any, exc: Any, traceback: Any) -> None: ...


class ManagedDouble(Double):
    """All that the session functions ask for."""

    def begin(self) -> Started:  # type: ignore[override]
        return Started()

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...

    async def close(self) -> None: ...


double: TransactionalSession = Double()
managed_double: ManagedSession = ManagedDouble()
started: StartableTransaction = Started()
double_factory: SessionFactory[ManagedDouble] = ManagedDouble


async def use_doubles() -> None:
    async with get_transaction(Double()) as session:
        assert_type(session, Double)
    async with create_db_context(ManagedDouble)() as opened:
        assert_type(opened, ManagedDouble)


async def wrong(session: AsyncSession) -> None:
    get_transaction(session, isolation_level="serializable")  # type: ignore[arg-type]
    get_transaction(object())  # type: ignore[type-var]
    create_db_context(session_maker=session)  # type: ignore[arg-type]
    create_db_dependency(session_maker=lambda: 3)  # type: ignore[type-var]
    on_commit(session, lambda value: value)  # type: ignore[arg-type, misc]

    async def work(session: MySession) -> None: ...

    await run_transaction(maker, work)  # type: ignore[arg-type]
