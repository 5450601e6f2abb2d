"""The statement of `m2m_set`: the smallest change from the rows of an owner to the wanted ones.

Wanted and present rows are compared by a FULL JOIN, for which PostgreSQL has no nested loop: a plan
that is reused does not know the length of an array, and a nested loop over two times 10,000 rows
takes seconds.

See https://www.postgresql.org/docs/current/queries-with.html#QUERIES-WITH-MODIFYING
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    FromClause,
    Select,
    and_,
    bindparam,
    column,
    delete,
    literal_column,
    not_,
    or_,
    select,
)
from sqlalchemy.sql.expression import CTE

from pgtoolset._postgres.catalog import compare, count, pg
from pgtoolset.m2m._associations import Association
from pgtoolset.m2m._conflicts import Insert, overwrite_conflicts, skip_conflicts
from pgtoolset.m2m._extras import Extras
from pgtoolset.m2m._rows import is_of_owner, owner_parameters, related_parameters, stored_rows


def replacement(association: Association, extras: Extras, *, rewrite: bool) -> Select[Any]:
    """Make the owner's rows exactly the related, and select how many were added and removed.

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
        self._difference = self._compare()
        first = next(iter(self._related))
        self._is_added = self._difference.c[f"p_{first}"].is_(None)
        self._is_removed = self._difference.c[f"w_{first}"].is_(None)

    def statement(self) -> Select[Any]:
        association = self._association
        if association.unique and not association.collides:
            # A transaction that adds what this one removes waits for it. If this one removed first
            # and then waited for a row of the other, each would wait for the other.
            inserted = self._insert(after=None)
            deleted = self._delete_removed(after=inserted)
        else:
            # A new row may collide with an old one, so the old ones go first.
            deleted = self._delete_old()
            inserted = self._insert(after=deleted)
        added = count().filter(self._is_added)
        removed = count().filter(self._is_removed)
        counts: Any = select(added, removed).select_from(self._difference)
        statement: Select[Any] = counts.add_cte(inserted, deleted)
        return statement

    def _compare(self) -> CTE:
        wanted = stored_rows(self._related, self._extras.array_columns, "wanted")
        present = self._present()
        is_same = and_(*(present.c[name] == wanted.c[name] for name in self._related))
        columns = [wanted.c[name].label(f"w_{name}") for name in wanted.c.keys()]
        columns += [present.c[name].label(f"p_{name}") for name in self._related]
        rows = select(*columns).select_from(present.join(wanted, is_same, full=True))
        if not self._rewrite:
            first = next(iter(self._related))
            rows = rows.where(or_(present.c[first].is_(None), wanted.c[first].is_(None)))
        return rows.cte("difference")

    def _present(self) -> FromClause:
        columns = (column.label(name) for name, column in self._related.items())
        rows = select(*columns).where(*is_of_owner(self._association))
        # Without a unique constraint a pair may be there several times, and is compared once.
        return (rows if self._association.unique else rows.distinct()).subquery("present")

    def _insert(self, after: CTE | None) -> CTE:
        association, extras, difference = self._association, self._extras, self._difference
        owner = owner_parameters(association)
        owners = [bindparam(name, type_=column.type) for name, column in owner.items()]
        keys = [difference.c[f"w_{name}"] for name in self._related]
        is_inserted = not_(self._is_removed) if self._rewrite else self._is_added
        rows = select(*owners, *keys, *extras.expressions(difference, "w_")).where(is_inserted)
        rows = rows.order_by(*keys)
        if after is not None:
            rows = rows.where(_is_done(after))
        columns = [*owner.values(), *self._related.values(), *extras.columns]
        statement = Insert(association.table).from_select(columns, rows, include_defaults=False)
        if self._rewrite and after is None:
            statement = overwrite_conflicts(statement, association.pair, association.extras)
        elif association.unique:
            statement = skip_conflicts(statement, association.pair)
        return _cte(statement, "inserted")

    def _delete_old(self) -> CTE:
        """Delete what has to go before anything is inserted."""
        if self._rewrite:
            return _cte(
                delete(self._association.table).where(*is_of_owner(self._association)), "deleted"
            )
        if self._association.unique:
            return self._delete_removed(after=None)
        return self._delete_surplus()

    def _delete_removed(self, after: CTE | None) -> CTE:
        association, difference = self._association, self._difference
        statement = delete(association.table).where(
            *is_of_owner(association),
            self._is_removed,
            *(column == difference.c[f"p_{name}"] for name, column in self._related.items()),
        )
        if after is not None:
            statement = statement.where(_is_done(after))
        return _cte(statement, "deleted")

    def _delete_surplus(self) -> CTE:
        """Delete unwanted rows, and of a pair that is there several times all but one row."""
        table, related = self._association.table, self._related
        # What tells rows without a unique key apart, in a partitioned table too.
        place: list[Any] = [column(name, _selectable=table) for name in ("tableoid", "ctid")]
        number = pg.row_number().over(partition_by=list(related.values()), order_by=place)
        columns = [each.label(each.name) for each in place]
        columns += [each.label(name) for name, each in related.items()]
        rows = select(*columns, number.label("number")).where(*is_of_owner(self._association))
        present = rows.subquery("numbered_rows")
        kept = stored_rows(related, {}, "kept")
        is_same = and_(*(present.c[name] == kept.c[name] for name in related))
        first = next(iter(related))
        surplus = (
            select(present.c.tableoid, present.c.ctid)
            .select_from(present.join(kept, is_same, full=True))
            .where(
                or_(kept.c[first].is_(None), compare(present.c.number, ">", literal_column("1")))
            )
            .cte("surplus")
        )
        statement = delete(table).where(
            *(compare(each, "=", surplus.c[each.name]) for each in place)
        )
        return _cte(statement, "deleted")


def _cte(statement: Any, name: str) -> CTE:
    cte: CTE = statement.returning(literal_column("1").label("n")).cte(name)
    return cte


def _is_done(cte: CTE) -> Any:
    """Return a condition that is true once the statement of `cte` has been executed to its end."""
    rows = select(count()).select_from(cte).scalar_subquery()
    return compare(rows, ">=", literal_column("0"))
