"""The statements that add and remove associations, and the lock of an owner.

Their parameters are arrays, so one statement serves any number of rows. Rows are inserted in the
order of their keys: of two transactions that insert the same rows, the second waits for the first
at the first row that both have, and neither waits for the other.

See https://www.postgresql.org/docs/current/sql-insert.html
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Delete,
    Select,
    Update,
    bindparam,
    delete,
    exists,
    literal_column,
    not_,
    select,
    update,
)

from pgtoolset._postgres.catalog import pg
from pgtoolset.m2m._associations import Association, End
from pgtoolset.m2m._conflicts import Insert, skip_conflicts
from pgtoolset.m2m._extras import Extras
from pgtoolset.m2m._rows import is_of_owner, owner_parameters, related_parameters, stored_rows


def insertion(
    association: Association, extras: Extras, *, many: bool, ignore_conflicts: bool
) -> Insert:
    """INSERT the related of one owner, or with `many` pairs of both."""
    owner, related = owner_parameters(association), related_parameters(association)
    keys = {**owner, **related} if many else related
    links = stored_rows(keys, extras.array_columns, "links")
    row: dict[Any, Any] = {
        column: links.c[name] if name in keys else bindparam(name, type_=column.type)
        for name, column in {**owner, **related}.items()
    }
    rows = select(*row.values(), *extras.expressions(links)).select_from(links)
    if ignore_conflicts and not association.unique:
        rows = rows.where(not_(exists().where(*(column == value for column, value in row.items()))))
    columns = [*row, *extras.columns]
    statement = Insert(association.table).from_select(columns, rows, include_defaults=False)
    if ignore_conflicts and association.unique:
        return skip_conflicts(statement, association.pair)
    return statement


def insertion_of_one(association: Association, extras: Extras, *, ignore_conflicts: bool) -> Insert:
    """INSERT one row without arrays: PostgreSQL has less to plan and nothing to sort."""
    keys = {**owner_parameters(association), **related_parameters(association)}
    row: dict[str, Any] = {
        column.key: bindparam(name, type_=column.type) for name, column in keys.items()
    }
    keys_of_extras = [column.key for column in extras.columns]
    row.update(zip(keys_of_extras, extras.scalar_expressions(), strict=True))
    statement = Insert(association.table).values(row).inline()
    return skip_conflicts(statement, association.pair) if ignore_conflicts else statement


def deletion(association: Association) -> Delete:
    """DELETE the associations of one owner with the related."""
    related = related_parameters(association)
    links = stored_rows(related, {}, "links")
    return delete(association.table).where(
        *is_of_owner(association), *(column == links.c[name] for name, column in related.items())
    )


def lock(association: Association) -> Select[Any]:
    """Lock the owner's row against other sets, and select the isolation level.

    This is a statement of its own because under READ COMMITTED the next statement then sees what
    the last holder of the lock has committed.
    """
    table = association.owner.referenced[0].table
    level = pg.current_setting(literal_column("'transaction_isolation'"))
    rows = select(level).select_from(table).where(*_is_owner(association.owner))
    return rows.with_for_update(key_share=True)


def touch(association: Association) -> Update | None:
    """Update the owner's row to its own values; `None` where no column can be updated.

    Under REPEATABLE READ a lock that another transaction has held leaves no trace, and its commit
    cannot be seen. PostgreSQL refuses the second of two updates: a serialization failure in place
    of a mixture of two sets.
    """
    table: Any = association.owner.referenced[0].table
    columns = [
        column
        for column in table.columns
        if column.computed is None and not (column.identity is not None and column.identity.always)
    ]
    if not columns:
        return None
    # A column with an `onupdate` would change if it were not named.
    same = {each: each for each in columns if each is columns[-1] or each.onupdate is not None}
    return update(table).where(*_is_owner(association.owner)).values(same)


def _is_owner(end: End) -> list[ColumnElement[bool]]:
    """Return conditions that hold for the owner's row in its own table."""
    table = end.referenced[0].table
    return [
        column == bindparam(f"o{at}", type_=column.type)
        for at, column in enumerate(end.referenced)
        if column.table is table
    ]
