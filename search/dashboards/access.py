"""Access to the dashboards: an address, the host names they answer to, and a password.

The loopback address needs no password. Any other address needs one, and the host names too: without them a page that a
user visits could make the browser send requests here (DNS rebinding).
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
EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - for comparison, not for listening
USER_VARIABLE = "LORA_SEARCH_UI_USER"
PASSWORD_VARIABLE = "LORA_SEARCH_UI_PASSWORD"
HOSTS_VARIABLE = "LORA_SEARCH_ALLOWED_HOSTS"
MIN_PASSWORD = 12
"""Characters; MLflow refuses shorter ones."""
HEALTH = "/health"
"""Answered without a password and under any host name, as MLflow's is: it reveals only that the server runs."""


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a dashboard may be reached. `check` makes one from options and environment."""

    host: str = LOOPBACK
    names: tuple[str, ...] = ()
    """Further host names, with or without a port, that it answers to."""
    user: str = "admin"
    password: str | None = field(default=None, repr=False)
    """None for no authentication, which only the loopback address allows."""

    def address(self, port: int) -> str:
        """The URL of a server on this port, as this machine reaches it."""
        return url(LOOPBACK if self.host in EVERYWHERE else self.host, port)

    def allowed_hosts(self, port: int) -> tuple[str, ...]:
        """Values of the Host header that a server on this port answers."""
        own = self.address(port).removeprefix("http://")  # an IP address cannot be rebound
        always = dict.fromkeys((own, f"{LOOPBACK}:{port}", f"localhost:{port}"))
        given = (host for name in self.names for host in ((name,) if ":" in name else (name, f"{name}:{port}")))
        return (*always, *given)

    def allowed_origins(self, port: int) -> tuple[str, ...]:
        """Values of the Origin header whose requests may change something."""
        return tuple(f"{scheme}://{host}" for host in self.allowed_hosts(port) for scheme in ("http", "https"))

    def authorization(self) -> str | None:
        """The header of HTTP Basic authentication; None without a password."""
        if self.password is None:
            return None
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode("ascii")


def url(host: str, port: int) -> str:
    """The URL of a server on this host and port."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check(host: str, allowed_hosts: str | None, environ: Mapping[str, str] = os.environ) -> Access:
    """The access requested by the options; user and password come from the environment, which `ps` does not show.

    Raises:
        UserError: an address beyond this machine without a password or without host names; a short password.
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
    """Whether only this machine can reach a server on this address."""
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
        # A browser names the page that a request comes from, unless the request only reads.
        origin = environ.get("HTTP_ORIGIN")
        if origin is not None and origin.lower() not in self._origins:
            return _answer(start_response, "403 Forbidden", "requests from other pages are refused")
        given = environ.get("HTTP_AUTHORIZATION", "")
        if self._authorization is not None and not hmac.compare_digest(
            given.encode("utf-8", "replace"), self._authorization.encode()
        ):
            challenge = ("WWW-Authenticate", 'Basic realm="lora-search", charset="UTF-8"')
            return _answer(start_response, "401 Unauthorized", "user name and password required", challenge)
        return self._application(environ, start_response)


def _answer(start_response: StartResponse, status: str, text: str, *headers: tuple[str, str]) -> Iterable[bytes]:
    body = text.encode()
    start_response(status, [("Content-Type", "text/plain"), ("Content-Length", str(len(body))), *headers])
    return [body]
