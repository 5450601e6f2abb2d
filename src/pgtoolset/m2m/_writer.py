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

from pgtoolset._arguments import PrimaryKey, check_iterable, sync_session
from pgtoolset._native import association_rows
from pgtoolset.m2m._analysis import association_of
from pgtoolset.m2m._arguments import check_instances, check_links, check_values
from pgtoolset.m2m._associations import End
from pgtoolset.m2m._collections import expire, remember
from pgtoolset.m2m._extras import Extras
from pgtoolset.m2m._keys import check_shared, columns_of, divided, identities
from pgtoolset.m2m._references import referenced_values
from pgtoolset.m2m._statements import lock, touch

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
        self._sync_session = sync_session(session)
        self._session = session
        self.association = association_of(rel_attr)
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
        sync, association = self._sync_session, self.association
        parameters = self._parameters(one)
        try:
            remember(sync, association)
            bind = {"mapper": association.owner.mapper, "clause": association.table}
            result = await self._session.execute(statement, parameters, bind_arguments=bind)
        except DBAPIError:
            raise  # PostgreSQL has undone the statement
        except BaseException:
            # After a cancellation the statement may have been executed or not.
            self._expire_touched()
            raise
        self._expire_touched()
        return result

    def _parameters(self, one: bool) -> dict[str, Any]:
        parameters = {f"o{at}": value for at, value in enumerate(self.owner)}
        shared = self.association.shared
        related = [column for at, column in enumerate(self.columns) if at not in shared]
        parameters |= {f"r{at}": each[0] if one else each for at, each in enumerate(related)}
        if self.extras.columns:
            keys = dict(zip(self.association.pair, parameters.values(), strict=True))
            parameters |= self.extras.parameters(self._values, keys, len(self.columns[0]))
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
        for end, instances, keys in self._touched():
            expire(self._sync_session, end, instances, keys)


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

    async def lock_owner(self) -> None:
        """Lock the owner's row, so that of two sets at the same time the second waits."""
        end = self.association.owner
        table = end.referenced[0].table
        parameters = {
            f"o{at}": value
            for at, value in enumerate(self.owner)
            if end.referenced[at].table is table
        }
        bind = {"mapper": end.mapper}
        level = await self._session.scalar(
            self.association.once(lock), parameters, bind_arguments=bind
        )
        if level in ("repeatable read", "serializable"):
            update = self.association.once(touch)
            if update is not None:
                await self._session.execute(update, parameters, bind_arguments=bind)

    async def replace(self, statement: Executable) -> Any:
        """Execute a statement that may change the collection of any related row."""
        self._replaces_all = True
        return await self.execute(statement)

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
