"""One run: a load on a cluster, faults, and the comparison of what was told with what is stored."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain, repeat
from math import isfinite

from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from examples.cluster.by_hand import CrowdByHand
from examples.cluster.cluster import Cluster, running_cluster
from examples.cluster.crowd import Crowd
from examples.cluster.faults import FAULTS, SHORT, Event, Fault, inflict, title_of, until_whole
from examples.cluster.ledger import judge
from examples.cluster.node import ROLE
from examples.cluster.patroni import Reign
from examples.cluster.picture import Run
from examples.cluster.store import create_tables, read_back
from examples.cluster.waiting import until
from examples.cluster.ways import WAYS, Driver, opened_way
from examples.cluster.with_pgtoolset import CrowdWithPgtoolset

#: What the way without the library is called.
BY_HAND = "by hand"

#: On a machine that is busy with other things all is late. SQLAlchemy by hand, which writes at the
#: same time by HAProxy, tells how much: others may take so many times as long.
TIMES_BY_HAND = 3

#: Seconds that a watcher may be late by, after a fault that took its connection.
LATE = 10.0


@dataclass(frozen=True)
class Options:
    """What kind of run.

    Attributes:
        seconds: how long faults are inflicted; 0 for the short form, each of a few faults once.
        driver: the driver of the application.
        strict: Patroni's `synchronous_mode_strict`: no commit without a second copy, ever.
        by_hand: judge the application without the library, too.
        resume: seconds in which writes must go on after there is a new primary.
    """

    seconds: float = 0.0
    driver: Driver = "asyncpg"
    strict: bool = False
    by_hand: bool = False
    resume: float = 2.0


async def prove(options: Options, say: Callable[[str], None]) -> tuple[Run, list[str]]:
    """Run the load and the faults; return what was seen, and what does not hold."""
    async with running_cluster(strict=options.strict) as cluster, AsyncExitStack() as stack:
        say("The cluster runs: a primary, a synchronous standby and another one.")
        await _prepare(cluster)
        ports = {node.port: node.name for node in cluster.nodes}
        crowds: list[Crowd] = [
            CrowdWithPgtoolset(
                await stack.enter_async_context(opened_way(name, cluster, options.driver)), ports
            )
            for name in WAYS
        ]
        way = await stack.enter_async_context(
            opened_way("haproxy", cluster, options.driver, label=BY_HAND, pool_pre_ping=True)
        )
        crowds.append(CrowdByHand(way, ports))
        began, events = time.monotonic(), list[Event]()
        for crowd in crowds:
            crowd.start()
        try:
            await asyncio.sleep(2)
            for fault in _faults(options):
                await until_whole(cluster, events)
                say(f"{time.monotonic() - began:6.1f} s  {title_of(fault)}")
                await inflict(fault, cluster, events)
            await asyncio.gather(*(crowd.stop() for crowd in crowds))
            with suppress(TimeoutError):  # that is judged with the rest
                await until(
                    lambda: all(_has_seen_all(each) for each in crowds), _late(options), str
                )
        finally:
            for node in cluster.nodes:
                node.clients.cut()  # so that nothing waits for a node that is frozen
            await asyncio.gather(*(crowd.end() for crowd in crowds))
        run = await _judged(cluster, crowds, began, events)
        return run, complaints(run, options)


def complaints(run: Run, options: Options) -> list[str]:
    """Return what does not hold, in words."""
    found: list[str] = []
    for ledger, verdict in zip(run.ledgers, run.verdicts, strict=True):
        if ledger.way == BY_HAND and not options.by_hand:
            continue
        found += [
            f"{ledger.way}: {number} {what}"
            for number, what in (
                (len(verdict.lost), "acknowledged writes are lost"),
                (len(verdict.twice), "writes were done twice"),
                (len(verdict.wrong), "outcomes are wrong"),
                (verdict.uncounted, "counts are missing: a lock did not hold"),
                (verdict.stale, "reads were stale"),
            )
            if number
        ]
        if not any(write.outcome == "acknowledged" for write in ledger.writes):
            found.append(f"{ledger.way}: no write was acknowledged")
        for event, reign in run.successions():
            seconds = run.resumed(ledger, reign)
            if seconds > _patience(run, reign, options):
                found.append(
                    f"{ledger.way}: writes went on {seconds:.1f} s late after: {event.title}"
                )
        if ledger.watcher_error is not None:
            found.append(f"{ledger.way}: its watcher failed: {ledger.watcher_error}")
        late = run.lateness(ledger)
        if late > _late(options):
            found.append(f"{ledger.way}: its watcher was {late:.1f} s late")
    return found


def _patience(run: Run, reign: Reign, options: Options) -> float:
    """Return the seconds after which writes must go on under a new primary."""
    times = [run.resumed(ledger, reign) for ledger in run.ledgers if ledger.way == BY_HAND]
    # Where that does not go on at all, it says nothing about the machine.
    return max([options.resume, *(TIMES_BY_HAND * each for each in times if isfinite(each))])


def _late(options: Options) -> float:
    """Return the seconds that a watcher may be late by."""
    return max(LATE, options.resume)


def _has_seen_all(crowd: Crowd) -> bool:
    beats, seen = crowd.ledger.beats, crowd.ledger.seen
    return not beats or bool(seen and seen[-1][1] >= beats[-1][1])


def _faults(options: Options) -> Iterator[Fault]:
    if not options.seconds:
        yield from SHORT
        return
    end = time.monotonic() + options.seconds
    for fault in chain.from_iterable(repeat(FAULTS)):
        if time.monotonic() > end:
            return
        yield fault


async def _prepare(cluster: Cluster) -> None:
    """Make the role of the application, and its tables."""
    connection = await cluster.superuser()
    try:
        await connection.execute(f"CREATE ROLE {ROLE} LOGIN PASSWORD '{cluster.plan.password}'")
        await connection.execute(f"GRANT CREATE ON SCHEMA public TO {ROLE}")
    finally:
        await connection.close()
    async with _engine(cluster) as engine:
        await create_tables(engine, [*WAYS, BY_HAND])


@asynccontextmanager
async def _engine(cluster: Cluster) -> AsyncIterator[AsyncEngine]:
    """Yield an engine on the primary, as the role of the application."""
    primary = cluster.patroni.primary
    assert primary is not None
    engine = create_async_engine(primary.url("postgresql+asyncpg"))
    try:
        yield engine
    finally:
        await engine.dispose()


async def _judged(
    cluster: Cluster, crowds: Sequence[Crowd], began: float, events: Sequence[Event]
) -> Run:
    ended = time.monotonic()
    connection = await cluster.superuser()
    try:
        # Nothing of the application may still be on its way.
        async def is_quiet() -> bool:
            busy = "SELECT count(*) FROM pg_stat_activity WHERE usename = $1 AND state <> 'idle'"
            return not await connection.fetchval(busy, ROLE)

        await until(is_quiet, 60, lambda: "transactions of the application do not end")
    finally:
        await connection.close()
    cluster.mend()
    async with _engine(cluster) as engine:
        stored, counters = await read_back(engine)
    return Run(
        began,
        ended,
        events,
        list(cluster.patroni.reigns),
        [crowd.ledger for crowd in crowds],
        [judge(crowd.ledger, stored, counters) for crowd in crowds],
    )
