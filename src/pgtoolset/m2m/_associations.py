"""What the functions know of a Many-to-Many relationship."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Column, Table, Update, update
from sqlalchemy.orm import Mapper

from pgtoolset._arguments import KeyParser

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """One end of a relationship: a mapped class, and how the association table refers to it.

    Attributes:
        name: of the class, as messages show it. To make it takes as long as the rest of a call.
        mapper: of the class.
        parser: of its primary keys.
        width: the number of columns of a primary key.
        columns: the columns of the association table that refer to it.
        referenced: the columns of the class's tables that they refer to.
        attributes: the names of the attributes of those.
        positions: where in the primary key their values are; `None` where one is not in it.
        key_order: where in `columns` the values of a primary key are; `None` where they are not
            all there.
        collections: the names of the attributes of the class that show rows of the association
            table and are loaded as a whole.
        has_one_spelling: whether two keys that differ in Python are two keys in PostgreSQL.
    """

    name: str
    mapper: Mapper[Any]
    parser: KeyParser
    columns: tuple[Column[Any], ...]
    referenced: tuple[Column[Any], ...]
    attributes: tuple[str, ...]
    positions: tuple[int, ...] | None
    key_order: tuple[int, ...] | None
    width: int
    collections: tuple[str, ...]
    has_one_spelling: bool

    def are_exact(self, columns: Sequence[list[Any]]) -> bool:
        """Whether keys need not be parsed one by one, given their values at `positions`."""
        order = self.key_order
        return order is not None and self.parser.are_exact([columns[at] for at in order])


@dataclass(frozen=True, slots=True, eq=False)
class AssociationObject:
    """A class that is mapped to an association table.

    Attributes:
        mapper: of the class.
        owner: the attributes of the columns that refer to the owner.
        related: the attributes of the columns that refer to the related row.
    """

    mapper: Mapper[Any]
    owner: tuple[str, ...]
    related: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Association:
    """A Many-to-Many relationship, seen from its owner.

    Attributes:
        name: `"Post.tags"`.
        table: the association table.
        owner: the end that has the attribute.
        related: the end that the attribute shows.
        shared: the columns of both ends: their positions in `related.columns`, and in the owner's.
        extras: the table's columns beyond the keys that can be written.
        generated: the columns that have another value in each row.
        viewers: mapped classes that are neither end, with the attributes that show rows of the
            table.
        objects: the classes that are mapped to the table itself.
        prefix: of the names of parameters and aliases; see `pgtoolset.m2m._names`.
        write: what the statements are to `Session.get_bind`, in which the documented recipes look
            for UPDATE and DELETE to find the writer.
    """

    name: str
    table: Table
    owner: End
    related: End
    shared: dict[int, int]
    extras: tuple[Column[Any], ...]
    generated: tuple[Column[Any], ...]
    viewers: tuple[tuple[Mapper[Any], tuple[str, ...]], ...]
    objects: tuple[AssociationObject, ...]
    prefix: str
    write: Update = field(init=False)
    _made: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "write", update(self.table))

    @property
    def bind_arguments(self) -> dict[str, Any]:
        """What leads the session to the database of the table, and to the one that is written."""
        return {"mapper": self.owner.mapper, "clause": self.write}

    def in_table_order(self, columns: Mapping[str, Column[Any]]) -> list[str]:
        """Return the names of `columns` in an order that is the same from either side."""
        order = list(self.table.columns)
        return sorted(columns, key=lambda name: order.index(columns[name]))

    @property
    def related_columns(self) -> list[Column[Any]]:
        """The related columns that are not the owner's too."""
        columns = enumerate(self.related.columns)
        return [column for position, column in columns if position not in self.shared]

    @property
    def pair(self) -> list[Column[Any]]:
        """The columns that identify an association: the owner's, then the related."""
        return [*self.owner.columns, *self.related_columns]

    def once(
        self, make: Callable[Concatenate[Association, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Return `make(self, ...)`, which is called once for each set of arguments.

        SQLAlchemy's cache of compiled statements is keyed by the whole statement; building that and
        its key takes longer than to insert a row.
        """
        key = (make, args, *kwargs.items())
        made: T | None = self._made.get(key)
        if made is None:
            made = self._made[key] = make(self, *args, **kwargs)
        return made
