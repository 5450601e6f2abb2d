"""Many-to-many associations, written directly: no collection is loaded, and any number goes in one
statement."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import check_flag, sync_session
from pgtoolset.m2m import _statements as statements
from pgtoolset.m2m._arguments import (
    check_instances,
    check_values,
    listed,
)
from pgtoolset.m2m._associations import association_of
from pgtoolset.m2m._extras import extras_of
from pgtoolset.m2m._keys import check_shared
from pgtoolset.m2m._preparing import (
    Touched,
    divided,
    ends_of,
    execute,
    lock_owner,
    owner_and_columns,
    pair_columns,
    parameters_of,
)
from pgtoolset.types import ManyToMany, PrimaryKeys, Related
from pgtoolset.values import M2MChange

__all__ = ["m2m_add", "m2m_add_many", "m2m_remove", "m2m_set"]


async def m2m_add(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: PrimaryKeys = (),
    ignore_conflicts: bool = False,
    values: Mapping[str, Any] | None = None,
) -> int:
    """Associate `instance` with each of `related` and `pks` in one INSERT, whatever their number.

    Nothing is lazily loaded: expired, detached and never-loaded instances work. Pending ones, and
    everything else that the session has pending, are flushed first. Collections that show the
    association are expired afterwards.

    Args:
        session: an `AsyncSession`; the rows belong to its transaction.
        instance: the owner, an instance of the class that has the relationship.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class. One that occurs twice counts once.
        pks: primary keys of more of them; a composite one is a tuple in the mapper's order.
        ignore_conflicts: skip associations that exist, in place of an `IntegrityError`.
        values: extra columns of the association table, by column name, the same for every row.
            Defaults, Python-side ones included, are evaluated once per row.

    Returns:
        How many rows were inserted.

    Raises:
        TypeError: `rel_attr` is no writable Many-to-Many relationship, or an argument is of the
            wrong class.
        ValueError: an instance is transient or deleted, a key does not fit, or `values` names an
            unknown column; all of these before any SQL.
        RowNotFoundError: the association table refers to a unique column that is not the primary
            key, and the row of a key among `pks` is not there to be looked at.
        sqlalchemy.exc.IntegrityError: an association exists already, or a row that it refers to
            does not.

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
    sync = sync_session(session)
    check_instances(sync, association, association.owner, [instance])
    keys = listed("pks", "primary keys", pks)
    if not related and not keys:
        return 0
    owner, columns = await owner_and_columns(session, sync, association, instance, related, keys)
    extras = extras_of(association, given)
    one = (
        len(columns[0]) == 1
        and not extras.array_columns
        and (association.unique or not ignore_conflicts)
    )
    shape = ("add", frozenset(given), ignore_conflicts, one)
    statement = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = (
            statements.insertion_of_one(association, extras, ignore_conflicts=ignore_conflicts)
            if one
            else statements.insertion(
                association, extras, many=False, ignore_conflicts=ignore_conflicts
            )
        )
    parameters = parameters_of(
        association, owner, [column[0] for column in columns] if one else columns
    )
    if extras.columns:
        named = dict(zip(association.pair, parameters.values(), strict=True))
        parameters |= extras.parameters(given, named, len(columns[0]))
    ends = ends_of(association, instance, related, keys)
    return int((await execute(session, sync, association, statement, parameters, *ends)).rowcount)


async def m2m_remove(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: PrimaryKeys = (),
) -> int:
    """Undo the associations of `instance` with `related` and `pks` in one DELETE; those that do not
    exist are no error.

    As with `m2m_add`, nothing is lazily loaded, what is pending is flushed first, and collections
    are expired.

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
    sync = sync_session(session)
    check_instances(sync, association, association.owner, [instance])
    keys = listed("pks", "primary keys", pks)
    if not related and not keys:
        return 0
    owner, columns = await owner_and_columns(session, sync, association, instance, related, keys)
    statement = association.statements.get("remove")
    if statement is None:
        statement = association.statements["remove"] = statements.deletion(association)
    parameters = parameters_of(association, owner, columns)
    ends = ends_of(association, instance, related, keys)
    return int((await execute(session, sync, association, statement, parameters, *ends)).rowcount)


async def m2m_set(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: PrimaryKeys = (),
    values: Mapping[str, Any] | None = None,
    keep_existing: bool = False,
) -> M2MChange:
    """Make the associations of `instance` exactly `related` and `pks`, as if all had been deleted
    and these inserted.

    What is there and wanted stays; only where the association table has columns beyond the keys it
    is rewritten, with `values` and defaults, unless `keep_existing`. Of two calls for one owner at
    the same time, the second waits for the first one's transaction (its row is locked FOR NO KEY
    UPDATE), and the result is that of one of them, never a mixture. Under REPEATABLE READ and
    SERIALIZABLE the second is a serialization failure; `run_transaction` tries it again.

    Args:
        session: an `AsyncSession`.
        instance: the owner.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class; none, and no `pks` either, clears.
        pks: primary keys of more of them; a composite one is a tuple in the mapper's order.
        values: extra columns of the association table, by column name, the same for every row that
            is written.
        keep_existing: leave the extra columns of associations that exist already as they are.

    Returns:
        How many associations were added and how many removed; one that was only rewritten counts as
        neither.

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
    sync = sync_session(session)
    check_instances(sync, association, association.owner, [instance])
    keys = listed("pks", "primary keys", pks)
    owner, columns = await owner_and_columns(session, sync, association, instance, related, keys)
    extras = extras_of(association, given)
    rewrite = bool(association.extras) and not keep_existing
    shape = ("set", frozenset(given), rewrite)
    statement = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = statements.replacement(
            association, extras, rewrite=rewrite
        )
    parameters = parameters_of(association, owner, columns)
    named = dict(zip(association.pair, parameters.values(), strict=True))
    parameters |= extras.parameters(given, named, len(columns[0]))
    await lock_owner(session, association, owner)
    ends = ends_of(association, instance, related, None)
    added, removed = (await execute(session, sync, association, statement, parameters, *ends)).one()
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

    As with `m2m_add`, nothing is lazily loaded, what is pending is flushed first, and collections
    are expired.

    Args:
        session: an `AsyncSession`.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        links: pairs (owner, related), each of the two an instance or a primary key. A pair that
            occurs twice counts once.
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
    sync = sync_session(session)
    pairs = listed("links", "pairs (owner, related)", links)
    if not pairs:
        return 0
    columns, width = await pair_columns(session, sync, association, pairs)
    check_shared(association, columns[:width], columns[width:])
    extras = extras_of(association, given)
    shape = ("add_many", frozenset(given), ignore_conflicts)
    statement = association.statements.get(shape)
    if statement is None:
        statement = association.statements[shape] = statements.insertion(
            association, extras, many=True, ignore_conflicts=ignore_conflicts
        )
    parameters = parameters_of(association, columns[:width], columns[width:])
    named = dict(zip(association.pair, parameters.values(), strict=True))
    parameters |= extras.parameters(given, named, len(columns[0]))
    ends: list[Touched] = []
    for at, end in enumerate((association.owner, association.related)):
        if end.collections:
            ends.append((end, *divided(end, [pair[at] for pair in pairs])))
    return int((await execute(session, sync, association, statement, parameters, *ends)).rowcount)
