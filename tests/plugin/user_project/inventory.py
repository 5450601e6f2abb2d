"""A project that uses pgtoolset: tables, and an API that commits."""

from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException
from sqlalchemy import ForeignKey, select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from pgtoolset import create_db_dependency, get_transaction, on_commit


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"
    __table_args__ = {"schema": "Stock room"}  # noqa: RUF012 - as SQLAlchemy's documentation has it

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)


class Part(Base):
    """Its foreign key is checked at the commit."""

    __tablename__ = "part"

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int] = mapped_column(ForeignKey(Item.id, deferrable=True, initially="DEFERRED"))


get_db = create_db_dependency(session_maker=async_sessionmaker())
app = FastAPI()
announced: list[str] = []

Session = Annotated[AsyncSession, Depends(get_db)]


@app.post("/items/{name}", status_code=201)
async def add_item(name: str, session: Session) -> int:
    async with get_transaction(session):
        item = Item(name=name)
        session.add(item)
    on_commit(session, lambda: announced.append(name))
    return item.id


@app.get("/items")
async def list_items(session: Session) -> list[str]:
    return list(await session.scalars(select(Item.name).order_by(Item.name)))


@app.post("/items/{name}/refused")
async def refuse_item(name: str, session: Session) -> None:
    session.add(Item(name=name))
    await session.flush()
    raise HTTPException(409)
