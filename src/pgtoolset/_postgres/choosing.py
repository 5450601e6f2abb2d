"""Which tables to truncate and from which to delete: what PostgreSQL allows, and what takes longer.

PostgreSQL looks for each row that is deleted in every table that references it. Where no index
helps, it reads that table from end to end for each row, with the rows that the same statement has
just deleted: as many rows again take four times as long.

https://www.postgresql.org/docs/current/ddl-constraints.html#DDL-CONSTRAINTS-FK and
https://www.postgresql.org/docs/current/sql-truncate.html
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from pgtoolset._postgres.contents import Relation
from pgtoolset._postgres.emptying import Details, Reaction, Reference

#: The costs of TRUNCATE and DELETE, measured; a factor of two in either decides nothing. TRUNCATE
#: takes a millisecond for each table, and must name every table that references one of them. In
#: that time DELETE empties so many pages of a table (8 kB each), or a part of a page where
#: PostgreSQL must look for each row in another table, at best through an index.
PAGES_PER_TRUNCATE = 16
_PAGES_PER_TRUNCATE_REFERENCED = 1 / 8

#: From so many on, pages that are read for rows take far longer than TRUNCATE takes for a table: 2
#: to 20 microseconds for each page, by the rows in it.
_READS_PER_TRUNCATE = 1000

#: No page has more rows.
_ROWS_PER_PAGE = 300


@dataclass(slots=True)
class Plan:
    """The tables to empty, and how.

    Attributes:
        truncated: tables for TRUNCATE, with every table that references them.
        deleted: tables for DELETE.
        from_outside: the foreign keys of other tables to these.
        reactions: the user's triggers and rules on these tables, which must not act.
        reads_all: whether a DELETE would read a table from end to end for each of many rows.
        keeps_plans: whether the plans of foreign keys, which a session keeps, may stay: not where
            one that was made for a small table would read a large one from end to end.
    """

    truncated: list[Relation] = field(default_factory=list)
    deleted: list[Relation] = field(default_factory=list)
    from_outside: list[Reference] = field(default_factory=list)
    reactions: list[Reaction] = field(default_factory=list)
    reads_all: bool = False
    keeps_plans: bool = True


@dataclass(frozen=True, slots=True)
class Limits:
    """What is known of the tables beside their details.

    Attributes:
        published: the oids of those where PostgreSQL may refuse a DELETE or an UPDATE.
        spared: the oids of those that this role may not truncate.
        costly: the oids of those with so many rows that a DELETE, which reads other tables for
            each of them, takes far longer than a TRUNCATE.
    """

    published: Collection[int]
    spared: frozenset[int] = frozenset()
    costly: frozenset[int] = frozenset()


def plan_of(filled: Sequence[Relation], details: Details, limits: Limits) -> tuple[Plan, set[int]]:
    """Choose TRUNCATE or DELETE for each table.

    Args:
        filled: the tables that have rows.
        details: of these, at least.
        limits: what else is known.

    Returns:
        The plan, and the oids of all tables to truncate: with the filled ones, empty ones that
        refer to them.
    """
    graph = _Graph(details, limits.spared)
    # A DELETE writes into these too, though they may be empty.
    needed = {
        graph.top_of(each.referenced)
        for each in details.references
        if each.writes and graph.top_of(each.referencing) in limits.published
    }
    needed |= {relation.oid for relation in filled if relation.is_for_truncate}
    needed |= {oid for oid in limits.costly if graph.read_for(oid, without=()).unindexed}
    truncated = _truncated(filled, graph, needed)
    for oid in limits.costly - truncated:
        # The tables that are read for each row have no page then, if they can be truncated.
        for referencing in graph.read_for(oid, without=truncated).tables:
            truncated |= graph.truncated_with(referencing) or set()
    emptied = {relation.oid for relation in filled}
    costly = [graph.read_for(oid, without=truncated) for oid in limits.costly - truncated]
    plan = Plan(
        truncated=[relation for relation in filled if relation.oid in truncated],
        deleted=[relation for relation in filled if relation.oid not in truncated],
        from_outside=_from_outside(details.references, emptied, graph),
        reactions=[
            each
            for each in details.reactions
            if (top := graph.top_of(each.relation)) in truncated | emptied
            and (each.on_truncate if top in truncated else each.on_delete)
        ],
        reads_all=any(each.unindexed for each in costly),
        keeps_plans=not any(each.pages for each in costly),
    )
    return plan, truncated


def too_many_rows(
    filled: Sequence[Relation], details: Details, limits: Limits
) -> dict[Relation, int]:
    """Return by table how many rows are too many to delete, where it may have as many.

    For each row PostgreSQL may read pages of other tables: a TRUNCATE is faster by far then.
    """
    graph = _Graph(details, limits.spared)
    plan, truncated = plan_of(filled, details, limits)
    found = {}
    for relation in plan.deleted:
        pages = graph.read_for(relation.oid, without=truncated).pages
        together = graph.truncated_with(relation.oid) or {relation.oid}
        reads = _READS_PER_TRUNCATE * len(together - truncated)
        if relation.pages * _ROWS_PER_PAGE * pages > reads:
            found[relation] = reads // pages + 1
    return found


def may_be_truncated(relation: Relation, has_published: bool, largest: int) -> bool:
    """Whether the lock on a table must allow TRUNCATE, or ALTER TABLE of its rules.

    It is taken before the foreign keys are known, because they are not certain without it. To take
    a stronger lock afterwards could be a deadlock with a transaction that reads the table.

    Args:
        relation: a table that has rows.
        has_published: whether a publication has one of the tables.
        largest: the pages of the largest of the tables that have pages, empty or not.
    """
    if relation.has_rules or relation.is_for_truncate:
        return True
    if relation.is_referenced:
        return relation.pages > 1 or has_published or largest > PAGES_PER_TRUNCATE
    return relation.pages > PAGES_PER_TRUNCATE


def _from_outside(
    references: Iterable[Reference], emptied: set[int], graph: _Graph
) -> list[Reference]:
    """Return the foreign keys to emptied tables of tables that the metadata does not have."""
    return [
        reference
        for reference in references
        if graph.top_of(reference.referenced) in emptied
        and graph.top_of(reference.referencing) is None
    ]


def _truncated(
    filled: Sequence[Relation], graph: _Graph, needed: Collection[int | None]
) -> set[int]:
    """Return the oids of the tables for which TRUNCATE is allowed, and needed or cheaper."""
    oids = {relation.oid for relation in filled}
    truncated: set[int] = set()
    for relation in filled:
        together = graph.truncated_with(relation.oid)
        # A TRUNCATE must not touch a table outside of the metadata; nor an empty one without need.
        if together is None:
            continue
        if relation.oid in needed or (
            together <= oids and graph.is_truncate_cheaper(relation, len(together - truncated))
        ):
            truncated |= together
    return truncated


@dataclass(slots=True)
class _Read:
    """What PostgreSQL reads for each row that is deleted from a table.

    Attributes:
        pages: the pages of the tables that reference it, read where no index is used.
        unindexed: those of them for which there is no index.
        tables: the tables of the metadata that these belong to.
    """

    pages: int = 0
    unindexed: int = 0
    tables: set[int] = field(default_factory=set)


class _Graph:
    """Which tables reference which. A partition counts as the table that it belongs to."""

    def __init__(self, details: Details, spared: Collection[int]) -> None:
        self._tops = details.tops
        self._spared = spared
        #: By the oid of a table: the foreign keys to it.
        self._references: dict[int, list[Reference]] = {}
        for reference in details.references:
            referenced = self._tops[reference.referenced]
            self._references.setdefault(referenced, []).append(reference)

    def top_of(self, oid: int) -> int | None:
        """Return the table of the metadata that a relation belongs to; `None` for others."""
        return self._tops.get(oid)

    def truncated_with(self, oid: int) -> set[int] | None:
        """Return all tables that a TRUNCATE of one must name; `None` where one is not to be."""
        found = {oid}
        waiting = [oid]
        while waiting:
            oid = waiting.pop()
            if oid in self._spared:
                return None
            for reference in self._references.get(oid, ()):
                referencing = self.top_of(reference.referencing)
                if referencing is None:
                    return None
                if referencing not in found:
                    found.add(referencing)
                    waiting.append(referencing)
        return found

    def is_truncate_cheaper(self, relation: Relation, tables: int) -> bool:
        """Whether a TRUNCATE of so many tables takes less time than a DELETE from this one."""
        if not self._references.get(relation.oid):
            return relation.pages > PAGES_PER_TRUNCATE * tables
        return relation.pages > 1 and relation.pages >= _PAGES_PER_TRUNCATE_REFERENCED * tables

    def read_for(self, oid: int, *, without: Collection[int]) -> _Read:
        """Return what is read for each row that is deleted from a table.

        Args:
            oid: of the table.
            without: the oids of tables that are truncated before.
        """
        found = _Read()
        for reference in self._references.get(oid, ()):
            top = self.top_of(reference.referencing)
            if top in without:
                continue
            found.pages += reference.pages
            found.unindexed += reference.unindexed
            if top is not None and reference.unindexed:
                found.tables.add(top)
        return found
