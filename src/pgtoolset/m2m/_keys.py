"""Keys without a lazy load: from the identity, or where that does not have them, by one explicit
SELECT."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm.attributes import instance_state

from pgtoolset.errors import RowNotFoundError
from pgtoolset.m2m._arguments import Key
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._statements import referenced_values


async def referenced_keys(
    session: AsyncSession,
    association: Association,
    end: End,
    instances: Sequence[Any],
    keys: Sequence[Key],
) -> list[Key]:
    """What the association table has for each of `instances`, then of `keys`, where it does not
    refer to their key.

    Raises:
        RowNotFoundError: a row that had to be looked at is not there.
    """
    found: list[Key | None] = []
    missing: dict[Key, list[int]] = {}
    for instance in instances:
        state: Any = instance_state(instance)
        loaded = state.dict
        if all(name in loaded for name in end.attributes):
            found.append(tuple([loaded[name] for name in end.attributes]))
        else:
            missing.setdefault(state.key[1], []).append(len(found))
            found.append(None)
    for key in keys:
        missing.setdefault(key, []).append(len(found))
        found.append(None)
    if missing:
        selected = await _select(session, association, end, list(missing))
        for key, places in missing.items():
            for at in places:
                found[at] = selected.get(key)
    result: list[Key] = []
    for at, value in enumerate(found):
        if value is None:
            absent = next(key for key, places in missing.items() if at in places)
            raise not_found(association, end, absent)
        if None in value:
            raise ValueError(
                f"{association.name}: {', '.join(end.attributes)} of a {end.name} is NULL"
            )
        result.append(value)
    return result


def not_found(association: Association, end: End, key: Key) -> RowNotFoundError:
    """The error for a key that has no row, where a column of the row is needed."""
    return RowNotFoundError(
        f"{association.name}: there is no {end.name} with the primary key "
        f"{key[0] if len(key) == 1 else key!r}, so its {', '.join(end.attributes)} cannot be looked up"
    )


async def _select(
    session: AsyncSession, association: Association, end: End, keys: list[Key]
) -> dict[Key, Key]:
    width = len(end.mapper.primary_key)
    shape = ("referenced", end is association.owner)
    statement: Any = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = referenced_values(end)
    assert isinstance(statement, Select)
    parameters = {f"k{at}": [key[at] for key in keys] for at in range(width)}
    rows = await session.execute(statement, parameters, bind_arguments={"mapper": end.mapper})
    return {tuple(row[:width]): tuple(row[width:]) for row in rows}


def identities(items: Sequence[Any]) -> list[Key]:
    """The identities of instances; a key among them is one already, but for the tuple around it."""
    found = []
    for item in items:
        state: Any = getattr(item, "_sa_instance_state", None)
        found.append(
            state.key[1] if state is not None else item if isinstance(item, tuple) else (item,)
        )
    return found


def columns_of(rows: Iterable[Key], positions: Sequence[int]) -> list[list[Any]]:
    """The rows, each once: a list for each of `positions` in them."""
    once = list(dict.fromkeys(tuple([row[position] for position in positions]) for row in rows))
    return [[row[at] for row in once] for at in range(len(positions))]


def check_shared(
    association: Association, owner: Sequence[Any], related: Sequence[Sequence[Any]]
) -> None:
    """A column that belongs to both keys has one value: owner and related must agree on it."""
    for position, at in association.shared.items():
        theirs = owner[at] if isinstance(owner[at], list) else [owner[at]] * len(related[position])
        for one, other in zip(theirs, related[position], strict=True):
            if one != other:
                raise ValueError(
                    f"{association.name}: owner and related share {association.owner.columns[at].name} of "
                    f"{association.table.name}, but the owner has {one!r} and the related {other!r}"
                )
