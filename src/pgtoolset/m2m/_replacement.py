"""The statements of `m2m_set`: from the rows of an owner to the wanted ones.

Where nothing but the pair can refuse a row, one statement makes the smallest change. Where a new
row may be refused because of an old one, the old ones go first, in a statement of their own: a
trigger, a check or a policy that counts rows sees the deletion only then.

Wanted and present rows are compared by a FULL JOIN or a hashed NOT IN, for which PostgreSQL has no
nested loop: a plan that is reused does not know the length of an array, and a nested loop over two
times 10,000 rows takes seconds.

See https://www.postgresql.org/docs/current/queries-with.html#QUERIES-WITH-MODIFYING
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    ColumnElement,
    Delete,
    Select,
    and_,
    bindparam,
    delete,
    literal_column,
    not_,
    or_,
    select,
    tuple_,
)
from sqlalchemy.sql.expression import CTE

from pgtoolset._postgres.arrays import element, unnest
from pgtoolset._postgres.catalog import compare, count
from pgtoolset.m2m._associations import Association
from pgtoolset.m2m._conflicts import Insert, overwrite_conflicts, skip_conflicts
from pgtoolset.m2m._extras import Extras
from pgtoolset.m2m._rows import (
    Columns,
    is_of_owner,
    is_of_selected_owner,
    owner_parameters,
    related_parameters,
    stored_rows,
)


def replacement(association: Association, extras: Extras, *, rewrite: bool) -> Select[Any]:
    """Make the owner's rows exactly the related, and select how many were added and removed.

    For a table where nothing but the pair can refuse a row.

    Args:
        association: the relationship.
        extras: its extra columns, as they are inserted.
        rewrite: whether rows that stay get the values of new ones.
    """
    return _Replacement(association, extras, rewrite).statement()


class _Replacement:
    """The parts of the statement.

    Attributes:
        related: the columns of the related key, by name.
        difference: the wanted rows with `w_` before each name and the present ones with `p_`, side
            by side; NULL where there is no such row. Rows that stay as they are are left out.
    """

    def __init__(self, association: Association, extras: Extras, rewrite: bool) -> None:
        self._association = association
        self._extras = extras
        self._rewrite = rewrite
        self._related = related_parameters(association)
        rows = _compare(association, extras.array_columns, _present(association))
        if not rewrite:
            rows = _different(association, rows)
        self._difference = rows.cte(f"{association.prefix}difference")
        first = next(iter(self._related))
        self._is_added = self._difference.c[f"p_{first}"].is_(None)
        self._is_removed = self._difference.c[f"w_{first}"].is_(None)

    def statement(self) -> Select[Any]:
        # A transaction that adds what this one removes waits for it. If this one removed first and
        # then waited for a row of the other, each would wait for the other.
        inserted = self._insert()
        deleted = self._delete_removed(after=inserted)
        added = count().filter(self._is_added)
        removed = count().filter(self._is_removed)
        counts: Any = select(added, removed).select_from(self._difference)
        statement: Select[Any] = counts.add_cte(inserted, deleted)
        return statement

    def _insert(self) -> CTE:
        association, extras, rows = self._association, self._extras, self._difference
        keys = {name: rows.c[f"w_{name}"] for name in self._related}
        owner = owner_parameters(association)
        owners = [bindparam(name, type_=column.type) for name, column in owner.items()]
        is_inserted = not_(self._is_removed) if self._rewrite else self._is_added
        wanted = select(*owners, *keys.values(), *extras.expressions(rows, "w_")).where(is_inserted)
        wanted = wanted.order_by(
            *(keys[name] for name in association.in_table_order(self._related))
        )
        columns = [*owner.values(), *self._related.values(), *extras.columns]
        statement = Insert(association.table).from_select(columns, wanted, include_defaults=False)
        if self._rewrite:
            statement = overwrite_conflicts(statement, association.pair, association.extras)
        else:
            statement = skip_conflicts(statement, association.pair)
        return self._cte(statement, "inserted")

    def _delete_removed(self, after: CTE) -> CTE:
        association, rows = self._association, self._difference
        statement = delete(association.table).where(
            *is_of_owner(association),
            self._is_removed,
            *(column == rows.c[f"p_{name}"] for name, column in self._related.items()),
            _is_done(after),
        )
        return self._cte(statement, "deleted")

    def _cte(self, statement: Any, name: str) -> CTE:
        prefix = self._association.prefix
        cte: CTE = statement.returning(literal_column("1").label(f"{prefix}n")).cte(prefix + name)
        return cte


def counts(association: Association) -> Select[Any]:
    """SELECT how many associations the wanted set adds and removes."""
    # Without a unique constraint a pair may be there several times, and is counted once.
    rows = _compare(association, {}, _present(association).distinct())
    found = _different(association, rows).subquery(f"{association.prefix}difference")
    first = next(iter(related_parameters(association)))
    added = count().filter(found.c[f"p_{first}"].is_(None))
    removed = count().filter(found.c[f"w_{first}"].is_(None))
    selected: Any = select(added, removed)
    statement: Select[Any] = selected.select_from(found)
    return statement


def deletion_of_old(association: Association, *, rewrite: bool, keep_existing: bool) -> Delete:
    """DELETE the rows of the owner that have to go before the new set is inserted.

    Args:
        association: the relationship.
        rewrite: whether rows that stay are inserted again.
        keep_existing: whether a pair that is there several times keeps all of its rows.
    """
    statement = delete(association.table).where(*is_of_owner(association))
    if rewrite:
        return statement
    related = related_parameters(association)
    wanted = unnest(f"{association.prefix}wanted", related)
    kept = select(*(element(wanted.c[name], column) for name, column in related.items()))
    key = _key(list(related.values()))
    is_old: ColumnElement[bool] = key.not_in(kept)
    if not keep_existing:
        # Without a unique constraint: such a pair is inserted again, once.
        several = _present(association).correlate(None).group_by(*related.values())
        several = several.having(compare(count(), ">", literal_column("1")))
        is_old = or_(is_old, key.in_(several))
    return statement.where(is_old)


def insertion_of_new(
    association: Association, extras: Extras, *, rewrite: bool, has_arbiter: bool
) -> Insert:
    """INSERT the wanted rows that are not there."""
    owner, related = owner_parameters(association), related_parameters(association)
    wanted = stored_rows(association, related, extras.array_columns, "wanted")
    keys = [wanted.c[name] for name in related]
    owners = [bindparam(name, type_=column.type) for name, column in owner.items()]
    rows = select(*owners, *keys, *extras.expressions(wanted)).select_from(wanted)
    if not rewrite:
        present = select(*related.values()).where(*is_of_selected_owner(association))
        present = present.correlate(None).where(*(each.is_not(None) for each in related.values()))
        rows = rows.where(_key(keys).not_in(present))
    columns = [*owner.values(), *related.values(), *extras.columns]
    statement = Insert(association.table).from_select(columns, rows, include_defaults=False)
    return skip_conflicts(statement, association.pair) if has_arbiter else statement


def _present(association: Association) -> Select[Any]:
    """SELECT the related keys of the owner's rows, by the names of their parameters."""
    columns = (column.label(name) for name, column in related_parameters(association).items())
    return select(*columns).where(*is_of_owner(association))


