"""Many-to-many associations, written directly: no collection is loaded, and any number goes in one statement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from sqlalchemy import Executable
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from pgtoolset._native import association_rows
from pgtoolset._postgres import associations as statements
from pgtoolset.m2m._arguments import (
    Key,
    check_flag,
    check_instances,
    check_key,
    check_links,
    check_session,
    check_values,
    listed,
)
from pgtoolset.m2m._association import Association, End, association_of
from pgtoolset.m2m._collections import expire, remember
from pgtoolset.m2m._extras import extras_of
from pgtoolset.m2m._keys import check_shared, columns_of, identities, referenced_keys
from pgtoolset.m2m._relationships import ManyToMany, Related
from pgtoolset.values import M2MChange

__all__ = ["m2m_add", "m2m_add_many", "m2m_remove", "m2m_set"]

#: An end of a relationship, and whose collections there a call changes: those of instances and of keys; `None`: of all.
Touched: TypeAlias = tuple[End, Sequence[Any], Sequence[Any] | None]


async def m2m_add(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: Iterable[Any] = (),
    ignore_conflicts: bool = False,
    values: Mapping[str, Any] | None = None,
) -> int:
    """Associate `instance` with each of `related` and `pks` in one INSERT, whatever their number.

    Nothing is lazily loaded: expired, detached and never-loaded instances work. Pending ones, and everything else that
    the session has pending, are flushed first. Collections that show the association are expired afterwards.

    Args:
        session: an `AsyncSession`; the rows belong to its transaction.
        instance: the owner, an instance of the class that has the relationship.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class. One that occurs twice counts once.
        pks: primary keys of more of them; a composite one is a tuple in the mapper's order.
        ignore_conflicts: skip associations that exist, in place of an `IntegrityError`.
        values: extra columns of the association table, by column name, the same for every row. Defaults, Python-side
            ones included, are evaluated once per row.

    Returns:
        How many rows were inserted.

    Raises:
        TypeError: `rel_attr` is no writable Many-to-Many relationship, or an argument is of the wrong class.
        ValueError: an instance is transient or deleted, a key does not fit, or `values` names an unknown column;
            all of these before any SQL.
        RowNotFoundError: the association table refers to a unique column that is not the primary key, and the row of
            a key among `pks` is not there to be looked at.
        sqlalchemy.exc.IntegrityError: an association exists already, or a row that it refers to does not.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_add(session, post, Post.tags, tag, pks=[2, 3], ignore_conflicts=True)
        3

    See https://www.postgresql.org/docs/current/sql-insert.html and
    https://docs.sqlalchemy.org/en/20/orm/basic_relationships.html#many-to-many
    """
    association = association_of(rel_attr)
    check_flag("ignore_conflicts", ignore_conflicts)
    given = check_values(association, values)
    sync = check_session(session)
    check_instances(sync, association, association.owner, [instance])
    keys = listed("pks", "primary keys", pks)
    if not related and not keys:
        return 0
    owner, columns = await _columns(session, sync, association, instance, related, keys)
    extras = extras_of(association, given)
    one = len(columns[0]) == 1 and not extras.array_columns and (association.unique or not ignore_conflicts)
    shape = ("add", frozenset(given), ignore_conflicts, one)
    statement = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = (
            statements.insertion_of_one(association, extras, ignore_conflicts=ignore_conflicts)
            if one
            else statements.insertion(association, extras, many=False, ignore_conflicts=ignore_conflicts)
        )
    parameters = _parameters(association, owner, [column[0] for column in columns] if one else columns)
    if extras.columns:
        named = dict(zip(association.pair, parameters.values(), strict=True))
        parameters |= extras.parameters(given, named, len(columns[0]))
    ends = _ends(association, instance, related, keys)
    return int((await _execute(session, sync, association, statement, parameters, *ends)).rowcount)


async def m2m_remove(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: Iterable[Any] = (),
) -> int:
    """Undo the associations of `instance` with `related` and `pks` in one DELETE; those that do not exist are no error.

    As with `m2m_add`, nothing is lazily loaded, what is pending is flushed first, and collections are expired.

    Args:
        session: an `AsyncSession`.
        instance: the owner.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class.
        pks: primary keys of more of them; a composite one is a tuple in the mapper's order.

    Returns:
        How many rows were deleted.

    Raises:
        TypeError, ValueError, RowNotFoundError: as `m2m_add`.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_remove(session, post, Post.tags, tag, pks=[2, 3])
        0

    See https://www.postgresql.org/docs/current/sql-delete.html
    """
    association = association_of(rel_attr)
    sync = check_session(session)
    check_instances(sync, association, association.owner, [instance])
    keys = listed("pks", "primary keys", pks)
    if not related and not keys:
        return 0
    owner, columns = await _columns(session, sync, association, instance, related, keys)
    statement = association.statements.get("remove")
    if statement is None:
        statement = association.statements["remove"] = statements.deletion(association)
    parameters = _parameters(association, owner, columns)
    ends = _ends(association, instance, related, keys)
    return int((await _execute(session, sync, association, statement, parameters, *ends)).rowcount)


async def m2m_set(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: Iterable[Any] = (),
    values: Mapping[str, Any] | None = None,
    keep_existing: bool = False,
) -> M2MChange:
    """Make the associations of `instance` exactly `related` and `pks`, as if all had been deleted and these inserted.

    What is there and wanted stays; only where the association table has columns beyond the keys it is rewritten, with
    `values` and defaults, unless `keep_existing`. Of two calls for one owner at the same time, the second waits for the
    first one's transaction (its row is locked FOR NO KEY UPDATE), and the result is that of one of them, never a
    mixture. Under REPEATABLE READ and SERIALIZABLE the second is a serialization failure; `run_transaction` tries it
    again.

    Args:
        session: an `AsyncSession`.
        instance: the owner.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class; none, and no `pks` either, clears.
        pks: primary keys of more of them; a composite one is a tuple in the mapper's order.
        values: extra columns of the association table, by column name, the same for every row that is written.
        keep_existing: leave the extra columns of associations that exist already as they are.

    Returns:
        How many associations were added and how many removed; one that was only rewritten counts as neither.

    Raises:
        TypeError, ValueError, RowNotFoundError, sqlalchemy.exc.IntegrityError: as `m2m_add`.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_set(session, post, Post.tags, tag)
        M2MChange(added=1, removed=0)

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
    """
    association = association_of(rel_attr)
    check_flag("keep_existing", keep_existing)
    given = check_values(association, values)
    sync = check_session(session)
    check_instances(sync, association, association.owner, [instance])
    keys = listed("pks", "primary keys", pks)
    owner, columns = await _columns(session, sync, association, instance, related, keys)
    extras = extras_of(association, given)
    rewrite = bool(association.extras) and not keep_existing
    shape = ("set", frozenset(given), rewrite)
    statement = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = statements.replacement(association, extras, rewrite=rewrite)
    parameters = _parameters(association, owner, columns)
    named = dict(zip(association.pair, parameters.values(), strict=True))
    parameters |= extras.parameters(given, named, len(columns[0]))
    await _lock_owner(session, association, owner)
    ends = _ends(association, instance, related, None)
    added, removed = (await _execute(session, sync, association, statement, parameters, *ends)).one()
    return M2MChange(added, removed)


async def m2m_add_many(
    session: AsyncSession,
    rel_attr: ManyToMany[Any],
    links: Iterable[tuple[Any, Any]],
    *,
    ignore_conflicts: bool = False,
    values: Mapping[str, Any] | None = None,
) -> int:
    """Associate every pair of owner and related in one INSERT, whatever their number.

    As with `m2m_add`, nothing is lazily loaded, what is pending is flushed first, and collections are expired.

    Args:
        session: an `AsyncSession`.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        links: pairs (owner, related), each of the two an instance or a primary key. A pair that occurs twice counts
            once.
        ignore_conflicts: skip associations that exist, in place of an `IntegrityError`.
        values: extra columns of the association table, by column name, the same for every row.

    Returns:
        How many rows were inserted.

    Raises:
        TypeError, ValueError, RowNotFoundError, sqlalchemy.exc.IntegrityError: as `m2m_add`.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_add_many(session, Post.tags, [(post, tag), (post, 2), (post.id, 3)])
        3

    See https://www.postgresql.org/docs/current/functions-array.html
    """
    association = association_of(rel_attr)
    check_flag("ignore_conflicts", ignore_conflicts)
    given = check_values(association, values)
    sync = check_session(session)
    pairs = listed("links", "pairs (owner, related)", links)
    if not pairs:
        return 0
    columns, width = await _pair_columns(session, sync, association, pairs)
    check_shared(association, columns[:width], columns[width:])
    extras = extras_of(association, given)
    shape = ("add_many", frozenset(given), ignore_conflicts)
    statement = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = statements.insertion(
            association, extras, many=True, ignore_conflicts=ignore_conflicts
        )
    parameters = _parameters(association, columns[:width], columns[width:])
    named = dict(zip(association.pair, parameters.values(), strict=True))
    parameters |= extras.parameters(given, named, len(columns[0]))
    ends: list[Touched] = []
    for at, end in enumerate((association.owner, association.related)):
        if end.collections:
            ends.append((end, *_divided(end, [pair[at] for pair in pairs])))
    return int((await _execute(session, sync, association, statement, parameters, *ends)).rowcount)


def _ends(
    association: Association, instance: Any, related: Sequence[Any], keys: Sequence[Any] | None
) -> tuple[Touched, Touched]:
    return (association.owner, [instance], ()), (association.related, related, keys)


def _is_pending(sync: Session) -> bool:
    # Whatever it is, as autoflush would have it: a change to a collection may hide behind any instance.
    return bool(sync.new or sync.dirty or sync.deleted)


async def _columns(
    session: AsyncSession,
    sync: Session,
    association: Association,
    instance: Any,
    related: Sequence[Any],
    keys: Sequence[Any],
) -> tuple[list[Any], list[list[Any]]]:
    """Check what is given, and flush what is pending; the owner's key, and the related keys as columns."""
    owner, end = association.owner, association.related
    class_, width = end.mapper.class_, len(end.mapper.primary_key)
    is_pending = _is_pending(sync)
    columns: list[list[Any]] | int = 0
    if end.positions is not None and not sync.deleted:
        columns = association_rows.key_columns(class_, related, keys, width, end.positions)
    if isinstance(columns, int):
        check_instances(sync, association, end, related)
        keys = [check_key(association, end, key) for key in keys]
    if is_pending:
        await session.flush()
    if end.positions is None:
        found = await referenced_keys(session, association, end, related, keys)
        columns = columns_of(found, range(len(end.columns)))
    elif is_pending or isinstance(columns, int):
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


