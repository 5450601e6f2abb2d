"""Where the shop's tables are."""

from dataclasses import dataclass, field
from typing import Self
from uuid import uuid4

from sqlalchemy import URL, make_url
from sqlalchemy.exc import SQLAlchemyError


@dataclass(frozen=True)
class Settings:
    """A database, and the schema in it that belongs to this run of the shop alone."""

    url: URL
    schema: str = field(default_factory=lambda: f"pgtoolset_shop_{uuid4().hex[:12]}")

    @classmethod
    def from_url(cls, database_url: str) -> Self:
        """Accept `postgresql://` and `postgres://`, as hosting services hand them out, whatever
        driver they name."""
        scheme, separator, rest = database_url.partition("://")
        if not separator or scheme.partition("+")[0] not in ("postgresql", "postgres"):
            raise ValueError("DATABASE_URL must start with postgresql:// or postgres://")
        try:
            url = make_url(f"postgresql+asyncpg://{rest}")
        except (SQLAlchemyError, ValueError) as error:  # which may repeat the password
            raise ValueError(
                "DATABASE_URL must look like postgresql://user:password@host:5432/database"
            ) from error
        # What libpq calls sslmode, SQLAlchemy hands to asyncpg under asyncpg's name for it.
        return cls(
            url.set(
                query={
                    ("ssl" if name == "sslmode" else name): value
                    for name, value in url.query.items()
                }
            )
        )

    @property
    def application_name(self) -> str:
        """What the shop's connections are called in pg_stat_activity: another run's have another
        name."""
        return self.schema

    @property
    def watcher_name(self) -> str:
        """What the connection of the shop's `RowWatcher` is called there."""
        return f"{self.schema}_watcher"

    @property
    def page_name(self) -> str:
        """What the connections are called there that look at the shop for its page."""
        return f"{self.schema}_page"

    @property
    def reader_name(self) -> str:
        """What a connection is called there that waits to read a locked table for the page."""
        return f"{self.schema}_reader"

    def server_settings(self, application_name: str) -> dict[str, str]:
        """PostgreSQL settings of a connection on which unqualified table names mean the shop's
        own."""
        return {"search_path": self.schema, "application_name": application_name}
