"""The methods of the protocols have the signatures of the public functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any, get_args, get_type_hints

import pytest

import pgtoolset
from pgtoolset import LockMode, RowLockMode, RowWatcher, protocols, types
from pgtoolset.watch import RowChanges

#: Protocols whose methods are functions of the package, or methods of a class.
PAIRS: dict[type[Any], Any] = {
    protocols.TableLocker: pgtoolset,
    protocols.AdvisoryLocker: pgtoolset,
    protocols.RowLocker: pgtoolset,
    protocols.LockObserver: pgtoolset,
    protocols.ChangeWaiter: pgtoolset,
    protocols.AssociationWriter: pgtoolset,
    protocols.Watcher: RowWatcher,
    protocols.ChangeStream: RowChanges,
}


def methods() -> Iterator[tuple[str, Callable[..., Any], Callable[..., Any]]]:
    for protocol, owner in PAIRS.items():
        for name, method in vars(protocol).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                yield f"{protocol.__name__}.{name}", method, getattr(owner, name)


METHODS = list(methods())


def described(function: Callable[..., Any], hints: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Each parameter: its name, kind, type (variables by name), whether it can be left out."""
    parameters = inspect.signature(function).parameters.values()
    return [
        (each.name, each.kind, str(hints.get(each.name)), each.default is not each.empty)
        for each in parameters
        if each.name != "self"
    ]


@pytest.mark.parametrize(
    ("method", "function"), [pair[1:] for pair in METHODS], ids=[pair[0] for pair in METHODS]
)
def test_signature(method: Callable[..., Any], function: Callable[..., Any]) -> None:
    """A method takes and returns what its function does, parameter by parameter."""
    expected, actual = get_type_hints(function), get_type_hints(method)
    assert described(method, actual) == described(function, expected)
    if method is not protocols.Watcher.changes:  # which returns a protocol too
        assert str(actual.get("return")) == str(expected.get("return"))


def test_every_protocol_of_functions_is_compared() -> None:
    """A new protocol whose methods have docstrings of functions cannot be forgotten here."""
    compared = {protocol.__name__ for protocol in PAIRS}
    of_sessions = {
        "DatabaseContext",
        "DatabaseDependency",
        "ManagedSession",
        "SessionFactory",
        "StartableTransaction",
        "TransactionalSession",
    }
    internal = {"AssociationRows", "RowComparator"}  # compared by stubtest, with the compiled ones
    of_users = {"Observer"}  # a function that an application writes
    assert compared | of_sessions | internal | of_users == set(protocols.__all__)


@pytest.mark.parametrize("timed", [name for name, *_ in METHODS if "changes" not in name])
def test_times(timed: str) -> None:
    """Every timeout and interval of the contracts takes all forms of a time."""
    method = next(method for name, method, _ in METHODS if name == timed)
    hints = get_type_hints(method)
    forms = set(get_args(types.Duration))
    for name in {"timeout", "interval"} & set(hints):
        assert set(get_args(hints[name])) - {type(None)} == forms


@pytest.mark.parametrize(
    ("spellings", "modes"),
    [(types.LockModeSpelling, LockMode), (types.RowLockModeSpelling, RowLockMode)],
)
def test_spellings_of_modes(spellings: Any, modes: Any) -> None:
    """The types spell each value and name of the modes in upper and in lower case, and no more."""
    enum, literals = get_args(spellings)
    written = [text for mode in modes for text in (mode.value, mode.name)]
    assert enum is modes
    assert sorted(get_args(literals)) == sorted({*written, *map(str.lower, written)})
    assert {modes(text) for text in get_args(literals)} == set(modes)
