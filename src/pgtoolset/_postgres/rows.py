"""Rows by an array of keys: the statement of a look, and the driver's values turned into those of the mapping.

The types of the parameters are left to PostgreSQL, which infers them from the columns that they are compared with.
A cast of ours would have to know domains, enums and collations, and one to `varchar(n)` would cut keys short.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sqlalchemy import Dialect, and_, any_, case, false, literal_column, select, true, tuple_
from sqlalchemy.orm import Mapper

__all__ = ["decoder", "key_arguments", "rows_statement"]


def rows_statement(
    mapper: Mapper[Any],
    keys: Sequence[str],
    columns: Sequence[str],
    dialect: Dialect,
    schema_translate_map: Mapping[str | None, str | None] | None,
) -> str:
    """The text of a SELECT of `keys` and `columns`, in this order, for arrays of keys in `$1`, `$2`, ..."""
    key_columns: list[Any] = list(mapper.primary_key)
    parameters = [f"${number}" for number in range(1, len(key_columns) + 1)]
    matches = [
        column.op("=", is_comparison=True)(any_(literal_column(parameter)))
        for column, parameter in zip(key_columns, parameters, strict=True)
    ]
    criterion: Any
    if len(matches) == 1:
        criterion = matches[0]
    else:
        # The first branch is gone before the statement is planned. It is there for its types: `unnest` takes any
        # array, so the parameters must have met their columns before they meet it.
        typed = case((false(), and_(*matches)), else_=true())
        wanted: Any = literal_column(f"(SELECT * FROM unnest({', '.join(parameters)}))")
        criterion = and_(typed, tuple_(*key_columns).op("IN", is_comparison=True)(wanted))
    # The entities are the mapping's, so that SQLAlchemy joins the tables of a subclass and adds its discriminator.
    entities = [getattr(mapper.class_, name) for name in (*keys, *columns)]
    options: dict[str, Any] = {}
    if schema_translate_map:
        options = {"schema_translate_map": schema_translate_map, "render_schema_translate": True}
    statement = select(*entities).where(criterion)
    return str(statement.compile(dialect=dialect, compile_kwargs={"literal_binds": True}, **options))


def key_arguments(keys: Sequence[Any], width: int) -> list[list[Any]]:
    """The arrays of `rows_statement` for these keys."""
    if width == 1:
        return [list(keys)]
    return [list(part) for part in zip(*keys, strict=True)]


def decoder(
    mapper: Mapper[Any], selected: Sequence[str], wanted: Sequence[str], dialect: Dialect
) -> Callable[[Sequence[Any]], dict[str, Any]]:
    """Turns a row of `selected` into a dictionary of the `wanted` attributes, with the values SQLAlchemy would give."""
    types = {name: mapper.column_attrs[name].columns[0].type.dialect_impl(dialect) for name in wanted}
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
    """The OID that SQLAlchemy's numeric types ask for, told by what asyncpg makes of a column of it."""
    if isinstance(value, float):
        return 701  # float8
    return 20 if isinstance(value, int) else 1700  # int8, numeric
