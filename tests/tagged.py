"""Posts and tags, for tests that need some many-to-many relationship."""

from __future__ import annotations

from sqlalchemy import Column, ForeignKey, Table
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Tagged(DeclarativeBase):
    """The base of these tables."""


post_tag = Table(
    "tagged_post_tag",
    Tagged.metadata,
    Column("post_id", ForeignKey("tagged_post.id"), primary_key=True),
    Column("tag_id", ForeignKey("tagged_tag.id"), primary_key=True),
)


class Tag(Tagged):
    __tablename__ = "tagged_tag"

    id: Mapped[int] = mapped_column(primary_key=True)


class Post(Tagged):
    __tablename__ = "tagged_post"

    id: Mapped[int] = mapped_column(primary_key=True)
    tags: Mapped[list[Tag]] = relationship(secondary=post_tag)
