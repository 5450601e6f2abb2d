"""The application as it is written with pgtoolset."""

import asyncio
from collections.abc import Mapping

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from examples.cluster.crowd import Crowd
from examples.cluster.ledger import Write
from examples.cluster.models import Beat, Counter, Entry
from examples.cluster.ways import Way
from pgtoolset import (
    ReadReplicas,
    RowWatcher,
    advisory_lock,
    create_db_context,
    lock_tables,
    on_commit,
    run_transaction,
    wait_for_row_change,
)

#: Seconds that PostgreSQL is asked what became of a commit.
RESOLVE = 3.0


class CrowdWithPgtoolset(Crowd):
    """Writers, readers and a watcher that are told the truth."""

    def __init__(self, way: Way, ports: Mapping[int, str]) -> None:
        super().__init__(way, ports, has_tokens=True)
        self._context = create_db_context(session_maker=way.maker, resolve_commit=RESOLVE)
        self._replicas = ReadReplicas(way.maker, way.standby_makers)

    async def write_once(self, write: Write) -> str | None:
        async with self._context() as session:
            session.add(Entry(write=write.id))
            on_commit(session, write.committed)
            await session.commit()
            write.end("acknowledged")
            return await self._replicas.position(session)

    async def write_retried(self, write: Write) -> None:
        async def work(session: AsyncSession) -> None:
            session.add(Entry(write=write.id))
            on_commit(session, write.committed)

        await run_transaction(self.way.maker, work, resolve_commit=RESOLVE)

    async def write_locked(self, write: Write) -> None:
        key = str(write.counter)

        async def under_table_lock(session: AsyncSession) -> None:
            on_commit(session, write.committed)
            async with lock_tables(session=session, tables=[Counter], mode="SHARE ROW EXCLUSIVE"):
                await self.raise_counter(session, write)

        async def under_advisory_lock(session: AsyncSession) -> None:
            on_commit(session, write.committed)
            async with advisory_lock(session=session, key=key, timeout=3):
                await self.raise_counter(session, write)

        work = under_table_lock if key.endswith("table") else under_advisory_lock
        await run_transaction(self.way.maker, work, resolve_commit=RESOLVE)

    async def read(self, write: Write, token: str | None) -> tuple[int | None, bool]:
        async with self._replicas.read(after=token) as session:
            port = await session.scalar(select(func.inet_server_port()))
            found = await session.scalar(select(Entry.number).where(Entry.write == write.id))
            return port, found is not None

    async def beat(self, value: int) -> bool:
        async def work(session: AsyncSession) -> None:
            await session.execute(
                update(Beat).where(Beat.name == self.way.name).values(value=value)
            )

        await run_transaction(self.way.maker, work, resolve_commit=RESOLVE)
        return True

    async def watch(self) -> None:
        if self.way.engine.dialect.driver != "asyncpg" or self.way.name == "pgbouncer":
            await self._wait_again_and_again()
            return
        async with RowWatcher(self.way.engine, interval=0.25) as watcher:
            async for change in watcher.changes(Beat, self.way.name, columns=[Beat.value]):
                if change.after is not None:
                    self.saw(change.after["value"])

    async def _wait_again_and_again(self) -> None:
        value = 0
        while True:
            try:
                async with self._context() as session:
                    row = await wait_for_row_change(
                        session=session,
                        model=Beat,
                        pk_value=self.way.name,
                        columns=[Beat.value],
                        baseline={"value": value},
                        interval=0.25,
                        timeout=60,
                    )
                    value = row.value
            except Exception:
                await asyncio.sleep(0.1)  # a client asks again
            else:
                self.saw(value)
