"""Settings of a transaction: checked, and written as the statements that set them.

`SET LOCAL` takes no parameters, so names are quoted and values become literals. It takes no
snapshot either, as `SELECT set_config(...)` would: the first statement of a REPEATABLE READ
transaction may be a lock. https://www.postgresql.org/docs/current/sql-set.html
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from pgtoolset._arguments.functions import check_not_awaitable, check_plain_function
from pgtoolset._arguments.names import LONGEST_NAME
from pgtoolset._arguments.shown import shown
from pgtoolset._postgres.quoting import ascii_literal, quoted
from pgtoolset._text import printable
from pgtoolset.errors import SettingMissingError
from pgtoolset.types import SettingsOrFunction

#: A name, of one part or of several: the settings of an extension or an application have a prefix.
#: https://www.postgresql.org/docs/current/runtime-config-custom.html
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*")

#: Settings whose value is a list of names, of which SET would take a string for one name.
_LISTS = frozenset({"search_path", "temp_tablespaces", "local_preload_libraries"})

#: What PostgreSQL takes for space in a list.
_SPACES = " \t\n\r\f\v"

#: One name of a list, as PostgreSQL reads it: quoted, or in lower case.
_LISTED = re.compile(rf'[{_SPACES}]*(?:"((?:[^"]|"")+)"|([^{_SPACES}",]+))[{_SPACES}]*(?:,|\Z)')

#: PostgreSQL folds these letters, and no others where the encoding is UTF-8.
_TO_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}

_EXAMPLE = '{"app.tenant_id": "7", "statement_timeout": "2s"}'


class Settings:
    """Checked settings.

    Attributes:
        values: each setting, in lower case, with its value as PostgreSQL reads it.
        statements: `SET LOCAL` for each, to be sent as one message.
    """

    __slots__ = ("statements", "values")

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values = dict(values)
        self.statements = self._statements("SET LOCAL")

    def of_connection(self) -> str:
        """Return `SET` for each: the settings of a connection, until it is closed."""
        return self._statements("SET")

    def _statements(self, verb: str) -> str:
        return " ".join(
            f"{verb} {_identifier(name)} = {_value(name, value)};"
            for name, value in self.values.items()
        )

    def __repr__(self) -> str:
        return f"Settings({', '.join(self.values)})"  # a value may be a secret

    def __bool__(self) -> bool:
        return bool(self.values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.statements)

    def updated(self, others: Settings) -> Settings:
        """Return these settings with others, which win."""
        return Settings({**self.values, **others.values})


class SettingsSource:
    """What gives the settings of each unit of work.

    Args:
        settings: the settings, or a function that returns them; `None` for none.
        require: names of settings that each unit must have.
    """

    __slots__ = ("_function", "_required", "_settings")

    def __init__(
        self, settings: SettingsOrFunction | None = None, require: Sequence[str] = ()
    ) -> None:
        self._function: Callable[[], Any] | None = None
        self._settings: Settings | None = None
        self._required = _check_require(require)
        if isinstance(settings, Mapping):
            self._settings = check_settings(settings)
        elif settings is not None:
            self._function = _check_function(settings)

    def now(self) -> Settings | None:
        """Return the settings of a unit that begins.

        Raises:
            SettingMissingError: a required setting is missing or empty.
            TypeError, ValueError: the function has returned something else than settings.
        """
        if self._function is None:
            return self._checked(self._settings)
        return self.of(self._function())

    def of(self, given: object) -> Settings | None:
        """Return what a function of the caller has returned as settings; raises as `now` does."""
        check_not_awaitable("settings", "a plain function", given)
        return self._checked(check_settings(given))

    def _checked(self, settings: Settings | None) -> Settings | None:
        if self._required:
            values = {} if settings is None else settings.values
            missing = [name for name in self._required if not values.get(name, "").strip()]
            if missing:
                names = ", ".join(missing)
                raise SettingMissingError(
                    f"the transaction must have the setting {names}, and it is missing or empty in "
                    "settings=; nothing was sent",
                    names=missing,
                )
        return settings or None


def check_settings(settings: object) -> Settings:
    """Return checked settings. No message shows a value.

    Raises:
        TypeError, ValueError: a name or a value is wrong.
    """
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"settings must be a mapping such as {_EXAMPLE}, or a function that returns one, not "
            f"an object of type {type(settings).__name__}"
        )
    values: dict[str, str] = {}
    for given, value in settings.items():
        name = check_setting_name("settings", given)
        if name in values:
            raise ValueError(f"settings has {name} twice; names differ by more than their case")
        values[name] = _text(name, value)
    return Settings(values)


def check_setting_name(argument: str, name: object) -> str:
    """Return the name of a setting in lower case, by which PostgreSQL compares it."""
    if not isinstance(name, str):
        raise TypeError(f"{argument} must have names that are strings, not {shown(name)}")
    if _NAME.fullmatch(name) is None:
        raise ValueError(
            f"{argument}: {shown(name)} is not the name of a setting, such as statement_timeout or "
            "app.tenant_id"
        )
    if any(len(part) > LONGEST_NAME for part in name.split(".")):
        raise ValueError(f"{argument}: {shown(name)} has a part of more than {LONGEST_NAME} bytes")
    return name.lower()


def _check_require(require: object) -> tuple[str, ...]:
    if isinstance(require, str | bytes) or not isinstance(require, Sequence):
        raise TypeError(
            f'require must be a list of names, such as ("app.tenant_id",), not {shown(require)}'
        )
    return tuple(check_setting_name("require", name) for name in require)


def _check_function(settings: object) -> Callable[[], Any]:
    if not callable(settings):
        check_settings(settings)
    assert callable(settings)
    check_plain_function("settings", "a plain function", settings)
    try:
        inspect.signature(settings).bind()
    except TypeError:
        raise TypeError(
            f"settings must be a function without parameters, and {shown(settings)} has some"
        ) from None
    except ValueError:
        pass  # a function of C that does not say
    return settings


def _text(name: str, value: object) -> str:
    """Return a value as PostgreSQL reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return _check_string(name, str.__str__(value))
    if isinstance(value, int):
        return int.__repr__(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise ValueError(f"settings: the value of {name} must be a finite number")
        return float.__repr__(value)
    if isinstance(value, timedelta):
        if value < timedelta():
            raise ValueError(f"settings: the value of {name} must be a time of at least 0")
        microseconds = value // timedelta(microseconds=1)
        whole, rest = divmod(microseconds, 1000)
        return f"{microseconds}us" if rest else f"{whole}ms"
    kind = shown(type(value))
    advice = "; leave the setting out" if value is None else "; pass str(value)"
    raise TypeError(
        f"settings: the value of {name} must be a str, an int, a float, a bool or a timedelta, not "
        f"{kind}{advice}"
    )


def _check_string(name: str, value: str) -> str:
    if "\0" in value:
        raise ValueError(f"settings: the value of {name} must not contain a NUL character")
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        raise ValueError(f"settings: the value of {name} must be valid Unicode") from None
    if name in _LISTS:
        _listed(name, value)
    return value


def _identifier(name: str) -> str:
    return ".".join(quoted(part) for part in name.split("."))


def _value(name: str, value: str) -> str:
    if name in _LISTS:
        return ", ".join(ascii_literal(each) for each in _listed(name, value))
    return ascii_literal(value)


def _listed(name: str, value: str) -> list[str]:
    """Return the names in a list.

    See https://www.postgresql.org/docs/current/runtime-config-client.html#GUC-SEARCH-PATH
    """
    if not value.strip(_SPACES):
        return [""]
    names: list[str] = []
    position = 0
    while position < len(value) or value[:position].endswith(","):
        match = _LISTED.match(value, position)
        if match is None:
            raise ValueError(
                f"settings: the value of {printable(name)} must be names with commas between them"
            )
        names.append(match[1].replace('""', '"') if match[1] else match[2].translate(_TO_LOWER))
        position = match.end()
    return names
