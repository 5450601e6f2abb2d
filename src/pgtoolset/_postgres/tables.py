"""Tables as the statements of a session find them: their engine, schema translation and names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect, Table
from sqlalchemy.orm import Session

__all__ = ["bind_arguments_of", "qualified_names", "translation_of"]


def bind_arguments_of(sync: Session, tables: Sequence[Table]) -> dict[str, Any]:
    """What finds the one engine that all the tables are on."""
    if len({id(sync.get_bind(clause=table)) for table in tables}) > 1:
        names = ", ".join(table.fullname for table in tables)
        raise ValueError(f"tables must be on one engine, for this to be one transaction: {names}")
    return {"clause": tables[0]}


def translation_of(session: Session, connection: Connection) -> Mapping[str | None, str | None]:
    """The `schema_translate_map` that a statement of the session would get."""
    of_session = getattr(session, "execution_options", None) or {}
    options = {**connection.get_execution_options(), **of_session}
    return options.get("schema_translate_map") or {}


def qualified_names(
    tables: Iterable[Table], dialect: Dialect, translation: Mapping[str | None, str | None]
) -> list[str]:
    """The names as SQL writes them, in the global order: that of the plain schema and table
    names."""
    default = dialect.default_schema_name
    quote = dialect.identifier_preparer
    names: dict[tuple[str, str], str] = {}
    for table in tables:
        schema = table.schema
        if schema in translation:
            schema = translation[schema] or default
        name = quote.quote(table.name)
        key = (str(schema or default or ""), str(table.name))
        if schema is not None:
            names[key] = f"{quote.quote_schema(schema)}.{name}"
        else:
            names.setdefault(key, name)
    return [names[key] for key in sorted(names)]
