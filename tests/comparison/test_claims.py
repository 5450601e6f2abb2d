"""What docs/migrating-from-fastapi-toolsets.md says about both versions, observed on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.comparison.stacks import FastapiToolsets

ROOT = Path(__file__).parents[2]
#: `make comparison` puts version 3 here, beside its environment.
OLD = ROOT / "build" / "fastapi-toolsets-3.1.1"

if not (FastapiToolsets.installed() and OLD.exists()):
    pytest.skip("`make comparison` installs the peers", allow_module_level=True)

BOTH = {
    "lock_timeout after a lock": "100ms",
    "a table named order": "ProgrammingError",
    "the same tag twice": "IntegrityError",
    "m2m_add returns": None,
    "a loaded collection": 0,
    "no row": "NotFoundError",
    "no change": "TimeoutError",
    "ours on their session": [2, "callback"],
    "crud reads": [200, 404],
    "crud creates, and fails": [500, 0],
    "crud creates": [200, 1],
    "both handlers": [409, "application/problem+json"],
    "callbacks on rows": [50, 51, 52],
    "rows outside": 0,
}
CLAIMS: dict[str, dict[str, Any]] = {
    "3.1.1": {
        "worker database": "app_test_db",
        "a lock that is not free": "DBAPIError",
        "connections of a wait": 1,
        "a commit that fails": 201,
        "a unique violation": 500,
        "an exhausted pool": 500,
    },
    "6.0.2": {
        "worker database": "test_db",
        "a lock that is not free": "LockTimeoutError",
        "connections of a wait": 0,
        "advisory locks left": 1,
        "a commit that fails": 409,
        "a unique violation": 409,
        "an exhausted pool": 503,
    },
}


@pytest.mark.parametrize("version", CLAIMS)
def test_claims(version: str) -> None:
    """Each version does what the page says of it."""
    path = [str(ROOT), *([str(OLD)] if version == "3.1.1" else [])]
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTEST_XDIST_WORKER"
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.comparison.claims"],
        env=environment | {"PYTHONPATH": os.pathsep.join(reversed(path))},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    assert json.loads(done.stdout) == {"version": version, **BOTH, **CLAIMS[version]}
