"""A real MLflow server's model registry: winners kept while it is away, delivered in order, loaded as documented."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.places import Places
from search.tracking.delivery import Delivery
from search.tracking.outbox import Model
from search.tracking.runs import StudyRuns
from tests.faults.servers import MlflowServer
from tests.search.tracking.test_models import recorded
from tests.support.search_process import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    server = MlflowServer(tmp_path / "server")
    yield server
    server.stop()


def winner(folder: Path, value: float, step: int) -> Model:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").write_text(folder.name)
    return Model(
        path=str(folder), name="rsicap", alias="best", step=step, metrics={"val_loss": value}, params={"lora_r": "8"}
    )


def loaded(uri: str) -> str:
    """Which winner the lines of docs/captions.md load from a server."""
    text = (ROOT / "docs" / "captions.md").read_text(encoding="utf-8")
    (lines,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "models:/" in code]
    assert lines.count("sqlite:///runs/mlflow.db") == 2
    code = lines.replace("sqlite:///runs/mlflow.db", uri)
    code += "\nfrom pathlib import Path\nprint((Path(folder) / 'adapter_model.safetensors').read_text())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_winners_reach_the_registry_in_order(server: MlflowServer, tmp_path: Path) -> None:
    places = Places.of(tmp_path / "runs", None, server.uri)
    places.runs_dir.mkdir()
    # Two searches end while the server is away; the second has a better winner.
    away = StudyRuns(places, "rsicap")
    first, second = recorded(away), recorded(away, "trial 001")
    away.keep_model(first.run_id, winner(tmp_path / "first", 0.5, 3))
    away.keep_model(second.run_id, winner(tmp_path / "second", 0.25, 5))
    assert len(away.outbox.runs()) == 2
    server.start()
    fresh = StudyRuns(places, "rsicap")
    Delivery(fresh.outbox, "rsicap", fresh.connect).once()
    assert not fresh.outbox.runs()
    # Both are there, with what they are linked to, and the alias is the later one's.
    tracking = fresh.connect()
    client = tracking._client
    ids = [tracking.resolve("rsicap", each.run_id) for each in (first, second)]
    versions = client.search_model_versions("name = 'rsicap'")
    assert [version.run_id for version in sorted(versions, key=lambda v: int(v.version))] == ids
    assert client.get_model_version_by_alias("rsicap", "best").run_id == ids[1]
    logged = {
        model.source_run_id: model
        for model in client.search_logged_models([client.get_run(ids[0]).info.experiment_id])
    }
    assert [logged[run_id].metrics[0].value for run_id in ids] == [0.5, 0.25]
    assert all(model.metrics[0].dataset_name == "mine" for model in logged.values())
    assert loaded(server.uri) == "second"
    # A search that ends while it is there; and the same once more, which changes nothing.
    third, model = recorded(fresh, "trial 002"), winner(tmp_path / "third", 0.2, 6)
    for _ in range(2):
        fresh.keep_model(third.run_id, model)
    assert not fresh.outbox.runs()
    assert len(client.search_model_versions("name = 'rsicap'")) == 3
    assert loaded(server.uri) == "third"