async def _pair_columns(
    session: AsyncSession, sync: Session, association: Association, pairs: Sequence[Any]
) -> tuple[list[list[Any]], int]:
    """Check what is given, and flush what is pending; the keys of both as columns, and how many are the owners'."""
    owner, related = association.owner, association.related
    is_pending = _is_pending(sync)
    columns: list[list[Any]] | int = 0

    def build() -> list[list[Any]] | int:
        if owner.positions is None or related.positions is None:
            return 0
        classes = owner.mapper.class_, related.mapper.class_
        widths = len(owner.mapper.primary_key), len(related.mapper.primary_key)
        return association_rows.pair_columns(classes, pairs, widths, (owner.positions, related.positions))

    if not sync.deleted:
        columns = build()
    if isinstance(columns, int):
        pairs = check_links(sync, association, pairs)
    if is_pending:
        await session.flush()
    if is_pending or isinstance(columns, int):
        columns = build()
    if not isinstance(columns, int):
        assert owner.positions is not None
        return columns, len(owner.positions)
    owners, owner_positions = await _keys_in_order(session, association, owner, [pair[0] for pair in pairs])
    keys, positions = await _keys_in_order(session, association, related, [pair[1] for pair in pairs])
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
    instances, keys = _divided(end, items)
    found = await referenced_keys(session, association, end, instances, keys)
    of_instances, of_keys = iter(found[: len(instances)]), iter(found[len(instances) :])
    ordered = [next(of_keys) if isinstance(item, tuple) else next(of_instances) for item in items]
    return ordered, range(len(end.columns))


