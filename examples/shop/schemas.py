"""What comes in and goes out over HTTP, validated at the edge: past it, every value fits its
column."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

# PostgreSQL's text holds every character but NUL.
Text = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=100, pattern=r"^[^\x00]+$"),
]
Email = Annotated[str, StringConstraints(max_length=200, pattern=r"^[^@\s\x00]+@[^@\s\x00]+$")]
Sku = Annotated[str, StringConstraints(max_length=40, pattern=r"^[a-z0-9-]+$")]
VoucherCode = Annotated[str, StringConstraints(max_length=40, pattern=r"^[A-Z0-9-]+$")]
Id = Annotated[int, Field(ge=1, le=2**31 - 1)]  # PostgreSQL's integer
Quantity = Annotated[int, Field(ge=1, le=1000)]


class Incoming(BaseModel):
    """A request body. An unknown field is refused."""

    model_config = ConfigDict(extra="forbid")


class CustomerIn(Incoming):
    name: Text
    email: Email


class CustomerOut(CustomerIn):
    id: Id


class Line(Incoming):
    """So much of a product."""

    sku: Sku
    quantity: Quantity


class WithLines(Incoming):
    """A body that lists products, each of them once."""

    lines: Annotated[list[Line], Field(min_length=1, max_length=50)]

    @field_validator("lines")
    @classmethod
    def _each_product_once(cls, lines: list[Line]) -> list[Line]:
        if len({line.sku for line in lines}) < len(lines):
            raise ValueError("a product may be listed only once")
        return lines

    def in_lock_order(self) -> list[Line]:
        """The lines by product: where all lock in one order, two requests for the same products
        cannot deadlock."""
        return sorted(self.lines, key=lambda line: line.sku)


class OrderIn(WithLines):
    customer_id: Id
    voucher: VoucherCode | None = None


class OrderOut(BaseModel):
    id: int
    customer_id: int
    placed_at: datetime
    total_cents: int
    status: str
    lines: list[Line]
    notes: list[str] = []


class StatusIn(Incoming):
    status: Literal["placed", "paid", "sent", "received"]


class StatusOut(StatusIn):
    id: int


class TagsIn(Incoming):
    tags: Annotated[list[Sku], Field(max_length=100_000)]


class TagsOut(BaseModel):
    """How many tags an order gained and lost, and those that do not exist."""

    added: int = 0
    removed: int = 0
    unknown: list[Sku] = []


class DeliveryIn(WithLines):
    supplier: Text


class DeliveryOut(BaseModel):
    """A delivery, with the products that found their place and those that went back."""

    id: int
    accepted: list[Sku]
    refused: list[Sku]


class ProductOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    sku: str
    price_cents: int
    stock: int
    shelf: int


class ReservationIn(Incoming):
    quantity: Quantity = 1


class ReservationOut(BaseModel):
    """What is left after a reservation, and how many attempts its transaction took."""

    sku: str
    stock: int
    attempts: int


class TurnoverOut(BaseModel):
    """How many orders there are, and what they amount to."""

    orders: int
    total_cents: int


class PoolOut(BaseModel):
    """The application's connection pool at this moment."""

    size: int
    checked_out: int
