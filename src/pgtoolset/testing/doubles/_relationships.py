"""A Many-to-Many relationship on plain keys: what the association table has for two keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Column, Table
from sqlalchemy import inspect as inspect_instance
from sqlalchemy.orm import Mapper
from sqlalchemy.orm.attributes import QueryableAttribute
from sqlalchemy.schema import PrimaryKeyConstraint, UniqueConstraint

from pgtoolset._arguments import KeyParser, PrimaryKey, check_relationship, shown
from pgtoolset._text import printable
from pgtoolset.testing.doubles._refusals import no_database
from pgtoolset.testing.doubles._rows import MemoryRow, in_order, model_of, table_of, values_of
from pgtoolset.testing.doubles._work import Place, Work


class End:
    """One end of a relationship: a mapped class, and how the association table refers to it.

    Attributes:
        mapper: of the class.
        table: the table of its primary key.
        parser: of its keys.
        columns: of the association table, and where their values stand in the primary key.
    """

    def __init__(self, name: str, mapper: Mapper[Any], pairs: Sequence[tuple[Any, Any]]) -> None:
        self.mapper = mapper
        self.table = table_of(mapper)
        self.parser = KeyParser(mapper)
        self.columns: dict[Column[Any], int] = {}
        self._name = name
        for referenced, column in pairs:
            position = _position(mapper, referenced)
            if position is not None:
                self.columns[column] = position
        if set(self.columns.values()) != set(range(len(mapper.primary_key))):
            raise no_database(
                f"{name} does not refer to the primary key of {shown(mapper.class_)}, and the "
                "doubles know an instance by its key alone"
            )

    def key_of(self, item: object) -> PrimaryKey:
        """The key of an instance, which is read from its attributes and not loaded."""
        class_, names = self.mapper.class_, self.parser.attributes
        if isinstance(item, MemoryRow) and issubclass(model_of(item), class_):
            values = values_of(item)
        elif isinstance(item, class_):
            # An expired instance has lost its attributes and kept its identity.
            state: Any = inspect_instance(item)
            values = dict(zip(names, state.identity or (), strict=False)) | state.dict
        else:
            raise TypeError(
                f"{self._name} takes instances of {shown(class_)}, not {shown(item)}{_hint(item)}"
            )
        for name in names:
            if values.get(name) is None:
                raise ValueError(
                    f"{self._name}: {shown(item)} has no primary key: its {name} is not set"
                )
        return tuple(values[name] for name in names)

    def key_or_instance(self, name: str, item: object) -> PrimaryKey:
        """The key that is given as an instance or as itself."""
        class_ = self.mapper.class_
        if isinstance(item, MemoryRow | class_):
            return self.key_of(item)
        return self.parser.parse(name, item)


def _hint(item: object) -> str:
    if isinstance(item, list | tuple | set | frozenset):
        return "; unpack a collection with *"
    return "" if hasattr(item, "_sa_instance_state") else "; a primary key goes into pks"


def _position(mapper: Mapper[Any], referenced: Column[Any]) -> int | None:
    """Where the value of a column stands in the primary key."""
    for position, column in enumerate(mapper.primary_key):
        if column is referenced:
            return position
        assert isinstance(column, Column)
        # The key of a joined table refers to the key of the table above.
        if referenced.primary_key and referenced.table is not column.table:
            if referenced.references(column):
                return position
    return None


class Relationship:
    """A Many-to-Many relationship: `TypeError` where it is not one.

    Attributes:
        name: `"Post.tags"`.
        table: the association table.
        owner: the end that has the attribute.
        related: the end that the attribute shows.
    """

    def __init__(self, rel_attr: object) -> None:
        prop = check_relationship(rel_attr)
        assert isinstance(prop.secondary, Table)
        self.name = f"{shown(prop.parent.class_)}.{printable(prop.key)}"
        self.table: Table = prop.secondary
        self.owner = End(self.name, prop.parent, prop.synchronize_pairs)
        self.related = End(self.name, prop.mapper, prop.secondary_synchronize_pairs or ())
        self._columns = list(dict.fromkeys([*self.owner.columns, *self.related.columns]))
        self._columns.sort(key=lambda column: list(self.table.columns).index(column))

    @property
    def is_unique(self) -> bool:
        """Whether the table is known to refuse an association that exists."""
        return any(
            isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint)
            and 0 < len(constraint.columns)
            and set(constraint.columns) <= set(self._columns)
            for constraint in self.table.constraints
        )

    def place(self, owner: PrimaryKey, related: PrimaryKey) -> Place:
        """Where the association of two keys is: the same seen from either end."""
        values: dict[Column[Any], Any] = {}
        for end, key in ((self.owner, owner), (self.related, related)):
            for column, at in end.columns.items():
                if values.setdefault(column, key[at]) != key[at]:
                    raise ValueError(
                        f"{self.name}: owner and related share {column.name} of "
                        f"{self.table.name}, and their values differ"
                    )
        return self.table, tuple(values[column] for column in self._columns)

    def keys(self, place: Place) -> tuple[PrimaryKey, PrimaryKey]:
        """The keys of owner and related that an association has."""
        values = dict(zip(self._columns, place[1], strict=True))
        return _key(self.owner, values), _key(self.related, values)


def _key(end: End, values: Mapping[Column[Any], Any]) -> PrimaryKey:
    by_position = {at: values[column] for column, at in end.columns.items()}
    return tuple(by_position[at] for at in sorted(by_position))


def pairs_of(work: Work, rel_attr: QueryableAttribute[Any]) -> list[tuple[Any, Any]]:
    """The associations that a session sees, as pairs of keys."""
    relationship = Relationship(rel_attr)
    pairs = [relationship.keys(place) for place in in_order(work.places(relationship.table))]
    return [
        (
            owner[0] if len(owner) == 1 else owner,
            related[0] if len(related) == 1 else related,
        )
        for owner, related in pairs
    ]
