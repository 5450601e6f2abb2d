"""The mail service: an effect outside of the database, which no rollback takes back."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel

router = APIRouter(tags=["mail"])


class Mail(BaseModel):
    """A mail that has left."""

    to: str
    subject: str


class Mailer:
    """Stands in for a mail service, and remembers what it has sent."""

    def __init__(self) -> None:
        self.sent: list[Mail] = []

    async def send(self, to: str, subject: str) -> None:
        """Send a mail. Call it after the commit: `on_commit(session, partial(mailer.send,
        ...))`."""
        self.sent.append(Mail(to=to, subject=subject))


def get_mailer(request: Request) -> Mailer:
    """The mailer of the application that serves this request."""
    mailer = request.app.state.mailer
    assert isinstance(mailer, Mailer)
    return mailer


Postman = Annotated[Mailer, Depends(get_mailer)]


@router.get("/mails")
async def sent_mails(mailer: Postman) -> list[Mail]:
    """Every mail that was sent, the oldest first."""
    return mailer.sent
