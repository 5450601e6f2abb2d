"""The task behind a `RowWatcher`: it keeps a connection and ticks the groups over it."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from typing import Any

from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._arguments import SettingsSource
from pgtoolset._cancellation import Requests
from pgtoolset._deadlines import suspended
from pgtoolset._postgres.link import (
    HEARTBEAT,
    Link,
    LinkLost,
    is_about_data,
    is_about_schema,
    is_locked,
    is_passing,
)
from pgtoolset._text import safe
from pgtoolset.errors import WatcherClosedError
from pgtoolset.watch._groups import Group
from pgtoolset.watch._looks import Look, Looks
from pgtoolset.watch._registry import Groups
from pgtoolset.watch._subscriptions import Stream, Subscription, Waiter

__all__ = ["Hub"]

logger = logging.getLogger("pgtoolset")

#: Seconds before the second attempt to connect. Each further pause is twice as long, up to the
#: longest.
FIRST_PAUSE = 0.05
LONGEST_PAUSE = 2.0

#: Seconds: the longest pause of a group whose table does not answer, so that the other groups are
#: not delayed with it; and the most for a table that is locked, before the pauses double.
LONGEST_BUSY_PAUSE = 10.0
FIRST_LOCK_PAUSE = 0.25

#: Ticks of a group in a row that may fail because of DDL, and the longest pause between two.
MOST_SCHEMA_FAILURES = 3
LONGEST_SCHEMA_PAUSE = 0.5

#: Seconds after which a refused LISTEN is tried again over the same connection.
LISTEN_RETRY = 10.0

#: Seconds after which the task of a watcher that is closed is cancelled again.
CLOSE_RETRY = 3.0

#: Seconds that a waiter whose time is up waits for its last tick, where the server does not answer.
LAST_TICK_TIMEOUT = 0.25


class Hub:
    """Ticks every group at every interval, and in between the groups with due rows."""

    def __init__(
        self, engine: AsyncEngine, interval: float, notify: bool, settings: SettingsSource
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._interval = interval
        self._notify = notify
        self._groups = Groups(engine)
        self._looks = Looks(engine, self._groups)
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._was_opened = False
        self._is_connected = False
        self._has_ticked = False  # over the present connection
        self._problem: Exception | None = None
        self._first_link: Link | None = None
        self._listen_at = -math.inf

    @property
    def is_open(self) -> bool:
        return self._task is not None and not self._task.done()

    async def open(self) -> None:
        """Connect, and start the task."""
        if self._was_opened:
            raise WatcherClosedError("A RowWatcher can be entered once; make a new one.")
        self._was_opened = True
        self._first_link = link = await Link.open(self._engine, self._settings.now())
        with suspended():  # each waiter has a deadline of its own
            self._task = asyncio.get_running_loop().create_task(
                self._run(link), name="pgtoolset.RowWatcher"
            )

    async def close(self) -> None:
        """Stop the task, and end every subscription with a `WatcherClosedError`."""
        task, self._task = self._task, None
        for group in self._groups.clear():
            for subscription in group.subscriptions:
                subscription.fail(
                    lambda: WatcherClosedError("The RowWatcher was closed during the wait.")
                )
        while task is not None and not task.done():
            # Again where a library that the task awaits has swallowed the cancellation.
            task.cancel()
            await asyncio.wait([task], timeout=CLOSE_RETRY)
        if self._first_link is not None:
            # A task that was cancelled before its first step has closed nothing. Otherwise the
            # connection is closed already.
            await self._first_link.close()

    def subscribe(self, subscription: Subscription[Any]) -> None:
        if not self._groups:
            self._looks.rest()
        self._groups.subscribe(subscription)
        self._wake.set()

    def unsubscribe(self, subscription: Subscription[Any]) -> None:
        self._groups.unsubscribe(subscription)

    def drop(self, stream: Stream[Any]) -> None:
        """Unsubscribe at the next tick. Safe to call in any thread."""
        self._groups.drop_later(stream)

    def expire(self, waiter: Waiter[Any]) -> None:
        """Have one more tick for a waiter whose time is up, where there is a connection."""
        group = self._groups.of(waiter)
        if group is None or not self._is_connected:
            waiter.expire(self._connection_problem())
            return
        group.mark_last(waiter)
        self._wake.set()
        asyncio.get_running_loop().call_later(
            LAST_TICK_TIMEOUT, lambda: waiter.expire(self._connection_problem())
        )

    def _connection_problem(self) -> str:
        return "" if self._problem is None else f" There is no connection: {self._problem}"

    async def _run(self, first_link: Link) -> None:
        link: Link | None = first_link
        pause = FIRST_PAUSE
        requests = Requests()
        try:
            while True:
                try:
                    if link is None:
                        link = await self._connect()
                    await self._serve(link)
                except LinkLost as lost:
                    if self._has_ticked:
                        pause = FIRST_PAUSE
                    self._note_lost(lost)
                finally:
                    if link is not None:
                        await link.close()
                    link = None
                await asyncio.sleep(pause * random.uniform(0.5, 1))
                requests.raise_swallowed()
                pause = min(2 * pause, LONGEST_PAUSE)
        except Exception as error:
            logger.exception("A RowWatcher failed.")
            for group in self._groups.clear():
                group.fail(error)

    async def _connect(self) -> Link:
        try:
            with self._looks.begin():
                return await Link.open(self._engine, self._settings.now())
        except Exception as error:
            description = safe(f"{type(error).__name__}: {error}")
            logger.warning("A RowWatcher cannot connect, and tries again: %s", description)
            raise LinkLost(description) from error

    def _note_lost(self, lost: LinkLost) -> None:
        if self._is_connected:
            logger.warning("A RowWatcher lost its connection, and connects again: %s", lost)
        self._is_connected, self._has_ticked, self._problem = False, False, lost

    async def _serve(self, link: Link) -> None:
        """Tick until the connection is lost."""
        loop = asyncio.get_running_loop()
        self._is_connected, self._has_ticked, self._problem = True, False, None
        self._listen_at = -math.inf
        self._groups.forget_channels()
        self._groups.mark_all_due()  # for the changes while there was no connection
        next_tick = loop.time()
        while True:
            self._wake.clear()
            now = loop.time()
            is_tick = now >= next_tick
            look = self._looks.begin(next_tick if is_tick else None)
            if is_tick:
                # An interval from now where ticks were left out or took longer than the interval.
                planned = next_tick + self._interval
                next_tick = planned if planned > now else now + self._interval
                self._groups.unsubscribe_dropped()
            with look:
                await self._tick_groups(link, now, is_tick, look)
            await self._sleep(link, next_tick)

    async def _tick_groups(self, link: Link, now: float, is_tick: bool, look: Look) -> None:
        for group in self._groups.all():
            if (is_tick or group.is_due) and now >= group.not_before:
                look.count += 1
                is_good = await self._tick(link, group, is_tick)
                look.has_failed = look.has_failed or not is_good
                self._has_ticked = True
            else:
                look.has_skipped = True

    async def _sleep(self, link: Link, next_tick: float) -> None:
        """Sleep until the next tick, or until something is due."""
        # A half-open connection is silent, and so is a sound one that has nothing to announce. Only
        # a heartbeat tells them apart.
        heartbeat = asyncio.get_running_loop().time() + HEARTBEAT
        try:
            async with asyncio.timeout_at(min(next_tick, heartbeat) if self._groups else heartbeat):
                await self._wake.wait()
        except TimeoutError:
            if not self._groups or heartbeat < next_tick:
                await link.check()

    async def _tick(self, link: Link, group: Group, whole: bool) -> bool:
        """Look at the rows of a group; return whether that was possible."""
        try:
            if self._notify and asyncio.get_running_loop().time() >= self._listen_at:
                await self._listen(link, group)
            await self._poll(link, group, whole)
            group.failures = 0
            return True
        except LinkLost:
            raise
        except Exception as error:
            pause = self._pause_after(group, error)
            if pause is not None:
                self._postpone(group, error, pause)
                return False
            # The next subscription gets a new group, and finds the table repaired or fails too.
            self._groups.discard(group)
            group.fail(error)
            return False

    def _pause_after(self, group: Group, error: Exception) -> float | None:
        """Return the seconds after which the group is ticked again; `None` where it has failed."""
        group.failures += 1
        if is_locked(error):
            first = min(self._interval, FIRST_LOCK_PAUSE)
            return min(first * 2.0**group.failures, LONGEST_BUSY_PAUSE)
        if is_passing(error):
            return min(self._interval * 2.0**group.failures, LONGEST_BUSY_PAUSE)
        if is_about_schema(error) and group.failures < MOST_SCHEMA_FAILURES:
            return min(self._interval, LONGEST_SCHEMA_PAUSE)
        return None

    async def _poll(self, link: Link, group: Group, whole: bool) -> None:
        try:
            await group.tick(link.fetch, whole=whole)
        except Exception as error:
            if isinstance(error, LinkLost) or not is_about_data(error):
                raise
            await group.fail_bad_keys(link.fetch)
            await group.tick(link.fetch, whole=whole)

    def _postpone(self, group: Group, error: Exception, pause: float) -> None:
        loop = asyncio.get_running_loop()
        group.mark_all_due()
        # A locked table would have each of its groups wait for the same lock.
        together = [each for each in self._groups.all() if is_locked(error) and each.shares(group)]
        again_at = loop.time() + pause
        for each in (group, *together):
            each.not_before = again_at
        loop.call_at(again_at, self._wake.set)
        logger.warning(
            "%s cannot be polled now, and is polled again: %s", group.target, safe(str(error))
        )

    async def _listen(self, link: Link, group: Group) -> None:
        try:
            await group.find_channels(link.fetch)
            await link.listen(group.channels, self._heard)
        except LinkLost:
            raise
        except Exception as error:
            # A standby refuses to LISTEN, until it is promoted. Polling still finds every change.
            is_first = self._listen_at == -math.inf
            self._listen_at = asyncio.get_running_loop().time() + LISTEN_RETRY
            logger.log(
                logging.WARNING if is_first else logging.DEBUG,
                "A RowWatcher cannot LISTEN now, and tries again in %s s. Until then it finds "
                "changes by polling only: %s",
                LISTEN_RETRY,
                safe(str(error)),
            )

    def _heard(self, channel: str, payload: str) -> None:
        if self._groups.mark_announced(channel, payload):
            self._wake.set()
