"""`pgtoolset._text`: what a message, a log and a terminal show of a text of another."""

from __future__ import annotations

import logging
import unicodedata
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgtoolset import PgToolsetError
from pgtoolset._text import (
    may_hold_password,
    one_line,
    printable,
    safe,
    safe_lines,
    without_passwords,
)
from pgtoolset.errors import EmbeddedServerError
from pgtoolset.values import Blocker, LockWait

#: Characters in, characters out.
pytestmark = pytest.mark.once

#: Each kind: C0, DEL, C1, a separator, an override, an isolate, a zero width, a lone surrogate.
CONTROL = "\x00\x07\x1b\x7f\x85\x9b\u2028\u2029\u202a\u202e\u2066\u2069\u200b\ud800\ue000"

#: Any text, with many of the characters that matter.
texts = st.text(st.one_of(st.characters(), st.sampled_from(CONTROL + "\r\n\t '\"\\=:/@%&")))

#: A password that a URL can have as it is, and one that is percent-encoded there.
plain_passwords = st.text(
    st.sampled_from("abcXYZ059-._~!$*+,;#?/=\\"), min_size=4, max_size=20
).map(lambda text: f"Q{text}Q")
any_passwords = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1)


def is_clean(text: str) -> bool:
    """Whether no character of a text commands a terminal or breaks a line."""
    categories = {unicodedata.category(each) for each in text}
    return not categories & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


@given(texts)
def test_any_text_is_clean(text: str) -> None:
    """No text has a control character, an override, a line break or a surrogate."""
    for shown in (printable(text), one_line(text), one_line(text, 20), safe(text)):
        assert is_clean(shown)
    assert all(is_clean(line) for line in safe_lines(text).split("\n"))


@given(texts)
def test_the_words_of_errors_and_values_are_clean(text: str) -> None:
    """The same of each error of ours, and of the words and the repr of what is reported."""
    blocker = Blocker(1, text, text, text, None)
    wait = LockWait(1, (2,), text, text, None, text, text)
    for each in (PgToolsetError(text), blocker, wait):
        assert is_clean(str(each))
        assert is_clean(repr(each))
    assert all(is_clean(line) for line in str(EmbeddedServerError(text)).split("\n"))
    assert (blocker.query, wait.relation) == (text, text), "the attributes stay as they were"


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_what_can_be_printed_stays(text: str) -> None:
    """A text of letters, digits, punctuation and symbols of any language is shown as it is."""
    assert printable(text) == text


def test_escapes() -> None:
    """A character that cannot be printed is shown as Python escapes it; white space in a line is
    one space."""
    assert printable("a\x1b[2J\n\u202eb") == r"a\x1b[2J\n\u202eb"
    assert one_line("SELECT\n\t 1  \r\n") == "SELECT 1"
    assert one_line("x" * 30, 20) == "x" * 20 + "..."
    assert str(PgToolsetError("one\ntwo\r\n\x1b]0;title\x07")) == r"one two \x1b]0;title\x07"


@given(plain_passwords, st.sampled_from(["postgresql", "postgres", "postgresql+asyncpg", ""]))
def test_no_password_of_a_url(password: str, scheme: str) -> None:
    """The password of a URL is left out of a text, well-formed or not, and the rest stays."""
    for url in (f"{scheme}://user:{password}@host/db", f"{scheme}//user:{password}@host,b:1/db"):
        shown = without_passwords(f"could not open {url} now")
        assert password not in shown
        assert shown.startswith("could not open ")
        assert shown.endswith("/db now")
        assert may_hold_password(url)


@given(any_passwords)
def test_no_encoded_password_of_a_url(password: str) -> None:
    """The same of a password that is percent-encoded, and of a URL that is encoded as a whole."""
    encoded = f"Q{quote(password, safe='')}Q"
    url = f"postgresql://user:{encoded}@host/db"
    for text in (url, quote(url, safe="")):
        assert quote(encoded, safe="") not in without_passwords(text)
        assert encoded not in without_passwords(text)
        assert may_hold_password(text)


@given(st.text(st.sampled_from("abc $%@:/=,"), min_size=1).map(lambda text: f"Q{text}Q"))
def test_no_password_of_a_dsn(password: str) -> None:
    """A password that follows its name is left out: in a DSN, a query of a URL, SQL or a dict."""
    quoted = password.replace(" ", "")
    for text in (
        f"host=h password='{password}' user=u",
        f"host=h password = {quoted} user=u",
        f"postgresql://h/db?password={quoted}&application_name=x",
        f"postgresql://h/db?sslpassword={quoted}&application_name=x",
        f"ALTER ROLE me PASSWORD '{password}'",
        str({"host": "h", "password": password}),
        f"PGPASSWORD={quoted}",
    ):
        assert password not in without_passwords(text)
        assert quoted not in without_passwords(text)
        assert may_hold_password(text)


@pytest.mark.parametrize(
    "text",
    [
        "SELECT 1",
        "12:30",
        'password authentication failed for user "me"',
        "see https://www.postgresql.org/docs/current/libpq.html",
        "me@host",
    ],
)
def test_other_texts_stay(text: str) -> None:
    """A text without a password stays as it is."""
    assert safe(text) == text


def test_hostile_length() -> None:
    """A text of a megabyte that nearly is a URL, over and over, is shown without delay."""
    for piece in ("//a:", "password='", "a:", "password=", "\x1b", "%2F%2Fa%3A"):
        text = piece * (2**20 // len(piece))
        assert len(one_line(text, 100)) < 1000
        safe(text)
        may_hold_password(text)


def test_logs(caplog: pytest.LogCaptureFixture) -> None:
    """A record of the library is one clean line, and its traceback has no password and no ESC."""
    logger = logging.getLogger("pgtoolset")
    try:
        raise ValueError("postgresql://me:hunter2@h \x1b[2J")
    except ValueError as error:
        logger.warning("lost: %s", error, exc_info=True)
    assert "hunter2" not in caplog.text
    assert "\x1b" not in caplog.text
    [record] = caplog.records
    assert record.getMessage() == r"lost: postgresql://me:***@h \x1b[2J"
    logger.warning("plain %d", 1)
    assert caplog.records[1].args == (1,), "a record that is clean stays as it is"
