"""A group: the watched rows of one model and one set of columns, polled by one statement a tick."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._postgres.link import is_about_data
from pgtoolset._postgres.notifications import SCHEMA_OF_TABLE, channel_in
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset._postgres.tables import qualified_names
from pgtoolset._text import safe
from pgtoolset.errors import WatchFailedError
from pgtoolset.watch._known_rows import KnownRows
from pgtoolset.watch._members import Members
from pgtoolset.watch._snapshots import Fetch
from pgtoolset.watch._subscriptions import Subscription, Values
from pgtoolset.watch._yielding import SLICE_SIZE, Yielder
from pgtoolset.watch.targets import Target

__all__ = ["Group"]

logger = logging.getLogger("pgtoolset")


class Group:
    """The rows of one model and one set of columns, and the subscriptions to them.

    Ticks of a group never overlap, so each finds a state at least as new as the one before.

    Attributes:
        target: the model and the columns.
        channels: the notification channels of the tables, once they are found.
        not_before: the time of the event loop before which the group is not ticked.
        failures: ticks in a row that found the server busy.
    """

    def __init__(self, engine: AsyncEngine, target: Target[Any]) -> None:
        self.target = target
        self.channels: tuple[str, ...] = ()
        self._tables = [table for table in target.mapper.tables if isinstance(table, Table)]
        self._engine = engine
        self.not_before = 0.0
        self.failures = 0
        self._rows = KnownRows(engine, target)
        self._members = Members(len(target.keys))
        self._due: set[Any] = set()
        self._all_due = False

    def __bool__(self) -> bool:
        return bool(self._members.by_key)

    @property
    def is_due(self) -> bool:
        """Whether rows have to be polled before the next tick."""
        return self._all_due or bool(self._due)

    @property
    def subscriptions(self) -> list[Subscription[Any]]:
        return self._members.all()

    @property
    def count(self) -> int:
        """How many subscriptions there are."""
        return len(self._members)

    def shares(self, other: Group) -> bool:
        """Return whether two groups have a table in common."""
        return not set(self._tables).isdisjoint(other._tables)

    async def find_channels(self, fetch: Fetch) -> None:
        """Ask which schemas the tables are in: each tenant's table has a channel of its own."""
        if self.channels:
            return
        translation = self._engine.sync_engine.get_execution_options().get("schema_translate_map")
        found: list[str] = []
        for table in self._tables:
            names = qualified_names([table], self._engine.dialect, translation or {})
            rows = await fetch(SCHEMA_OF_TABLE, *names)
            found += [channel_in(table, schema) for (schema,) in rows]
        self.channels = tuple(found)

    def add(self, subscription: Subscription[Any]) -> None:
        self._members.add(subscription)
        self._due.add(subscription.key)

    def remove(self, subscription: Subscription[Any]) -> None:
        if self._members.remove(subscription):
            self._forget(subscription.key)

    def mark_all_due(self) -> None:
        """Have the next tick poll every key."""
        self._all_due = True

    def mark_due(self, payload_keys: Iterable[tuple[Any, ...]]) -> bool:
        """Have the next tick poll the keys that a notification names.

        Returns:
            Whether one of them is watched.
        """
        if self._rows.has_given_keys:
            # A payload has the keys as the table spells them, which are not the given ones.
            self.mark_all_due()
            return True
        found = [key for key in map(self._members.key_of, payload_keys) if key is not None]
        self._due.update(found)
        return bool(found)

    def mark_last(self, subscription: Subscription[Any]) -> None:
        """Have the next tick be the last for a subscription: it expires unless its row changed."""
        self._members.expiring.add(subscription)
        self._due.add(subscription.key)

    async def tick(self, fetch: Fetch, *, whole: bool) -> None:
        """Poll the rows that are due, or all of them, and tell the subscriptions of changes.

        An error leaves the group as it was: the keys that were due are due again.
        """
        joining, expiring = list(self._members.joining), list(self._members.expiring)
        was_all_due, self._all_due = self._all_due, False
        due, self._due = self._due, set()
        if not self:
            return
        yielder = Yielder()
        try:
            await self._poll(fetch, due, whole or was_all_due, yielder)
        except BaseException:
            self._all_due = self._all_due or was_all_due
            self._due |= due
            raise
        for count, subscription in enumerate(joining):
            if subscription in self._members.joining:
                del self._members.joining[subscription]
                self._join(subscription)
            if count % SLICE_SIZE == 0:
                await yielder.yield_if_due()
        for subscription in expiring:
            self._members.expiring.discard(subscription)
            subscription.expire()

    async def fail_bad_keys(self, fetch: Fetch) -> None:
        """Fail the joining subscriptions whose keys PostgreSQL or the driver cannot read.

        Raises:
            Exception: the error of a statement that is not about the key.
        """
        for subscription in list(self._members.joining):
            try:
                await self._rows.fetch(fetch, [subscription.key])
            except Exception as error:
                if not is_about_data(error):
                    raise
                self._fail_for_key(subscription, error)

    def fail(self, cause: Exception) -> None:
        """End every subscription with a `WatchFailedError`."""
        message = (
            f"{self.target} can no longer be watched: {type(cause).__name__}: {cause}. "
            "Repair it, then wait again."
        )
        for subscription in self.subscriptions:
            subscription.fail(_failure(message, cause))

    async def _poll(self, fetch: Fetch, due: set[Any], whole: bool, yielder: Yielder) -> None:
        due = due.intersection(self._members.by_key)
        keys: Sequence[Any] = list(due)
        if whole:
            members = self._members
            keys = await self._rows.changed_keys(fetch, members.keys, due, members.by_key)
        if not keys:
            return
        rows = await self._rows.fetch(fetch, keys)
        has_spellings = len(rows) < len(keys) and self._may_have_other_spellings(keys, rows)
        has_other_keys = await self._compare(rows, yielder)
        if has_other_keys or len(rows) < len(keys):
            missing = self._missing(keys, rows)
            await yielder.yield_if_due()
            if has_other_keys or has_spellings:
                missing = await self._respell(fetch, missing, yielder)
            await self._tell_missing(missing, yielder)

    def _missing(self, keys: Sequence[Any], rows: Sequence[Any]) -> list[Any]:
        """Return the watched keys without a row."""
        found = set(map(self._rows.key_of, rows))
        return [key for key in keys if key not in found and key in self._members.by_key]

    def _may_have_other_spellings(self, keys: Sequence[Any], rows: Sequence[Any]) -> bool:
        """Return whether a key without a row may be another spelling of a key that has one.

        That can come about when the row appears, or when the key is watched.
        """
        if self._rows.has_unique_spellings:
            return False
        joining = {subscription.key for subscription in self._members.joining}
        appeared = any(self._rows.key_of(row) not in self._rows for row in rows)
        return appeared or not joining.isdisjoint(keys)

    async def _compare(self, rows: Sequence[Any], yielder: Yielder) -> bool:
        """Tell of the rows that have changed; return whether a row has a key that is not watched.

        Such a row was found under another spelling of its key.
        """
        has_other_keys = False
        for start in range(0, len(rows), SLICE_SIZE):
            part = rows[start : start + SLICE_SIZE]
            for row in self._rows.changed(part):
                key = self._rows.key_of(row)
                if key not in self._members.by_key:
                    has_other_keys = True
                elif self._rows.has_same_values(key, row):
                    self._rows.note(key, row)
                else:
                    await self._tell(key, row, yielder)
            await yielder.yield_if_due()
        return has_other_keys

    async def _tell(self, key: Any, row: Sequence[Any] | None, yielder: Yielder) -> None:
        """Keep the row, or its absence, and tell the subscriptions that have joined."""
        known = self._rows.note(key, row)
        by_key = self._members.by_key
        served = [each for each in by_key[key] if each.joined and not each.abandoned]
        if not served:
            return
        try:
            before, after = self._values(known), self._values(row)
        except Exception as error:
            self._fail_for_row(served, error)
            return
        for count, subscription in enumerate(served, 1):
            subscription.changed(before, after)
            if count % SLICE_SIZE == 0:
                await yielder.yield_if_due()
        await yielder.yield_if_due()

    async def _tell_missing(self, keys: Sequence[Any], yielder: Yielder) -> None:
        """Tell of the rows that are gone."""
        for key in keys:
            if key in self._rows and key in self._members.by_key:
                await self._tell(key, None, yielder)

    async def _respell(self, fetch: Fetch, keys: Sequence[Any], yielder: Yielder) -> list[Any]:
        """Find rows whose keys the table spells differently; return the keys without any.

        A key may be padded, in another case, or equal only by a collation. The spelling of the
        table is watched from then on.
        """
        missing: list[Any] = list(keys)
        if not keys or not await self._rows.fetch(fetch, keys):
            return missing
        for key in keys:
            rows = await self._rows.fetch(fetch, [key])
            if rows:
                missing.remove(key)
                await self._move(key, rows[0], yielder)
        return missing

    async def _move(self, key: Any, row: Sequence[Any], yielder: Yielder) -> None:
        """Watch a row under the key that the table has for it."""
        if key not in self._members.by_key:
            return
        # A subscription that has seen the other spelling sees a change: that of the key.
        await self._tell(key, row, yielder)
        spelling = self._rows.key_of(row)
        if spelling == key or key not in self._members.by_key:
            return
        self._members.move(key, spelling)
        self._rows.note(key, None)
        self._due.discard(key)
        # Also where the row is known: its line was the other key's for a moment.
        known = self._rows.get(spelling)
        self._rows.note(spelling, row if known is None else known)

    def _join(self, subscription: Subscription[Any]) -> None:
        subscription.joined = True
        row = self._rows.get(subscription.key)
        try:
            subscription.start(None if row is None else partial(self._rows.values_of, row))
        except Exception as error:
            self._fail_for_row([subscription], error)

    def _values(self, row: Sequence[Any] | None) -> Values | None:
        return None if row is None else self._rows.values_of(row)

    def _fail_for_row(self, served: Iterable[Subscription[Any]], cause: Exception) -> None:
        logger.warning("A row of %s cannot be decoded.", self.target, exc_info=cause)
        for subscription in served:
            message = (
                f"The columns of {subscription} cannot be decoded: {type(cause).__name__}: {cause}"
            )
            subscription.fail(_failure(message, cause))

    def _fail_for_key(self, subscription: Subscription[Any], cause: Exception) -> None:
        error = ValueError(safe(f"pk_value: {subscription} cannot be a primary key: {cause}"))
        error.__cause__ = cause
        subscription.fail(lambda: error)
        self.remove(subscription)

    def _forget(self, key: Any) -> None:
        self._members.remove_key(key)
        self._rows.note(key, None)
        self._due.discard(key)
        if not self:
            self._rows.clear()


def _failure(message: str, cause: Exception) -> Callable[[], Exception]:
    def make() -> Exception:
        error = WatchFailedError(message, sqlstate=sqlstate_of(cause))
        error.__cause__ = cause
        return error

    return make
