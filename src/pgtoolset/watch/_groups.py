"""The rows of one model and one set of columns: a single statement looks at all of them, whoever
waits for which."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncEngine

from pgtoolset._native import row_comparator
from pgtoolset._postgres.link import LinkLost, is_about_data, is_passing
from pgtoolset._postgres.notifications import channel_of, spelled
from pgtoolset._postgres.rows import Statements, decoder, key_arguments
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset.errors import WatchFailedError
from pgtoolset.watch._subscriptions import Subscription, Values
from pgtoolset.watch._texts import Fetch, Texts
from pgtoolset.watch.targets import Target

__all__ = ["Breath", "Group"]

logger = logging.getLogger("pgtoolset")

#: Rows that are compared, and subscriptions that are served, before the clock is looked at.
SLICE = 500

#: Keys up to which all rows are fetched at every look. With more, they are compared as text, and
#: those that changed are fetched by a second statement.
FEW = 30

#: Seconds of work after which the event loop gets its turn.
BREATH = 0.005


class Breath:
    """Gives the event loop a turn when there has been none for a while."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    async def take(self) -> None:
        if self._loop.time() - self._since > BREATH:
            await asyncio.sleep(0)
            self._since = self._loop.time()


class Group:
    """What is watched of one model.

    `_known` has the row that everybody who has joined has seen, with its text at the end. A key
    without one is a row that does not exist, or that nobody has joined yet. Looks at a group never
    overlap, so each finds a state at least as new as the last.
    """

    def __init__(self, engine: AsyncEngine, target: Target[Any]) -> None:
        dialect = engine.dialect
        translate = engine.sync_engine.get_execution_options().get("schema_translate_map")
        selected = (*target.keys, *(name for name in target.columns if name not in target.keys))
        self.target = target
        self.channels = tuple(
            channel_of(table) for table in target.mapper.tables if isinstance(table, Table)
        )
        self.not_before = 0.0
        self.busy = 0
        self._width = len(target.keys)
        statements = Statements(
            target.mapper, target.keys, selected[self._width :], dialect, translate
        )
        self._statement = statements.rows()
        self._texts = Texts(statements, self._width)
        self._decode = decoder(target.mapper, selected, target.columns, dialect)
        self._known: dict[Any, Sequence[Any]] = {}
        self._subscriptions: dict[Any, dict[Subscription[Any], None]] = {}
        self._joining: dict[Subscription[Any], None] = {}
        self._expiring: set[Subscription[Any]] = set()
        self._due: set[Any] = set()
        self._all_due = False
        self._keys: list[Any] | None = None
        self._spelled: dict[tuple[Any, ...], Any] = {}

    def __bool__(self) -> bool:
        return bool(self._subscriptions)

    @property
    def is_due(self) -> bool:
        return self._all_due or bool(self._due)

    def add(self, subscription: Subscription[Any]) -> None:
        if subscription.key not in self._subscriptions:
            self._subscriptions[subscription.key] = {}
            self._spell(subscription.key)
        self._subscriptions[subscription.key][subscription] = None
        self._joining[subscription] = None
        self._due.add(subscription.key)

    def remove(self, subscription: Subscription[Any]) -> None:
        self._joining.pop(subscription, None)
        self._expiring.discard(subscription)
        served = self._subscriptions.get(subscription.key, {})
        if subscription in served:
            del served[subscription]
            if not served:
                self._forget(subscription.key)

    def look_at_all(self) -> None:
        """Have the next look look at every key."""
        self._all_due = True

    def look_at(self, keys: Iterable[tuple[Any, ...]]) -> bool:
        """Have the next look look at those of `keys`, spelled as in a payload, that are watched;
        whether any is."""
        found = [self._spelled[key] for key in keys if key in self._spelled]
        self._due.update(found)
        return bool(found)

    def last_look(self, subscription: Subscription[Any]) -> None:
        """Look once more, and end the subscription unless something has changed."""
        self._expiring.add(subscription)
        self._due.add(subscription.key)

    def subscriptions(self) -> list[Subscription[Any]]:
        return [each for served in self._subscriptions.values() for each in served]

    async def look(self, fetch: Fetch, *, whole: bool) -> None:
        """Look at what is due, or at all of it, and tell whoever waits.

        An error leaves everything as it was: what was due is due again.
        """
        joining, expiring = list(self._joining), list(self._expiring)
        was_all_due, self._all_due = self._all_due, False
        due, self._due = self._due, set()
        if not self._subscriptions:
            return
        breath = Breath()
        try:
            keys = await self._to_fetch(fetch, due, whole or was_all_due)
            if keys:
                rows = await fetch(self._statement, *key_arguments(keys, self._width))
                strangers = await self._compare(rows, breath)
                if strangers or len(rows) < len(keys):
                    await self._find_missing(fetch, keys, rows, breath)
        except BaseException:
            self._all_due = self._all_due or was_all_due
            self._due |= due
            raise
        for count, subscription in enumerate(joining):
            if subscription in self._joining:
                del self._joining[subscription]
                self._join(subscription)
            if count % SLICE == 0:
                await breath.take()
        for subscription in expiring:
            self._expiring.discard(subscription)
            subscription.expire()

    async def _to_fetch(self, fetch: Fetch, due: set[Any], whole: bool) -> Sequence[Any]:
        """The keys whose rows may have changed: those that are due and, in a look at the whole,
        whose text differs."""
        wanted = due.intersection(self._subscriptions)
        if not whole:
            return list(wanted)
        if self._keys is None:
            self._keys = list(self._subscriptions)
        keys = self._keys
        if len(keys) <= FEW or 2 * len(wanted) > len(keys) or not self._texts.is_usable:
            return keys
        try:
            changed = await self._texts.changed(fetch, keys, self._known, self._subscriptions)
        except Exception as error:
            if isinstance(error, LinkLost) or is_passing(error):
                raise
            # What is wrong with the rows themselves is found when they are fetched.
            if not is_about_data(error):
                logger.warning(
                    "rows of %s cannot be compared as text, and are fetched at every look: %s",
                    self.target,
                    error,
                )
                self._texts.is_usable = False
            return keys
        return (
            keys if changed is None else list((changed | wanted).intersection(self._subscriptions))
        )

    async def blame(self, fetch: Fetch) -> None:
        """Fail those who are joining with a key that cannot be looked at; raise where it is none of
        theirs."""
        for subscription in list(self._joining):
            try:
                await fetch(self._statement, *key_arguments([subscription.key], self._width))
            except (ValueError, TypeError) as error:
                self._fail_for_key(subscription, error)
            except Exception as error:
                if not (sqlstate_of(error) or "").startswith("22"):
                    raise
                self._fail_for_key(subscription, error)

    def fail(self, cause: Exception) -> None:
        """End everybody who waits here."""
        message = f"{self.target} can no longer be watched: {type(cause).__name__}: {cause}. Put it right and wait anew."
        state = sqlstate_of(cause)

        def failed() -> Exception:
            error = WatchFailedError(message, sqlstate=state)
            error.__cause__ = cause
            return error

        for subscription in self.subscriptions():
            subscription.fail(failed)

    async def _compare(self, rows: Sequence[Any], breath: Breath) -> bool:
        """Tell of the rows that changed; whether there were any whose key nobody watches."""
        strangers = False
        for start in range(0, len(rows), SLICE):
            part = rows[start : start + SLICE]
            for position in row_comparator.changed_rows(part, self._known, self._width):
                row = part[position]
                key = row[0] if self._width == 1 else tuple(row[: self._width])
                if key not in self._subscriptions:
                    strangers = True
                elif (before := self._known.get(key)) is not None and _same_values(before, row):
                    self._note(key, row)
                else:
                    await self._tell(key, row, breath)
            await breath.take()
        return strangers

    async def _tell(self, key: Any, row: Sequence[Any] | None, breath: Breath) -> None:
        """Note that the row is now this, or is gone, and tell those who have joined."""
        known = self._note(key, row)
        served = [each for each in self._subscriptions[key] if each.joined and not each.abandoned]
        if not served:
            return
        try:
            before, after = self._values(known), self._values(row)
        except Exception as error:
            logger.warning("a row of %s cannot be decoded", self.target, exc_info=True)
            self._fail_for_row(served, error)
            return
        for count, subscription in enumerate(served, 1):
            subscription.changed(before, after)
            if count % SLICE == 0:
                await breath.take()
        await breath.take()

    async def _find_missing(
        self, fetch: Fetch, keys: Sequence[Any], rows: Sequence[Any], breath: Breath
    ) -> None:
        """Tell of the rows that are gone.

        A row may be there under another spelling of its key: padded, in another case, equal to a
        collation only. It is asked for by itself then, and watched under the spelling of the table
        from there on.
        """
        if self._width == 1:
            found = {row[0] for row in rows}
        else:
            found = {tuple(row[: self._width]) for row in rows}
        await breath.take()
        strange = not found.issubset(keys)
        for key in keys:
            if key in found or key not in self._subscriptions:
                continue
            if strange:
                alone = await fetch(self._statement, *key_arguments([key], self._width))
                if alone:
                    await self._respell(key, alone[0], breath)
                    continue
            if key in self._known:
                await self._tell(key, None, breath)

    async def _respell(self, key: Any, row: Sequence[Any], breath: Breath) -> None:
        spelling = row[0] if self._width == 1 else tuple(row[: self._width])
        if spelling == key:
            await self._tell(key, row, breath)
            return
        if key in self._subscriptions:
            # The key itself has changed its spelling, so for those who have seen the other it is a
            # change anyway.
            await self._tell(key, row, breath)
            moved = self._subscriptions.get(key, {})
            self._forget(key)
            for subscription in moved:
                subscription.key = spelling
            self._subscriptions.setdefault(spelling, {}).update(moved)
            if spelling not in self._known:
                self._note(spelling, row)
            self._spell(spelling)

    def _join(self, subscription: Subscription[Any]) -> None:
        subscription.joined = True
        row = self._known.get(subscription.key)
        try:
            subscription.start(None if row is None else partial(self._values_of, row))
        except Exception as error:
            logger.warning("a row of %s cannot be decoded", self.target, exc_info=True)
            self._fail_for_row([subscription], error)

    def _values(self, row: Sequence[Any] | None) -> Values | None:
        return None if row is None else self._values_of(row)

    def _values_of(self, row: Sequence[Any]) -> Values:
        # One mapping for all who wait for the row, so it is one that nobody can write to.
        return MappingProxyType(self._decode(row))

    def _fail_for_row(self, served: Iterable[Subscription[Any]], cause: Exception) -> None:
        for subscription in served:
            message = (
                f"The columns of {subscription} cannot be decoded: {type(cause).__name__}: {cause}"
            )
            subscription.fail(
                partial(_caused, WatchFailedError(message, sqlstate=sqlstate_of(cause)), cause)
            )

    def _fail_for_key(self, subscription: Subscription[Any], cause: Exception) -> None:
        error = ValueError(f"{subscription.pk!r} cannot be a primary key of {self.target}: {cause}")
        subscription.fail(partial(_caused, error, cause))
        self.remove(subscription)

    def _parts(self, key: Any) -> tuple[Any, ...]:
        parts: tuple[Any, ...] = (key,) if self._width == 1 else key
        return parts

    def _note(self, key: Any, row: Sequence[Any] | None) -> Sequence[Any] | None:
        """The row is this now, or there is none; what it was."""
        before = self._known.pop(key, None)
        if row is not None:
            self._known[key] = row
        self._texts.note(key, before, row)
        return before

    def _forget(self, key: Any) -> None:
        self._subscriptions.pop(key, None)
        self._note(key, None)
        self._due.discard(key)
        self._spelled.pop(spelled(self._parts(key)), None)
        self._keys = None
        if not self._subscriptions:
            self._texts.clear()

    def _spell(self, key: Any) -> None:
        self._spelled[spelled(self._parts(key))] = key
        self._keys = None


def _same_values(before: Sequence[Any], row: Sequence[Any]) -> bool:
    """Whether two rows whose texts differ are the same in what is watched: 1.0 and 1.00 are."""
    return row_comparator.same_value(tuple(before)[:-1], tuple(row)[:-1])


def _caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error
