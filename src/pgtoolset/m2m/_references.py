"""Keys where the association table refers to a unique column that is not the primary key.

Its value is taken from the instance, or where that has not loaded it from one explicit SELECT.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import instance_state

from pgtoolset._arguments import PrimaryKey, shown
from pgtoolset._compatibility import execute_of
from pgtoolset._postgres.arrays import equals, unnest
from pgtoolset._text import printable
from pgtoolset.errors import RowNotFoundError
from pgtoolset.m2m._associations import Association, End


async def referenced_values(
    session: AsyncSession,
    association: Association,
    end: End,
    instances: Sequence[Any],
    keys: Sequence[PrimaryKey],
) -> list[tuple[Any, ...]]:
    """Return the values that the association table has for `instances`, then those for `keys`.

    Raises:
        RowNotFoundError: a row that had to be read does not exist.
        ValueError: a value is NULL, so no association can refer to it.
    """
    loaded = [_loaded(end, instance) for instance in instances]
    missing = [
        instance_state(instance).key[1]  # type: ignore[index]  # flushed, so it has an identity
        for instance, values in zip(instances, loaded, strict=True)
        if values is None
    ]
    read = iter(await _read(session, association, end, [*missing, *keys]))
    found = [next(read) if values is None else values for values in loaded] + list(read)
    if any(None in values for values in found):
        raise ValueError(
            f"{association.name}: {printable(', '.join(end.attributes))} of an instance of "
            f"{end.name} is NULL"
        )
    return found


def _loaded(end: End, instance: Any) -> tuple[Any, ...] | None:
    """Return the values where the instance has all of them loaded."""
    loaded = instance_state(instance).dict
    if all(name in loaded for name in end.attributes):
        return tuple([loaded[name] for name in end.attributes])
    return None


async def _read(
    session: AsyncSession, association: Association, end: End, keys: list[PrimaryKey]
) -> list[tuple[Any, ...]]:
    """Return the values of the rows with these keys, in their order."""
    if not keys:
        return []
    statement = association.once(_selection, end)
    prefix = association.prefix
    parameters = {f"{prefix}k{at}": [key[at] for key in keys] for at in range(end.width)}
    bind = {"mapper": end.mapper, "clause": association.write}
    rows = await execute_of(session)(statement, parameters, bind_arguments=bind)
    found = {position: tuple(values) for position, *values in rows}
    for position, key in enumerate(keys, start=1):
        if position not in found:
            raise RowNotFoundError(
                f"{association.name}: there is no {end.name} with the primary key "
                f"{shown(key[0] if len(key) == 1 else key)}, so its "
                f"{printable(', '.join(end.attributes))} cannot be read"
            )
    return [found[position] for position in range(1, len(keys) + 1)]


def _selection(association: Association, end: End) -> Select[Any]:
    """SELECT the referenced columns by primary key.

    Each row has the position of its key: PostgreSQL may spell a key otherwise than the caller.
    """
    prefix = association.prefix
    keys: Any = {f"{prefix}k{at}": column for at, column in enumerate(end.mapper.primary_key)}
    wanted = unnest(f"{prefix}wanted", keys, ordinality=f"{prefix}n")
    columns: Any = select(wanted.c[f"{prefix}n"], *end.referenced)
    statement: Select[Any] = columns.select_from(wanted, end.mapper.selectable).where(
        *(equals(column, wanted.c[name]) for name, column in keys.items())
    )
    return statement
