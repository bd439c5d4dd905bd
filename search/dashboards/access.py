"""Who may open the dashboards: an address, the names under which they are asked for, and a password.

On the loopback address no password is needed. Anywhere else there must be one, and the names must be given: without
them a page that a user visits could make the browser send requests here (DNS rebinding).
"""

from __future__ import annotations

import base64
import hmac
import ipaddress
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.common.errors import UserError

LOOPBACK = "127.0.0.1"
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared with, not listened on
USER_VARIABLE = "LORA_SEARCH_UI_USER"
PASSWORD_VARIABLE = "LORA_SEARCH_UI_PASSWORD"
HOSTS_VARIABLE = "LORA_SEARCH_ALLOWED_HOSTS"
MIN_PASSWORD = 12
"""Characters; MLflow refuses shorter ones."""
HEALTH = "/health"
"""Answered without a password and under any name, as MLflow's is: it tells nothing but that the server runs."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a dashboard is reached. `check` makes one from options and environment."""

    host: str = LOOPBACK
    names: tuple[str, ...] = ()
    """Further names, with or without a port, that browsers may ask for."""
    user: str = "admin"
    password: str | None = field(default=None, repr=False)
    """None for no authentication, on the loopback address only."""

    def address(self, port: int) -> str:
        """The URL of a server on this port, as this machine reaches it."""
        host = LOOPBACK if self.host in EVERYWHERE else self.host
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def allowed_hosts(self, port: int) -> tuple[str, ...]:
        """Values of the Host header that are answered, by a server on this port."""
        own = self.address(port).removeprefix("http://")  # an address is no name that could be rebound
        always = dict.fromkeys((own, f"{LOOPBACK}:{port}", f"localhost:{port}"))
        given = (host for name in self.names for host in ((name,) if ":" in name else (name, f"{name}:{port}")))
        return (*always, *given)

    def allowed_origins(self, port: int) -> tuple[str, ...]:
        """Values of the Origin header from which requests may change something."""
        return tuple(f"{scheme}://{host}" for host in self.allowed_hosts(port) for scheme in ("http", "https"))

    def authorization(self) -> str | None:
        """The header of HTTP Basic authentication; None where none is needed."""
        if self.password is None:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")


def check(host: str, allowed_hosts: str | None, environ: Mapping[str, str] = os.environ) -> Access:
    """The access that the options ask for; user and password come from the environment, which `ps` does not show.

    Raises:
        UserError: an address beyond this machine without a password or without names; a password too short.
    """
    names = tuple(name.strip() for name in (allowed_hosts or "").split(",") if name.strip())
    password = environ.get(PASSWORD_VARIABLE) or None
    problems = []
    if not is_loopback(host):
        if password is None:
            problems.append(f"other machines could open it without a password: set {PASSWORD_VARIABLE}")
        if not names:
            problems.append("name the hosts it may be asked for, e.g. --allowed-hosts search.example.com")
    if "*" in names:
        problems.append("--allowed-hosts '*' would let any web page in; name the hosts")
    if password is not None and len(password) < MIN_PASSWORD:
        problems.append(f"{PASSWORD_VARIABLE} must have at least {MIN_PASSWORD} characters")
    user = environ.get(USER_VARIABLE) or "admin"
    if ":" in user:
        problems.append(f"{USER_VARIABLE} must not hold a colon, but is {user!r}")
    if problems:
        raise UserError(f"--host {host}: " + "; ".join(problems))
    return Access(host=host, names=names, user=user, password=password)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


Environ = dict[str, Any]
StartResponse = Callable[..., Any]
Application = Callable[[Environ, StartResponse], Iterable[bytes]]


class Gate:
    """WSGI middleware in front of a server that has neither authentication nor a check of Host and Origin."""

    def __init__(self, application: Application, access: Access, port: int) -> None:
        self._application = application
        self._hosts = frozenset(access.allowed_hosts(port))
        self._origins = frozenset(access.allowed_origins(port))
        self._authorization = access.authorization()

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Pass a request on, or answer 403 or 401."""
        if environ.get("PATH_INFO") == HEALTH:
            return _answer(start_response, "200 OK", "ok")
        if environ.get("HTTP_HOST", "").lower() not in self._hosts:
            return _answer(start_response, "403 Forbidden", "this name is not among the allowed hosts")
        # A browser says which page a request comes from, unless it only reads.
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and origin.lower() not in self._origins:
            return _answer(start_response, "403 Forbidden", "requests from other pages are refused")
        given = environ.get("HTTP_AUTHORIZATION", "")
        if self._authorization is not None and not hmac.compare_digest(
            given.encode("utf-8", "replace"), self._authorization.encode()
        ):
            challenge = ("WWW-Authenticate", 'Basic realm="lora-search", charset="UTF-8"')
            return _answer(start_response, "401 Unauthorized", "user and password, please", challenge)
        return self._application(environ, start_response)


def _answer(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    body = text.encode()
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), *headers])
    return [body]
