"""The four functions that write association tables.

Each reads the same way: check the arguments, resolve the keys, execute one statement.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from pgtoolset._arguments import check_flag
from pgtoolset.m2m._statements import deletion, insertion, insertion_of_one
from pgtoolset.m2m._writer import LinkWriter, OwnerWriter
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
    """Associate `instance` with each of `related` and `pks` in one INSERT.

    Nothing is lazily loaded: expired, detached and never-loaded instances work. Pending instances
    and all other pending changes of the session are flushed first. Loaded collections that show the
    new associations are expired afterwards.

    Args:
        session: an `AsyncSession`; the rows belong to its transaction.
        instance: the owner, an instance of the class that has the relationship.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class. Duplicates count once.
        pks: primary keys of more related rows, each a value or, for a composite key, a tuple in the
            mapper's order or a mapping of attribute names. Duplicates count once, in whatever
            spelling.
        ignore_conflicts: skip associations that exist, in place of an `IntegrityError`.
        values: extra columns of the association table, by column name, the same for every row.
            Defaults, Python-side ones included, are evaluated once per row.

    Returns:
        The number of rows inserted.

    Raises:
        TypeError: `rel_attr` is not a writable Many-to-Many relationship, or an argument or a key
            is of a wrong type; before any SQL.
        ValueError: an instance is transient or deleted, a key does not fit its column, or `values`
            names an unknown column; before any SQL.
        RowNotFoundError: the association table refers to a unique column that is not the primary
            key, and there is no row with one of `pks` to read it from.
        sqlalchemy.exc.IntegrityError: an association exists already, or a row that it refers to
            does not.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_add(session, post, Post.tags, tag, pks=[2, 3], ignore_conflicts=True)
        3

    See https://www.postgresql.org/docs/current/sql-insert.html and
    https://docs.sqlalchemy.org/en/20/orm/basic_relationships.html#many-to-many
    """
    check_flag("ignore_conflicts", ignore_conflicts)
    writer = OwnerWriter(session, rel_attr, instance, related, pks, values)
    if writer.is_empty:
        return 0
    await writer.resolve_keys()
    association, extras, skip = writer.association, writer.extras, ignore_conflicts
    has_arbiter = skip and await writer.has_arbiter()
    one = writer.has_one_row and not extras.array_columns and (has_arbiter or not skip)
    if one:
        statement = association.once(insertion_of_one, extras, skip=skip)
    else:
        statement = association.once(
            insertion, extras, many=False, skip=skip, has_arbiter=has_arbiter
        )
    return int((await writer.execute(statement, one=one)).rowcount)


async def m2m_remove(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: PrimaryKeys = (),
) -> int:
    """Remove the associations of `instance` with `related` and `pks` in one DELETE.

    An association that does not exist is skipped. As with `m2m_add`, nothing is lazily loaded,
    pending changes are flushed first, and loaded collections are expired.

    Args:
        session: an `AsyncSession`; the change belongs to its transaction.
        instance: the owner, an instance of the class that has the relationship.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class.
        pks: primary keys of more related rows, as in `m2m_add`.

    Returns:
        The number of rows deleted.

    Raises:
        TypeError, ValueError, RowNotFoundError: as `m2m_add`.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_remove(session, post, Post.tags, tag, pks=[2, 3])
        0

    See https://www.postgresql.org/docs/current/sql-delete.html
    """
    writer = OwnerWriter(session, rel_attr, instance, related, pks)
    if writer.is_empty:
        return 0
    await writer.resolve_keys()
    statement = writer.association.once(deletion)
    return int((await writer.execute(statement)).rowcount)


async def m2m_set(
    session: AsyncSession,
    instance: Any,
    rel_attr: ManyToMany[Related],
    *related: Related,
    pks: PrimaryKeys = (),
    values: Mapping[str, Any] | None = None,
    keep_existing: bool = False,
) -> M2MChange:
    """Make the associations of `instance` exactly `related` and `pks`.

    The table is left as if every association of the owner had been deleted and these inserted, by
    the smallest change. Associations that stay keep their rows. Where the association table has
    columns beyond the keys those rows are rewritten, with `values` and defaults, unless
    `keep_existing`. Rows are inserted before others are deleted, or after that where the database
    has a constraint, a trigger or a policy that may refuse a new row because of an old one.

    The owner's row is locked FOR NO KEY UPDATE: of two calls for one owner at the same time the
    second waits for the first one's transaction, and the result is that of one of them, never a
    mixture. Under REPEATABLE READ and SERIALIZABLE the second call raises a serialization failure,
    which `run_transaction` tries again.

    Args:
        session: an `AsyncSession`; the change belongs to its transaction.
        instance: the owner, an instance of the class that has the relationship.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        related: instances of the related class. Without any, and without `pks`, the set is empty.
        pks: primary keys of more related rows, as in `m2m_add`.
        values: extra columns of the association table, by column name, the same for every row that
            is written.
        keep_existing: leave all rows of associations that exist already as they are.

    Returns:
        The numbers of associations added and removed. A row that is only rewritten counts as
        neither.

    Raises:
        TypeError, ValueError, sqlalchemy.exc.IntegrityError: as `m2m_add`.
        RowNotFoundError: as `m2m_add`, and where the owner's row is gone or row-level security
            hides it; before anything is written.
        sqlalchemy.exc.DBAPIError: the owner's row cannot be locked: the role lacks the privilege
            UPDATE, or the owner is a view that cannot be updated; before anything is written.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_set(session, post, Post.tags, tag)
        M2MChange(added=1, removed=0)

    See https://www.postgresql.org/docs/current/explicit-locking.html#LOCKING-ROWS
    """
    check_flag("keep_existing", keep_existing)
    writer = OwnerWriter(session, rel_attr, instance, related, pks, values)
    await writer.resolve_keys()
    storage = await writer.lock_owner()
    added, removed = await writer.replace(storage, keep_existing=keep_existing)
    return M2MChange(added, removed)


async def m2m_add_many(
    session: AsyncSession,
    rel_attr: ManyToMany[Any],
    links: Iterable[tuple[Any, Any]],
    *,
    ignore_conflicts: bool = False,
    values: Mapping[str, Any] | None = None,
) -> int:
    """Associate every pair of owner and related in one INSERT.

    As with `m2m_add`, nothing is lazily loaded, pending changes are flushed first, and loaded
    collections are expired.

    Args:
        session: an `AsyncSession`; the rows belong to its transaction.
        rel_attr: the Many-to-Many relationship, `Post.tags`.
        links: pairs (owner, related), each an instance or a primary key as in the `pks` of
            `m2m_add`. Duplicates count once.
        ignore_conflicts: skip associations that exist, in place of an `IntegrityError`.
        values: extra columns of the association table, by column name, the same for every row.

    Returns:
        The number of rows inserted.

    Raises:
        TypeError, ValueError, RowNotFoundError, sqlalchemy.exc.IntegrityError: as `m2m_add`.

    Example:
        >>> async with get_transaction(session=session):
        ...     await m2m_add_many(session, Post.tags, [(post, tag), (post, 2), (post.id, 3)])
        3

    See https://www.postgresql.org/docs/current/functions-array.html
    """
    check_flag("ignore_conflicts", ignore_conflicts)
    writer = LinkWriter(session, rel_attr, links, values)
    if writer.is_empty:
        return 0
    await writer.resolve_keys()
    has_arbiter = ignore_conflicts and await writer.has_arbiter()
    statement = writer.association.once(
        insertion, writer.extras, many=True, skip=ignore_conflicts, has_arbiter=has_arbiter
    )
    return int((await writer.execute(statement)).rowcount)
