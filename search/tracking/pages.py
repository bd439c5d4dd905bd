"""Addresses of MLflow's pages. Routes and query are those of its web interface, which the browser tests open."""

from __future__ import annotations

import os
import urllib.parse

from search.tracking import views
from search.tracking.mlflow_private import VIEW_PARAMETER
from search.tracking.outbox import is_local
from search.urls import PAGES_VARIABLE, shown

LOCAL = "http://127.0.0.1:5000"
"""Where `python -m search.ui` serves a database's pages by default."""


def server_url(uri: str) -> str | None:
    """The address of an MLflow server without user name, password and query; None for a database."""
    try:
        parts = urllib.parse.urlsplit(uri)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:  # a port that is not a number, an unclosed bracket
        return None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    path = urllib.parse.quote(parts.path.rstrip("/"), safe="/%~")
    return urllib.parse.urlunsplit((parts.scheme, f"{host}{port}", path, "", ""))


def pages_of(tracking_uri: str) -> str:
    """Address of the pages that show this store: the server itself, or that of `search.ui` for a database.

    Workers may know the server by a name that browsers do not; LORA_SEARCH_MLFLOW_PAGES then holds the browsers' name.
    """
    if pages := os.environ.get(PAGES_VARIABLE):
        return server_url(pages) or shown(pages)
    return server_url(tracking_uri) or LOCAL


def runs_page(server: str, experiment_id: str, view: str = views.TRIALS) -> str:
    """URL of the page that compares a study's trials by their curves, on an MLflow server; `view` is a key of `views`.

    Nothing but the view may be in it: with a filter or an order in the address, MLflow's page ignores the view.
    """
    query = {"workflowType": "machine_learning", "compareRunsMode": "CHART", VIEW_PARAMETER: view}
    encoded = urllib.parse.urlencode(query, quote_via=urllib.parse.quote)
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs?{encoded}"


def run_page(server: str | None, experiment_id: str | None, run_id: str | None) -> str | None:
    """URL of the page of one run; None without a server, or for a run that MLflow does not have yet."""
    if server is None or experiment_id is None or run_id is None or is_local(run_id):
        return None
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}?workflowType=machine_learning"
