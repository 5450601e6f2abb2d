"""Both implementations of each hot module, or the interpreted one where no other is installed.

These tests need no database and nothing from the folder above: wheels are tested with them on every
platform.
"""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest


def implementations(name: str) -> list[ModuleType]:
    """The interpreted module and, where it is installed, the compiled one."""
    found = [importlib.import_module(f"pgtoolset._native.{name}")]
    try:
        found.append(importlib.import_module(f"pgtoolset._native.{name}_c"))
    except ModuleNotFoundError:
        pass  # test_choice.py fails where it must be installed
    return found


def name_of(module: ModuleType) -> str:
    return module.__name__.rpartition(".")[2]


@pytest.fixture(scope="session", params=implementations("comparator"), ids=name_of)
def comparator(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module


@pytest.fixture(scope="session", params=implementations("associations"), ids=name_of)
def associations(request: pytest.FixtureRequest) -> ModuleType:
    module: ModuleType = request.param
    return module