def _compare(association: Association, extras: Columns, present: Select[Any]) -> Select[Any]:
    """SELECT the wanted rows and the present ones side by side."""
    related = related_parameters(association)
    wanted = stored_rows(association, related, extras, "wanted")
    there = present.subquery(f"{association.prefix}present")
    is_same = and_(*(there.c[name] == wanted.c[name] for name in related))
    columns = [wanted.c[name].label(f"w_{name}") for name in wanted.c.keys()]
    columns += [there.c[name].label(f"p_{name}") for name in related]
    return select(*columns).select_from(there.join(wanted, is_same, full=True))


def _different(association: Association, rows: Select[Any]) -> Select[Any]:
    """Leave out the rows that are wanted and present."""
    first = next(iter(related_parameters(association)))
    sides = {each.name: each.element for each in rows.selected_columns}
    return rows.where(or_(sides[f"p_{first}"].is_(None), sides[f"w_{first}"].is_(None)))


def _key(columns: list[Any]) -> ColumnElement[Any]:
    return columns[0] if len(columns) == 1 else tuple_(*columns)


def _is_done(cte: CTE) -> Any:
    """Return a condition that is true once the statement of `cte` has been executed to its end."""
    rows = select(count()).select_from(cte).scalar_subquery()
    return compare(rows, ">=", literal_column("0"))
