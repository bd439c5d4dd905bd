"""Both dashboards of a study in a real browser: headless Chromium through Playwright."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.search.test_ui import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# A browser calls home in many ways of its own; none of it is the pages'.
SWITCHES = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# MLflow opens its assistant's panel once in every new browser, over a quarter of the page.
NO_ASSISTANT = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"


@dataclass(frozen=True)
class Dashboards:
    """Where the two are served."""

    mlflow: str
    optuna: str
    """Without `/dashboard`."""
    runs_pages: dict[str, str]
    """MLflow's pages that compare a study's trials, as `search.ui` prints them, by study."""

    def study_page(self, name: str) -> str:
        """optuna-dashboard's page of a study."""
        with urllib.request.urlopen(f"{self.optuna}/api/studies", timeout=30) as response:
            studies = json.load(response)["study_summaries"]
        number = next(s["study_id"] for s in studies if s["study_name"] == name)
        return f"{self.optuna}/dashboard/studies/{number}"


@contextlib.contextmanager
def dashboards(runs_dir: Path) -> Iterator[Dashboards]:
    """`python -m search.ui` on free ports."""
    ports = ["--mlflow-port", str(free_port()), "--optuna-port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "search.ui", "--runs-dir", str(runs_dir), *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    try:
        assert process.stdout is not None
        printed = ""
        for line in process.stdout:
            printed += line
            if line.startswith("Ctrl-C"):
                break
        urls = dict(re.findall(r"^ *(\S+) +(http://\S+)$", printed, re.MULTILINE))
        mlflow, optuna = urls.pop("MLflow"), urls.pop("optuna-dashboard")
        yield Dashboards(mlflow, optuna.removesuffix("/dashboard/"), urls)
    finally:
        process.terminate()  # ends both servers; killed, it could not
        process.wait(30)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def page(width: int = 1280, height: int = 900) -> Iterator[tuple[Any, list[str]]]:
    """(a page in a new browser, the URLs of all it asks for)."""
    from playwright.sync_api import sync_playwright

    requested: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        try:
            opened = browser.new_page(viewport={"width": width, "height": height})
            opened.set_default_timeout(30_000)
            opened.add_init_script(NO_ASSISTANT)
            opened.on("request", lambda request: requested.append(request.url))
            yield opened, requested
        finally:
            browser.close()


def show_charts(opened: Any, runs_page: str, metrics: str, count: int) -> None:
    """Open MLflow's page of runs with the charts of these metrics (a regular expression) alone, and wait for them."""
    opened.goto(runs_page)
    opened.get_by_placeholder("Search metric charts").fill(metrics)
    opened.wait_for_function(
        "count => { const all = [...document.querySelectorAll('.js-plotly-plot')];"
        " return all.length === count && all.every(plot => plot.querySelector('.scatterlayer .trace')) }",
        arg=count,
    )
