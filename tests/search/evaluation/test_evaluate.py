"""`search.evaluate`: the rows it judges on, what it records, and where."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from search import evaluate, leaderboard
from search.evaluation import candidates, java
from search.evaluation.candidates import Evaluation
from search.evaluation.metrics import score
from search.options import opened
from search.places import Places
from search.records import TrialRecord
from search.tracking.delivery import Delivery
from search.tracking.runs import StudyRuns
from search.verdict.race import Verdict
from tests.support import called, small_study
from tests.support import candidate_trials as leaders
from trainer.data import dataset

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """A copy of the small study, which the tests here add to."""
    small = small_study.build(tmp_path_factory, tiny_checkpoint)
    return Path(shutil.copytree(small.runs, tmp_path_factory.mktemp("evaluated") / "runs"))


@pytest.fixture
def call(runs: Path) -> Call:
    def call(*arguments: object) -> tuple[int, str, str]:
        command = ["--study", small_study.NAME, "--runs-dir", runs, "--max-new-tokens", 4, *arguments]
        done = called.call(evaluate.app, [str(each) for each in command])
        return done.code, done.out, done.err

    return call


def test_figures_become_metrics_of_the_runs_also_while_mlflow_is_away(call: Call, runs: Path) -> None:
    good = small_study.GOOD
    code, out, _ = call("--trials", good, "--rows", "validation", "--json", "--tracking-uri", "http://127.0.0.1:1")
    assert code == 0
    found = json.loads(out)
    assert set(found["candidates"]) == {"base", str(good)}
    assert len(found["captions"]["base"]) == found["images"] == len(found["files"])
    assert "by whose loss the search chose" in found["warnings"][0]
    places = Places.of(runs)
    study_runs = StudyRuns(places, small_study.NAME)
    assert len(study_runs.outbox.runs()) == 2
    Delivery(study_runs.outbox, small_study.NAME, study_runs.connect).once()
    with opened(small_study.NAME, places) as (study, tracking):
        run_id = study.get_trials()[good].user_attrs["run_id"]
        run = tracking._client.get_run(run_id)
        value = found["candidates"][str(good)]["cider_d"]
        assert run.data.metrics["caption/validation/cider_d"] == value["value"]
        assert run.data.metrics["caption/validation/cider_d_high"] == value["high"]
        assert run.info.status == "FINISHED"
        parent = tracking.find_parent(small_study.NAME)
        assert parent is not None
        metrics = tracking._client.get_run(parent).data.metrics
        assert metrics["caption/validation/base/bleu_1"] == found["candidates"]["base"]["bleu_1"]["value"]
        assert study.user_attrs[candidates.ATTRIBUTE]["validation"]["images"] == found["images"]
    captions = json.loads((runs / small_study.NAME / "captions" / "validation.json").read_text())
    assert captions[0]["base"] == found["captions"]["base"][0]


def test_other_data_may_be_a_test_set_alone(call: Call, tmp_path: Path) -> None:
    """RSIEval's layout, which a search refuses to read."""
    rows = dataset.examine("mini").rows[:6]
    (tmp_path / "RSIEval").mkdir()
    listed = [{"filename": row.image.name, "caption": row.caption, "qa_pairs": []} for row in rows]
    (tmp_path / "RSIEval" / "annotations.json").write_text(json.dumps({"annotations": listed}))
    (tmp_path / "RSIEval" / "images").symlink_to(rows[0].image.parent)
    code, out, err = call("--trials", small_study.GOOD, "--no-base", "--data", tmp_path / "RSIEval")
    assert (code, err) == (0, "")
    assert out.startswith(f"6 test rows of {tmp_path / 'RSIEval'}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trials", "99"], "the study has no trial 99; it has 0 to 4"),
        (["--trials", "x"], "--trials must be best, all, or numbers"),
        (["--rows", "test"], "no row is of a given test split"),
        (["--rows", "tset"], "--rows must be auto, test, validation or all"),
        (["--data", "nowhere"], "the data folder 'nowhere' does not exist"),
        (["--device", "foo"], "device must be auto, cpu, cuda or cuda:N, but got 'foo'"),
    ],
)
def test_wrong_input_is_one_message(call: Call, arguments: list[str], message: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_data_without_prompts_are_asked_what_the_adapters_learnt(
    call: Call, runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.captions import generate

    rows = dataset.examine("mini").rows[:2]
    listed = [{"image": row.image.name, "caption": row.caption} for row in rows]
    (tmp_path / "rows.json").write_text(json.dumps(listed))
    (tmp_path / "images").symlink_to(rows[0].image.parent)
    (use,) = (runs / small_study.NAME / "trials" / f"{small_study.GOOD:04d}").rglob("captioning.json")
    before = use.read_text()
    use.write_text(json.dumps({**json.loads(before), "instruction": "Which ground is it?"}))
    asked: list[str] = []
    real = generate.in_batches

    def spied(captioner: Any, items: Any, batch_size: int) -> Any:
        asked.extend(instruction for _, instruction in items)
        return real(captioner, items, batch_size)

    monkeypatch.setattr(generate, "in_batches", spied)
    try:
        code, _, err = call("--trials", small_study.GOOD, "--data", tmp_path, "--max-new-tokens", 2)
    finally:
        use.write_text(before)
    assert (code, err) == (0, "")
    assert asked == ["Which ground is it?"] * 4, "the base is asked the same, or the comparison is none"


def test_a_disagreement_of_cider_and_loss_is_told() -> None:
    texts = ["a large airport with two runways", "three ships lie in a harbour", "a lake near the town"]
    references = [[text] for text in texts]
    rows: Any = SimpleNamespace(scenes=lambda: None)
    found = Evaluation(
        rows=rows,
        captions={},
        scores={"4": score(["a lake"] * 3, references), "2": score(texts, references)},
        losses={"4": 0.3, "2": 0.4},
    )
    assert str(found.disagreement()).startswith("by validation loss trial 4 is best, by CIDEr-D trial 2 (10.000")
    assert replace(found, losses={"4": 0.5, "2": 0.4}).disagreement() is None
    assert replace(found, comparable=False).disagreement() is None, "losses of other samples are no ranking"


def with_adapters(tmp_path: Path, trials: list[TrialRecord]) -> list[TrialRecord]:
    for trial in trials:
        folder = leaderboard.adapter(tmp_path, trial)
        folder.mkdir(parents=True)
        (folder / "adapter_config.json").touch()
    return trials


def numbered(n: int, value: float, **config: Any) -> TrialRecord:
    return leaders.trial(n, value, attrs={"folder": f"trials/{n:04d}"}, config=config)


def test_the_verdicts_trial_is_the_first_that_is_evaluated(tmp_path: Path) -> None:
    trials = with_adapters(tmp_path, [numbered(n, value) for n, value in enumerate((0.4, 0.401, 0.402))])
    verdict = Verdict(kind="tied", choice=2, tied=(0, 1, 2))
    assert [t.number for t in candidates.choose_trials(trials, "best", tmp_path, verdict)] == [2, 0]
    assert [t.number for t in candidates.choose_trials(trials, "best", tmp_path)] == [0, 1]


def test_all_are_those_of_the_search_and_the_second_best_is_of_the_same_samples(tmp_path: Path) -> None:
    """A repeat has another split, and has trained on rows that the search left out."""
    again = leaders.repeat(3, 0, 1, 0.3, attrs={"folder": "trials/0003"})
    trials = [numbered(0, 0.4), numbered(1, 0.41, max_samples=24), numbered(2, 0.5), again]
    with_adapters(tmp_path, trials)
    assert [t.number for t in candidates.choose_trials(trials, "all", tmp_path)] == [0, 1, 2]
    assert [t.number for t in candidates.choose_trials(trials, "best", tmp_path)] == [0, 2]
    assert [t.number for t in candidates.choose_trials(trials, "3,0", tmp_path)] == [3, 0]


class Counted:
    """In place of METEOR's program: the share of a caption's words in its first reference."""

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def statistics(self, captions: list[str], references: list[tuple[str, ...]]) -> np.ndarray:
        found = [
            [sum(w in refs[0].split() for w in c.split()), len(c.split())]
            for c, refs in zip(captions, references, strict=True)
        ]
        return np.array(found, dtype=float)

    def values(self, sums: np.ndarray) -> np.ndarray:
        return np.asarray(sums[:, 0] / np.maximum(sums[:, 1], 1))


def test_meteor_is_a_figure_where_it_can_be_computed_and_its_lack_is_said(
    call: Call, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("--trials", small_study.GOOD, "--rows", "validation")
    monkeypatch.setattr("shutil.which", lambda _: None)
    code, out, err = call(*asked, "--meteor")
    assert code == 2 and "METEOR is not computed: there is no Java" in err and not out
    code, out, _ = call(*asked)
    assert code == 0 and "METEOR is not computed: there is no Java" in out and "SPICE is not computed" in out
    monkeypatch.setattr(java, "why_no_meteor", lambda: None)
    monkeypatch.setattr(candidates, "Meteor", Counted)
    code, out, _ = call(*asked, "--json")
    found = json.loads(out)
    for figures in found["candidates"].values():
        assert 0 <= figures["meteor"]["low"] <= figures["meteor"]["value"] <= figures["meteor"]["high"] <= 1
    assert list(found["not_computed"]) == ["spice"]
    with opened(small_study.NAME, Places.of(runs)) as (study, tracking):
        (run_id,) = {t.user_attrs["run_id"] for t in study.trials if t.number == small_study.GOOD}
        assert "caption/validation/meteor_low" in tracking._client.get_run(run_id).data.metrics
