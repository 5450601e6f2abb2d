"""The statements that write association tables. Their parameters are arrays, so one statement
serves any size.

Rows are inserted in the order of their keys: of two transactions that insert the same ones, the
second waits for the first at the first row that both have, and neither for the other. `m2m_set`
inserts before it deletes for the same reason: whoever adds what it is deleting would otherwise wait
for it with rows in hand that it wants to insert.

See https://www.postgresql.org/docs/current/sql-insert.html and
https://www.postgresql.org/docs/current/queries-with.html#QUERIES-WITH-MODIFYING
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import (
    Column,
    Delete,
    FromClause,
    Select,
    Update,
    and_,
    bindparam,
    column,
    delete,
    exists,
    func,
    literal_column,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.sql.expression import CTE

from pgtoolset._postgres.arrays import element, unnest
from pgtoolset.m2m._conflicts import Insert, overwrite_conflicts, skip_conflicts

if TYPE_CHECKING:
    from pgtoolset.m2m._associations import Association, End
    from pgtoolset.m2m._extras import Extras


def owner_parameters(association: Association) -> dict[str, Column[Any]]:
    return {f"o{at}": column for at, column in enumerate(association.owner.columns)}


def related_parameters(association: Association) -> dict[str, Column[Any]]:
    return {f"r{at}": column for at, column in enumerate(association.related_columns)}


def insertion(
    association: Association, extras: Extras, *, many: bool, ignore_conflicts: bool
) -> Insert:
    """INSERT the related of one owner, or with `many` pairs of both."""
    owner, related = owner_parameters(association), related_parameters(association)
    keys = {**owner, **related} if many else related
    links = _ordered(keys, extras)
    row: dict[Any, Any] = {column: element(links.c[name], column) for name, column in keys.items()}
    if not many:
        row = {
            **{column: bindparam(name, type_=column.type) for name, column in owner.items()},
            **row,
        }
    rows = select(*row.values(), *extras.expressions(links)).select_from(links)
    if ignore_conflicts and not association.unique:
        rows = rows.where(not_(exists().where(*(column == value for column, value in row.items()))))
    columns = [*row, *extras.columns]
    statement = Insert(association.table).from_select(columns, rows, include_defaults=False)
    return (
        skip_conflicts(statement, association.pair)
        if ignore_conflicts and association.unique
        else statement
    )


def insertion_of_one(association: Association, extras: Extras, *, ignore_conflicts: bool) -> Insert:
    """INSERT one row, whose values are no arrays: PostgreSQL has less to plan and nothing to
    sort."""
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
    links = _ordered(related, None)
    return delete(association.table).where(
        *_of_owner(association), *(column == links.c[name] for name, column in related.items())
    )


def lock(end: End) -> Select[Any]:
    """Lock the owner's row against other sets, and tell the isolation level.

    In a statement of its own, because under READ COMMITTED the next one then sees what the last
    holder has committed.
    """
    table = end.referenced[0].table
    level = func.current_setting(literal_column("'transaction_isolation'"))
    return select(level).select_from(table).where(*_is_owner(end)).with_for_update(key_share=True)


def touch(end: End) -> Update | None:
    """Update the owner's row to what it is; `None` where there is no column that may be updated.

    Under REPEATABLE READ a lock that somebody else has held leaves no trace, and what he committed
    is not to be seen. Of two updates, PostgreSQL refuses the second: a serialization failure
    instead of a mixture of two sets.
    """
    table: Any = end.referenced[0].table
    columns = [
        c
        for c in table.columns
        if c.computed is None and not (c.identity is not None and c.identity.always)
    ]
    if not columns:
        return None
    same = {c: c for c in columns if c is columns[-1] or c.onupdate is not None}
    return update(table).where(*_is_owner(end)).values(same)


def referenced_values(end: End) -> Select[Any]:
    """The primary keys that are asked for, and the columns that the association table refers to
    instead."""
    keys: Any = {f"k{at}": column for at, column in enumerate(end.mapper.primary_key)}
    links = _ordered(keys, None)
    conditions = [column == links.c[name] for name, column in keys.items()]
    columns: Any = select(*keys.values(), *end.referenced).select_from(end.mapper.selectable)
    statement: Select[Any] = columns.join(links, and_(*conditions))
    return statement


def replacement(association: Association, extras: Extras, *, rewrite: bool) -> Select[Any]:
    """Make the owner's rows exactly the related, in one statement that counts what was added and
    removed.

    Wanted and present are compared by a FULL JOIN, for which PostgreSQL has no nested loop: a plan
    that is reused knows nothing of the length of an array, and a nested loop over two times 10,000
    rows takes seconds.
    """
    related = related_parameters(association)
    wanted = _ordered(related, extras, "wanted")
    present = _present(association, related)
    both = and_(*(present.c[name] == wanted.c[name] for name in related))
    join = present.join(wanted, both, full=True)
    columns = [wanted.c[name].label(f"w_{name}") for name in wanted.c.keys()]
    columns += [present.c[name].label(f"p_{name}") for name in related]
    first = next(iter(related))
    difference = select(*columns).select_from(join)
    if not rewrite:
        difference = difference.where(or_(present.c[first].is_(None), wanted.c[first].is_(None)))
    diff = difference.cte("diff")
    added, removed = diff.c[f"p_{first}"].is_(None), diff.c[f"w_{first}"].is_(None)
    insert_first = association.unique and not association.collides
    if insert_first:
        inserted = _insert_from(
            association, extras, diff, not_(removed) if rewrite else added, rewrite, None
        )
        deleted = _delete_by(association, diff, removed, inserted)
    else:
        if rewrite:
            gone: Any = (
                delete(association.table)
                .where(*_of_owner(association))
                .returning(literal_column("1").label("n"))
            )
            deleted = gone.cte("deleted")
        elif association.unique:
            deleted = _delete_by(association, diff, removed, None)
        else:
            deleted = _delete_surplus(association, wanted_links=unnest("kept", related))
        inserted = _insert_from(
            association, extras, diff, not_(removed) if rewrite else added, False, deleted
        )
    counts: Any = select(func.count().filter(added), func.count().filter(removed)).select_from(diff)
    statement: Select[Any] = counts.add_cte(inserted, deleted)
    return statement


def _present(association: Association, related: dict[str, Column[Any]]) -> FromClause:
    rows = select(*(column.label(name) for name, column in related.items())).where(
        *_of_owner(association)
    )
    return (rows if association.unique else rows.distinct()).subquery("present")


def _insert_from(
    association: Association,
    extras: Extras,
    diff: CTE,
    condition: Any,
    overwrite: bool,
    after: CTE | None,
) -> CTE:
    owner, related = owner_parameters(association), related_parameters(association)
    keys = [element(diff.c[f"w_{name}"], column) for name, column in related.items()]
    owners = [bindparam(name, type_=column.type) for name, column in owner.items()]
    rows = select(*owners, *keys, *extras.expressions(diff, "w_")).where(condition).order_by(*keys)
    if after is not None:
        rows = rows.where(_is_done(after))
    names = [*owner.values(), *related.values(), *extras.columns]
    statement = Insert(association.table).from_select(names, rows, include_defaults=False)
    if overwrite:
        statement = overwrite_conflicts(statement, association.pair, association.extras)
    elif association.unique:
        statement = skip_conflicts(statement, association.pair)
    return statement.returning(literal_column("1").label("n")).cte("inserted")


def _delete_by(association: Association, diff: CTE, condition: Any, after: CTE | None) -> CTE:
    statement = delete(association.table).where(*_of_owner(association), condition)
    statement = statement.where(
        *(column == diff.c[f"p_{name}"] for name, column in related_parameters(association).items())
    )
    if after is not None:
        statement = statement.where(_is_done(after))
    return statement.returning(literal_column("1").label("n")).cte("deleted")


def _delete_surplus(association: Association, wanted_links: FromClause) -> CTE:
    """Delete what is not wanted, and of what is there more than once all but one row."""
    table, related = association.table, related_parameters(association)
    place: list[Any] = [column("tableoid", _selectable=table), column("ctid", _selectable=table)]
    number = (
        func.row_number().over(partition_by=list(related.values()), order_by=place).label("number")
    )
    rows = select(
        *(each.label(each.name) for each in place),
        *(c.label(n) for n, c in related.items()),
        number,
    )
    rows_of_owner = rows.where(*_of_owner(association)).subquery("rows_of_owner")
    first = next(iter(related))
    join = rows_of_owner.join(
        wanted_links,
        and_(*(rows_of_owner.c[name] == wanted_links.c[name] for name in related)),
        full=True,
    )
    surplus = or_(wanted_links.c[first].is_(None), rows_of_owner.c.number > 1)
    doomed = (
        select(rows_of_owner.c.tableoid, rows_of_owner.c.ctid)
        .select_from(join)
        .where(surplus)
        .cte("doomed")
    )
    statement = delete(table).where(*(each == doomed.c[each.name] for each in place))
    return statement.returning(literal_column("1").label("n")).cte("deleted")


def _ordered(
    keys: Mapping[str, Column[Any]], extras: Extras | None, name: str = "links"
) -> FromClause:
    """The rows of the arrays, each once, in the order of their keys."""
    columns = {**keys, **(extras.array_columns if extras is not None else {})}
    rows = unnest("rows", columns)
    statement = select(*(rows.c[each] for each in columns)).order_by(
        *(rows.c[each] for each in keys)
    )
    # With extras, no DISTINCT: the keys are different in Python, and where PostgreSQL thinks
    # otherwise it says so.
    return (statement if len(columns) > len(keys) else statement.distinct()).subquery(name)


def _of_owner(association: Association) -> Iterable[Any]:
    return [
        column == bindparam(name, type_=column.type)
        for name, column in owner_parameters(association).items()
    ]


def _is_owner(end: End) -> Iterable[Any]:
    table = end.referenced[0].table
    pairs = enumerate(end.referenced)
    return [
        column == bindparam(f"o{at}", type_=column.type)
        for at, column in pairs
        if column.table is table
    ]


def _is_done(cte: CTE) -> Any:
    """True, once the statement of `cte` has been carried out to its end."""
    return select(func.count()).select_from(cte).scalar_subquery() >= literal_column("0")
