"""The same calls on random mappings as changes of ORM collections: the tables are equal after each.

A mapping is chosen at random: the types of the keys of both ends, one or two columns of a key, how
the association table is constrained in the metadata and in the database, what further columns it
has, and how everything is called.
"""

from __future__ import annotations

import itertools
import uuid
from dataclasses import dataclass
from datetime import date, datetime
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from sqlalchemy import (
    ARRAY,
    CHAR,
    Column,
    Date,
    DateTime,
    Enum,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Numeric,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    and_,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import registry, relationship, subqueryload

from pgtoolset import m2m_add, m2m_add_many, m2m_remove, m2m_set
from tests.m2m.models import Colour, Hexadecimal, Lowered, Prefixed
from tests.support import DRIVER, examples

#: A type of a key, and four keys.
TYPES: dict[str, tuple[Any, list[Any]]] = {
    "integer": (Integer(), [1, 2, 3, -4]),
    "varchar(3)": (String(3), ["abc", "ABC", "", 'é,"']),
    "text": (Text(), ["NULL", "{}", "\\", "'"]),
    "char(4)": (CHAR(4), ["a   ", "ab  ", "abcd", "    "]),
    "numeric(6, 2)": (Numeric(6, 2), [Decimal(each) for each in ("1.50", "2.00", "-3.25", "0")]),
    "timestamp": (DateTime(), [datetime(2024, 1, day, 1, 2, 3, day) for day in (1, 2, 3, 4)]),
    "date": (Date(), [date(2024, 1, day) for day in (1, 2, 3, 4)]),
    "uuid": (Uuid(), [uuid.UUID(int=number) for number in (1, 2, 3, 4)]),
    "uuid text": (Uuid(as_uuid=False), [str(uuid.UUID(int=number)) for number in (1, 2, 3, 4)]),
    "bytes": (LargeBinary(), [b"", b"\x00", b"a", b"61"]),
    "enum": (Enum(Colour, native_enum=False), [Colour.RED, Colour.GREEN]),
    "lowered": (Lowered(), ["a", "b", "c", "d"]),
    "hexadecimal": (Hexadecimal(), [b"", b"a", b"61", b"\xff"]),
    "prefixed": (Prefixed(), ["a", "p-a", "b", "c"]),
    "array": (ARRAY(Integer, as_tuple=True), [(1,), (1, 2), (2, 1), ()]),
}
NAMES = ["link", "links", "diff", "difference", "wanted", "excluded", "doomed", "m2m_rows", "order"]
COLUMN_NAMES = ["r0", "r1", "o0", "o1", "v0", "n", "id", "m2m_r0", "number", "key"]

#: How the association table is constrained: the pair, then what else there is.
PAIRS = [
    "primary key",
    "unique",
    "deferrable",
    "initially deferred",
    "index of the database",
    "wider key",
    "not at all",
]
OTHERS = [
    "nothing",
    "surrogate",
    "trigger",
    "unique index of one",
    "exclusion of one",
    "loud index",
]


class Composite(tuple[Any, ...]):
    """The values of a key of two columns."""


@dataclass
class Mapped:
    """The classes, the table, and the keys of the instances."""

    owner: Any
    related: Any
    link: Table
    metadata: MetaData
    statements: list[str]
    owner_keys: list[Any]
    related_keys: list[Any]
    most: int
    keys: list[str]


@dataclass(frozen=True)
class Plan:
    """The choices of one mapping."""

    types: tuple[tuple[str, ...], tuple[str, ...]]
    pair: str
    other: str
    extra: str
    name: str
    shift: int
    reverse: bool

    def made(self) -> Mapped:
        metadata = MetaData()
        mapped = registry(metadata=metadata)
        names = itertools.cycle(COLUMN_NAMES[self.shift :] + COLUMN_NAMES[: self.shift])
        ends, columns = [], []
        for end, types in zip(("differ_owner", "differ_related"), self.types, strict=True):
            own_keys: list[Any] = [
                Column(f"k{at}", TYPES[each][0], primary_key=True, autoincrement=False)
                for at, each in enumerate(types)
            ]
            table = Table(end, metadata, *own_keys)
            ends.append(table)
            columns.append([Column(next(names), TYPES[each][0], nullable=False) for each in types])
        flat = [*columns[0], *columns[1]]
        if self.reverse:
            flat.reverse()
        keys = [column.name for column in flat]
        link = Table(self.name, metadata, *flat, *self._extras(names))
        for table, own in zip(ends, columns, strict=True):
            link.append_constraint(
                ForeignKeyConstraint([each.name for each in own], [*table.columns])
            )
        statements = self._constrain(link, keys, [each.name for each in columns[0]])
        classes = [type(name, (), {}) for name in ("Owner", "Related")]
        joins = [
            and_(*(one == other for one, other in zip(table.columns, own, strict=True)))
            for table, own in zip(ends, columns, strict=True)
        ]
        mapped.map_imperatively(
            classes[0],
            ends[0],
            properties={
                "others": relationship(
                    classes[1],
                    secondary=link,
                    primaryjoin=joins[0],
                    secondaryjoin=joins[1],
                    back_populates="owners",
                )
            },
        )
        mapped.map_imperatively(
            classes[1],
            ends[1],
            properties={
                "owners": relationship(
                    classes[0],
                    secondary=link,
                    primaryjoin=joins[1],
                    secondaryjoin=joins[0],
                    back_populates="others",
                )
            },
        )
        mapped.configure()
        most = 1 if "one" in self.other or self.other == "loud index" else 4
        return Mapped(
            classes[0],
            classes[1],
            link,
            metadata,
            statements,
            _keys(self.types[0]),
            _keys(self.types[1]),
            most,
            keys,
        )

    def _extras(self, names: Any) -> list[Column[Any]]:
        if self.extra == "server default":
            return [Column(next(names), Integer, server_default="7")]
        if self.extra == "default":
            return [Column(next(names), Integer, default=7)]
        if self.extra == "callable":
            return [Column(next(names), Integer, default=lambda: 7)]
        return []

    def _constrain(self, link: Table, keys: list[str], owner: list[str]) -> list[str]:
        quoted = ", ".join(f'"{key}"' for key in keys)
        owners = ", ".join(f'"{key}"' for key in owner)
        name = f'"{link.name}"'
        statements = []
        if self.other == "surrogate":
            link.append_column(
                Column("surrogate", Integer, server_default=text("nextval('differ_sequence')"))
            )
            link.append_constraint(PrimaryKeyConstraint("surrogate"))
            statements.append("!CREATE SEQUENCE differ_sequence")
        if self.pair == "primary key" and self.other != "surrogate":
            link.append_constraint(PrimaryKeyConstraint(*keys))
        elif self.pair in ("primary key", "unique"):
            link.append_constraint(UniqueConstraint(*keys))
        elif self.pair == "deferrable":
            link.append_constraint(UniqueConstraint(*keys, deferrable=True))
        elif self.pair == "initially deferred":
            link.append_constraint(UniqueConstraint(*keys, initially="DEFERRED"))
        elif self.pair == "index of the database":
            statements.append(f"CREATE UNIQUE INDEX ON {name} ({quoted})")
        elif self.pair == "wider key":
            link.append_column(Column("term", Integer, server_default="0"))
            link.append_constraint(UniqueConstraint(*keys, "term"))
        if self.other == "loud index":
            link.append_constraint(Index("differ_index", *owner, unique=True))
        elif self.other == "exclusion of one":
            excluded: Any = ExcludeConstraint(*((each, "=") for each in owner), using="btree")
            link.append_constraint(excluded)
        elif self.other == "unique index of one":
            statements.append(f"CREATE UNIQUE INDEX ON {name} ({owners}) INCLUDE ({quoted})")
        elif self.other == "trigger":
            statements.append(
                f"""CREATE TRIGGER differ BEFORE INSERT OR DELETE ON {name}
                FOR EACH ROW EXECUTE FUNCTION differ()"""
            )
        return statements


def _keys(types: tuple[str, ...]) -> list[Any]:
    """Four keys, or as many as the types have."""
    values = [TYPES[each][1] for each in types]
    if len(values) == 1:
        return values[0]
    return [Composite(key) for key in itertools.product(*(each[:2] for each in values))]


#: The types of the first column of two. The ORM itself cannot load rows on psycopg where that is
#: an array: it binds the values of `(a, b) IN ((%s, %s))` without a cast, and psycopg binds [1] as
#: SMALLINT[].
OF_TWO = sorted(TYPES if DRIVER == "asyncpg" else TYPES.keys() - {"array"})

single = st.sampled_from(sorted(TYPES)).map(lambda name: (name,))
ends = single | st.tuples(st.sampled_from(OF_TWO), st.sampled_from(["integer", "lowered"]))
plans = st.builds(
    Plan,
    types=st.tuples(ends, ends),
    pair=st.sampled_from(PAIRS),
    other=st.sampled_from(OTHERS),
    extra=st.sampled_from(["none", "none", "server default", "default", "callable"]),
    name=st.sampled_from(NAMES),
    shift=st.integers(0, len(COLUMN_NAMES) - 1),
    reverse=st.booleans(),
)
number = st.integers(0, 3)
numbers = st.lists(number, max_size=4)
calls = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["add", "remove", "set", "keep"]), number, numbers),
        st.tuples(st.just("add_many"), st.lists(st.tuples(number, number), max_size=5), st.none()),
    ).flatmap(lambda call: st.tuples(st.just(call), st.booleans(), st.booleans())),
    min_size=1,
    max_size=6,
)


