"""Names, strings and blocks of code in SQL, where they cannot be parameters.

https://www.postgresql.org/docs/current/sql-syntax-lexical.html
"""

from __future__ import annotations

import re

_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def quoted(name: str) -> str:
    """Return the name as a quoted identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(string: str) -> str:
    """Return the string as a literal, whatever `standard_conforming_strings` is."""
    doubled = string.replace("'", "''")
    return f"E'{doubled}'".replace("\\", "\\\\") if "\\" in doubled else f"'{doubled}'"


def ascii_literal(string: str) -> str:
    """Return the string as a literal of ASCII alone, whatever the encoding of the client is.

    asyncpg sends the text of a statement in UTF-8 also where `client_encoding` says otherwise.
    """
    if string.isascii():
        return literal(string)
    doubled = string.replace("\\", "\\\\").replace("'", "''")
    escaped = _NOT_ASCII.sub(lambda found: f"\\U{ord(found[0]):08X}", doubled)
    return f"E'{escaped}'"


def dollar_quoted(body: str) -> str:
    """Return the body of a function or block between two tags that nothing in it can end."""
    tag = "$pgtoolset$"
    # The end of the body and the start of the closing tag may make up a tag as well.
    while (body + tag).index(tag) < len(body):
        tag = f"{tag[:-1]}_$"
    return f"{tag}{body}{tag}"


def do_block(body: str) -> str:
    """Return a DO statement with this body in PL/pgSQL."""
    return f"DO {dollar_quoted(body)}"
