"""What libpq takes from its environment: variables and the service file, for what a URL lacks.

asyncpg reads most variables and the password file itself. This module adds the rest.
https://www.postgresql.org/docs/current/libpq-envars.html and
https://www.postgresql.org/docs/current/libpq-pgservice.html
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from sqlalchemy import URL

__all__ = ["ServiceError", "completed", "environment_names_a_server"]

#: Each parameter and its variable. asyncpg reads those of passwords and certificates, of the
#: service only where it is given a DSN.
_VARIABLES = {
    "host": "PGHOST",
    "port": "PGPORT",
    "dbname": "PGDATABASE",
    "user": "PGUSER",
    "application_name": "PGAPPNAME",
    "options": "PGOPTIONS",
    "connect_timeout": "PGCONNECT_TIMEOUT",
    "hostaddr": "PGHOSTADDR",
    "channel_binding": "PGCHANNELBINDING",
    "gssencmode": "PGGSSENCMODE",
    "require_auth": "PGREQUIREAUTH",
    "requirepeer": "PGREQUIREPEER",
}

#: Variables that say where to connect to.
_SERVER = ("PGHOST", "PGHOSTADDR", "PGPORT", "PGDATABASE", "PGUSER", "PGSERVICE")

#: The parts of a URL that are not in its query.
_PARTS = {"host": "host", "port": "port", "dbname": "database", "user": "username"}


class ServiceError(ValueError):
    """The service file does not have the service, or cannot be read."""


def environment_names_a_server(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a variable of libpq says where to connect to."""
    return any(environment.get(name) for name in _SERVER)


def completed(url: URL, environment: Mapping[str, str] = os.environ) -> URL:
    """Complete a URL: first from the service, then from the variables.

    Raises:
        ServiceError: there is no such service, or no file that could have it.
    """
    query = dict(url.query)
    service = query.pop("service", None) or environment.get("PGSERVICE")
    servicefile = query.pop("servicefile", None)
    url = url.set(query=query)
    if service:
        name = service if isinstance(service, str) else service[-1]
        path = servicefile if isinstance(servicefile, str) else None
        url = _with_defaults(url, _service(name, path, environment))
    variables = {name: environment.get(variable) for name, variable in _VARIABLES.items()}
    return _with_defaults(url, {name: value for name, value in variables.items() if value})


def _with_defaults(url: URL, defaults: Mapping[str, str]) -> URL:
    """Add each missing parameter to a URL. libpq takes each one separately."""
    query = dict(url.query)
    for name, value in defaults.items():
        if name == "password":
            url = url if url.password is not None else url.set(password=value)
        elif name in query or (name in _PARTS and getattr(url, _PARTS[name]) is not None):
            continue
        elif name == "user":
            url = url.set(username=value)
        elif name == "dbname":
            url = url.set(database=value)
        else:  # a host may be a directory or several, and so may be a port
            query[name] = value
    # An empty name of a database is what a URL without one has.
    if url.database == "" and "dbname" in defaults:
        url = url.set(database=defaults["dbname"])
    return url.set(query=query)


def _service(name: str, servicefile: str | None, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the parameters of a service, of the first file that has it."""
    paths = list(_service_files(servicefile, environment))
    for path in paths:
        try:
            lines = path.read_text(errors="surrogateescape").splitlines()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise ServiceError(
                f"the service file {path} cannot be read ({error.strerror})"
            ) from None
        found = _section(name, lines)
        if found is not None:
            return found
    looked = " and ".join(map(str, paths))
    raise ServiceError(f"there is no service {name!r} in {looked}")


def _service_files(servicefile: str | None, environment: Mapping[str, str]) -> Iterator[Path]:
    given = servicefile or environment.get("PGSERVICEFILE")
    home = environment.get("HOME")
    if given:
        yield Path(given)
    elif home:
        yield Path(home) / ".pg_service.conf"
    directory = environment.get("PGSYSCONFDIR")
    if directory:
        yield Path(directory) / "pg_service.conf"


def _section(name: str, lines: list[str]) -> dict[str, str] | None:
    """Return the parameters of a section; nothing in a value has a meaning, `%` and `#` neither."""
    found: dict[str, str] | None = None
    for line in map(str.strip, lines):
        if not line or line.startswith("#"):
            continue
        if line.startswith("["):
            if found is not None:
                break
            if line == f"[{name}]":
                found = {}
        elif found is not None:
            key, equals, value = line.partition("=")
            if equals:
                found[key.strip()] = value.strip()
    return found
