"""The tables: what the shop knows, and what the database itself refuses to believe."""

from datetime import datetime

from sqlalchemy import CheckConstraint, Column, DateTime, ForeignKey, Table, event, func
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from pgtoolset import row_change_trigger


class Base(DeclarativeBase):
    """The declarative base of the shop."""


class Customer(Base):
    """Somebody who orders. An e-mail address belongs to one customer."""

    __tablename__ = "customers"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]
    email: Mapped[str] = mapped_column(unique=True)


product_tags = Table(
    "product_tags",
    Base.metadata,
    Column("sku", ForeignKey("products.sku"), primary_key=True),
    Column("tag", ForeignKey("tags.name"), primary_key=True),
)


class Product(Base):
    """Something on a shelf. There is never less than nothing of it, and never more than the shelf
    holds."""

    __tablename__ = "products"
    __table_args__ = (CheckConstraint("stock BETWEEN 0 AND shelf", name="stock_fits_shelf"),)

    sku: Mapped[str] = mapped_column(primary_key=True)
    price_cents: Mapped[int]
    stock: Mapped[int]
    shelf: Mapped[int]

    tags: Mapped[list["Tag"]] = relationship(secondary=product_tags)


order_tags = Table(
    "order_tags",
    Base.metadata,
    Column("order_id", ForeignKey("orders.id"), primary_key=True),
    Column("tag", ForeignKey("tags.name"), primary_key=True),
)


class Tag(Base):
    """A word for orders and products."""

    __tablename__ = "tags"

    name: Mapped[str] = mapped_column(primary_key=True)


class Order(Base):
    """What a customer has ordered, at the prices of that moment."""

    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(primary_key=True)
    customer_id: Mapped[int] = mapped_column(ForeignKey("customers.id"))
    placed_at: Mapped[datetime] = mapped_column(DateTime(timezone=True), server_default=func.now())
    total_cents: Mapped[int] = mapped_column(default=0)
    status: Mapped[str] = mapped_column(default="placed")

    lines: Mapped[list["OrderLine"]] = relationship(order_by="OrderLine.sku")
    tags: Mapped[list[Tag]] = relationship(secondary=order_tags)


# Created with the table: a follower of an order receives a change at once, and not at the next
# look.
for ddl in row_change_trigger(Order):
    event.listen(Order.__table__, "after_create", ddl)


class OrderLine(Base):
    """One product of an order."""

    __tablename__ = "order_lines"
    __table_args__ = (CheckConstraint("quantity > 0", name="some_quantity"),)

    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"), primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("products.sku"), primary_key=True)
    quantity: Mapped[int]
    price_cents: Mapped[int]


class Parcel(Base):
    """Something that is sent. PostgreSQL looks for its order only at the COMMIT."""

    __tablename__ = "parcels"

    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(
        ForeignKey("orders.id", deferrable=True, initially="DEFERRED")
    )


class Voucher(Base):
    """A promise of a discount."""

    __tablename__ = "vouchers"

    code: Mapped[str] = mapped_column(primary_key=True)
    percent: Mapped[int]


class Redemption(Base):
    """The order that a voucher was used for. The primary key sees to it that there is only one."""

    __tablename__ = "redemptions"

    voucher_code: Mapped[str] = mapped_column(ForeignKey("vouchers.code"), primary_key=True)
    order_id: Mapped[int] = mapped_column(ForeignKey("orders.id"))


class Delivery(Base):
    """Goods that came in."""

    __tablename__ = "deliveries"

    id: Mapped[int] = mapped_column(primary_key=True)
    supplier: Mapped[str]


class DeliveryLine(Base):
    """One product of a delivery that found its place on the shelf."""

    __tablename__ = "delivery_lines"

    delivery_id: Mapped[int] = mapped_column(ForeignKey("deliveries.id"), primary_key=True)
    sku: Mapped[str] = mapped_column(ForeignKey("products.sku"), primary_key=True)
    quantity: Mapped[int]


class TillClosing(Base):
    """What was in the till when it was counted."""

    __tablename__ = "till_closings"

    id: Mapped[int] = mapped_column(primary_key=True)
    sales: Mapped[int]
    cents: Mapped[int]


class TillSale(Base):
    """A sale at the till, and the closing that has counted it."""

    __tablename__ = "till_sales"

    id: Mapped[int] = mapped_column(primary_key=True)
    cents: Mapped[int]
    closing_id: Mapped[int | None] = mapped_column(ForeignKey("till_closings.id"))


class Audit(Base):
    """A look at the books. The shop itself never uses the table, so who locks it is only in another
    auditor's way."""

    __tablename__ = "audits"

    id: Mapped[int] = mapped_column(primary_key=True)
