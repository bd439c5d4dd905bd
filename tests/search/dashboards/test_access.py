"""Who may open the dashboards: what is refused at the start, and what the gate before optuna-dashboard lets in."""

import base64
from collections.abc import Iterable
from typing import Any

import pytest

from search.dashboards.access import Access, Gate, check, is_loopback
from trainer.common.errors import UserError

PASSWORD = "correct horse battery"
ENVIRON = {"LORA_SEARCH_UI_PASSWORD": PASSWORD}


def request(access: Access, host: str, path: str = "/dashboard", **headers: str) -> str:
    """The status that the gate answers on port 8080, `200 OK` from the application behind it."""

    def application(_environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [])
        return [b""]

    said: list[str] = []
    environ = {
        "PATH_INFO": path,
        "HTTP_HOST": host,
        **{f"HTTP_{key.upper()}": value for key, value in headers.items()},
    }
    list(Gate(application, access, 8080)(environ, lambda status, _headers: said.append(status)))
    return said[0]


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_this_machine_alone_needs_no_password() -> None:
    for host in ("127.0.0.1", "localhost", "::1", "127.0.0.2"):
        assert check(host, None, {}).password is None
    assert not is_loopback("0.0.0.0") and not is_loopback("192.168.1.5") and not is_loopback("example.com")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "search.example.com"])
def test_beyond_this_machine_there_must_be_a_password_and_names(host: str) -> None:
    with pytest.raises(UserError, match=r"set LORA_SEARCH_UI_PASSWORD; name the hosts"):
        check(host, None, {})
    with pytest.raises(UserError, match="name the hosts"):
        check(host, "", ENVIRON)
    assert check(host, "search.example.com", ENVIRON).names == ("search.example.com",)


def test_what_would_let_anyone_in_is_refused() -> None:
    with pytest.raises(UserError, match="any web page"):
        check("0.0.0.0", "*", ENVIRON)
    with pytest.raises(UserError, match="at least 12 characters"):
        check("0.0.0.0", "a", {"LORA_SEARCH_UI_PASSWORD": "short"})
    with pytest.raises(UserError, match="colon"):
        check("127.0.0.1", None, {"LORA_SEARCH_UI_USER": "a:b"})


def test_a_password_is_in_no_repr() -> None:
    assert PASSWORD not in repr(check("0.0.0.0", "x.example", ENVIRON))


def test_other_names_and_other_pages_are_refused() -> None:
    access = Access(names=("search.example.com", "other.example:443"))
    for host in ("127.0.0.1:8080", "localhost:8080", "search.example.com", "search.example.com:8080"):
        assert request(access, host) == "200 OK"
        assert request(access, host, origin="http://evil.example") == "403 Forbidden"
        assert request(access, host, origin=f"http://{host}") == "200 OK"
    assert request(access, "other.example:443", origin="https://other.example:443") == "200 OK"
    for host in ("evil.example", "127.0.0.1", "127.0.0.1:8081", "other.example", ""):
        assert request(access, host) == "403 Forbidden"
    assert request(access, "127.0.0.1:8080", origin="null") == "403 Forbidden"


def test_a_password_is_asked_for_everywhere_but_on_the_health_page() -> None:
    access = check("0.0.0.0", "search.example.com", {**ENVIRON, "LORA_SEARCH_UI_USER": "ann"})
    for given in (
        "",
        "Basic",
        "Bearer x",
        basic("ann", "wrong"),
        basic("admin", PASSWORD),
        basic("ann", PASSWORD + " "),
    ):
        assert request(access, "search.example.com", authorization=given) == "401 Unauthorized"
    assert request(access, "search.example.com", authorization=basic("ann", PASSWORD)) == "200 OK"
    assert request(access, "evil.example", authorization=basic("ann", PASSWORD)) == "403 Forbidden"
    assert request(access, "evil.example", path="/health") == "200 OK"
    assert request(access, "search.example.com", path="/health/x") == "401 Unauthorized"


def test_an_address_that_is_listened_on_may_be_asked_for() -> None:
    access = Access(host="192.168.1.5", names=("a.example",), password=PASSWORD)
    assert access.address(5000) == "http://192.168.1.5:5000"
    assert "192.168.1.5:5000" in access.allowed_hosts(5000)
    assert Access(host="0.0.0.0").address(5000) == "http://127.0.0.1:5000"
    assert "0.0.0.0:5000" not in Access(host="0.0.0.0").allowed_hosts(5000)
