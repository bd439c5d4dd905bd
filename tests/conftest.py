"""What the trainer's tests share: generated data in a folder of the session, small models that train in no time."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import once
from tests.support import small_study as built

gc.disable()  # until all is imported: a sixth of the time that it takes, see trainer.common.imports


LONGEST_FIRST = (
    "simulation/test_simulation.py",
    "search/test_run.py",
    "deploy/test_wheel.py",
    "search/workers/test_worker.py",
    "search/test_session.py",
    "faults/test_database_faults.py",
    "faults/test_tracking_faults.py",
    "search/workers/test_repeats.py",
    "search/dashboards/test_browser.py",
    "faults/test_tracking_passwords.py",
    "search/test_export.py",
    "search/workers/test_pausing.py",
    "trainer/test_loop.py",
    "trainer/model/test_sizes.py",
    "search/tracking/test_opening.py",
    "search/storage/test_database.py",
    "search/storage/test_lifecycle.py",
    "search/test_places.py",
    "search/test_ui.py",
    "bad_input/test_urls.py",
)
"""Files of more than 15 s. Processes take whole files: with a long one last, the others would wait for it."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; `make test` keeps xdist from putting those with the most tests there."""
    here = Path(__file__).parent
    place = {here / name: number for number, name in enumerate(LONGEST_FIRST)}
    assert all(path.is_file() for path in place), "a test file of conftest.LONGEST_FIRST has moved"
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Nothing that was imported is looked at again when garbage is collected: half a second each time."""
    gc.freeze()
    gc.enable()
    gc.callbacks.append(_took)


SLOW_S = 0.05
_collecting = {"since": 0.0, "slow": False}


def _took(phase: str, _: dict[str, int]) -> None:
    """Whether a collection looked at so much that the test's end is to freeze what is there."""
    if phase == "start":
        _collecting["since"] = time.perf_counter()
    elif time.perf_counter() - _collecting["since"] > SLOW_S:
        _collecting["slow"] = True


def pytest_runtest_logfinish() -> None:
    """What tests import and keep is frozen, too: collections were a sixth of the time of the workers' tests."""
    if _collecting["slow"]:
        gc.collect()
        gc.freeze()
        _collecting["slow"] = False


@pytest.fixture(scope="session", autouse=True)
def _revisions() -> Iterator[None]:
    """Alembic compiles and runs the files of all revisions, Optuna's and MLflow's, whenever a database is opened: a
    tenth of the time of the tests that open some. Here once a process.
    """
    from alembic.script import base

    load = base.util.load_python_file
    kept: dict[tuple[str, str], Any] = {}

    def once_each(folder: str, name: str) -> Any:
        if str(name) == "env.py":  # to load it is to migrate
            return load(folder, name)
        if (folder, name) not in kept:
            kept[folder, name] = load(folder, name)
        return kept[folder, name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base.util, "load_python_file", once_each)
        yield


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c() -> None:
    """A shell starts jobs in the background with SIGINT ignored, which the programs under test would inherit."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The embedded data is generated into a folder of this session, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_SEARCH_CACHE", str(once.folder(tmp_path_factory) / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def _embedded_images(_cache: None) -> Iterator[None]:
    """The 640 images of the embedded data are decoded once a process: programs in tests looked at them 76 times,
    half a second each.
    """
    from trainer.data import dataset

    look, folder = dataset._look, Path(os.environ["LORA_SEARCH_CACHE"])
    kept: dict[Path, Any] = {}

    def once_each(image: Path, names: Any) -> Any:
        if folder not in image.parents:
            return look(image, names)
        if image not in kept:
            kept[image] = look(image, names)
        return kept[image]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "_look", once_each)
        yield


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders that other users may enter: PostgreSQL that root starts runs as one.

    Not below pytest's own folder, which each pytest that starts on the machine closes to all others.
    """
    with tempfile.TemporaryDirectory(prefix="servers-", ignore_cleanup_errors=True) as name:
        yield lambda: Path(tempfile.mkdtemp(dir=name))


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An InstructBLIP with the embedded model's processor and some 60,000 random weights, not blind; no dropout."""
    import torch
    from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, InstructBlipProcessor

    from trainer.mini import CHECKPOINT

    config = InstructBlipConfig.from_pretrained(CHECKPOINT)
    small_vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    for name, value in {**small_vision, "patch_size": 16}.items():
        setattr(config.vision_config, name, value)
    small_qformer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    for name, value in {**small_qformer, "encoder_hidden_size": 32}.items():
        setattr(config.qformer_config, name, value)
    small_text = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
    for name, value in small_text.items():
        setattr(config.text_config, name, value)
    config.qformer_config.hidden_dropout_prob = config.qformer_config.attention_probs_dropout_prob = 0.0
    config.text_config.dropout_rate = 0.0
    torch.manual_seed(0)
    model = InstructBlipForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("vision_model", "query_tokens", "qformer", "language_projection")):
                parameter.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    model.save_pretrained(folder)
    InstructBlipProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_study(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> built.Small:
    """A finished study of five trials, each of which ends otherwise; not to be changed."""
    return built.build(tmp_path_factory, tiny_checkpoint)


@pytest.fixture(scope="session")
def embedded() -> Any:
    """The embedded data, examined: 0.4 s that each new workbench would take."""
    from trainer.data import dataset

    return dataset.examine("mini")


@pytest.fixture(scope="session")
def bench(embedded: Any) -> Any:
    """One workbench for all tests, as a worker has one for all its trials."""
    import torch

    from trainer.workbench import Workbench

    torch.set_num_threads(1)
    return Workbench(embedded, "mini")


@pytest.fixture(scope="session")
def small(tiny_checkpoint: Path) -> Callable[..., Any]:
    """`small(learning_rate=1e-3)`: a configuration of the tiny model on a few samples, without any dropout."""
    from trainer.config import TrainConfig

    def make(**fields: Any) -> TrainConfig:
        base = {
            "model": str(tiny_checkpoint),
            "max_samples": 16,
            "num_epochs": 2,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "warmup_steps": 2,
            "lora_dropout": 0.0,
            "lora_r": 4,
            "device": "cpu",
        }
        return TrainConfig.parse({**base, **fields})

    return make
