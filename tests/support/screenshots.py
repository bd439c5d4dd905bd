"""`python -m tests.support.screenshots --runs-dir DIR --out docs/images`: the README's pictures of both dashboards."""

from __future__ import annotations

import io
import sqlite3
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

from search.tracking import views
from tests.support import browser
from tests.support.browser import Dashboards

WIDTH = 1200
"""Of the pictures, in pixels; the windows are wider, so that more is on them."""


def main(
    runs_dir: Annotated[Path, typer.Option(help="Folder of a search's databases.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("docs/images"),
    study: Annotated[str | None, typer.Option(help="The study; the one with the most trials by default.")] = None,
    trial: Annotated[int | None, typer.Option(help="The trial whose note is shown; the best by default.")] = None,
) -> None:
    """Take them, unattended."""
    if browser.CHROMIUM is None:
        raise SystemExit("no chromium is installed")
    out.mkdir(parents=True, exist_ok=True)
    with browser.dashboards(runs_dir) as served, browser.page() as (page, _):
        name = study or largest(runs_dir, served)
        taken = (("mlflow-trials", mlflow_trials), ("mlflow-best-two", mlflow_two), ("optuna-study", optuna_study))
        for file, take in taken:
            take(page, served, name)
            keep(page, out / f"{file}.png")
        optuna_trial(page, served, name, best(page, served, name) if trial is None else trial)
        keep(page, out / "optuna-trial.png")


def largest(runs_dir: Path, served: Dashboards) -> str:
    """The study with the most runs."""
    with sqlite3.connect(runs_dir / "mlflow.db") as database:
        counted = database.execute(
            "select name, count(*) from experiments natural join (select experiment_id from runs) group by name"
        ).fetchall()
    return max((count, name) for name, count in counted if name in served.runs_pages)[1]


def best(page: Any, served: Dashboards, name: str) -> int:
    """The number of the trial with the lowest value."""
    study = page.request.get(served.study_page(name).replace("/dashboard/", "/api/")).json()
    return int(study["best_trials"][0]["number"])


def mlflow_trials(page: Any, served: Dashboards, name: str) -> None:
    """Losses and gradient norms of the trials, epoch by epoch."""
    page.set_viewport_size({"width": 1500, "height": 760})
    page.goto(served.runs_pages[name])
    _drawn(page, 3)


def mlflow_two(page: Any, served: Dashboards, name: str) -> None:
    """What differs between the best two trials, and their curves."""
    page.set_viewport_size({"width": 1500, "height": 900})
    page.goto(served.runs_pages[name].replace(views.TRIALS, views.BEST_TWO))
    _drawn(page, 3)
    page.get_by_text("learning_rate", exact=True).first.wait_for()


def _drawn(page: Any, charts: int) -> None:
    """Wait for MLflow's charts; without its assistant and tooltips."""
    page.wait_for_function(
        "count => { const all = [...document.querySelectorAll('.js-plotly-plot')];"
        " return all.length === count && all.every(plot => plot.querySelector('.scatterlayer .trace')) }",
        arg=charts,
    )
    page.add_style_tag(content="[data-assistant-ui] { display: none !important }")
    page.evaluate("document.activeElement.blur()")
    page.mouse.move(0, 0)


def optuna_study(page: Any, served: Dashboards, name: str) -> None:
    """The study's main page: history, importance, timeline."""
    page.set_viewport_size({"width": 1500, "height": 1120})
    page.goto(served.study_page(name))
    page.get_by_text("Intermediate values").wait_for()
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .plot-container').length >= 4")


def optuna_trial(page: Any, served: Dashboards, name: str, number: int) -> None:
    """A trial's page with its note: findings, cause, advice, plot."""
    page.set_viewport_size({"width": 1400, "height": 1000})
    page.goto(f"{served.study_page(name)}/trials?numbers={number}")
    page.get_by_text("Decision tree:").wait_for()
    page.wait_for_function("[...document.images].every(image => image.complete)")


def keep(page: Any, path: Path) -> None:
    """The window as a PNG of `WIDTH`."""
    page.wait_for_timeout(1_500)  # animations of charts and ripples of buttons
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture = picture.resize((WIDTH, round(picture.height * WIDTH / picture.width)), Image.Resampling.LANCZOS)
    picture.save(path, optimize=True)
    print(f"{path}  {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    typer.run(main)
