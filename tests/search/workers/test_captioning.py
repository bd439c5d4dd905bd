"""Captions during a study: which images, what is kept, how long it may take, and that training does not notice."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna_dashboard import get_note

from search import captions
from search.captions import CUT, IMAGES, Pictured, page, table
from search.dashboards import notes
from search.records import Outcome
from search.report import render, write
from search.report.facts import gather
from search.workers.captioning import Captioning, choose
from tests.support import report_data
from trainer.data import dataset
from trainer.data.dataset import Row
from trainer.loop import Pack, train

EVIL = "<script>alert(1)</script> | `x` ![a](http://evil.example/x.png)"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, bench: Any, small: Callable[..., Any]) -> tuple[Any, Path]:
    """(configuration, its adapter)."""
    config = small(num_epochs=1)
    out = tmp_path_factory.mktemp("trained")
    list(train(config, bench, out))
    return config, out / "checkpoints" / "epoch-0001" / "adapter"


def captioning(folder: Path, config: Any, bench: Any, most: int = 3) -> tuple[Captioning, optuna.Study]:
    study = optuna.create_study()
    return Captioning(study, config, bench, folder, most), study


def row(name: str, label: str | None, scene: str = "") -> Row:
    return Row(image=Path(name), prompt="", caption="", scene=scene, where="", label=label)


def test_images_are_spread_over_classes_and_the_same_each_time() -> None:
    rows = [row(f"{label}{n}", label) for label in "abc" for n in range(5)]
    chosen = choose(rows, 4, seed=1)
    assert {each.label for each in chosen[:3]} == {"a", "b", "c"}
    assert chosen == choose(list(reversed(rows)), 4, seed=1)
    assert len(choose([row("same.png", None, "s")] * 3, 4, seed=1)) == 1
    scenes = choose([row(f"{n}", None, scene=f"s{n // 4}") for n in range(16)], 4, seed=0)
    assert len({each.scene for each in scenes}) == 4


def test_a_trial_captions_the_images_and_the_base_is_asked_once(
    tmp_path: Path, bench: Any, trained: tuple[Any, Path]
) -> None:
    config, adapter = trained
    worker, study = captioning(tmp_path, config, bench)
    said = worker.of(config, adapter, trained_s=1e4)
    assert said is not None
    val = {str(each.image) for each in dataset.split(dataset.examine("mini"), config).val}
    assert set(said.pictured.images) <= val
    assert len(said.captions) == len(said.pictured.base) == len(said.files) == 3
    assert (tmp_path / "captions" / "sheet.png").read_bytes() == said.sheet
    assert Pictured.of(study.user_attrs) == said.pictured
    # Another worker takes them from the study.
    other = Captioning(study, config, bench, tmp_path, 3)
    asked = []
    other._captions = lambda config, adapter, budget: asked.append(adapter) or ("x", "y", "z")  # type: ignore[method-assign,func-returns-value]
    assert other.of(config, adapter, trained_s=1e4) is not None
    assert asked == [adapter]


def test_training_beside_it_computes_the_same_bits(
    tmp_path: Path, bench: Any, small: Callable[..., Any], trained: tuple[Any, Path]
) -> None:
    config, adapter = trained
    other = small(num_epochs=1, seed=7, lora_dropout=0.2)
    alone = [vars(event).get("loss") for event in train(other, bench, tmp_path / "alone")]
    worker, _ = captioning(tmp_path, config, bench)
    losses = []
    with Pack(bench) as pack:
        pack.add(other, tmp_path / "beside")
        while pack.members:
            for _, event in pack.round():
                losses.append(vars(event).get("loss"))
            assert worker.of(config, adapter, trained_s=1e4) is not None
    assert losses == alone
    assert not any("forward" in vars(module) for module in bench.base(config).model.modules())


def test_it_stops_when_its_share_of_the_time_is_over(tmp_path: Path, bench: Any, trained: tuple[Any, Path]) -> None:
    config, adapter = trained
    worker, study = captioning(tmp_path, config, bench)
    assert worker.of(config, adapter, trained_s=0.5) is None
    assert IMAGES not in study.user_attrs
    said = worker.of(config, adapter, trained_s=1.0)  # 30 ms: some tokens of weights that never end
    assert said is not None
    assert said.seconds < 5
    assert all(text.endswith(CUT) for text in said.captions)
    none, _ = captioning(tmp_path, config, bench, most=0)
    assert none.of(config, adapter, trained_s=1e4) is None


def test_an_adapter_that_is_gone_costs_no_trial(tmp_path: Path, bench: Any, trained: tuple[Any, Path]) -> None:
    worker, _ = captioning(tmp_path, trained[0], bench)
    assert worker.of(trained[0], tmp_path / "gone", trained_s=1e4) is None


def test_page_and_table_show_text_as_text() -> None:
    pictured = Pictured(
        images=("/data/a.png",), labels=("port",), references=(EVIL,), instruction="What?", base=("a ship",)
    )
    shown = page(pictured, [EVIL], [b"png"], "study <x>, trial 1")
    assert "<script" not in shown
    assert "src='http" not in shown
    found = json.loads(table(pictured, ["two ships"], ["images/image-1.png"]))
    assert found["columns"] == ["image", "class", "reference", "base", "trial"]
    picture = {"type": "image", "filepath": "images/image-1.png", "compressed_filepath": "images/image-1.png"}
    assert found["data"] == [[picture, "port", EVIL, "a ship", "two ships"]]


def test_the_note_of_a_trial_has_its_captions(tmp_path: Path, bench: Any, trained: tuple[Any, Path]) -> None:
    config, adapter = trained
    worker, study = captioning(tmp_path, config, bench)
    said = worker.of(config, adapter, trained_s=1e4)
    assert said is not None
    trial = study.ask()
    notes.annotate_trial(
        trial,
        folder=tmp_path / "artifacts",
        outcome=Outcome(state="COMPLETE", reason="finished", detail="done"),
        findings=(),
        epochs=(),
        config=config.model_dump(mode="json"),
        run=None,
        captioned=replace(said, captions=(EVIL, "b", "c")),
    )
    note = get_note(trial)
    assert "![Validation images](/artifacts/" in note
    assert "**this trial**: b" in note
    assert "<script" not in note


@pytest.mark.parametrize(("lang", "head"), [("en", "## 🖼️ Captions"), ("zh", "## 🖼️ 图像描述")])
def test_the_tuning_log_has_them_for_base_best_and_runner_up(tmp_path: Path, lang: Any, head: str) -> None:
    record = report_data.hand_run()
    before = gather(record)
    assert before.best is not None
    assert before.best.runner_up is not None
    assert head not in render.markdown(before, lang, {})
    pictured = Pictured(
        images=("/data/a.png",), labels=(None,), references=("two ships",), instruction="", base=("a lake",)
    )
    numbers = {before.best.best.number: EVIL, before.best.runner_up.number: "one ship"}
    trials = tuple(
        replace(t, attrs={**t.attrs, captions.CAPTIONS: [numbers.get(t.number, "no")]}) for t in record.trials
    )
    facts = gather(replace(record, trials=trials, attrs={**record.attrs, IMAGES: pictured.to_dict()}))
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "sheet.png").write_bytes(b"png")
    drawn = write.drawings(facts, tmp_path)
    assert drawn["captions.png"] == b"png"
    log = render.markdown(facts, lang, {"captions": "tuning-log-plots/captions.png"})
    part = log.partition(head)[2].partition("\n## ")[0]
    assert "tuning-log-plots/captions.png" in part
    assert all(text in part for text in ("two ships", "a lake", "one ship"))
    assert "<script" not in part
    assert "no" not in part.split()
