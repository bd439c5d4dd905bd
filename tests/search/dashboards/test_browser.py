"""What is on the pages of both dashboards, seen in a browser, for a small real study."""

from __future__ import annotations

import json
import re
import sqlite3
import urllib.parse
from collections.abc import Iterator
from typing import Any

import pytest

from search.tracking import views
from tests.support import browser
from tests.support.browser import Dashboards
from tests.support.small_study import FLOAT16, LABEL, NAME, SLOW, STALLS, WORSE, Small
from trainer.config import TrainConfig

pytestmark = [
    pytest.mark.browser,
    pytest.mark.long,
    pytest.mark.skipif(browser.CHROMIUM is None, reason="no chromium or chrome is installed"),
    # Playwright's event loop leaves its transport to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

NOTE_RIGHT = """() => {
  const items = [...document.querySelectorAll('main li')].filter(e => /^(NaN or|cause|advice)/.test(e.innerText));
  const walk = node => node.nodeType === Node.TEXT_NODE ? [node] : [...node.childNodes].flatMap(walk);
  return Math.max(...items.flatMap(walk).map(node => {
    const range = document.createRange(); range.selectNodeContents(node); return range.getBoundingClientRect().right;
  }));
}"""
"""The right edge, in pixels, of the texts of a note's findings."""


@pytest.fixture(scope="module")
def served(small_study: Small) -> Iterator[Dashboards]:
    with browser.dashboards(small_study.runs) as found:
        yield found


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[Any, list[str]]]:
    with browser.page() as found:
        yield found


@pytest.fixture
def page(opened: tuple[Any, list[str]]) -> Iterator[Any]:
    """The page; whatever it asks for must come from this machine."""
    yield opened[0]
    hosts = {urllib.parse.urlsplit(url).hostname for url in opened[1] if url.startswith(("http", "ws"))}
    assert hosts == {"127.0.0.1"}


@pytest.fixture(scope="module")
def run_ids(small_study: Small) -> dict[str, str]:
    """MLflow's run ids, of trials by number and of the study by its name."""
    with sqlite3.connect(small_study.runs / "mlflow.db") as database:
        found = database.execute(
            "select runs.run_uuid, name, value from runs"
            " left join tags on tags.run_uuid = runs.run_uuid and key = 'trial'"
        ).fetchall()
    return {number or name: run_id for run_id, name, number in found}


def run_page(served: Dashboards, run_id: str, tab: str = "") -> str:
    experiment = re.search(r"#/experiments/(\d+)/", served.runs_pages[NAME])
    assert experiment is not None
    return f"{served.mlflow}/#/experiments/{experiment[1]}/runs/{run_id}{tab}?workflowType=machine_learning"


def charts(page: Any) -> list[dict[str, Any]]:
    """The curves of all charts on the page."""
    found: list[dict[str, Any]] = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')].flatMap(plot => plot.data.map("
        "t => ({name: t.name, text: t.text, x: [...(t.x || [])], y: [...(t.y || [])]})))"
    )
    return found


# ------------------------------------------------------------------------- optuna-dashboard


def test_the_study_is_listed_and_its_page_has_charts(page: Any, served: Dashboards) -> None:
    page.goto(f"{served.optuna}/dashboard/")
    page.get_by_text(NAME).first.click()
    page.get_by_text("Intermediate values").wait_for()
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot').length >= 4")
    curves = {curve["name"]: curve for curve in charts(page) if str(curve["name"]).startswith("trial #")}
    assert {f"trial #{STALLS} ", f"trial #{WORSE} "} <= set(curves)
    assert curves[f"trial #{STALLS} "]["x"] == [1, 2, 3, 4, 5, 6]


def test_a_trial_s_page_has_its_note_with_plot_and_link(
    page: Any, served: Dashboards, run_ids: dict[str, str]
) -> None:
    page.goto(f"{served.study_page(NAME)}/trials?numbers={STALLS}")
    page.get_by_text("Decision tree:").wait_for()
    text = page.inner_text("main")
    assert "COMPLETE (rising): validation loss has no new best for 2 epochs" in text
    assert "TRAINING_CONFIG = {" in text and "Intermediate Values" in text
    plot = page.locator("img[alt^='Losses of 6 epochs, lowest validation loss']")
    plot.wait_for()
    page.wait_for_function("image => image.complete", arg=plot.element_handle())
    assert plot.evaluate("image => image.naturalWidth") == 600
    link = page.get_by_role("link", name="Curves in MLflow").get_attribute("href")
    assert link == run_page(served, run_ids[str(STALLS)]), "MLflow's own port, whatever port the note was written with"
    page.goto(link)
    page.get_by_role("heading", name=re.compile(rf"trial 00{STALLS} \(stalls\) lr=3e-1 r=16")).wait_for()


