"""One call of a public function: its arguments checked, its keys resolved, its statement executed.

Everything is checked when a writer is made, before any SQL. Keys come out in columns: the builder
of `pgtoolset._native` makes them in one pass where every instance and key is as it should be, and
leaves the rest to a closer look.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import PrimaryKey, check_bind, check_iterable, shown, writable_session
from pgtoolset._compatibility import execute_of
from pgtoolset._listeners import listen_to_errors
from pgtoolset._native import association_rows
from pgtoolset._postgres.sqlstates import sqlstate_of
from pgtoolset._text import printable
from pgtoolset.errors import RowNotFoundError
from pgtoolset.m2m._analysis import association_of
from pgtoolset.m2m._arguments import check_instances, check_links, check_values
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._catalog import Knowledge, Storage, knowledge
from pgtoolset.m2m._collections import (
    expire,
    expire_objects,
    expire_owner,
    expire_viewers,
    remember,
)
from pgtoolset.m2m._extras import Extras
from pgtoolset.m2m._keys import check_shared, columns_of, divided, identities
from pgtoolset.m2m._references import referenced_values
from pgtoolset.m2m._replacement import counts, deletion_of_old, insertion_of_new, replacement
from pgtoolset.m2m._statements import ask, lock, touch

#: No constraint that ON CONFLICT can name (42P10), or a deferrable one (55000).
_WITHOUT_ARBITER = frozenset({"42P10", "55000"})
#: No privilege, not a table, not an updatable view.
_NOT_LOCKABLE = frozenset({"42501", "42809", "0A000"})

#: Which collections a call changes: those of an end, of these instances and keys; `None`: of all.
Touched = tuple[End, Sequence[Any], Sequence[Any] | None]


class Writer(ABC):
    """What every call has: a session, an association, values for extra columns, and keys.

    Attributes:
        association: the relationship that is written.
        extras: the extra columns that an INSERT names.
        owner: for each column of the owner's key its value, or one for each row in a list.
        columns: for each column of the related key a list of one value for each row.
    """

    def __init__(
        self, session: AsyncSession, rel_attr: Any, values: Mapping[str, Any] | None
    ) -> None:
        self._sync_session = writable_session(session, "m2m_*")
        self._session = session
        self.association = association_of(rel_attr)
        bind = self._sync_session.get_bind(**self.association.bind_arguments)
        if self._sync_session.bind is None:  # which `sync_session` has checked
            check_bind(bind)
        listen_to_errors(bind)
        self._values = check_values(self.association, values)
        self.extras = self.association.once(Extras, frozenset(self._values))
        self.owner: list[Any] = []
        self.columns: list[list[Any]] = []

    async def execute(self, statement: Executable, *, one: bool = False) -> Any:
        """Execute the statement, and expire every loaded collection that it has changed.

        Args:
            statement: of this association.
            one: whether its parameters are the values of one row in place of arrays.
        """
        return await self._execute(statement, self._parameters(one))

    async def has_arbiter(self) -> bool:
        """Whether ON CONFLICT can name the constraint of the pair; PostgreSQL is asked once."""
        storage = self._knowledge().latest
        if storage is None:
            storage = await self._ask()
        return storage >= Storage.RESTRICTED

    async def _ask(self) -> Storage:
        """Ask PostgreSQL what the association table is."""
        row = (await self._read(self.association.once(ask), {})).one_or_none()
        if row is None:
            return Storage.INDIRECT  # made by another session, after this transaction's snapshot
        storage = Storage(row[1])
        self._knowledge().learn(row[0], storage)
        return storage

    def _knowledge(self) -> Knowledge:
        association = self.association
        dialect = self._sync_session.get_bind(**association.bind_arguments).dialect
        pair = association.once(_pair_names)
        return knowledge(dialect, association.table, pair)

    async def _read(self, statement: Executable, parameters: dict[str, Any]) -> Any:
        """Execute a statement that changes no association where the associations are."""
        bind = self.association.bind_arguments
        return await execute_of(self._session)(statement, parameters, bind_arguments=bind)

    async def _execute(self, statement: Executable, parameters: dict[str, Any]) -> Any:
        sync, association = self._sync_session, self.association
        try:
            remember(sync, association)
            bind = association.bind_arguments
            result = await execute_of(self._session)(statement, parameters, bind_arguments=bind)
        except DBAPIError as error:
            if sqlstate_of(error) in _WITHOUT_ARBITER:
                self._knowledge().latest = None
            raise  # PostgreSQL has undone the statement
        except BaseException:
            # After a cancellation the statement may have been executed or not.
            self._expire_touched()
            raise
        self._expire_touched()
        return result

    def _parameters(self, one: bool) -> dict[str, Any]:
        prefix, shared = self.association.prefix, self.association.shared
        parameters = {f"{prefix}o{at}": value for at, value in enumerate(self.owner)}
        related = [column for at, column in enumerate(self.columns) if at not in shared]
        parameters |= {
            f"{prefix}r{at}": each[0] if one else each for at, each in enumerate(related)
        }
        if self.extras.columns:
            keys = dict(zip(self.association.pair, parameters.values(), strict=True))
            parameters |= self.extras.parameters(self._values, keys, len(self.columns[0]))
        parameters |= {f"{prefix}p{at}": value for at, value in enumerate(self.owner)}
        return parameters

    async def _flush(self) -> bool:
        """Flush pending changes; whether there were any."""
        # As autoflush does, everything: any instance may have a changed collection.
        sync = self._sync_session
        if not (sync.new or sync.dirty or sync.deleted):
            return False
        await self._session.flush()
        return True

    @abstractmethod
    def _touched(self) -> Iterable[Touched]:
        """Yield the ends whose loaded collections the call changes."""

    def _expire_touched(self) -> None:
        sync, association = self._sync_session, self.association
        for end, instances, keys in self._touched():
            expire(sync, end, instances, keys)
        if association.viewers or association.objects:
            expire_viewers(sync, association)
            expire_objects(sync, association, self._touched_rows())

    @abstractmethod
    def _touched_rows(self) -> tuple[Sequence[PrimaryKey], Sequence[PrimaryKey] | None]:
        """Return the keys of the owners whose rows the call changes, and those of the related."""


class OwnerWriter(Writer):
    """A call for one owner and any number of related rows."""

    def __init__(
        self,
        session: AsyncSession,
        rel_attr: Any,
        instance: Any,
        related: Sequence[Any],
        pks: Iterable[Any],
        values: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(session, rel_attr, values)
        self._instance = instance
        self._related = related
        self._replaces_all = False
        check_instances(self._sync_session, "instance", self.association.owner, [instance])
        end = self.association.related
        self._keys: Sequence[Any] = check_iterable("pks", f"primary keys of {end.name}", pks)
        built = self._build()
        self._is_built = built is not None and (not self._keys or end.are_exact(built))
        if built is not None and self._is_built:
            self.columns = built
        else:
            check_instances(self._sync_session, "related", end, related)
            self._keys = end.parser.parse_all("pks", self._keys)

    @property
    def is_empty(self) -> bool:
        """Whether no related row was given."""
        return not self._related and not self._keys

    @property
    def has_one_row(self) -> bool:
        """Whether exactly one related row was given."""
        return len(self.columns[0]) == 1

    async def resolve_keys(self) -> None:
        """Flush pending changes, and fill `owner` and `columns`."""
        association = self.association
        end = association.related
        flushed = await self._flush()
        if end.positions is None:
            values = await referenced_values(
                self._session, association, end, self._related, self._keys
            )
            self.columns = columns_of(values, range(len(end.columns)))
        elif flushed or not self._is_built:
            # The flush has given instances their identities, or others.
            items = [*self._related, *self._keys]
            self.columns = self._build() or columns_of(identities(items), end.positions)
        self.owner = await self._owner_values()
        name = "related" if self._related else "pks"
        check_shared(name, association, self.owner, self.columns)

    async def lock_owner(self) -> Storage:
        """Lock the owner's row, so that of two sets at the same time the second waits.

        Raises:
            RowNotFoundError: there is no such row, or row-level security hides it.
        """
        association = self.association
        parameters = self._owner_parameters()
        try:
            row = (await self._read(association.once(lock), parameters)).one_or_none()
        except DBAPIError as error:
            if sqlstate_of(error) in _NOT_LOCKABLE:
                error.add_note(f"{self._what_is_locked()}. Nothing has been written.")
            raise
        if row is None:
            raise self._not_locked()
        level, signature = row
        if level in ("repeatable read", "serializable"):
            await self._touch_owner(parameters)
        storage = self._knowledge().recall(signature)
        return await self._ask() if storage is None else storage

    async def _touch_owner(self, parameters: dict[str, Any]) -> None:
        association = self.association
        update = association.once(touch)
        if update is None:
            return
        row = (await self._read(update, parameters)).one_or_none()
        if row is None:
            raise self._not_locked()
        expire_owner(self._sync_session, association.owner, self._instance, has_triggers=row[0])

    def _owner_parameters(self) -> dict[str, Any]:
        """Return the parameters that find the owner's row in its own table."""
        end, prefix = self.association.owner, self.association.prefix
        table = end.referenced[0].table
        return {
            f"{prefix}o{at}": value
            for at, value in enumerate(self.owner)
            if end.referenced[at].table is table
        }

    def _what_is_locked(self) -> str:
        end = self.association.owner
        table = printable(str(end.referenced[0].table))
        return (
            f"{self.association.name}: m2m_set locks the row of {end.name} in {table} FOR NO KEY "
            "UPDATE, for which that has to be a table or an updatable view, and the role needs the "
            "privilege UPDATE on one of its columns"
        )

    def _not_locked(self) -> RowNotFoundError:
        return RowNotFoundError(
            f"{self._what_is_locked()}; the row with {shown(tuple(self.owner))} was not found: it "
            "has been deleted, or row-level security hides it (the policies for UPDATE count "
            "too). Nothing has been written."
        )

    async def replace(self, storage: Storage, *, keep_existing: bool) -> tuple[int, int]:
        """Make the owner's rows the set; return how many associations it has gained and lost."""
        association, extras = self.association, self.extras
        self._replaces_all = True
        rewrite = bool(association.extras) and not keep_existing
        parameters = self._parameters(one=False)
        # ON CONFLICT DO UPDATE calls the row that was to be inserted `excluded`.
        if storage is Storage.PLAIN and not (rewrite and association.table.name == "excluded"):
            statement = association.once(replacement, extras, rewrite=rewrite)
            return tuple((await self._execute(statement, parameters)).one())
        change = (await self._read(association.once(counts), parameters)).one()
        old = association.once(deletion_of_old, rewrite=rewrite, keep_existing=keep_existing)
        await self._execute(old, parameters)
        if self.columns[0]:
            has_arbiter = storage >= Storage.RESTRICTED
            new = association.once(
                insertion_of_new, extras, rewrite=rewrite, has_arbiter=has_arbiter
            )
            await self._execute(new, parameters)
        return tuple(change)

    def _build(self) -> list[list[Any]] | None:
        """Return the related keys as columns; `None` where one of them needs a closer look."""
        end = self.association.related
        if end.positions is None or self._sync_session.deleted:
            return None
        columns = association_rows.key_columns(
            end.mapper.class_, self._related, self._keys, end.width, end.positions
        )
        return None if isinstance(columns, int) else columns

    async def _owner_values(self) -> list[Any]:
        end = self.association.owner
        if end.positions is None:
            (values,) = await referenced_values(
                self._session, self.association, end, [self._instance], ()
            )
            return list(values)
        (key,) = identities([self._instance])
        return [key[position] for position in end.positions]

    def _touched(self) -> Iterable[Touched]:
        yield self.association.owner, [self._instance], ()
        keys = None if self._replaces_all else self._keys
        yield self.association.related, self._related, keys

    def _touched_rows(self) -> tuple[Sequence[PrimaryKey], Sequence[PrimaryKey] | None]:
        related = None if self._replaces_all else list(zip(*self.columns, strict=True))
        return [tuple(self.owner)], related


