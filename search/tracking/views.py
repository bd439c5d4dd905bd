"""The views of a study's runs that MLflow's pages open with: its losses and gradient norms by epoch, in that order.

MLflow (3.17) keeps a view as a tag of the experiment, and opens it by its key in the page's address; its menu of views
lists them by name. By itself it draws the ten latest runs, a chart for each metric in the alphabet's order, groups
first: step metrics, then single dots, the validation loss at the end. The form is that of its own "Save view", see
`mlflow_private.VIEW`. Every other metric is still there, in groups that are folded.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from search.tracking.mlflow_private import VIEW

TRIALS = "lora-search-trials"
"""Key of the view of a study's trials, without repeats."""
ALL = "lora-search-all"
"""Key of the view of all runs, repeats included."""
BEST_TWO = "lora-search-best-two"
"""Key of the view of the best two trials: what differs between them, and their curves."""
FIRST = ("val_loss", "train_loss", "grad_norm_max")
"""Metrics by epoch whose charts are open, in this order."""
LOG_SCALE = frozenset({"grad_norm_max"})
FOLDED = ("Model metrics", "step", "System metrics")
"""MLflow's own groups: metrics without a `/`, ours by optimizer step, and the machine's."""
MOST_RUNS = 100
"""Runs in a chart; MLflow draws ten by default."""
COLUMNS = (
    *("metrics.`best_val_loss`", "params.`learning_rate`", "params.`lora_r`", "params.`lora_alpha`"),
    *("params.`batch_size`", "params.`lora_dropout`", "params.`warmup_steps`", "tags.`state`", "tags.`finding`"),
)
"""Of the table of runs."""
CIDER = "metrics.`val_cider_d`"
"""The first of them, by which runs are sorted, where the study ranks by it."""
STEADY_MS = 1_700_000_000_000
"""Time of a view's making: always the same, so that an unchanged view is not written again."""


def tags(*, cider: bool = False) -> dict[str, str]:
    """The experiment's tags that hold the views of many runs.

    Args:
        cider: whether the study ranks its trials by CIDEr-D.
    """
    trials = "tags.kind = 'trial' AND tags.repeat_of IS NULL"
    return {
        f"{VIEW}{TRIALS}": _view("Trials by epoch", _state(trials, cider=cider)),
        f"{VIEW}{ALL}": _view("All runs, repeats too", _state("tags.kind != 'study'", cider=cider)),
    }


def of_two(run_ids: Sequence[str]) -> dict[str, str]:
    """The experiment's tag that holds the view of these runs, the first of them the one that others differ from."""
    named = ", ".join(f"'{run_id}'" for run_id in run_ids)
    state = _state(f"attributes.run_id IN ({named})")
    differ = "lora-search-differ"
    difference = {
        "uuid": "lora-search-difference",
        "type": "DIFFERENCE",
        "metricSectionId": differ,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": MOST_RUNS,
        "chartName": "What differs",
        "compareGroups": ["Parameters", "Model metrics"],
        "showChangeFromBaseline": True,
        "showDifferencesOnly": True,
        "baselineColumnUuid": run_ids[0],
    }
    state["compareRunCharts"].append(difference)
    epochs, *others = state["compareRunSections"]
    # All of it in a window of 900 pixels' height.
    below = {**_section(differ, "What differs", is_open=True), "columns": 1, "cardHeight": 360}
    state["compareRunSections"] = [{**epochs, "cardHeight": 240}, below, *others]
    return {f"{VIEW}{BEST_TWO}": _view("The best two, compared", state)}


def _view(name: str, shown: Mapping[str, Any]) -> str:
    state = json.dumps(shown, separators=(",", ":")).encode()
    packed = "deflate;" + base64.b64encode(zlib.compress(state, 9)).decode()
    return json.dumps({"name": name, "createdAt": STEADY_MS, "updatedAt": STEADY_MS, "state": packed})


def read(value: str) -> dict[str, Any]:
    """The state that a view's tag holds, as MLflow's page reads it."""
    packed = json.loads(value)["state"].removeprefix("deflate;")
    state: dict[str, Any] = json.loads(zlib.decompress(base64.b64decode(packed)))
    return state


def _state(query: str, *, cider: bool = False) -> dict[str, Any]:
    columns = [CIDER, *COLUMNS] if cider else list(COLUMNS)
    epochs = "lora-search-epochs"
    sections = [_section(epochs, "By epoch", is_open=True), *(_section(name, name, is_open=False) for name in FOLDED)]
    return {
        "searchFilter": query,
        "orderByKey": columns[0],
        "orderByAsc": not cider,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": {},
        "runsHiddenMode": "SHOW_ALL",
        "compareRunCharts": [_chart(metric, epochs) for metric in FIRST],
        "compareRunSections": sections,
        "isAccordionReordered": True,
        "viewMaximized": False,
        "runListHidden": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "chartsSearchFilter": "",
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }


def _section(uuid: str, name: str, *, is_open: bool) -> Mapping[str, Any]:
    return {
        "uuid": uuid,
        "name": name,
        "display": is_open,
        "isReordered": is_open,
        "deleted": False,
        "isGenerated": not is_open,
    }


def _chart(metric: str, section: str) -> Mapping[str, Any]:
    return {
        "uuid": f"lora-search-{metric}",
        "type": "LINE",
        "metricKey": metric,
        "selectedMetricKeys": [metric],
        "displayName": metric,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        "runsCountToCompare": MOST_RUNS,
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "yAxisKey": "metric",
        "yAxisExpressions": [],
        "selectedXAxisMetricKey": "",
        "scaleType": "log" if metric in LOG_SCALE else "linear",
        "range": {},
        "lineSmoothness": 0,
        "useGlobalXaxisKey": False,
        "useGlobalLineSmoothing": True,
        "displayPoints": True,
        "ignoreOutliers": False,
    }