def test_the_note_s_plot_is_among_the_trial_s_artifacts_and_opens(page: Any, served: Dashboards) -> None:
    page.goto(f"{served.study_page(NAME)}/trials?numbers={WORSE}")
    page.get_by_text(f"trial-{WORSE:03d}-losses.svg").wait_for()
    image = page.locator("img[alt^='Losses of']").get_attribute("src")
    answer = page.request.get(served.optuna + image)
    assert answer.status == 200 and answer.body().startswith(b"<svg")


def test_a_trial_that_broke_says_why_and_is_infeasible(page: Any, served: Dashboards) -> None:
    page.goto(f"{served.study_page(NAME)}/trials?numbers={FLOAT16}")
    page.get_by_text("Decision tree:").wait_for()
    text = " ".join(page.inner_text("main").split())  # lines break as their width has it
    assert "PRUNED (non_finite): step 2: param: " in text and "eps 1e-08 is 0 in float16" in text
    assert "advice: set torch_dtype: float16 → float32" in text
    study = page.request.get(served.study_page(NAME).replace("/dashboard/", "/api/")).json()
    assert [trial["constraints"] for trial in study["trials"]] == [[0], [0], [0], [0], [1]]


def test_no_line_of_a_note_runs_out_of_the_window(page: Any, served: Dashboards) -> None:
    page.goto(f"{served.study_page(NAME)}/trials?numbers={FLOAT16}")
    page.get_by_text("Decision tree:").wait_for()
    right = page.evaluate(NOTE_RIGHT)
    assert 600 < right <= 1280


@pytest.mark.parametrize(
    "path", ["", "/note", "/trialTable", f"/trials?numbers={FLOAT16}", f"/trials?numbers={STALLS}"]
)
def test_no_page_is_wider_than_the_window(page: Any, served: Dashboards, path: str) -> None:
    page.goto(served.study_page(NAME) + path)
    page.wait_for_load_state("networkidle")
    page.get_by_text(NAME).first.wait_for()
    page.wait_for_timeout(500)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280


def test_the_axis_says_what_a_trial_s_value_is(page: Any, served: Dashboards) -> None:
    study = page.request.get(served.study_page(NAME).replace("/dashboard/", "/api/")).json()
    assert study["objective_names"] == ["lowest val_loss"]


def test_the_study_s_note_sums_up(page: Any, served: Dashboards) -> None:
    page.goto(f"{served.study_page(NAME)}/note")
    page.get_by_text("All curves in MLflow").wait_for()
    text = page.inner_text("main")
    assert "5 trials (" in text and re.search(r"Best: trial \d, validation loss 6\.\d{4} at epoch \d", text)
    rows = page.locator("main table tbody tr")
    assert rows.count() == 5
    assert f"{SLOW} ({LABEL})" in rows.all_inner_texts()[2], "a label is shown as it was written"
    assert "tuning-log.md" in text


# ------------------------------------------------------------------------- MLflow


def test_the_filter_finds_runs_by_finding(page: Any, served: Dashboards) -> None:
    page.goto(served.runs_pages[NAME])
    page.get_by_text("5 matching runs").wait_for()
    search = page.locator("input[data-testid='search-box'], input[placeholder*='metrics.rmse']").first
    search.fill("tags.finding = 'non_finite'")
    search.press("Enter")
    page.get_by_text(re.compile("^1 matching run")).wait_for()
    assert page.get_by_text(f"trial 00{FLOAT16} (float16) lr=5e-6 r=4").first.is_visible()


def test_trials_are_compared_by_their_curves(page: Any, served: Dashboards) -> None:
    browser.show_charts(page, served.runs_pages[NAME], "^val_loss$", 1)
    # MLflow draws as the histories come in; a busy machine shows the first curve well before the last.
    page.wait_for_function(
        "[...document.querySelectorAll('.js-plotly-plot')].flatMap(p => p.data).filter(t => t.x?.length).length >= 4"
    )
    curves = {str(curve["name"]): curve for curve in charts(page)}
    stalls = next(curve for name, curve in curves.items() if f"trial 00{STALLS} (stalls) lr=3e-1 r=16" in name)
    assert stalls["x"] == list(range(1, len(stalls["x"]) + 1))
    assert len(stalls["x"]) >= 4
    assert len(curves) == 4, "the fifth had no whole epoch"


