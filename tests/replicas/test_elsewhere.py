"""Where no standby can be read from: tokens of other places, standbys that are away, failovers."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset import ReadReplicas, TransactionStateError
from pgtoolset._postgres.nodes import Position
from pgtoolset.replicas import _opening, _standbys
from pgtoolset.replicas._tokens import PRIMARY, format_token, parse_token
from tests.nodes import Nodes, execute
from tests.replicas.cluster import Cluster, counted, is_standby, server_of, silent_url
from tests.replicas.test_reading import items, write
from tests.support import insert, until


def moved(token: str, **changes: int) -> str:
    """Return a token with another position."""
    position = parse_token(token)
    assert position is not None
    values = {name: getattr(position, name) for name in ("system", "timeline", "lsn")}
    return format_token(Position(**(values | changes)))


ELSEWHERE: dict[str, Any] = {
    "garbage": lambda token: "garbage",
    "empty": lambda token: "",
    "the primary": lambda token: PRIMARY,
    "another version": lambda token: "2" + token[1:],
    "another cluster": lambda token: moved(token, system=1),
    "an earlier timeline": lambda token: moved(token, timeline=parse_token(token).timeline - 1),
    "a later timeline": lambda token: moved(token, timeline=99),
    "the future": lambda token: moved(token, lsn=2**63),
}


@pytest.mark.parametrize("kind", ELSEWHERE)
@pytest.mark.parametrize("has_read", [True, False])
async def test_other_tokens(cluster: Cluster, kind: str, has_read: bool) -> None:
    """A token that is unreadable, of another cluster or timeline, or from the future means the
    primary, and keeps no other reader from the standbys."""
    replicas = cluster.replicas(max_wait="20ms")
    token = await write(cluster, replicas, 1)
    await cluster.caught_up()
    fresh = cluster.replicas(max_wait="20ms")  # which has not seen the primary yet
    if has_read:
        async with fresh.read(after=token) as session:
            assert await items(session) == [1]
    for _ in range(2):
        async with fresh.read(after=ELSEWHERE[kind](token)) as session:
            assert await items(session) == [1]
            assert not await is_standby(session)
    for after in (None, token):
        async with fresh.read(after=after) as session:
            assert await is_standby(session)


@pytest.mark.parametrize("token", [5, b"1.1.1.1", object(), ["1.1.1.1"]])
async def test_no_token(replicas: ReadReplicas, token: Any) -> None:
    """A token that is no text is a TypeError before any SQL."""
    with pytest.raises(TypeError, match="after must be a token"):
        replicas.read(after=token)


async def test_no_standby(cluster: Cluster) -> None:
    """Without any standby the primary serves."""
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(cluster.maker(cluster.nodes.primary), [])
    for after in (None, await write(cluster, replicas, 1)):
        async with replicas.read(after=after) as session:
            assert await items(session) == [1]
            assert not await is_standby(session)


class Clock:
    """The clock of the pauses, which stands still until the test moves it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(_standbys, "time", clock)
    return clock


