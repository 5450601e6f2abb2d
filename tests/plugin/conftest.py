"""Projects of users, for the tests of the plugin."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.plugin.projects import MODELS, USER_PROJECT, Project, Warm, databases

collect_ignore = ["user_project"]


@pytest.fixture
async def before(server_url: str, database_url: str) -> set[str]:
    """The databases on the server before the test, that of this run among them."""
    return await databases(server_url)


@pytest.fixture
def user_project(tmp_path: Path, server_url: str, warm: Warm) -> Project:
    """A copy of user_project, on the server of this run."""
    shutil.copytree(
        USER_PROJECT, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    return Project(tmp_path, server_url, warm)


@pytest.fixture
def project(tmp_path: Path, server_url: str, warm: Warm) -> Project:
    """A project with models and nothing else, on the server of this run."""
    project = Project(tmp_path, server_url, warm)
    project.write(
        models=MODELS,
        pytest_ini="""
            [pytest]
            pythonpath = .
            pg_metadata = models:Base
            asyncio_mode = auto
            asyncio_default_fixture_loop_scope = function
            filterwarnings = error
        """,
    )
    return project