class Twins:
    """One mapping on two sessions: ours, and one that changes collections of the ORM.

    Each has its own copy of the rows, in two schemas.
    """

    def __init__(self, made: Mapped, ours: AsyncSession, theirs: AsyncSession) -> None:
        self.made = made
        self.sessions = (ours, theirs)
        self.sides: list[tuple[list[Any], list[Any]]] = []
        self.present: set[tuple[int, int]] = set()

    async def store(self) -> None:
        made = self.made
        for session in self.sessions:
            side = (
                [_instance(made.owner, key) for key in made.owner_keys],
                [_instance(made.related, key) for key in made.related_keys],
            )
            session.add_all([*side[0], *side[1]])
            await session.flush()
            self.sides.append(side)

    async def call(self, call: Any, from_other_side: bool, by_key: bool) -> None:
        name, first, second = call
        owners, related = len(self.made.owner_keys), len(self.made.related_keys)
        if name == "add_many":
            pairs = [(one % owners, other % related) for one, other in first]
            fixed = None
        elif from_other_side:
            fixed = first % related
            pairs = [(each % owners, fixed) for each in second]
        else:
            fixed = first % owners
            pairs = [(fixed, each % related) for each in second]
        target = self._target(name, pairs, fixed, int(from_other_side))
        if not self._is_legal(target):
            return
        await self._theirs(target)
        if fixed is None:
            await self._add_many(pairs, by_key)
        else:
            await self._of_one(name, pairs, from_other_side, fixed, by_key)
        await self.check(call)

    def _target(
        self, name: str, pairs: list[tuple[int, int]], fixed: int | None, at: int
    ) -> set[tuple[int, int]]:
        if name in ("add", "add_many"):
            return self.present | set(pairs)
        if name == "remove":
            return self.present - set(pairs)
        return {pair for pair in self.present if pair[at] != fixed} | set(pairs)

    def _is_legal(self, target: set[tuple[int, int]]) -> bool:
        owners = [owner for owner, _ in target]
        return all(owners.count(each) <= self.made.most for each in owners)

    async def _theirs(self, target: set[tuple[int, int]]) -> None:
        session = self.sessions[1]
        owners, related = self.sides[1]
        # selectinload leaves the bind expression of a type out of a key of several columns.
        statement = select(self.made.owner).options(subqueryload(self.made.owner.others))
        await session.execute(statement.execution_options(populate_existing=True))
        # The ORM deletes first within one flush; with several owners it needs two.
        for phase in ("remove", "add"):
            for at, owner in enumerate(owners):
                wanted = [related[other] for one, other in sorted(target) if one == at]
                kept = [each for each in owner.others if each in wanted]
                owner.others[:] = kept if phase == "remove" else wanted
            await session.flush()
        self.present = target

    async def _add_many(self, pairs: list[tuple[int, int]], by_key: bool) -> None:
        made = self.made
        owners, related = self.sides[0]
        links: list[Any] = [
            (_key(made.owner_keys[one]), _key(made.related_keys[other]))
            if by_key
            else (owners[one], related[other])
            for one, other in pairs
        ]
        await m2m_add_many(self.sessions[0], made.owner.others, links, ignore_conflicts=True)

    async def _of_one(
        self,
        name: str,
        pairs: list[tuple[int, int]],
        from_other_side: bool,
        fixed: int,
        by_key: bool,
    ) -> None:
        session, made = self.sessions[0], self.made
        owners, related = self.sides[0]
        if from_other_side:
            instance, attribute = related[fixed], made.related.owners
            items = [(owners[one], made.owner_keys[one]) for one, _ in pairs]
        else:
            instance, attribute = owners[fixed], made.owner.others
            items = [(related[other], made.related_keys[other]) for _, other in pairs]
        args = [] if by_key else [item for item, _ in items]
        pks = [_key(key) for _, key in items] if by_key else []
        if name == "add":
            await m2m_add(session, instance, attribute, *args, pks=pks, ignore_conflicts=True)
        elif name == "remove":
            await m2m_remove(session, instance, attribute, *args, pks=pks)
        else:
            keep = name == "keep"
            await m2m_set(session, instance, attribute, *args, pks=pks, keep_existing=keep)

    async def check(self, call: Any) -> None:
        found = []
        columns = [column for column in self.made.link.columns if column.name != "surrogate"]
        for session in self.sessions:
            rows = await session.execute(select(*columns))
            found.append(sorted((tuple(row) for row in rows), key=repr))
        assert found[0] == found[1], call