def _divided(end: End, items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """The instances among them, and the keys."""
    class_ = end.mapper.class_
    instances = [item for item in items if isinstance(item, class_)]
    return instances, [item for item in items if not isinstance(item, class_)]


def _parameters(association: Association, owner: Sequence[Any], related: Sequence[Any]) -> dict[str, Any]:
    """The keys by the names of their parameters, in the order of `association.pair`."""
    parameters = {f"o{at}": value for at, value in enumerate(owner)}
    own = [column for at, column in enumerate(related) if at not in association.shared]
    return parameters | {f"r{at}": column for at, column in enumerate(own)}


async def _lock_owner(session: AsyncSession, association: Association, owner: Sequence[Any]) -> None:
    end = association.owner
    shape = "lock"
    if shape not in association.statements:
        association.statements[shape] = statements.lock(end)
    table = end.referenced[0].table
    parameters = {f"o{at}": value for at, value in enumerate(owner) if end.referenced[at].table is table}
    bind = {"mapper": end.mapper}
    level = await session.scalar(association.statements[shape], parameters, bind_arguments=bind)
    if level in ("repeatable read", "serializable"):
        update = statements.touch(end)
        if update is not None:
            await session.execute(update, parameters, bind_arguments=bind)


async def _execute(
    session: AsyncSession,
    sync: Session,
    association: Association,
    statement: Executable,
    parameters: dict[str, Any],
    *ends: Touched,
) -> Any:
    """Execute, and expire what shows the associations: after a cancellation too, when nobody knows what was done."""
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
