"""Many-to-Many relationships, read from their mapping."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import BinaryExpression, BooleanClauseList, Column, Table
from sqlalchemy.orm import RelationshipProperty
from sqlalchemy.orm.attributes import QueryableAttribute
from sqlalchemy.sql import operators
from sqlalchemy.sql.elements import Grouping

from pgtoolset._arguments.shown import shown
from pgtoolset._text import printable, safe


def relationship_of(rel_attr: object) -> RelationshipProperty[Any]:
    """Return the mapping of a relationship of any kind that is given as `Post.tags`."""
    if not isinstance(rel_attr, QueryableAttribute):
        raise TypeError(
            "rel_attr must be a Many-to-Many relationship, written as in Post.tags; "
            f"not {shown(rel_attr)}"
        )
    prop: Any = rel_attr.property
    if not isinstance(prop, RelationshipProperty):
        raise TypeError(
            f"rel_attr: {printable(str(rel_attr))} is not a Many-to-Many relationship but a column"
        )
    found: RelationshipProperty[Any] = prop
    return found


def check_relationship(rel_attr: object) -> RelationshipProperty[Any]:
    """Return the mapping of a writable Many-to-Many relationship that is given as `Post.tags`."""
    prop: Any = relationship_of(rel_attr)
    name = f"rel_attr: {shown(prop.parent.class_)}.{printable(prop.key)}"
    if prop.secondary is None:
        raise TypeError(
            f"{name} is not a Many-to-Many relationship: it has no association table (`secondary`)"
        )
    if prop.viewonly:
        raise TypeError(
            f"{name} is a Many-to-Many relationship that is `viewonly`; write through another one"
        )
    if not isinstance(prop.secondary, Table):
        raise TypeError(
            f"{name}: the `secondary` of a Many-to-Many relationship must be a Table, "
            f"not {shown(prop.secondary)}"
        )
    for join, pairs in (
        (prop.primaryjoin, prop.synchronize_pairs),
        (prop.secondaryjoin, prop.secondary_synchronize_pairs),
    ):
        conditions = list(conditions_of(join))
        if len(conditions) != len(pairs or ()) or not all(map(is_equality, conditions)):
            raise TypeError(
                f"{name}: this Many-to-Many relationship has conditions beyond its keys "
                f"({safe(str(join))}), so that its collection does not show every row of an owner, "
                "and a set would delete rows that it does not show; write the rows with insert() "
                "and delete() of the association table"
            )
    checked: RelationshipProperty[Any] = prop
    return checked


def conditions_of(join: Any) -> Iterator[Any]:
    """Yield the conditions of a join that are combined by AND."""
    if isinstance(join, Grouping):
        yield from conditions_of(join.element)
    elif isinstance(join, BooleanClauseList) and join.operator is operators.and_:
        for clause in join.clauses:
            yield from conditions_of(clause)
    else:
        yield join


def is_equality(condition: Any) -> bool:
    """Whether a condition says that two columns are equal."""
    return (
        isinstance(condition, BinaryExpression)
        and condition.operator is operators.eq
        and isinstance(condition.left, Column)
        and isinstance(condition.right, Column)
    )