def test_the_page_opens_on_the_losses_and_the_gradient_norm(page: Any, served: Dashboards) -> None:
    page.goto(served.runs_pages[NAME])
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length >= 12")
    text = page.inner_text("body")
    assert re.search(r"By epoch\s\(3\).*val_loss.*train_loss.*grad_norm_max", text, re.DOTALL)
    assert page.locator(".js-plotly-plot").count() == 3, "few panels: the others are folded"
    assert re.search(r"^step\s\(\d+\)$", text, re.MULTILINE), "but there"
    colours = page.evaluate(
        "[...document.querySelectorAll('.js-plotly-plot')][0].data.filter(t => t.x?.length > 0)"
        ".map(t => t.line?.color || t.marker?.color)"
    )
    assert len(set(colours)) >= 4


def test_the_best_two_are_compared_on_one_screen(page: Any, served: Dashboards) -> None:
    page.goto(served.runs_pages[NAME].replace(views.TRIALS, views.BEST_TWO))
    page.get_by_text("2 matching runs").wait_for()
    page.get_by_role("heading", name="What differs").wait_for()
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length >= 6")
    row = page.get_by_text("learning_rate", exact=True).first
    row.wait_for()
    assert row.bounding_box()["y"] < 900
    assert page.get_by_text("gradient_accumulation_steps", exact=True).count() == 0, "the same in both"


def test_five_runs_side_by_side_show_what_differs(page: Any, served: Dashboards, run_ids: dict[str, str]) -> None:
    trials = [run_id for name, run_id in run_ids.items() if name != NAME]
    query = urllib.parse.urlencode({"runs": json.dumps(trials), "experiments": json.dumps(["1"])})
    page.goto(f"{served.mlflow}/#/compare-runs?{query}")
    page.get_by_text("Comparing 5 Runs from 1 Experiment").wait_for()
    page.get_by_text("gradient_accumulation_steps").wait_for()
    page.get_by_role("switch", name="Show diff only").first.click()
    page.get_by_text("gradient_accumulation_steps").wait_for(state="detached")
    text = page.inner_text("body")
    for name in ("learning_rate", "lora_r", "num_epochs", "torch_dtype"):
        assert re.search(rf"^{name}\t", text, re.MULTILINE), name


def test_a_run_s_page_has_analysis_params_and_metrics(page: Any, served: Dashboards, run_ids: dict[str, str]) -> None:
    page.goto(run_page(served, run_ids[str(FLOAT16)]))
    page.get_by_text(f"Parameters ({len(TrainConfig.model_fields)})").wait_for()
    text = page.inner_text("body")
    assert "PRUNED (non_finite): step 2" in text and "non_finite: " in text
    assert re.search(r"torch_dtype\s+float16", text) and "finding" in text
    page.goto(run_page(served, run_ids[str(STALLS)], "/model-metrics"))
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .scatterlayer .trace').length >= 3")


def test_the_study_s_run_holds_the_log_and_its_plots(page: Any, served: Dashboards, run_ids: dict[str, str]) -> None:
    page.goto(run_page(served, run_ids[NAME], "/artifacts"))
    page.get_by_text("tuning-log.html").click()
    log = page.frame_locator("iframe.mlflow-html-iframe")
    log.get_by_role("heading", name=re.compile(f"tuning log: {NAME}")).wait_for()
    assert log.locator("svg[role=img]").count() >= 5, "the plots are in it"
    folded = log.locator("main details:not([open])").count()
    log.get_by_role("button", name="Open all").click()
    assert log.locator("main details:not([open])").count() == 0 <= folded, "its script runs within MLflow's frame"
    assert page.get_by_text("tuning-log.zh.html").count() == 1


def test_tables_of_the_log_sort(page: Any, small_study: Small) -> None:
    page.goto((small_study.runs / NAME / "tuning-log.html").as_uri())
    page.get_by_role("button", name="Open all").click()
    heads = page.locator("main table th.sorts")
    head = heads.nth(1)
    column = (
        "th => [...th.closest('table').tBodies[0].rows].map(r => parseFloat(r.cells[th.cellIndex].innerText))"
        ".filter(x => !isNaN(x))"
    )
    for way in (1, -1):
        head.click()
        shown = head.evaluate(column)
        assert shown == sorted(shown, reverse=way < 0)


def test_the_log_is_read_on_a_phone(opened: tuple[Any, list[str]], small_study: Small) -> None:
    phone, requested = opened
    address = (small_study.runs / NAME / "tuning-log.html").as_uri()
    before = len(requested)
    phone.set_viewport_size({"width": 360, "height": 740})
    try:
        phone.goto(address)
        assert phone.evaluate("document.documentElement.scrollWidth") == 360
        assert requested[before:] == [address], "one file"
    finally:
        phone.set_viewport_size({"width": 1280, "height": 900})
