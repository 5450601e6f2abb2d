"""What the four functions share: keys as columns, the lock on the owner, collections that are
expired."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from sqlalchemy import Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgtoolset._native import association_rows
from pgtoolset.m2m import _statements as statements
from pgtoolset.m2m._arguments import (
    Key,
    check_instances,
    check_key,
    check_links,
)
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._collections import expire, remember
from pgtoolset.m2m._keys import check_shared, columns_of, identities, referenced_keys

#: An end of a relationship, and whose collections there a call changes: those of instances and of
#: keys; `None`: of all.
Touched: TypeAlias = tuple[End, Sequence[Any], Sequence[Any] | None]


def ends_of(
    association: Association, instance: Any, related: Sequence[Any], keys: Sequence[Any] | None
) -> tuple[Touched, Touched]:
    return (association.owner, [instance], ()), (association.related, related, keys)


def has_pending(sync: Session) -> bool:
    # Whatever it is, as autoflush would have it: a change to a collection may hide behind any
    # instance.
    return bool(sync.new or sync.dirty or sync.deleted)


async def owner_and_columns(
    session: AsyncSession,
    sync: Session,
    association: Association,
    instance: Any,
    related: Sequence[Any],
    keys: Sequence[Any],
) -> tuple[list[Any], list[list[Any]]]:
    """Check what is given, and flush what is pending; the owner's key, and the related keys as
    columns."""
    owner, end = association.owner, association.related
    class_, width = end.mapper.class_, len(end.mapper.primary_key)
    pending = has_pending(sync)
    columns: list[list[Any]] | int = 0
    if end.positions is not None and not sync.deleted:
        columns = association_rows.key_columns(class_, related, keys, width, end.positions)
    if isinstance(columns, int):
        check_instances(sync, association, end, related)
        keys = [check_key(association, end, key) for key in keys]
    if pending:
        await session.flush()
    if end.positions is None:
        found = await referenced_keys(session, association, end, related, keys)
        columns = columns_of(found, range(len(end.columns)))
    elif pending or isinstance(columns, int):
        # Instances have got identities by the flush, or other ones, and keys have become tuples.
        columns = association_rows.key_columns(class_, related, keys, width, end.positions)
        if isinstance(columns, int):
            columns = columns_of(identities([*related, *keys]), end.positions)
    if owner.positions is None:
        (key,) = await referenced_keys(session, association, owner, [instance], ())
        owner_key = list(key)
    else:
        (key,) = identities([instance])
        owner_key = [key[position] for position in owner.positions]
    if association.shared:
        check_shared(association, owner_key, columns)
    return owner_key, columns


async def pair_columns(
    session: AsyncSession, sync: Session, association: Association, pairs: Sequence[Any]
) -> tuple[list[list[Any]], int]:
    """Check what is given, and flush what is pending; the keys of both as columns, and how many are
    the owners'."""
    owner, related = association.owner, association.related
    pending = has_pending(sync)
    columns: list[list[Any]] | int = 0

    def build() -> list[list[Any]] | int:
        if owner.positions is None or related.positions is None:
            return 0
        classes = owner.mapper.class_, related.mapper.class_
        widths = len(owner.mapper.primary_key), len(related.mapper.primary_key)
        return association_rows.pair_columns(
            classes, pairs, widths, (owner.positions, related.positions)
        )

    if not sync.deleted:
        columns = build()
    if isinstance(columns, int):
        pairs = check_links(sync, association, pairs)
    if pending:
        await session.flush()
    if pending or isinstance(columns, int):
        columns = build()
    if not isinstance(columns, int):
        assert owner.positions is not None
        return columns, len(owner.positions)
    owners, owner_positions = await _keys_in_order(
        session, association, owner, [pair[0] for pair in pairs]
    )
    keys, positions = await _keys_in_order(
        session, association, related, [pair[1] for pair in pairs]
    )
    offset = len(owners[0])
    both = [one + other for one, other in zip(owners, keys, strict=True)]
    columns = columns_of(both, [*owner_positions, *(offset + position for position in positions)])
    return columns, len(owner_positions)


async def _keys_in_order(
    session: AsyncSession, association: Association, end: End, items: Sequence[Any]
) -> tuple[list[Key], Sequence[int]]:
    """The key of each of `items`, and the positions in them."""
    if end.positions is not None:
        return identities(items), end.positions
    instances, keys = divided(end, items)
    found = await referenced_keys(session, association, end, instances, keys)
    of_instances, of_keys = iter(found[: len(instances)]), iter(found[len(instances) :])
    ordered = [next(of_keys) if isinstance(item, tuple) else next(of_instances) for item in items]
    return ordered, range(len(end.columns))


def divided(end: End, items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The instances among them, and the keys."""
    class_ = end.mapper.class_
    instances = [item for item in items if isinstance(item, class_)]
    return instances, [item for item in items if not isinstance(item, class_)]


def parameters_of(
    association: Association, owner: Sequence[Any], related: Sequence[Any]
) -> dict[str, Any]:
    """The keys by the names of their parameters, in the order of `association.pair`."""
    parameters = {f"o{at}": value for at, value in enumerate(owner)}
    own = [column for at, column in enumerate(related) if at not in association.shared]
    return parameters | {f"r{at}": column for at, column in enumerate(own)}


async def lock_owner(session: AsyncSession, association: Association, owner: Sequence[Any]) -> None:
    end = association.owner
    shape = "lock"
    if shape not in association.statements:
        association.statements[shape] = statements.lock(end)
    table = end.referenced[0].table
    parameters = {
        f"o{at}": value for at, value in enumerate(owner) if end.referenced[at].table is table
    }
    bind = {"mapper": end.mapper}
    level = await session.scalar(association.statements[shape], parameters, bind_arguments=bind)
    if level in ("repeatable read", "serializable"):
        update = statements.touch(end)
        if update is not None:
            await session.execute(update, parameters, bind_arguments=bind)


async def execute(
    session: AsyncSession,
    sync: Session,
    association: Association,
    statement: Executable,
    parameters: dict[str, Any],
    *ends: Touched,
) -> Any:
    """Execute, and expire what shows the associations: after a cancellation too, when nobody knows
    what was done."""
    try:
        remember(sync, association)
        bind = {"mapper": association.owner.mapper, "clause": association.table}
        result = await session.execute(statement, parameters, bind_arguments=bind)
    except DBAPIError:
        raise  # nothing was written
    except BaseException:
        for end, instances, keys in ends:
            expire(sync, end, instances, keys)
        raise
    for end, instances, keys in ends:
        expire(sync, end, instances, keys)
    return result
