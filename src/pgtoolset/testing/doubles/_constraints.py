"""What PostgreSQL checks of a row: NOT NULL, unique keys, foreign keys. Each check takes the locks
that it would take.

CHECK constraints, exclusion constraints and partial or functional indexes are not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Column, ForeignKeyConstraint, Table
from sqlalchemy.schema import PrimaryKeyConstraint, UniqueConstraint

from pgtoolset.testing.doubles._locking import ALONE
from pgtoolset.testing.doubles._refusals import FOREIGN_KEY, NOT_NULL, UNIQUE, refusal
from pgtoolset.testing.doubles._store import Row, RowId, Work, pick
from pgtoolset.values import LockMode, RowLockMode

__all__ = ["check_deferred", "delete_row", "insert_row", "key_lock", "named", "update_row"]


def insert_row(work: Work, table: Table, row: Row) -> RowId:
    """Insert a row that has a value for each column."""
    what = f"INSERT {named(table, row)}"
    work.statement(what, writes=True)
    work.lock(("table", table), LockMode.ROW_EXCLUSIVE)
    _check_values(work, table, row, what)
    at = work.store.new_row(table)
    _check_unique(work, at, row, None, what)
    work.changes[at] = row
    _check_references(work, at, row, what)
    work.log(what)
    return at


def update_row(work: Work, at: RowId, values: Row) -> bool:
    """Change some columns of a row; `False` where it is gone by the time that its lock is had."""
    table = at[0]
    before = work.row(at)
    what = f"UPDATE {named(table, before or values)}"
    work.statement(what, writes=True)
    work.lock(("table", table), LockMode.ROW_EXCLUSIVE)
    keys = {name for key in _keys(table) for name in key}
    work.lock(
        ("row", *at), RowLockMode.UPDATE if keys & values.keys() else RowLockMode.NO_KEY_UPDATE
    )
    before = work.row(at)
    if before is None:
        return False
    row = {**before, **values}
    _check_values(work, table, row, what)
    _check_unique(work, at, row, before, what)
    work.changes[at] = row
    _check_references(work, at, row, what)
    _check_referencing(work, table, before, row, what)
    work.log(what)
    return True


def delete_row(work: Work, at: RowId) -> bool:
    """Delete a row, and do what its foreign keys say of those that refer to it; `False` where it is
    gone."""
    table = at[0]
    before = work.row(at)
    if before is None:
        return False
    what = f"DELETE {named(table, before)}"
    work.statement(what, writes=True)
    work.lock(("table", table), LockMode.ROW_EXCLUSIVE)
    work.lock(("row", *at), RowLockMode.UPDATE)
    before = work.row(at)
    if before is None:
        return False
    for names in _keys(table):
        work.lock(("key", table, names, _hashable(pick(before, names))), ALONE)
    work.changes[at] = None
    work.log(what)
    _check_referencing(work, table, before, None, what)
    return True


def key_lock(work: Work, table: Table, values: Row) -> None:
    """Wait for whoever has inserted or deleted a row with the same unique key, and keep others from
    it."""
    for names in _keys(table):
        if set(names) == values.keys():
            work.lock(("key", table, names, _hashable(pick(values, names))), ALONE)


def check_deferred(work: Work) -> None:
    """The foreign keys that are checked at the commit."""
    for at, row in list(work.changes.items()):
        if row is not None:
            _check_references(work, at, row, "COMMIT", deferred=True)
        elif at[1] in work.store.committed.get(at[0], {}):
            before = work.store.committed[at[0]][at[1]]
            _check_referencing(work, at[0], before, None, "COMMIT", deferred=True)


def _check_values(work: Work, table: Table, row: Row, what: str) -> None:
    for column in table.columns:
        if not column.nullable and row.get(column.key) is None:
            work.abort(
                refusal(NOT_NULL, f"null value in column {column.name} of {table.fullname}", what)
            )


def _check_unique(work: Work, at: RowId, row: Row, before: Row | None, what: str) -> None:
    table = at[0]
    for names in _keys(table):
        values = pick(row, names)
        if None in values or (before is not None and pick(before, names) == values):
            continue
        # Whoever has inserted or deleted the same key is waited for: only its end decides.
        work.lock(("key", table, names, _hashable(values)), ALONE)
        if before is not None and None not in pick(before, names):
            work.lock(("key", table, names, _hashable(pick(before, names))), ALONE)
        if any(other != at for other in work.find(table, dict(zip(names, values, strict=True)))):
            shown = ", ".join(names)
            work.abort(
                refusal(
                    UNIQUE, f"key ({shown})={values!r} of {table.fullname} already exists", what
                )
            )


def _check_references(
    work: Work, at: RowId, row: Row, what: str, *, deferred: bool = False
) -> None:
    table = at[0]
    for constraint in table.foreign_key_constraints:
        if _is_deferred(constraint) is not deferred:
            continue
        wanted = {element.column.key: row[element.parent.key] for element in constraint.elements}
        if None in wanted.values():
            continue
        referred = constraint.referred_table
        while found := work.find(referred, wanted):
            work.lock(("row", *found[0]), RowLockMode.KEY_SHARE)
            if work.find(referred, wanted):
                break
        else:
            work.abort(
                refusal(
                    FOREIGN_KEY,
                    f"{table.fullname} refers to {wanted!r}, not present in {referred.fullname}",
                    what,
                )
            )


def _check_referencing(
    work: Work, table: Table, before: Row, after: Row | None, what: str, *, deferred: bool = False
) -> None:
    for other, constraint in _references_to(work, table):
        if _is_deferred(constraint) is not deferred and constraint.ondelete is None:
            continue
        names = {element.column.key: element.parent.key for element in constraint.elements}
        old = {mine: before[theirs] for theirs, mine in names.items()}
        if None in old.values() or (
            after is not None and all(after[name] == before[name] for name in names)
        ):
            continue
        if work.find(table, {theirs: before[theirs] for theirs in names}):
            continue  # another row with that key has taken its place
        for at in work.find(other, old):
            action = (constraint.ondelete or "").upper() if after is None else ""
            if action == "CASCADE":
                delete_row(work, at)
            elif action == "SET NULL":
                update_row(work, at, dict.fromkeys(old))
            elif _is_deferred(constraint) is deferred:
                work.abort(
                    refusal(
                        FOREIGN_KEY,
                        f"{named(table, before)} is still referenced from {other.fullname}",
                        what,
                    )
                )


def _references_to(work: Work, table: Table) -> Iterator[tuple[Table, ForeignKeyConstraint]]:
    tables = {*work.store.committed, *(at[0] for at in work.changes)}
    for other in sorted(tables, key=lambda each: each.fullname):
        for constraint in sorted(
            other.foreign_key_constraints, key=lambda each: ",".join(each.column_keys)
        ):
            if constraint.referred_table is table:
                yield other, constraint


def _is_deferred(constraint: ForeignKeyConstraint) -> bool:
    return bool(constraint.deferrable) and (constraint.initially or "").upper() == "DEFERRED"


def _keys(table: Table) -> list[tuple[str, ...]]:
    """The columns of each unique constraint and each unique index of plain columns on all rows."""
    keys = [
        tuple(column.key for column in constraint.columns)
        for constraint in table.constraints
        if isinstance(constraint, PrimaryKeyConstraint | UniqueConstraint)
        and len(constraint.columns) > 0
    ]
    columns = set(table.columns)
    for index in table.indexes:
        plain = all(isinstance(each, Column) and each in columns for each in index.expressions)
        if index.unique and plain and index.dialect_options["postgresql"]["where"] is None:
            keys.append(tuple(column.key for column in index.columns))
    return sorted(dict.fromkeys(keys))


def _hashable(values: tuple[Any, ...]) -> Any:
    try:
        hash(values)
    except TypeError:
        return repr(values)
    return values


def named(table: Table, row: Row) -> str:
    """`item (1)`: the table and the row's primary key, or all that it has where there is none."""
    names = [column.key for column in table.primary_key] or [column.key for column in table.columns]
    return f"{table.fullname} ({', '.join(repr(row.get(name)) for name in names)})"
