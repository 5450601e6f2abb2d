"""The types of the contracts, for annotations of code that wraps or doubles pgtoolset.

    async def lock_orders(session: AsyncSession, ids: PrimaryKeys, timeout: Duration) -> None:
        await lock_rows(session, Order, ids, timeout=timeout)

This module imports no implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSet
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from typing import Any, ClassVar, Literal, Protocol, TypeAlias, TypeVar
from uuid import UUID

from sqlalchemy import Connection, FromClause
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Mapped, Mapper

from pgtoolset.values import LockMode, RowLockMode

__all__ = [
    "AdvisoryKey",
    "ColumnAttribute",
    "CommitObserver",
    "CommitPhase",
    "Duration",
    "LockModeSpelling",
    "LockWaitSource",
    "ManyToMany",
    "PrimaryKeys",
    "ReadTokens",
    "Related",
    "RowLockModeSpelling",
    "SettingValue",
    "Settings",
    "SettingsOrFunction",
    "SpentOn",
    "TableTarget",
]

#: Which commit it was whose outcome is unknown; see `CommitUnknownError.phase`.
CommitPhase: TypeAlias = Literal["commit", "end", "statement"]

#: A length of time, such as a `timeout` or an `interval`: seconds, a `timedelta`, or a number with
#: a unit of PostgreSQL's settings: `"500ms"`, `"5s"`, `"1min"`.
Duration: TypeAlias = float | timedelta | str

#: The value of a setting of PostgreSQL. A `timedelta` becomes a number with the unit ms or us.
SettingValue: TypeAlias = str | int | float | bool | timedelta

#: Settings of a transaction, by name: `{"app.tenant_id": "7", "statement_timeout": "2s"}`.
Settings: TypeAlias = Mapping[str, SettingValue]

#: Settings, or a function without parameters that returns those of a unit of work that begins.
SettingsOrFunction: TypeAlias = Settings | Callable[[], Settings]

#: What the rest of the time of a deadline was spent on; see `DeadlineExceededError`.
SpentOn: TypeAlias = Literal["pool", "lock", "statement", "retry", "wait"]

#: What `lock_tables` locks: a mapped class or a table.
TableTarget: TypeAlias = type[Any] | FromClause

#: The key of `advisory_lock`: 64 bits, twice 32 bits, or a string.
AdvisoryKey: TypeAlias = int | tuple[int, int] | str

#: What `list_lock_waits` asks.
LockWaitSource: TypeAlias = AsyncConnection | AsyncSession | AsyncEngine

#: A mode of `lock_tables`: a member of `LockMode`, its value or its name. A checker refuses a mode
#: that does not exist, and therefore a variable of type `str` too: pass `LockMode(variable)`, which
#: takes a value or a name in any case.
LockModeSpelling: TypeAlias = (
    LockMode
    | Literal[
        "ACCESS SHARE",
        "ACCESS_SHARE",
        "access share",
        "access_share",
        "ROW SHARE",
        "ROW_SHARE",
        "row share",
        "row_share",
        "ROW EXCLUSIVE",
        "ROW_EXCLUSIVE",
        "row exclusive",
        "row_exclusive",
        "SHARE UPDATE EXCLUSIVE",
        "SHARE_UPDATE_EXCLUSIVE",
        "share update exclusive",
        "share_update_exclusive",
        "SHARE",
        "share",
        "SHARE ROW EXCLUSIVE",
        "SHARE_ROW_EXCLUSIVE",
        "share row exclusive",
        "share_row_exclusive",
        "EXCLUSIVE",
        "exclusive",
        "ACCESS EXCLUSIVE",
        "ACCESS_EXCLUSIVE",
        "access exclusive",
        "access_exclusive",
    ]
)

#: A mode of `lock_rows` in the same spellings; `RowLockMode(variable)` for a `str`.
RowLockModeSpelling: TypeAlias = (
    RowLockMode
    | Literal[
        "UPDATE",
        "update",
        "NO KEY UPDATE",
        "NO_KEY_UPDATE",
        "no key update",
        "no_key_update",
        "SHARE",
        "share",
        "KEY SHARE",
        "KEY_SHARE",
        "key share",
        "key_share",
    ]
)

#: A column that is watched: an attribute, `Order.status`, or its name. An attribute's type does not
#: say of which class it is, so one of another model is a `TypeError` at run time only.
ColumnAttribute: TypeAlias = Mapped[Any] | str


class _Collection(Protocol):
    """A collection of anything. A `str` does not fit: its `__contains__` takes strings only."""

    def __contains__(self, item: object, /) -> bool: ...

    def __iter__(self) -> Iterator[Any]: ...


#: A primary key that cannot be a character of a string.
_OtherKey: TypeAlias = (
    int
    | float
    | Decimal
    | UUID
    | date
    | time
    | timedelta
    | bytes
    | Enum
    | tuple[Any, ...]
    | Mapping[str, Any]
)

#: Primary keys of several rows: scalars, or tuples or mappings for composite keys, in any
#: collection or iterator. A `str`, which is an iterable of its characters, is refused, and so is a
#: variable of type `Iterable[str]`, which may hold a `str`: annotate it as `Collection[str]`.
PrimaryKeys: TypeAlias = Iterable[_OtherKey] | Iterator[Any] | _Collection

#: The class on the other side of a Many-to-Many relationship.
Related = TypeVar("Related")


class _Instance(Protocol):
    """An instance of a mapped class: of one row, or of the rows of a `WriteOnlyMapped`."""

    __mapper__: ClassVar[Mapper[Any]]


class _OtherCollection(Protocol):
    """A collection that is annotated as a `Sequence`, or is of a class of its own.

    A `str` does not fit: its items are strings. A list, a set or a dict does not fit because it is
    not hashable: `ManyToMany` names these three, and so knows the class of their items.
    """

    def __hash__(self) -> int: ...

    def __iter__(self) -> Iterator[_Instance]: ...


#: A Many-to-Many relationship, such as `Post.tags`; `Post.title` and `post.tags` do not fit. The
#: three mutable collections are invariant, so a checker refuses an instance of another class than
#: that of their items. Whether the relationship has an association table is not in its type: the
#: functions check that before any SQL.
ManyToMany: TypeAlias = Mapped[
    list[Related]
    | MutableSet[Related]
    | MutableMapping[Any, Related]
    | _OtherCollection
    | _Instance
    | None
]


class CommitObserver(Protocol):
    """Observes each COMMIT of a unit of work. Both methods run in SQLAlchemy's greenlet."""

    def before_commit(self, connection: Connection) -> None:
        """Look at the transaction just before its COMMIT. An error keeps it from being sent."""
        ...

    def after_commit(self, connection: Connection) -> None:
        """Look at the connection after the COMMIT. It raises nothing: the work is stored."""
        ...


class ReadTokens(Protocol):
    """Puts tokens for readers into responses: what `create_db_dependency` takes as `replicas`.

    `pgtoolset.ReadReplicas` is one.
    """

    def observer_of(self, scope: MutableMapping[str, Any]) -> CommitObserver | None:
        """Return what observes the commits of a request; `None` where it has no response.

        Raises:
            TransactionStateError: nothing would put the token into the response.
        """
        ...
