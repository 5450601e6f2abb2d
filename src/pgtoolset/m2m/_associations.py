"""What the functions know of a Many-to-Many relationship."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from sqlalchemy import Column, Table
from sqlalchemy.orm import Mapper

from pgtoolset._arguments import KeyParser, shown

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True, eq=False)
class End:
    """One end of a relationship: a mapped class, and how the association table refers to it.

    Attributes:
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

    @property
    def name(self) -> str:
        return shown(self.mapper.class_)

    def are_exact(self, columns: Sequence[list[Any]]) -> bool:
        """Whether keys need not be parsed one by one, given their values at `positions`."""
        order = self.key_order
        return order is not None and self.parser.are_exact([columns[at] for at in order])


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
        unique: whether a unique constraint covers exactly the pair.
        collides: whether rows of different pairs might violate another unique constraint.
    """

    name: str
    table: Table
    owner: End
    related: End
    shared: dict[int, int]
    extras: tuple[Column[Any], ...]
    unique: bool
    collides: bool
    _made: dict[Hashable, Any] = field(default_factory=dict)

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
