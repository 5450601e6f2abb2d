"""The desk where arguments are checked: one function for each kind, used by every capability.

Each check raises `TypeError` for a value of a wrong type and `ValueError` for one that does not
fit, before any SQL. The message begins with the name of the argument. It shows a value only through
`shown`, so that no password in a URL that was given by mistake reaches a log.
"""

from pgtoolset._arguments.answers import (
    check_constraint_texts,
    check_problem_statuses,
    check_type_base,
)
from pgtoolset._arguments.functions import (
    check_begun,
    check_function,
    check_not_awaitable,
    check_observer,
    check_plain_function,
    check_predicate,
    check_work,
    close_unawaited,
    is_async,
    is_generator,
)
from pgtoolset._arguments.keys import KeyParser, PrimaryKey, parse_key, parse_keys
from pgtoolset._arguments.mappings import (
    check_at_most_one,
    check_columns,
    check_count,
    check_flag,
    check_iterable,
    check_mode,
    check_provider,
    check_text,
    mapper_of,
    metadata_of,
    tables_of,
)
from pgtoolset._arguments.names import LONGEST_NAME, advisory_numbers, check_http_name, check_name
from pgtoolset._arguments.relationships import (
    check_relationship,
    conditions_of,
    is_equality,
    relationship_of,
)
from pgtoolset._arguments.sessions import (
    AUTOCOMMIT,
    READ_BLOCK,
    check_atomic,
    check_bind,
    check_engine,
    check_pool,
    check_session_maker,
    check_session_makers,
    check_supported,
    check_transactional,
    new_session,
    refuse_read_block,
    sync_session,
    sync_session_of,
    writable_session,
)
from pgtoolset._arguments.settings import Settings, SettingsSource, check_settings
from pgtoolset._arguments.shown import cause_to_show, shown
from pgtoolset._arguments.times import milliseconds, optional_seconds, seconds
from pgtoolset._arguments.transactions import (
    NO_OPTIONS,
    IsolationLevel,
    TransactionOptions,
    check_resolve_commit,
)
from pgtoolset._arguments.urls import (
    DatabaseUrl,
    UrlObject,
    is_connection_string,
    url_of,
)
from pgtoolset._postgres.urls import connect_arguments, engine_url, uses_asyncpg

__all__ = [
    "AUTOCOMMIT",
    "LONGEST_NAME",
    "NO_OPTIONS",
    "READ_BLOCK",
    "DatabaseUrl",
    "IsolationLevel",
    "KeyParser",
    "PrimaryKey",
    "Settings",
    "SettingsSource",
    "TransactionOptions",
    "UrlObject",
    "advisory_numbers",
    "cause_to_show",
    "check_at_most_one",
    "check_atomic",
    "check_begun",
    "check_bind",
    "check_columns",
    "check_constraint_texts",
    "check_count",
    "check_engine",
    "check_flag",
    "check_function",
    "check_http_name",
    "check_iterable",
    "check_mode",
    "check_name",
    "check_not_awaitable",
    "check_observer",
    "check_plain_function",
    "check_pool",
    "check_predicate",
    "check_problem_statuses",
    "check_provider",
    "check_relationship",
    "check_resolve_commit",
    "check_session_maker",
    "check_session_makers",
    "check_settings",
    "check_supported",
    "check_text",
    "check_transactional",
    "check_type_base",
    "check_work",
    "close_unawaited",
    "conditions_of",
    "connect_arguments",
    "engine_url",
    "is_async",
    "is_connection_string",
    "is_equality",
    "is_generator",
    "mapper_of",
    "metadata_of",
    "milliseconds",
    "new_session",
    "optional_seconds",
    "parse_key",
    "parse_keys",
    "refuse_read_block",
    "relationship_of",
    "seconds",
    "shown",
    "sync_session",
    "sync_session_of",
    "tables_of",
    "url_of",
    "uses_asyncpg",
    "writable_session",
]
