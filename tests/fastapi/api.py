"""An application that runs whatever statement it gets, and tables whose every name is secret."""

import re
from typing import Annotated, Any

import httpx
from fastapi import Body, Depends, FastAPI
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from pgtoolset import create_db_dependency
from pgtoolset.fastapi import install_error_handlers

Maker = async_sessionmaker[AsyncSession]

#: Each name, and each value in it, contains "secret".
TABLES = """
CREATE TABLE secret_owner (
    secret_id int CONSTRAINT secret_key PRIMARY KEY
);
CREATE TABLE secret_item (
    secret_id int CONSTRAINT secret_item_key PRIMARY KEY,
    secret_name text NOT NULL CONSTRAINT secret_unique UNIQUE,
    secret_number int DEFAULT 0 CONSTRAINT secret_check CHECK (secret_number < 100),
    secret_owner int CONSTRAINT secret_reference REFERENCES secret_owner,
    secret_range int4range,
    secret_late text CONSTRAINT secret_late_unique UNIQUE DEFERRABLE INITIALLY DEFERRED,
    secret_late_owner int CONSTRAINT secret_late_reference REFERENCES secret_owner
        DEFERRABLE INITIALLY DEFERRED,
    secret_late_range int4range,
    CONSTRAINT secret_exclusion EXCLUDE USING gist (secret_range WITH &&),
    CONSTRAINT secret_late_exclusion EXCLUDE USING gist (secret_late_range WITH &&)
        DEFERRABLE INITIALLY DEFERRED
);
CREATE FUNCTION secret_function() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    RAISE EXCEPTION 'secret_message' USING ERRCODE = NEW.secret_state, DETAIL = 'secret_detail',
        HINT = 'secret_hint', CONSTRAINT = 'secret_constraint', TABLE = 'secret_table',
        COLUMN = 'secret_column', SCHEMA = 'secret_schema';
END $$;
CREATE TABLE secret_now (secret_state text);
CREATE TRIGGER secret_trigger BEFORE INSERT ON secret_now
    FOR EACH ROW EXECUTE FUNCTION secret_function();
CREATE TABLE secret_later (secret_state text);
CREATE CONSTRAINT TRIGGER secret_trigger AFTER INSERT ON secret_later
    DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION secret_function();
INSERT INTO secret_owner VALUES (1);
INSERT INTO secret_item (secret_id, secret_name, secret_owner, secret_range, secret_late,
        secret_late_range)
    VALUES (1, 'secret value', 1, '[1, 5)', 'secret value', '[1, 5)');
"""

DROP = """
DROP TABLE IF EXISTS secret_now, secret_later, secret_item, secret_owner;
DROP FUNCTION IF EXISTS secret_function();
"""

#: What must stand in no body: names, values and texts of the tables above, SQL, SQLSTATEs, and
#: names of packages.
INTERNAL = re.compile(
    r"secret|select|insert|update|commit|violat|\bkey\b|\$1|\b(22|23|40|55)[0-9A-Z]{3}\b"
    r"|postgres|asyncpg|psycopg|sqlalchemy|pgtoolset|error|traceback|\bpid\b|session|table|column",
    re.IGNORECASE,
)


def make_app(maker: Maker, **options: Any) -> FastAPI:
    """An application with the handlers, and `/run`, which runs a statement."""
    app = FastAPI()
    install_error_handlers(app, **options)
    Session = Annotated[AsyncSession, Depends(create_db_dependency(maker))]

    @app.post("/run")
    async def run(
        session: Session,
        sql: Annotated[str, Body()],
        parameters: Annotated[dict[str, Any] | None, Body()] = None,
    ) -> str:
        await session.execute(text(sql), parameters or {})
        return "done"

    return app


def check_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """The response is a problem of this status, in which nothing is internal; return its body."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert set(body) == {"type", "title", "status", "detail"}
    assert body["type"] == "about:blank"
    assert body["status"] == status
    assert body["detail"].endswith(".")
    assert not INTERNAL.search(response.text), response.text
    assert not INTERNAL.search(str(response.headers)), response.headers
    if status == 503:
        assert int(response.headers["retry-after"]) >= 1
    else:
        assert "retry-after" not in response.headers
    return body
