"""Rows by arrays of keys: the statements of a look, and the driver's values turned into those of
the mapping.

The types of the parameters are left to PostgreSQL, which infers them from the columns that they are
compared with. A cast of ours would have to know domains, enums and collations, and one to
`varchar(n)` would cut keys short.

A row as text is what `ROW(...)::text` makes of it. PostgreSQL's text forms lose nothing, but that
of floats where somebody has set `extra_float_digits` below 1; there is none then. See
https://www.postgresql.org/docs/current/rowtypes.html#ROWTYPES-IO-SYNTAX
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import (
    Dialect,
    Integer,
    LargeBinary,
    Text,
    and_,
    any_,
    case,
    cast,
    false,
    func,
    literal_column,
    select,
    true,
    tuple_,
)
from sqlalchemy.orm import Mapper

from pgtoolset._postgres.arrays import array_text

__all__ = ["Statements", "array_texts", "decoder", "key_arguments"]

_NEWLINE: Any = literal_column(r"E'\n'")
_ESCAPED: Any = literal_column(r"E'\\n'")


class Statements:
    """The statements that look at rows of one mapper by arrays of keys in `$1`, `$2`, ...

    Args:
        mapper: of the rows.
        keys: the attributes of its primary key, in order.
        columns: the other attributes that are looked at.
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
        # The entities are the mapping's, so that SQLAlchemy joins the tables of a subclass and adds
        # its discriminator.
        self._entities = [getattr(mapper.class_, name) for name in (*keys, *columns)]
        self._parameters = [f"${number}" for number in range(1, len(keys) + 1)]

    def rows(self) -> str:
        """The rows: keys, columns and at the end the text."""
        return self._sql(
            select(*self._entities, self._text()).where(self._criterion(self._parameters))
        )

    def texts(self, types: Sequence[str] | None) -> str:
        """The texts of all the rows in one value of lines, NULL where there are none.

        With `types` the parameters are the texts of arrays of these types.
        """
        parameters = self._parameters
        if types is not None:
            # In a subquery, because a cast that depends on settings, as that of text does, is
            # carried out anew for each row that is not found by the index: 10,000 times 10,000 keys
            # where the planner takes a table for small.
            parameters = [
                f"CAST((SELECT CAST({each}::text AS {type_})) AS {type_})"
                for each, type_ in zip(parameters, types, strict=True)
            ]
        lines: Any = func.convert_to(
            func.string_agg(self._line(), _NEWLINE), literal_column("'UTF8'")
        )
        is_exact = _is_exact().label("is_exact")
        return self._sql(
            select(lines, is_exact).select_from(self._mapper).where(self._criterion(parameters))
        )

    def types(self) -> str:
        """The types that PostgreSQL infers for the parameters; it looks at no row."""
        # Spelled out, because SQLAlchemy would leave away what is joined to its own `false()`.
        never: Any = select(true()).select_from(self._mapper).where(literal_column("false"))
        never = never.where(self._criterion(self._parameters))
        # The subquery comes first, so that the parameters have met their columns before they are
        # asked.
        types = [cast(func.pg_typeof(literal_column(each)), Text) for each in self._parameters]
        return self._sql(select(never.scalar_subquery(), *types))

    def _line(self) -> Any:
        # Backslashes are doubled in the text of a row, so one that is not is ours.
        return func.replace(cast(func.row(*self._entities), Text), _NEWLINE, _ESCAPED)

    def _text(self) -> Any:
        return case(
            (
                _is_exact(),
                func.convert_to(self._line(), literal_column("'UTF8'"), type_=LargeBinary),
            )
        )

    def _criterion(self, parameters: Sequence[str]) -> Any:
        key_columns: list[Any] = list(self._mapper.primary_key)
        matches = [
            column.op("=", is_comparison=True)(any_(literal_column(parameter)))
            for column, parameter in zip(key_columns, parameters, strict=True)
        ]
        if len(matches) == 1:
            return matches[0]
        # The first branch is gone before the statement is planned. It is there for its types:
        # `unnest` takes any array, so the parameters must have met their columns before they meet
        # it.
        typed = case((false(), and_(*matches)), else_=true())
        wanted: Any = literal_column(f"(SELECT * FROM unnest({', '.join(parameters)}))")
        return and_(typed, tuple_(*key_columns).op("IN", is_comparison=True)(wanted))

    def _sql(self, statement: Any) -> str:
        return str(
            statement.compile(
                dialect=self._dialect, compile_kwargs={"literal_binds": True}, **self._options
            )
        )


def _is_exact() -> Any:
    digits = cast(func.current_setting(literal_column("'extra_float_digits'")), Integer)
    return select(digits > literal_column("0")).scalar_subquery()


def array_texts(keys: Sequence[Any], width: int) -> list[str] | None:
    """The arrays of `texts` for these keys, as text; `None` where their text is not beyond
    doubt."""
    columns = key_arguments(keys, width)
    for column in columns:
        if not all(
            kind is int or kind is str or issubclass(kind, UUID) for kind in set(map(type, column))
        ):
            return None
    return [array_text(column) for column in columns]


def key_arguments(keys: Sequence[Any], width: int) -> list[list[Any]]:
    """The arrays of `rows` for these keys."""
    if width == 1:
        return [list(keys)]
    return [[key[position] for key in keys] for position in range(width)]


def decoder(
    mapper: Mapper[Any], selected: Sequence[str], wanted: Sequence[str], dialect: Dialect
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Turns a row of `selected` into a dictionary of the `wanted` attributes, with the values
    SQLAlchemy would give."""
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
    """The OID that SQLAlchemy's numeric types ask for, told by what asyncpg makes of a column of
    it."""
    if isinstance(value, float):
        return 701  # float8
    return 20 if isinstance(value, int) else 1700  # int8, numeric
