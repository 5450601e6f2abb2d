"""The engine, the schema translation and the names of tables in the statements of a session."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import ARRAY, Connection, Dialect, Engine, Table, Text, bindparam, delete, text
from sqlalchemy import Sequence as SchemaSequence
from sqlalchemy.orm import Mapper, Session
from sqlalchemy.sql.functions import next_value
from sqlalchemy.sql.visitors import iterate

from pgtoolset._compatibility import connections_of
from pgtoolset._text import printable

__all__ = [
    "bind_arguments_of",
    "hiding",
    "options_of",
    "qualified_names",
    "sequences_of",
    "translation_of",
]

#: Execution options of one transaction, or of how results are fetched. The others say where
#: statements go and what they mean, or are the application's own.
_OPTIONS_OF_A_TRANSACTION = frozenset(
    {
        *("isolation_level", "postgresql_readonly", "postgresql_deferrable"),
        *("stream_results", "yield_per", "max_row_buffer", "prebuffer_rows"),
    }
)


def bind_arguments_of(
    name: str, sync: Session, tables: Sequence[Table], mappers: Iterable[Mapper[Any]] = ()
) -> dict[str, Any]:
    """Return the bind arguments that lead a session to the engine of all the tables.

    `ValueError` where they are on more than one engine; `name` is the argument that named them.
    A session that routes by the statement sees a write, of the mapper of the table if it is known.
    """
    if type(sync).get_bind is Session.get_bind:
        arguments: list[dict[str, Any]] = [{"clause": table} for table in tables]
    else:
        owners: dict[Any, Mapper[Any]] = {}
        for mapper in mappers:
            known = owners.get(mapper.local_table)
            if known is None or known.isa(mapper):
                owners[mapper.local_table] = mapper
        arguments = [_arguments_of_write(table, owners.get(table)) for table in tables]
    if len({id(sync.get_bind(**each)) for each in arguments}) > 1:
        names = printable(", ".join(table.fullname for table in tables))
        raise ValueError(
            f"{name} must have all tables on one engine, since this is one transaction: {names}"
        )
    return arguments[0]


def _arguments_of_write(table: Table, mapper: Mapper[Any] | None) -> dict[str, Any]:
    arguments: dict[str, Any] = {"clause": delete(table)}
    return arguments if mapper is None else {"mapper": mapper, **arguments}


def options_of(session: Session, bind: Engine | Connection) -> dict[str, Any]:
    """Return the execution options of the session's statements over a bind, for other connections.

    They are those of the engine, then of the connection that the open transaction uses, then of the
    session itself (SQLAlchemy 2.1). Options of one transaction, such as its isolation level, are
    left out.
    """
    options = dict(bind.get_execution_options())
    for connection in connections_of(session.get_transaction()):
        if connection is bind or connection.engine is bind:
            options.update(connection.get_execution_options())
    options.update(getattr(session, "execution_options", None) or {})
    return {name: each for name, each in options.items() if name not in _OPTIONS_OF_A_TRANSACTION}


def translation_of(session: Session, connection: Connection) -> Mapping[str | None, str | None]:
    """Return the `schema_translate_map` of the session's statements."""
    of_session = getattr(session, "execution_options", None) or {}
    options = {**connection.get_execution_options(), **of_session}
    return options.get("schema_translate_map") or {}


def sequences_of(tables: Iterable[Table]) -> Iterator[SchemaSequence]:
    """Return the sequences that the defaults of columns call from SQLAlchemy's side."""
    for table in tables:
        for column in table.columns:
            default: Any = column.default
            if default is None:
                continue
            if isinstance(default, SchemaSequence):
                # PostgreSQL has a serial in place of one that is optional.
                if not default.optional:
                    yield default
            elif default.is_clause_element:
                for element in iterate(default.arg):
                    if isinstance(element, next_value):
                        yield element.sequence


def qualified_names(
    tables: Iterable[Table | SchemaSequence],
    dialect: Dialect,
    translation: Mapping[str | None, str | None],
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
        name = plain(quote.quote(table.name), dialect)
        key = (str(schema or default or ""), str(table.name))
        if schema is not None:
            names[key] = f"{plain(quote.quote_schema(schema), dialect)}.{name}"
        else:
            names.setdefault(key, name)
    return [names[key] for key in sorted(names)]


def plain(quoted: str, dialect: Dialect) -> str:
    """Return a name as PostgreSQL has it: SQLAlchemy doubles each `%` where `%s` is a placeholder.

    Compiled statements need that. Our own texts are sent as they are.
    """
    return quoted.replace("%%", "%") if dialect.paramstyle in ("format", "pyformat") else quoted


#: The role, and those of the tables whose row-level security is active for it.
_HIDING = text("""
SELECT CURRENT_USER, each.name
FROM pg_catalog.unnest(CAST(:names AS pg_catalog.text[])) AS each(name)
WHERE pg_catalog.row_security_active(CAST(pg_catalog.to_regclass(each.name) AS pg_catalog.oid))
""").bindparams(bindparam("names", type_=ARRAY(Text)))


def hiding(connection: Connection, names: Sequence[str]) -> str:
    """Return which tables may hide rows by row-level security, in words; empty for none.

    See https://www.postgresql.org/docs/current/ddl-rowsecurity.html
    """
    found = connection.execute(_HIDING, {"names": list(names)}).all()
    if not found:
        return ""
    tables = ", ".join(name for _, name in found)
    return printable(f"it is active for the role {found[0][0]} on {tables}")
