"""The statements of a `RowWatcher`, and the driver's values turned into those of the mapping.

Rows are found by arrays of keys, one for each column of the primary key, in `$1`, `$2`, and so on.

The line of a row is its `ROW(...)::text` without newlines. PostgreSQL's text forms are exact, but
for floats where `extra_float_digits` is set below 1; a row has no line then. See
https://www.postgresql.org/docs/current/rowtypes.html#ROWTYPES-IO-SYNTAX
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import (
    JSON,
    ColumnElement,
    Dialect,
    Integer,
    LargeBinary,
    String,
    Text,
    Uuid,
    and_,
    any_,
    bindparam,
    case,
    cast,
    column,
    false,
    literal_column,
    select,
    true,
    tuple_,
)
from sqlalchemy.orm import Mapper
from sqlalchemy.types import TypeDecorator, TypeEngine

from pgtoolset._postgres.arrays import (
    DIALECT,
    Elements,
    array_text,
    equals,
    is_bound_as_it_is,
    stored_type,
)
from pgtoolset._postgres.catalog import EQ, as_text, compare, pg, row_of, unnested

__all__ = ["RowStatements", "array_texts", "decoder", "key_arguments", "key_parameter"]

_NEWLINE: Any = literal_column(r"E'\n'")
_ESCAPED: Any = literal_column(r"E'\\n'")

#: The type of a parameter. Its own text would have no schema where the search_path has it.
_NAME_OF_TYPE = (
    "(SELECT pg_catalog.format('%I.%I', n.nspname, t.typname) FROM pg_catalog.pg_type AS t"
    f" JOIN pg_catalog.pg_namespace AS n ON n.oid {EQ} t.typnamespace"
    f" WHERE t.oid {EQ} CAST(pg_catalog.pg_typeof({{}}) AS pg_catalog.oid))"
)


class RowStatements:
    """The statements for the rows of one mapper and one set of columns.

    Attributes:
        selected: the attribute in each position of a row of `rows`, before the line at its end.
            The first positions are the key; `None` stands for a key that is not a column's value.
        returns_given_keys: whether a row begins with the key that found it, as it was given, and
            not as the table spells it.

    Args:
        mapper: of the rows.
        keys: the attributes of its primary key, in order.
        columns: the watched attributes.
    """

    def __init__(
        self,
        mapper: Mapper[Any],
        keys: Sequence[str],
        columns: Sequence[str],
        dialect: Dialect,
        schema_translate_map: Mapping[str | None, str | None] | None,
    ) -> None:
        self._mapper = mapper
        self._dialect = dialect
        self._options: dict[str, Any] = {}
        if schema_translate_map:
            self._options = {
                "schema_translate_map": schema_translate_map,
                "render_schema_translate": True,
            }
        self.returns_given_keys = any(_needs_expression(each) for each in mapper.primary_key)
        self._keys: _Keys
        if self.returns_given_keys:
            self._keys = _GivenKeys(mapper)
            others = tuple(columns)
            self.selected: tuple[str | None, ...] = (*(None for _ in keys), *others)
        else:
            self._keys = _ColumnKeys(mapper, keys)
            spelled = [None if _is_json(each) else name for name, each in _named(mapper, keys)]
            others = tuple(name for name in columns if name not in spelled)
            self.selected = (*spelled, *others)
        # The entities are attributes of the class, so that SQLAlchemy joins the tables of a
        # subclass and adds its discriminator.
        attributes = [getattr(mapper.class_, name) for name in others]
        self._entities = [*self._keys.entities, *attributes]
        self._parameters = [f"${number}" for number in range(1, len(keys) + 1)]

    def rows(self) -> str:
        """The rows of the keys: `selected`, and the line."""
        line = pg.convert_to(self._line(), literal_column("'UTF8'"), type_=LargeBinary)
        return self._sql(
            select(*self._entities, case((_is_exact(), line)))
            .select_from(self._mapper)
            .where(self._keys.criterion(self._parameters))
        )

    def snapshot(self, types: Sequence[str] | None) -> str:
        """The lines of the keys' rows in one value (NULL without rows), and whether they are exact.

        Args:
            types: of the arrays, where the parameters are their texts.
        """
        parameters = self._parameters
        if types is not None:
            # In a subquery, because PostgreSQL repeats a cast that depends on settings, as that of
            # text does, for each row that the index does not find: 10,000 times 10,000 keys where
            # the planner takes a table for small.
            parameters = [
                f"CAST((SELECT CAST(CAST({each} AS pg_catalog.text) AS {type_})) AS {type_})"
                for each, type_ in zip(parameters, types, strict=True)
            ]
        lines: Any = pg.convert_to(pg.string_agg(self._line(), _NEWLINE), literal_column("'UTF8'"))
        return self._sql(
            select(lines, _is_exact().label("is_exact"))
            .select_from(self._mapper)
            .where(self._keys.criterion(parameters))
        )

    def parameter_types(self) -> str:
        """The types that PostgreSQL infers for the parameters, with their schemas.

        The statement reads no row of the table.
        """
        # Spelled out, because SQLAlchemy would drop conditions beside its own `false()`.
        never: Any = select(true()).select_from(self._mapper).where(literal_column("false"))
        never = never.where(self._keys.criterion(self._parameters))
        # The subquery comes first: PostgreSQL has to compare a parameter with its column before it
        # can tell the type.
        types: list[Any] = [literal_column(_NAME_OF_TYPE.format(each)) for each in self._parameters]
        return self._sql(select(never.scalar_subquery(), *types))

    def _line(self) -> Any:
        # The text of a row doubles its backslashes, so a single one is from this replacement.
        return pg.replace(as_text(row_of(self._entities)), _NEWLINE, _ESCAPED)

    def _sql(self, statement: Any) -> str:
        return str(
            statement.compile(
                dialect=self._dialect, compile_kwargs={"literal_binds": True}, **self._options
            )
        )


class _Keys(Protocol):
    """How rows are found by keys, and how a row tells its key."""

    entities: list[Any]

    def criterion(self, parameters: Sequence[str]) -> Any: ...


class _ColumnKeys:
    """Compares the columns with the parameters themselves, whose types PostgreSQL infers.

    A cast would have to know domains, enums and collations, and one to `varchar(n)` would cut keys
    short.
    """

    def __init__(self, mapper: Mapper[Any], keys: Sequence[str]) -> None:
        self._columns: list[Any] = list(mapper.primary_key)
        # The driver decodes JSON, and does not take the decoded value as a parameter.
        self.entities = [
            as_text(each) if _is_json(each) else getattr(mapper.class_, name)
            for name, each in _named(mapper, keys)
        ]

    def criterion(self, parameters: Sequence[str]) -> Any:
        matches = [
            each.op("=", is_comparison=True)(any_(literal_column(parameter)))
            for each, parameter in zip(self._columns, parameters, strict=True)
        ]
        if len(matches) == 1:
            return matches[0]
        # The planner removes the first branch. It is there for its types: `unnest` takes any array,
        # so PostgreSQL has to infer the types of the parameters from the columns before it.
        typed = case((false(), and_(*matches)), else_=true())
        # Several arrays, which is a form of the grammar: see `unnested`.
        wanted: Any = literal_column(f"(SELECT * FROM unnest({', '.join(parameters)}))")
        return and_(typed, tuple_(*self._columns).op("IN", is_comparison=True)(wanted))


class _GivenKeys:
    """Compares the columns with what the ORM binds for a key: an expression of the parameter.

    `lower($1)` finds "news" for the key "News", so the row cannot tell which key found it. It
    therefore comes with the key itself.
    """

    def __init__(self, mapper: Mapper[Any]) -> None:
        self._columns: list[Any] = list(mapper.primary_key)
        arrays: list[Any] = [
            cast(literal_column(f"${number}"), Elements(each.type))
            for number, each in enumerate(self._columns, 1)
        ]
        outputs = [column(f"key_{n}", each.type) for n, each in enumerate(self._columns)]
        rows = unnested(arrays).table_valued(*outputs)
        self._wanted = list(rows.render_derived(name="pgtoolset_wanted").c)
        # Without the type, whose `column_expression` is for what the table stores.
        self.entities: list[Any] = [
            literal_column(f"pgtoolset_wanted.key_{n}") for n in range(len(outputs))
        ]

    def criterion(self, parameters: Sequence[str]) -> Any:
        pairs = zip(self._columns, self._wanted, strict=True)
        return and_(*(equals(each, wanted) for each, wanted in pairs))


def _needs_expression(target: ColumnElement[Any]) -> bool:
    # The elements of an array of arrays are not its arrays; their texts travel in their place.
    return not is_bound_as_it_is(target)


def _named(mapper: Mapper[Any], keys: Sequence[str]) -> list[tuple[str, ColumnElement[Any]]]:
    return list(zip(keys, mapper.primary_key, strict=True))


def _is_json(target: ColumnElement[Any]) -> bool:
    return isinstance(stored_type(target.type, DIALECT), JSON)


def _is_exact() -> Any:
    digits = cast(pg.current_setting(literal_column("'extra_float_digits'")), Integer)
    return select(compare(digits, ">", literal_column("0"))).scalar_subquery()


def key_parameter(name: str, type_: TypeEngine[Any]) -> ColumnElement[Any]:
    """Return a parameter for an array of keys of one column, as SQLAlchemy binds single keys.

    Integers, strings and UUIDs travel as text: asyncpg asks the server about the type of most
    arrays, at the first use on each connection.
    """
    if isinstance(stored_type(type_, DIALECT), Integer | String | Uuid):
        return cast(bindparam(name, type_=_TextOfElements(type_)), Elements(type_))
    return bindparam(name, type_=Elements(type_))


class _TextOfElements(TypeDecorator[list[Any]]):
    """The text of an array whose elements `Elements` binds."""

    impl = Text
    cache_ok = True

    def __init__(self, item: TypeEngine[Any]) -> None:
        super().__init__()
        self.item = item

    def bind_processor(self, dialect: Dialect) -> Any:
        bind = Elements(self.item).bind_processor(dialect)
        return lambda values: array_text(bind(values))


def array_texts(keys: Sequence[Any], width: int) -> list[str] | None:
    """Return the arrays of keys as texts; `None` where a key is of a type without a known text."""
    columns = key_arguments(keys, width)
    for values in columns:
        if not all(
            kind is int or kind is str or issubclass(kind, UUID) for kind in set(map(type, values))
        ):
            return None
    return [array_text(values) for values in columns]


def key_arguments(keys: Sequence[Any], width: int) -> list[list[Any]]:
    """Return the arrays of keys, one for each of `width` columns."""
    if width == 1:
        return [list(keys)]
    return [[key[position] for key in keys] for position in range(width)]


def decoder(
    mapper: Mapper[Any], selected: Sequence[str | None], wanted: Sequence[str], dialect: Dialect
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Return a function that turns a row of `selected` into the `wanted` attributes and values.

    The values are the ones that SQLAlchemy returns for the columns.
    """
    types = {
        name: mapper.column_attrs[name].columns[0].type.dialect_impl(dialect) for name in wanted
    }
    positions = [(name, selected.index(name)) for name in wanted]
    processors: dict[tuple[str, int], Callable[[Any], Any] | None] = {}

    def decode(row: Sequence[Any]) -> dict[str, Any]:
        decoded = {}
        for name, position in positions:
            value = row[position]
            kind = (name, _type_code(value))
            if kind not in processors:
                processors[kind] = types[name].result_processor(dialect, kind[1])
            process = processors[kind]
            decoded[name] = value if process is None else process(value)
        return decoded

    return decode


def _type_code(value: Any) -> int:
    """Return the OID that SQLAlchemy's numeric types ask for, by what asyncpg made of a value."""
    if isinstance(value, float):
        return 701  # float8
    return 20 if isinstance(value, int) else 1700  # int8, numeric
