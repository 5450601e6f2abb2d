"""A connection outside of the pool, to ask the server while the session's own connection waits."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, cast
from weakref import WeakValueDictionary

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from pgtoolset._cancellation import uninterrupted
from pgtoolset._postgres.checkouts import pool_apart
from pgtoolset._postgres.locks import sessions_blocking
from pgtoolset.values import Blocker

T = TypeVar("T")

#: Seconds that one question may take, so that the others are not kept waiting by a lock.
_LONGEST_QUESTION = 2.0


@asynccontextmanager
async def outside_connection(engine: Engine) -> AsyncIterator[AsyncConnection]:
    """Yield a connection in AUTOCOMMIT that is made as `engine` makes its own, outside of the pool.

    The pool may be exhausted. `Pool.recreate()` returns an empty pool that connects in the same
    way: with the same arguments and the same listeners, such as one that fetches a password.
    """
    own = AsyncEngine(Engine(pool_apart(engine.pool), engine.dialect, engine.url))
    try:
        async with own.connect() as connection:
            yield await connection.execution_options(isolation_level="AUTOCOMMIT")
    finally:
        await own.dispose()


@dataclass(slots=True)
class _Question:
    """What one user of an `Onlooker` wants to know.

    Attributes:
        about: the pid of a backend whose blockers are wanted, or a function that asks for more.
    """

    about: int | Callable[[AsyncConnection], Awaitable[Any]]
    answer: asyncio.Future[Any]


class Onlooker:
    """One outside connection that all who wait for locks over one pool share.

    It is opened for the first question, and closed when the last user has left. The questions that
    arrive while PostgreSQL answers another are asked together. A connection that fails is an error
    of the questions that were open, and the next question opens another.
    """

    #: By the ids of the pool and of the event loop. Each onlooker keeps both alive, and its users
    #: keep it alive: where they are dropped without leaving, no entry stays.
    _shared: ClassVar[WeakValueDictionary[tuple[int, int], Onlooker]] = WeakValueDictionary()

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._owners = (engine.pool, asyncio.get_running_loop())
        self._users = 0
        self._questions: list[_Question] = []
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        #: The task before, which may have to close its connection yet.
        self._closing: asyncio.Task[None] | None = None

    @classmethod
    @asynccontextmanager
    async def joined(cls, engine: Engine) -> AsyncIterator[Onlooker]:
        """Yield the onlooker of an engine; its connection is closed when its last block ends."""
        key = (id(engine.pool), id(asyncio.get_running_loop()))
        onlooker = cls._shared.get(key)
        if onlooker is None:
            onlooker = cls._shared[key] = cls(engine)
        onlooker._users += 1
        try:
            yield onlooker
        finally:
            onlooker._users -= 1
            await onlooker._leave()

    async def blocking(self, pid: int) -> list[Blocker]:
        """Return the sessions that block a backend which waits now."""
        return cast("list[Blocker]", await self._ask(pid))

    async def ask(self, question: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """Return what a function returns that asks over the connection."""
        return cast("T", await self._ask(question))

    async def _ask(self, about: Any) -> Any:
        question = _Question(about, asyncio.get_running_loop().create_future())
        self._questions.append(question)
        self._asked.set()
        if self._task is None:
            # An empty context: what holds for the first user must not hold for the others.
            serving = self._serve(self._closing)
            self._task = asyncio.get_running_loop().create_task(serving, context=Context())
        try:
            return await question.answer
        finally:
            self._questions.remove(question)

    async def _leave(self) -> None:
        """Close the connection after the last user, whatever cancels this one meanwhile."""
        if self._users or self._task is None:
            return
        self._closing, self._task = self._task, None
        self._closing.cancel()
        await uninterrupted(ended(self._closing))

    async def _serve(self, previous: asyncio.Task[None] | None) -> None:
        if previous is not None:
            await uninterrupted(ended(previous))
        task = asyncio.current_task()
        assert task is not None
        # A driver may turn the cancellation into an error of its own, where the network ends at
        # the same moment, or return an answer that arrives at the same moment: psycopg waits with
        # `asyncio.wait_for`, which does that before Python 3.12.
        while not task.cancelling():
            await self._asked.wait()
            try:
                async with outside_connection(self._engine) as connection:
                    while not (connection.invalidated or task.cancelling()):
                        await self._asked.wait()
                        self._asked.clear()
                        await self._answer(connection)
            except Exception as error:
                for question in self._open_questions():
                    question.answer.set_exception(error)
                self._asked.clear()

    def _open_questions(self) -> list[_Question]:
        return [each for each in self._questions if not each.answer.done()]

    async def _answer(self, connection: AsyncConnection) -> None:
        questions = self._open_questions()
        pids = [each.about for each in questions if isinstance(each.about, int)]
        blockers: Mapping[int, list[Blocker]] = {}
        if pids:
            async with asyncio.timeout(_LONGEST_QUESTION):
                blockers = await sessions_blocking(connection, pids)
        for question in questions:
            if isinstance(question.about, int):
                if not question.answer.done():
                    question.answer.set_result(blockers[question.about])
            else:
                await self._answer_one(connection, question, question.about)

    async def _answer_one(
        self,
        connection: AsyncConnection,
        question: _Question,
        ask: Callable[[AsyncConnection], Awaitable[Any]],
    ) -> None:
        """Answer a question of its own kind; its error is not that of the others."""
        failure: Exception | None = None
        answer: Any = None
        try:
            async with asyncio.timeout(_LONGEST_QUESTION):
                answer = await ask(connection)
        except Exception as error:
            failure = error
        if not question.answer.done():
            if failure is None:
                question.answer.set_result(answer)
            else:
                question.answer.set_exception(failure)
        if connection.invalidated:
            raise failure or ConnectionError("the connection was lost")


async def ended(task: asyncio.Task[None]) -> None:
    """Wait for the end of a task, whatever it is."""
    await asyncio.wait([task])
