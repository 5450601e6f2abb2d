"""The engine, the schema translation and the names of tables in the statements of a session."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Dialect, Table
from sqlalchemy.orm import Session

from pgtoolset._text import printable

__all__ = ["bind_arguments_of", "qualified_names", "translation_of"]


def bind_arguments_of(name: str, sync: Session, tables: Sequence[Table]) -> dict[str, Any]:
    """Return the bind arguments that lead a session to the engine of all the tables.

    `ValueError` where they are on more than one engine; `name` is the argument that named them.
    """
    if len({id(sync.get_bind(clause=table)) for table in tables}) > 1:
        names = printable(", ".join(table.fullname for table in tables))
        raise ValueError(
            f"{name} must have all tables on one engine, since this is one transaction: {names}"
        )
    return {"clause": tables[0]}


def translation_of(session: Session, connection: Connection) -> Mapping[str | None, str | None]:
    """Return the `schema_translate_map` of the session's statements."""
    of_session = getattr(session, "execution_options", None) or {}
    options = {**connection.get_execution_options(), **of_session}
    return options.get("schema_translate_map") or {}


def qualified_names(
    tables: Iterable[Table], dialect: Dialect, translation: Mapping[str | None, str | None]
) -> list[str]:
    """Return the quoted and qualified names, in the order of the plain schema and table names.

    That order is the same for every caller, so two that lock the same tables do not deadlock.
    """
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