class LinkWriter(Writer):
    """A call for any number of pairs of owner and related."""

    def __init__(
        self,
        session: AsyncSession,
        rel_attr: Any,
        links: Iterable[tuple[Any, Any]],
        values: Mapping[str, Any] | None,
    ) -> None:
        super().__init__(session, rel_attr, values)
        self._links: Sequence[Any] = check_iterable("links", "pairs (owner, related)", links)
        self._is_built = self._build()
        if not self._is_built or not self._are_exact():
            self._is_built = False
            self._links = check_links(self._sync_session, self.association, self._links)

    @property
    def is_empty(self) -> bool:
        """Whether no pair was given."""
        return not self._links

    async def resolve_keys(self) -> None:
        """Flush pending changes, and fill `owner` and `columns`."""
        association = self.association
        flushed = await self._flush()
        if (flushed or not self._is_built) and not self._build():
            owners = await self._values_of(association.owner, [link[0] for link in self._links])
            related = await self._values_of(association.related, [link[1] for link in self._links])
            rows = [(*one, *other) for one, other in zip(owners, related, strict=True)]
            width = len(association.owner.columns)
            columns = columns_of(rows, range(width + len(association.related.columns)))
            self.owner, self.columns = columns[:width], columns[width:]
        check_shared("links", association, self.owner, self.columns)

    def _build(self) -> bool:
        """Fill `owner` and `columns`; `False` where a pair needs a closer look."""
        owner, related = self.association.owner, self.association.related
        if owner.positions is None or related.positions is None or self._sync_session.deleted:
            return False
        columns = association_rows.pair_columns(
            (owner.mapper.class_, related.mapper.class_),
            self._links,
            (owner.width, related.width),
            (owner.positions, related.positions),
        )
        if isinstance(columns, int):
            return False
        width = len(owner.positions)
        self.owner, self.columns = columns[:width], columns[width:]
        return True

    def _are_exact(self) -> bool:
        association = self.association
        return association.owner.are_exact(self.owner) and association.related.are_exact(
            self.columns
        )

    async def _values_of(self, end: End, items: Sequence[Any]) -> list[PrimaryKey]:
        """Return the values that the association table has for each of `items`."""
        if end.positions is not None:
            keys = identities(items)
            return [tuple([key[position] for position in end.positions]) for key in keys]
        instances, keys = divided(end, items)
        values = await referenced_values(self._session, self.association, end, instances, keys)
        of_instances, of_keys = iter(values[: len(instances)]), iter(values[len(instances) :])
        return [next(of_keys) if isinstance(item, tuple) else next(of_instances) for item in items]

    def _touched(self) -> Iterable[Touched]:
        for position, end in enumerate((self.association.owner, self.association.related)):
            if end.collections:
                yield end, *divided(end, (link[position] for link in self._links))

    def _touched_rows(self) -> tuple[Sequence[PrimaryKey], Sequence[PrimaryKey] | None]:
        return list(zip(*self.owner, strict=True)), list(zip(*self.columns, strict=True))


def _pair_names(association: Association) -> frozenset[str]:
    return frozenset(column.name for column in association.pair)