def _key(key: Any) -> Any:
    """A key as the functions take it: a value that is a tuple itself goes into another one."""
    is_one = isinstance(key, tuple) and not isinstance(key, Composite)
    return (key,) if is_one else key


def _instance(class_: Any, key: Any) -> Any:
    names = [column.key for column in class_.__mapper__.primary_key]
    instance = class_()
    values = key if len(names) > 1 else (key,)
    for name, value in zip(names, values, strict=True):
        setattr(instance, name, value)
    return instance


SCHEMAS = ("differ_ours", "differ_theirs")


@pytest.fixture
async def schemas(engine: AsyncEngine) -> Any:
    """Two schemas for the two copies, and the function of the triggers."""
    async with engine.begin() as connection:
        for schema in SCHEMAS:
            await connection.execute(text(f"CREATE SCHEMA {schema}"))
    yield
    async with engine.begin() as connection:
        for schema in SCHEMAS:
            await connection.execute(text(f"DROP SCHEMA {schema} CASCADE"))


FUNCTION = """
    CREATE OR REPLACE FUNCTION differ() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN IF TG_OP = ''DELETE'' THEN RETURN OLD; END IF; RETURN NEW; END'
"""


async def create(connection: AsyncConnection, made: Mapped, schema: str) -> None:
    """Create the tables of a mapping in a schema; the transaction is rolled back in the end."""
    await connection.execute(text(f"SET LOCAL search_path = {schema}"))
    await connection.execute(text(FUNCTION))
    for statement in made.statements:
        if statement.startswith("!"):
            await connection.execute(text(statement[1:]))
    await connection.run_sync(made.metadata.create_all)
    for statement in made.statements:
        if not statement.startswith("!"):
            await connection.execute(text(statement))


@settings(
    max_examples=examples(30),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    # Each example creates its tables: to find a smaller one takes many minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
@given(plan=plans, sequence=calls)
async def test_as_the_orm(
    engine: AsyncEngine, schemas: None, plan: Plan, sequence: list[Any]
) -> None:
    """After each call the rows are those that the ORM leaves, by key and by instance, from either
    side."""
    made = plan.made()
    async with engine.connect() as ours, engine.connect() as theirs:
        for connection, schema in zip((ours, theirs), SCHEMAS, strict=True):
            await create(connection, made, schema)
        options: Any = {"expire_on_commit": False, "join_transaction_mode": "create_savepoint"}
        async with AsyncSession(ours, **options) as one, AsyncSession(theirs, **options) as other:
            twins = Twins(made, one, other)
            await twins.store()
            for call, from_other_side, by_key in sequence:
                await twins.call(call, from_other_side, by_key)
            await one.commit()
            await other.commit()
        await ours.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
        await ours.rollback()
        await theirs.rollback()
