"""Addresses of MLflow's pages."""

from __future__ import annotations

import pytest

from search.tracking.outbox import local_id
from search.tracking.pages import PAGES_VARIABLE, pages_of, run_page, server_url


def test_a_run_has_a_page_once_a_server_has_it() -> None:
    assert run_page("http://host/", "7", "a1") == "http://host/#/experiments/7/runs/a1?workflowType=machine_learning"
    for missing in ((None, "7", "a1"), ("http://host", None, "a1"), ("http://host", "7", None)):
        assert run_page(*missing) is None
    assert run_page("http://host", "7", local_id()) is None, "MLflow does not have it yet"


def test_links_lead_to_the_server_without_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PAGES_VARIABLE, raising=False)
    assert pages_of("https://ann:s3cret@host/base?token=s3cret") == "https://host/base"
    assert pages_of("postgresql:///mlflow?password=s3cret") == "http://127.0.0.1:5000"
    monkeypatch.setenv(PAGES_VARIABLE, "https://ann:s3cret@pages.example")
    assert pages_of("http://mlflow:5000") == "https://pages.example"


@pytest.mark.parametrize("uri", ["http://host:port", "http://[", "ftp://host", ""])
def test_what_is_not_a_servers_address(uri: str) -> None:
    assert server_url(uri) is None
