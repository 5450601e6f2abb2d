"""The one task behind a watcher: it looks at every group at every tick, sooner at what is new or
announced."""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._postgres.link import HEARTBEAT, Link, LinkLost, is_about_data, is_passing
from pgtoolset._postgres.notifications import keys_in
from pgtoolset.errors import WatcherClosedError
from pgtoolset.watch._groups import Group
from pgtoolset.watch._subscriptions import Stream, Subscription, Waiter
from pgtoolset.watch.targets import Target

__all__ = ["Hub"]

logger = logging.getLogger("pgtoolset")

#: Seconds: the pause before the second attempt to connect; it doubles with each further one, up to
#: the limit.
BACKOFF_BASE = 0.05
BACKOFF_LIMIT = 2.0

#: Seconds: the longest pause for a group whose table does not answer, so that the others are not
#: held up with it.
BUSY_LIMIT = 10.0

#: Seconds that a waiter whose time is up waits for its last look, where the server does not answer.
GRACE = 0.25


class Hub:
    """Groups, the connection that serves them, and the task that keeps both."""

    def __init__(self, engine: AsyncEngine, interval: float, notify: bool) -> None:
        self._engine = engine
        self._interval = interval
        self._notify = notify
        self._groups: dict[tuple[Any, tuple[str, ...]], Group] = {}
        self._made: dict[tuple[Any, tuple[str, ...]], Group] = {}
        self._dropped: deque[Stream[Any]] = deque()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._connected = False
        self._served = False
        self._trouble: Exception | None = None
        self._opened = False
        self._first: Link | None = None

    @property
    def is_open(self) -> bool:
        return self._task is not None and not self._task.done()

    async def open(self) -> None:
        """Connect, and start."""
        if self._opened:
            raise WatcherClosedError("A RowWatcher is entered once; make a new one.")
        self._opened = True
        self._first = link = await Link.open(self._engine)
        self._task = asyncio.get_running_loop().create_task(
            self._run(link), name="pgtoolset.RowWatcher"
        )

    async def close(self) -> None:
        """Stop, and end everybody who waits."""
        task, self._task = self._task, None
        groups = list(self._groups.values())
        self._groups.clear()
        for group in groups:
            for subscription in group.subscriptions():
                subscription.fail(
                    lambda: WatcherClosedError(
                        "The RowWatcher was closed while somebody waited on it."
                    )
                )
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        if self._first is not None:
            # A task that was cancelled before its first step has closed nothing; otherwise it is
            # closed already.
            await self._first.close()

    def drop(self, stream: Stream[Any]) -> None:
        """Unsubscribe at the next tick. May be called in any thread."""
        self._dropped.append(stream)

    def subscribe(self, subscription: Subscription[Any]) -> None:
        self._group(subscription.target).add(subscription)
        self._wake.set()

    def unsubscribe(self, subscription: Subscription[Any]) -> None:
        id_ = (subscription.target.mapper, subscription.target.columns)
        group = self._groups.get(id_)
        if group is not None:
            group.remove(subscription)
            if not group:
                del self._groups[id_]

    def expire(self, waiter: Waiter[Any]) -> None:
        """The time of `waiter` is up: have one more look, as far as there is somebody to look."""
        group = self._groups.get((waiter.target.mapper, waiter.target.columns))
        if group is None or not self._connected:
            waiter.expire(self._excuse())
            return
        group.last_look(waiter)
        self._wake.set()
        asyncio.get_running_loop().call_later(GRACE, lambda: waiter.expire(self._excuse()))

    def _excuse(self) -> str:
        return f" There is no connection: {self._trouble}" if self._trouble is not None else ""

    def _group(self, target: Target[Any]) -> Group:
        id_ = (target.mapper, target.columns)
        group = self._groups.get(id_)
        if group is None:
            # An empty group knows no rows, so it is as good as new, and its statement is compiled.
            group = self._made.pop(id_, None) or Group(self._engine, target)
            self._made[id_] = self._groups[id_] = group
        return group

    async def _run(self, link: Link | None) -> None:
        pause = BACKOFF_BASE
        try:
            while True:
                try:
                    if link is None:
                        link = await self._connect()
                    await self._serve(link)
                except LinkLost as lost:
                    if self._connected:
                        logger.warning(
                            "a RowWatcher lost its connection and gets a new one: %s", lost
                        )
                    if self._served:
                        pause = BACKOFF_BASE
                    self._connected, self._served, self._trouble = False, False, lost
                finally:
                    if link is not None:
                        await link.close()
                    link = None
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                pause = min(2 * pause, BACKOFF_LIMIT)
        except Exception as error:
            logger.exception("a RowWatcher failed")
            for group in list(self._groups.values()):
                group.fail(error)
            self._groups.clear()

    async def _connect(self) -> Link:
        try:
            return await Link.open(self._engine)
        except Exception as error:
            logger.warning(
                "a RowWatcher cannot connect and tries again: %s: %s", type(error).__name__, error
            )
            raise LinkLost(f"{type(error).__name__}: {error}") from error

    async def _serve(self, link: Link) -> None:
        """Look, again and again, until the connection is lost."""
        loop = asyncio.get_running_loop()
        self._connected, self._served, self._trouble = True, False, None
        for group in self._groups.values():
            group.look_at_all()  # whatever was announced or changed while there was no connection
        next_tick = loop.time()
        while True:
            self._wake.clear()
            now = loop.time()
            whole = now >= next_tick
            if whole:
                next_tick += self._interval
                if (
                    next_tick <= now
                ):  # there was nobody to look for, or looking took longer than the interval
                    next_tick = now + self._interval
                while self._dropped:
                    self.unsubscribe(self._dropped.popleft())
            for id_, group in list(self._groups.items()):
                if (whole or group.is_due) and now >= group.not_before:
                    await self._look(link, id_, group, whole)
                    self._served = True
            # A connection that is half-open says nothing, and one that has nothing to say does
            # neither.
            heartbeat = loop.time() + HEARTBEAT
            try:
                async with asyncio.timeout_at(
                    min(next_tick, heartbeat) if self._groups else heartbeat
                ):
                    await self._wake.wait()
            except TimeoutError:
                if not self._groups or heartbeat < next_tick:
                    await link.check()

    async def _look(
        self, link: Link, id_: tuple[Any, tuple[str, ...]], group: Group, whole: bool
    ) -> None:
        try:
            if self._notify:
                await self._listen(link, group)
            try:
                await group.look(link.fetch, whole=whole)
            except Exception as error:
                if isinstance(error, LinkLost) or not is_about_data(error):
                    raise
                await group.blame(link.fetch)
                await group.look(link.fetch, whole=whole)
            group.busy = 0
        except LinkLost:
            raise
        except Exception as error:
            if is_passing(error):
                group.busy += 1
                pause = min(self._interval * 2**group.busy, BUSY_LIMIT)
                group.not_before = asyncio.get_running_loop().time() + pause
                logger.warning("%s cannot be looked at now: %s", group.target, error)
                return
            # Whoever comes next starts with a new group, and finds the table repaired or is told
            # the same.
            if self._groups.get(id_) is group:
                del self._groups[id_]
            self._made.pop(id_, None)
            group.fail(error)

    async def _listen(self, link: Link, group: Group) -> None:
        try:
            await link.listen(group.channels, self._heard)
        except LinkLost:
            raise
        except Exception as error:
            # A standby refuses to LISTEN, for one. What cannot be announced can be looked at.
            self._notify = False
            logger.warning("a RowWatcher cannot LISTEN and sees changes by polling only: %s", error)

    def _heard(self, channel: str, payload: str) -> None:
        keys = keys_in(payload)
        for group in self._groups.values():
            if channel in group.channels:
                if keys is None:
                    group.look_at_all()
                    self._wake.set()
                elif group.look_at(keys):
                    self._wake.set()
