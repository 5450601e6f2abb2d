"""Running the contract classes by hand, on implementations that are wrong on purpose."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest


def cases(test: Any) -> Iterator[dict[str, Any]]:
    """The arguments of each case of a parametrised test."""
    axes = []
    for mark in getattr(test, "pytestmark", ()):
        if mark.name == "parametrize":
            names = mark.args[0]
            names = [names] if isinstance(names, str) else list(names)
            axes.append(
                [
                    dict(zip(names, values if len(names) > 1 else (values,), strict=True))
                    for values in mark.args[1]
                ]
            )
    for combination in itertools.product(*axes):
        yield {name: value for part in combination for name, value in part.items()}


async def failures(contract: type[Any], fixtures: Callable[[], dict[str, Any]]) -> set[str]:
    """The names of the tests of a contract class that fail; `fixtures` makes new ones for each
    case."""
    failed = set()
    for name, test in inspect.getmembers(contract, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        for case in cases(test):
            known = fixtures() | case
            wanted = [
                parameter for parameter in inspect.signature(test).parameters if parameter != "self"
            ]
            try:
                await test(contract(), **{parameter: known[parameter] for parameter in wanted})
            except (Exception, pytest.fail.Exception):
                failed.add(name)
    return failed