async def test_standby_away(
    cluster: Cluster, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    """A standby that cannot be reached is left out and not tried by each request; it is asked
    beside them, and read from again when it is back."""
    replicas = cluster.replicas()
    gone = cluster.nodes.standby
    await asyncio.to_thread(gone.shut_down, immediate=True)
    try:
        sent = [counted(engine) for engine in cluster.engines]
        for _ in range(6):
            async with replicas.read() as session:
                assert await is_standby(session)
                assert str(cluster.second.standby._directory) in await server_of(session)
        assert not sent[1]
        assert caplog.text.count("left out of reading") == 1
        assert "standbys[0] is left out of reading for 1 s" in caplog.text
    finally:
        await cluster.nodes._resume(gone)

    async def is_back() -> bool:
        clock.now += _standbys.LONGEST_PAUSE
        async with replicas.read() as session:
            return str(gone._directory) in await server_of(session)

    await until(is_back)


async def test_all_standbys_away(cluster: Cluster) -> None:
    """With all standbys away the primary serves, with a token and without."""
    replicas = cluster.replicas()
    token = await write(cluster, replicas, 1)
    async with replicas.read(after=token) as session:  # whose connection is lost then
        assert await is_standby(session)
    for server in cluster.standbys:
        await asyncio.to_thread(server.shut_down, immediate=True)
    try:
        for after in (None, token, None, token):
            async with replicas.read(after=after) as session:
                assert await items(session) == [1]
                assert not await is_standby(session)
    finally:
        for pair in (cluster.nodes, cluster.second):
            await pair._resume(pair.standby)


async def test_standby_that_does_not_answer(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby that takes connections and says nothing costs a reader a limited time, once."""
    monkeypatch.setattr(_opening, "ANSWER_TIMEOUT", 0.05)
    monkeypatch.setattr(_opening, "GIVE_UP", 0.1)
    accepted: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, writer: accepted.append(writer), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    try:
        replicas = ReadReplicas(
            cluster.maker(cluster.nodes.primary),
            [cluster.maker(silent_url(port))],
        )
        for _ in range(5):
            async with asyncio.timeout(30), replicas.read() as session:
                assert not await is_standby(session)
        assert len(accepted) == 1
        await until(lambda: not _opening._abandoned)
    finally:
        silent.close()
        for writer in accepted:
            writer.close()


async def test_pool_exhausted(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standby whose pool is exhausted is not away: it is read from when a connection is back."""
    monkeypatch.setattr(_opening, "FRESH", -1.0)
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(
        cluster.maker(cluster.nodes.primary), [cluster.maker(cluster.nodes.standby, pool_size=2)]
    )
    async with replicas.read() as first:
        assert await is_standby(first)
        async with replicas.read() as second:
            assert await is_standby(second)
            third = asyncio.create_task(_reads_on_standby(replicas))
            await asyncio.wait([third], timeout=0.05)
            assert not third.done()
        assert await third


async def _reads_on_standby(replicas: ReadReplicas) -> bool:
    async with replicas.read() as session:
        return await is_standby(session)


async def test_pauses(clock: Clock) -> None:
    """A standby that stays away is left out for 1, 2, 4, ... 30 seconds, however many find out."""
    pause = _standbys._Pause()
    lengths = []
    for _ in range(8):
        lengths.append(pause.begin())
        assert pause.begin() == 0
        assert not pause.is_over
        clock.now += lengths[-1]
        assert pause.is_over
    assert lengths == [1, 2, 4, 8, 16, 30, 30, 30]
    pause.end()
    assert not pause.is_on
    assert pause.begin() == 1


async def test_behind(cluster: Cluster, clock: Clock) -> None:
    """A standby that does not replay keeps one reader waiting, not each; it is asked again."""
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(
        cluster.maker(cluster.nodes.primary),
        [cluster.maker(cluster.nodes.standby)],
        max_wait="10ms",
    )
    await cluster.pause()
    token = await write(cluster, replicas, 1)
    sent = counted(cluster.engines[1])
    async with replicas.read(after=token) as session:
        assert not await is_standby(session)
    looks = len(sent)
    assert looks >= 1
    async with replicas.read(after=token) as session:
        assert not await is_standby(session)
    assert len(sent) == looks
    await cluster.pause(paused=False)
    await cluster.caught_up()

    async def is_back() -> bool:
        clock.now += _standbys.LONGEST_PAUSE
        async with replicas.read(after=token) as session:
            assert await items(session) == [1]
            return await is_standby(session)

    await until(is_back)


async def test_switchover(cluster: Cluster, replicas: ReadReplicas) -> None:
    """After a switchover tokens of the new primary are served by standbys that follow it, and
    those of the old timeline by the primary."""
    old = await write(cluster, replicas, 1)
    await cluster.caught_up()
    await cluster.nodes.switch_over()
    await follow(cluster)
    after = cluster.replicas()
    new = await write(cluster, after, 2)
    async with after.read(after=new) as session:
        assert await items(session) == [1, 2]
        assert await is_standby(session)
    for each in (after, cluster.replicas()):
        async with each.read(after=old) as session:
            assert await items(session) == [1, 2]
            assert not await is_standby(session)


@pytest.mark.parametrize("role", ["postgres", "clerk"])
async def test_failover(cluster: Cluster, role: str) -> None:
    """After a failover that has lost work, its tokens mean the primary, also where the new primary
    has written more than the old one; no read that a token covers is stale. A role that sees no
    timeline of a standby's is as safe."""
    # A role that may read the items, and nothing else.
    await execute(cluster.nodes.primary, "CREATE ROLE clerk LOGIN")
    await execute(cluster.nodes.primary, "GRANT SELECT ON item TO clerk")
    replicas = cluster.replicas()
    kept = await write(cluster, replicas, 1)
    await cluster.caught_up()
    await cluster.cut_off()
    lost = await write(cluster, replicas, 2)
    await cluster.nodes.fail_over()
    await follow(cluster)
    position = parse_token(lost)
    assert position is not None

    def url(pair: Nodes, name: str) -> str:
        return getattr(pair, name).url().replace("postgres@", f"{role}@")

    def fresh() -> ReadReplicas[AsyncSession]:
        return ReadReplicas(
            cluster.maker(url(cluster.nodes, "primary")),
            [cluster.maker(url(cluster.second, "standby"))],
            max_wait="200ms",
        )

    async with cluster.maker(cluster.nodes.primary)() as session:
        while True:  # past the LSN that was lost
            await insert(session, 3)
            await session.execute(
                text("SELECT pg_logical_emit_message(true, 'x', repeat('x', 5000))")
            )
            await session.commit()
            new = await fresh().position(session)
            await session.execute(text("DELETE FROM item WHERE id = 3"))
            await session.commit()
            found = parse_token(new)
            assert found is not None and found.timeline == position.timeline + 1
            if found.lsn > position.lsn:
                break
        await insert(session, 4)
        await session.commit()
        new = await fresh().position(session)
    await cluster.second.caught_up()
    readers = fresh()
    for after in (lost, kept):
        for _ in range(2):
            async with readers.read(after=after) as session:
                assert await items(session) == [1, 4]
                if role == "postgres" or after == lost:
                    assert not await is_standby(session), after
    async with readers.read(after=new) as session:
        assert await items(session) == [1, 4]
        if role == "postgres":
            assert await is_standby(session)


async def follow(cluster: Cluster) -> None:
    """Let the second standby follow the new primary, in the middle of its run."""
    await execute(cluster.nodes.primary, "ALTER SYSTEM RESET ALL")
    cluster.second.primary = cluster.nodes.primary
    cluster.second._follow(cluster.second.standby, cluster.second.primary)
    await execute(cluster.second.standby, "ALTER SYSTEM RESET primary_conninfo")
    await execute(cluster.second.standby, "SELECT pg_reload_conf()")
    await execute(cluster.second.standby, "SELECT pg_wal_replay_resume()")
    await cluster.second.caught_up()


async def test_demoted_primary(cluster: Cluster) -> None:
    """Where a pool of the primary still has connections to a standby, a reader with a token is
    not served there; the pool connects anew, and no further one of them is tried."""
    maker = cluster.maker(cluster.nodes.address())
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(maker, [])
    cluster.nodes.move(cluster.nodes.standby)
    async with maker() as one, maker() as two, maker() as three, maker() as four:
        for each in (one, two, three, four):
            assert await is_standby(each)
    cluster.nodes.move(cluster.nodes.primary)
    await cluster.pause()
    token = await write(cluster, replicas, 1)
    checkouts: list[object] = []
    event.listen(maker.kw["bind"].sync_engine, "checkout", lambda raw, *_: checkouts.append(raw))
    async with replicas.read(after=token) as session:
        assert await items(session) == [1]
        assert not await is_standby(session)
    assert len(checkouts) == 2
    async with maker() as one, maker() as two:
        assert not await is_standby(one) and not await is_standby(two)


async def test_no_primary(cluster: Cluster) -> None:
    """Where the primary of the configuration is a standby that lacks the token, an error says so;
    one that has it serves."""
    maker = cluster.maker(cluster.nodes.standby)
    replicas: ReadReplicas[AsyncSession] = ReadReplicas(maker, [])
    token = await write(cluster, cluster.replicas(), 1)
    await cluster.caught_up()
    async with replicas.read(after=token) as session:
        assert await items(session) == [1]
    with pytest.raises(TransactionStateError, match="is a standby"):
        async with replicas.read(after="the primary"):
            raise AssertionError
