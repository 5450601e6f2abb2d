"""The statements that add and remove associations, and the lock of an owner.

Their parameters are arrays, so one statement serves any number of rows. Rows are inserted in the
order of their keys: of two transactions that insert the same rows, the second waits for the first
at the first row that both have, and neither waits for the other.

See https://www.postgresql.org/docs/current/sql-insert.html
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Column,
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
from pgtoolset.m2m._associations import Association
from pgtoolset.m2m._catalog import has_update_triggers, question, signature
from pgtoolset.m2m._conflicts import Insert, skip_conflicts
from pgtoolset.m2m._extras import Extras
from pgtoolset.m2m._rows import (
    is_of_owner,
    is_of_selected_owner,
    owner_parameters,
    related_parameters,
    stored_rows,
)

#: https://www.postgresql.org/docs/current/ddl-system-columns.html
_SYSTEM_COLUMNS = frozenset({"tableoid", "xmin", "cmin", "xmax", "cmax", "ctid"})


def insertion(
    association: Association, extras: Extras, *, many: bool, skip: bool, has_arbiter: bool
) -> Insert:
    """INSERT the related of one owner.

    Args:
        association: the relationship.
        extras: its extra columns.
        many: INSERT pairs of both in place of one owner's.
        skip: leave out associations that exist.
        has_arbiter: whether ON CONFLICT can name the constraint of the pair.
    """
    owner, related = owner_parameters(association), related_parameters(association)
    keys = {**owner, **related} if many else related
    links = stored_rows(association, keys, extras.array_columns, "links")
    row: dict[Any, Any] = {
        column: links.c[name] if name in keys else bindparam(name, type_=column.type)
        for name, column in {**owner, **related}.items()
    }
    rows = select(*row.values(), *extras.expressions(links)).select_from(links)
    if skip and not has_arbiter:
        is_there = [column == links.c[name] for name, column in related.items()]
        if many:
            is_there += [column == links.c[name] for name, column in owner.items()]
        else:
            is_there += is_of_selected_owner(association)
        rows = rows.where(not_(exists().where(*is_there)))
    columns = [*row, *extras.columns]
    statement = Insert(association.table).from_select(columns, rows, include_defaults=False)
    if skip and has_arbiter:
        statement = skip_conflicts(statement, association.pair)
    return _counted(statement)


def insertion_of_one(association: Association, extras: Extras, *, skip: bool) -> Insert:
    """INSERT one row without arrays: PostgreSQL has less to plan and nothing to sort."""
    keys = {**owner_parameters(association), **related_parameters(association)}
    row: dict[str, Any] = {
        column.key: bindparam(name, type_=column.type) for name, column in keys.items()
    }
    keys_of_extras = [column.key for column in extras.columns]
    row.update(zip(keys_of_extras, extras.scalar_expressions(), strict=True))
    statement = Insert(association.table).values(row).inline()
    return _counted(skip_conflicts(statement, association.pair) if skip else statement)


def _counted(statement: Insert) -> Insert:
    """Keep the number of rows: SQLAlchemy closes the cursor of an INSERT, and psycopg's forgets."""
    return statement.execution_options(preserve_rowcount=True)


def deletion(association: Association) -> Delete:
    """DELETE the associations of one owner with the related."""
    related = related_parameters(association)
    links = stored_rows(association, related, {}, "links")
    return delete(association.table).where(
        *is_of_owner(association), *(column == links.c[name] for name, column in related.items())
    )


def lock(association: Association) -> Select[Any]:
    """Lock the owner's row against other sets; select the isolation level and the signature.

    This is a statement of its own because under READ COMMITTED the next statement then sees what
    the last holder of the lock has committed.
    """
    table = association.owner.referenced[0].table
    level = pg.current_setting(literal_column("'transaction_isolation'"))
    selected: Any = select(level, signature(association.table)).select_from(table)
    rows: Select[Any] = selected.where(*_is_owner(association)).with_for_update(key_share=True)
    return rows


def ask(association: Association) -> Select[Any]:
    """SELECT the signature of the association table, and its `Storage`."""
    pair = [column.name for column in association.pair]
    return question(association.table, pair, [column.name for column in association.generated])


def touch(association: Association) -> Update | None:
    """Update the owner's row to its own values; `None` where no column can be updated.

    Under REPEATABLE READ a lock that another transaction has held leaves no trace, and its commit
    cannot be seen. PostgreSQL refuses the second of two updates: a serialization failure in place
    of a mixture of two sets. The statement returns whether triggers may have changed the row.
    """
    table: Any = association.owner.referenced[0].table
    columns = [column for column in table.columns if is_writable(column)]
    if not columns:
        return None
    # A column with an `onupdate` would change if it were not named.
    same = {each: each for each in columns if each is columns[-1] or each.onupdate is not None}
    statement = update(table).where(*_is_owner(association)).values(same)
    return statement.returning(has_update_triggers(table))


def is_writable(column: Column[Any]) -> bool:
    """Whether an UPDATE can name the column."""
    is_generated = column.identity is not None and column.identity.always
    return column.computed is None and not is_generated and not is_system(column)


def is_system(column: Column[Any]) -> bool:
    """Whether it is one of the columns that PostgreSQL gives each table, such as `xmin`."""
    return column.system or column.name in _SYSTEM_COLUMNS


def _is_owner(association: Association) -> list[ColumnElement[bool]]:
    """Return conditions that hold for the owner's row in its own table."""
    end = association.owner
    table = end.referenced[0].table
    return [
        column == bindparam(f"{association.prefix}o{at}", type_=column.type)
        for at, column in enumerate(end.referenced)
        if column.table is table
    ]
