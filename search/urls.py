"""URLs as they may be shown: without the passwords that they may hold. The only place that decides what is secret.

`shown` is for a URL that this program was given, `masked_in` for texts of others (a driver's message, a log line) that
may contain one. SQLAlchemy is imported only when it is needed: commands that print their help need no second for it.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING
from urllib.parse import quote, quote_plus

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

PAGES_VARIABLE = "LORA_SEARCH_MLFLOW_PAGES"
"""Environment variable with the address under which browsers find MLflow's pages."""
MOST_CHARACTERS = 1000
"""Of an address that is shown whole: no file's name is longer, and hardly any other's."""

_WORDS = "pass|pwd|secret|token|key|credential"
_SECRET = re.compile(_WORDS, re.IGNORECASE)
"""Names of query parameters that are not shown: drivers take `?password=...` as well as `user:password@`."""
_NESTED = re.compile(rf"(?:{_WORDS})[^=;&\s]*\s*=|://[^/@\s]*:[^@\s]*@", re.IGNORECASE)
"""A value that holds a password itself: ODBC's `odbc_connect=...;PWD=...`, libpq's `dbname=postgresql://u:p@h/d`."""
_USER_INFO = re.compile(r"(\w[\w+.-]*://[^\s/?#:@]*):\S*@")
_QUERY = re.compile(rf"([?&;][^=&;?\s]*(?:{_WORDS})[^=&;?\s]*=)[^&;\s]*", re.IGNORECASE)


def shown(url: str | URL) -> str:
    """The URL with `***` for its password and for each query parameter that may be one; a long one is shortened.

    A text that cannot be read as a URL loses whatever could be a password in it.
    """
    parsed = _parsed(url)
    if parsed is None:
        return _shortened(_unparsed(str(url)))
    if not secrets(parsed):
        return _shortened(url if isinstance(url, str) else url.render_as_string(hide_password=False))
    hidden = {name: "***" for name, value in parsed.query.items() if _is_secret(name, value)}
    text = parsed.update_query_dict(hidden).render_as_string(hide_password=True)
    return _shortened(text.replace("%2A%2A%2A", "***"))


def has_secret(url: str) -> bool:
    """Whether `shown` would leave something out."""
    parsed = _parsed(url)
    return _unparsed(url) != url if parsed is None else bool(secrets(parsed))


def secrets(url: URL) -> tuple[str, ...]:
    """What `shown` leaves out."""
    values = [str(url.password or "")]
    for name, value in url.query.items():
        if _is_secret(name, value):
            values += [value] if isinstance(value, str) else value
    return tuple(value for value in values if value)


def without_secrets(text: str, url: URL) -> str:
    """A driver's message about the URL, with `***` for the secrets of the URL wherever they stand in it."""
    for secret in secrets(url):
        for form in {secret, quote(secret, safe=""), quote_plus(secret)}:
            text = text.replace(form, "***")
    return masked_in(text)


def masked_in(text: str) -> str:
    """The text with `***` for passwords in the URLs that it contains."""
    return _QUERY.sub(r"\1***", _USER_INFO.sub(r"\1:***@", text))


def first_line(error: BaseException) -> str:
    """What an error says, without passwords and without the statement, parameters and links that SQLAlchemy adds."""
    lines = [line.partition(" (Background")[0] for line in str(error).splitlines() if line.strip()]
    return _shortened(masked_in(lines[0].strip())) if lines else type(error).__name__


class LogFormatter(logging.Formatter):
    """A formatter of log lines that hides passwords in URLs, those in tracebacks too.

    The error of a request that failed quotes its URL, user and password included (requests 2.32).
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the traceback below it."""
        return masked_in(super().format(record))


def _parsed(url: str | URL) -> URL | None:
    """The URL in its parts, None for a text that is not a URL."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        return make_url(url)
    except (ArgumentError, ValueError):  # ValueError: a port that is not a number
        return None


def _is_secret(name: str, value: str | tuple[str, ...]) -> bool:
    values = (value,) if isinstance(value, str) else value
    return bool(_SECRET.search(name)) or any(_NESTED.search(each) for each in values)


def _unparsed(text: str) -> str:
    """A text that is not a URL, without what could be its password."""
    text = _QUERY.sub(r"\1***", text)
    head, at, tail = text.rpartition("@")
    scheme, colon, rest = head.partition("://")
    if at and not colon:
        return f"***@{tail}"
    return f"{scheme}://{rest.partition(':')[0]}:***@{tail}" if at and ":" in rest else text


def _shortened(text: str) -> str:
    """The text, the middle of a long one left out."""
    return text if len(text) < MOST_CHARACTERS else f"{text[:200]}...{text[-100:]}"
