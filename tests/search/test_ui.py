"""`python -m search.ui`: both dashboards answer, end together, and mistakes are reported before anything starts."""

import contextlib
import http.client
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from mlflow.tracking import MlflowClient

from search.dashboards import access, servers
from search.places import Places
from search.storage.database import close_storage, open_storage
from search.tracking import views
from search.tracking.client import Tracking, open_tracking
from search.tracking.mlflow_private import VIEW, VIEW_PARAMETER
from search.ui import check
from tests.search.tracking.recorded import finding, whole_run
from trainer.common.errors import UserError
from trainer.config import TrainConfig


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def get(url: str, host: str | None = None) -> tuple[int, str]:
    """Status and body, with another Host header if given."""
    address, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(address, timeout=30)
    connection.request("GET", f"/{path}", headers={"Host": host or address})
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response.status, body


@pytest.fixture(scope="module")
def runs_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Databases of a study with one trial."""
    folder = tmp_path_factory.mktemp("runs")
    storage = open_storage(f"sqlite:///{folder}/optuna.db")
    study = optuna.create_study(study_name="demo", storage=storage)
    study.add_trial(optuna.trial.create_trial(value=1.5, state=optuna.trial.TrialState.COMPLETE))
    close_storage(storage)
    tracking = open_tracking(f"sqlite:///{folder}/mlflow.db", folder / "artifacts")
    parent = tracking.parent_run("demo", {})
    run_id = tracking.start_run(
        tracking.experiment("demo"), parent, name="trial 0", config=TrainConfig().model_dump(), tags={"trial": "0"}
    )
    recorder = tracking.recorder(run_id)
    for event in whole_run(2, 20):
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE", findings=[finding("healthy")])
    return folder


@pytest.fixture(scope="module")
def dashboards(runs_dir: Path) -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """The program, running, and the URLs it printed: of MLflow, of optuna-dashboard, and of the study `demo`."""
    ports = ["--mlflow-port", str(free_port()), "--optuna-port", str(free_port())]
    # Under pytest and in CI telemetry is off anyway: here it must be the program that switches it off.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "CI", "GITHUB", "MLFLOW", "DO_NOT"))}
    # What a user may have set for another server must not shut out the printed URL.
    env = {**kept, "MLFLOW_SERVER_ALLOWED_HOSTS": "mlflow.example.com", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "search.ui", "--runs-dir", str(runs_dir), *ports],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        if line.startswith("Ctrl-C"):
            break
    urls = dict(re.findall(r"^ *(\S+) +(http://\S+)$", printed, re.MULTILINE))
    try:
        yield process, urls
    finally:
        process.kill()
        process.communicate()


def test_both_pages_answer_at_the_printed_urls(
    dashboards: tuple[subprocess.Popen[str], dict[str, str]], runs_dir: Path
) -> None:
    _, urls = dashboards
    status, page = get(urls["MLflow"])
    assert status == 200 and "MLflow" in page
    experiment = re.search(r"#/experiments/(\d+)/runs", urls["demo"])
    assert experiment is not None
    tracking = open_tracking(f"sqlite:///{runs_dir}/mlflow.db", runs_dir / "artifacts")
    assert experiment[1] == tracking.experiment("demo")
    query = urllib.parse.parse_qs(urls["demo"].partition("?")[2])
    client = MlflowClient(urls["MLflow"])
    view = views.read(client.get_experiment(experiment[1]).tags[VIEW + query[VIEW_PARAMETER][0]])
    found = client.search_runs([experiment[1]], view["searchFilter"])
    assert [run.info.run_name for run in found] == ["trial 0"]
    status, page = get(urls["optuna-dashboard"])
    assert status == 200 and "Optuna Dashboard" in page
    studies = get(urls["optuna-dashboard"].replace("/dashboard/", "/api/studies"))[1]
    assert '"demo"' in studies


def test_other_host_names_are_still_refused(dashboards: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    _, urls = dashboards
    assert get(f"{urls['MLflow']}/api/2.0/mlflow/experiments/get?experiment_id=0", "evil.example")[0] == 403


def test_runs_read_over_http_are_those_of_the_database(
    dashboards: tuple[subprocess.Popen[str], dict[str, str]], runs_dir: Path
) -> None:
    local = open_tracking(f"sqlite:///{runs_dir}/mlflow.db", runs_dir / "artifacts")
    remote = open_tracking(dashboards[1]["MLflow"], runs_dir / "artifacts")
    experiment = local.experiment("demo")
    assert remote.experiment("demo") == experiment
    assert remote.runs(experiment) == local.runs(experiment)
    assert write_and_read(remote) == 40


def write_and_read(tracking: Tracking) -> int:
    """Number of steps of a run written over HTTP."""
    parent = tracking.parent_run("remote", {})
    run_id = tracking.start_run(
        tracking.experiment("remote"), parent, name="trial 0", config=TrainConfig().model_dump(), tags={}
    )
    recorder = tracking.recorder(run_id)
    for event in whole_run(2, 20):
        recorder(event)
    recorder.finish("FINISHED", state="COMPLETE")
    return len(tracking.steps(run_id))


def test_telemetry_is_off_in_the_server(dashboards: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    _, urls = dashboards
    request = urllib.request.Request(f"{urls['MLflow']}/ajax-api/3.0/mlflow/ui-telemetry")
    with urllib.request.urlopen(request) as response:
        assert b'"disable_ui_telemetry":true' in response.read().replace(b" ", b"")


def test_ctrl_c_ends_both(dashboards: tuple[subprocess.Popen[str], dict[str, str]]) -> None:
    process, urls = dashboards
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    for name in ("MLflow", "optuna-dashboard"):
        with pytest.raises(OSError):
            urllib.request.urlopen(urls[name], timeout=5)


def test_when_one_dies_the_other_ends_too(runs_dir: Path) -> None:
    ports = ["--mlflow-port", str(free_port()), "--optuna-port", str(free_port())]
    process = subprocess.Popen(
        [sys.executable, "-m", "search.ui", "--runs-dir", str(runs_dir), *ports], stderr=subprocess.PIPE, text=True
    )
    dashboard: psutil.Process | None = None
    while dashboard is None and process.poll() is None:  # a child has its command line a moment after it is there
        time.sleep(0.1)
        children = psutil.Process(process.pid).children()
        dashboard = next((child for child in children if "search.dashboard" in child.cmdline()), None)
    assert dashboard is not None
    dashboard.kill()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "optuna-dashboard ended by itself with exit code -9" in told
    assert not any(child.is_running() for child in children)


def test_mistakes_are_reported_together_before_anything_starts(runs_dir: Path, tmp_path: Path) -> None:
    good = Places.of(runs_dir)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError) as told:
            check(
                Places.of(runs_dir, f"sqlite:///{tmp_path}/optuna.db"),
                {"--mlflow-port": port, "--optuna-port": free_port()},
            )
    assert f"port {port} is already in use" in str(told.value)
    assert "with --mlflow-port" in str(told.value)
    assert "python -m search.run --study rsicap_mini" in str(told.value)
    with pytest.raises(UserError, match="both 5000"):
        check(good, {"--mlflow-port": 5000, "--optuna-port": 5000})
    with pytest.raises(UserError, match="Optuna's database"):
        check(Places.of(runs_dir, tracking=good.storage_url), {"--optuna-port": free_port()})
    check(good, {"--mlflow-port": free_port(), "--optuna-port": free_port()})


def test_a_missing_database_ends_with_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "search.ui", "--runs-dir", str(tmp_path / "none")]
    ports = ["--mlflow-port", str(free_port()), "--optuna-port", str(free_port())]
    done = subprocess.run([*command, *ports], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert f"there is no database '{tmp_path}/none/mlflow.db'" in done.stderr
    assert not (tmp_path / "none").exists()


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, search.ui; print(sorted({'mlflow', 'optuna', 'torch', 'sqlalchemy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("there", [True, False])
def test_pictures_of_notes_are_served_also_where_the_first_comes_later(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their folder is made when the first trial ends; without it, optuna-dashboard would answer 400 from then on."""
    started: list[list[str]] = []

    @contextlib.contextmanager
    def noted(*arguments: Any) -> Iterator[None]:
        started.append(arguments[4])
        yield

    monkeypatch.setattr(servers, "_started", noted)
    folder = tmp_path / "dashboard"
    if there:
        folder.mkdir()
    granted = access.check(access.LOOPBACK, None)
    with servers.optuna_dashboard("sqlite:///x.db", 1, folder, granted):
        pass
    assert started[0][-2:] == ["--artifact-dir", str(folder)]
