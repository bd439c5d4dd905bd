"""The benchmark's peer trains what we train, and its gate can tell if it does not."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from search.study_file import load
from tests.benchmarks import configs, gate, peer, peer_study, sides
from tests.benchmarks.sides import TrialLosses
from tests.support import search_process
from tests.support.library_run import library_inputs
from tests.support.tiny import IMAGE_TOKEN, QUERIES, tiny_batch, tiny_model
from trainer.common.errors import DataError
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.batches import CaptionDataset, Pixels, Tokenizer
from trainer.events import EpochEnded
from trainer.loop import train
from trainer.model.base import forward


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_the_library_gets_the_same_batch_and_finds_the_same_loss(kind: str) -> None:
    model, batch = tiny_model(kind), tiny_batch(kind)
    inputs = library_inputs(batch, image_token=IMAGE_TOKEN, num_query_tokens=QUERIES)
    with torch.no_grad():
        theirs = model(**inputs).loss
        ours = forward(model, batch).loss_sum / batch.num_tokens()
    assert float(theirs) == pytest.approx(float(ours), rel=1e-6)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == QUERIES * len(batch)


def test_a_trial_of_the_peer_has_our_validation_losses(
    small: Callable[..., TrainConfig], bench: Any, tmp_path: Path
) -> None:
    config = small(num_epochs=2, eval_batch_size=2, warmup_steps=1)  # batches of unequal numbers of label tokens
    ours = [e.val_loss for e in train(config, bench, tmp_path / "ours") if isinstance(e, EpochEnded)]
    configs.write_rows(config, tmp_path / "rows.json")
    rows = peer.read_rows(tmp_path / "rows.json")
    theirs = peer.train(config, rows, tmp_path / "peer", clock=peer.Clock(), track=False)
    assert theirs["state"] == "COMPLETE"
    assert theirs["val_losses"] == pytest.approx(ours, rel=1e-5)
    assert theirs["steps"] == 2 * math.ceil(len(rows[0]) / config.batch_size)
    nudged = peer.train(config, rows, tmp_path / "nudged", clock=peer.Clock(), track=False, nudge=1e-2)
    assert nudged["val_losses"] != pytest.approx(ours, rel=1e-5)


def test_the_peer_has_no_dropout_but_loras(small: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = small(model="mini")  # the embedded model's own dropout is 0.1
    configs.write_rows(config, tmp_path / "rows.json")
    model, processor = peer.load_model(config)
    tokenizer = Tokenizer(processor, model.config, config.max_target_length)
    data = CaptionDataset(peer.read_rows(tmp_path / "rows.json")[0][:4], tokenizer, Pixels(processor.image_processor))
    samples = [item for item in (data[i] for i in range(4)) if not isinstance(item, DataError)]
    inputs = peer.LibraryCollator(tokenizer, model.config)(samples)
    with torch.no_grad():
        found = [float(model.train(training)(**inputs).loss) for training in (True, False)]
    assert found[0] == found[1]


def test_the_written_study_holds_the_sampled_configurations(tmp_path: Path) -> None:
    scale = configs.SCALES["mini"]
    file = tmp_path / "bench.py"
    file.write_text(configs.study_text(scale, 5, seed=3, base={"model": "mini"}), encoding="utf-8")
    study = load(str(file))
    sampled = configs.sample(scale, 9, seed=3)[:5]  # more trials go on where fewer ended
    assert [dict(fixed.config) for fixed in study.enqueue] == sampled
    assert study.base_config().lora_dropout == 0
    assert all(scale.batch[0] <= c["batch_size"] <= scale.batch[1] for c in sampled)


def test_the_rows_written_for_the_peer_are_our_split(small: Callable[..., TrainConfig], tmp_path: Path) -> None:
    config = small()
    configs.write_rows(config, tmp_path / "rows.json")
    parts = dataset.split(dataset.examine(config.data), config)
    assert peer.read_rows(tmp_path / "rows.json") == (list(parts.train), list(parts.val))


def losses(*val: float, first: Sequence[float] = (1.0, 0.9)) -> TrialLosses:
    return TrialLosses(val=val, first=tuple(first), state="COMPLETE")


def counts(ours: TrialLosses, theirs: TrialLosses, *moved: TrialLosses) -> bool:
    """`moved`: what the peer's runs with their start moved give, one after the other."""
    again = iter(moved)

    def nudged(labels: Sequence[str], nudge: float) -> Mapping[str, TrialLosses]:
        assert 1 + nudge != 1
        return dict.fromkeys(labels, next(again, theirs))

    return gate.report(gate.compare({"c": ours}, {"c": theirs}, 1e-3, nudged), 1e-3)[0]


def test_the_gate_lets_through_what_agrees() -> None:
    assert counts(losses(0.5, 0.4), losses(0.5, 0.4001))


def test_the_gate_refuses_what_differs_by_more_than_rounding() -> None:
    assert not counts(losses(0.5, 0.41), losses(0.5, 0.4))
    assert not counts(losses(0.5, math.nan), losses(0.5, 0.4))
    # The peer is hardly sensitive: a difference of 10 % is none of rounding.
    assert not counts(losses(0.5, 0.44), losses(0.5, 0.4), losses(0.5, 0.4008))


def test_the_gate_takes_a_trial_for_chaotic_only_by_the_peers_own_measure() -> None:
    assert counts(losses(0.5, 0.44), losses(0.5, 0.4), losses(0.5, 0.43))
    # A rounding may be carried far only in the third try.
    assert counts(losses(0.5, 0.44), losses(0.5, 0.4), losses(0.5, 0.4001), losses(0.5, 0.4), losses(0.5, 0.43))
    other_start = losses(0.5, 0.44, first=(1.0, 0.8))
    assert not counts(other_start, losses(0.5, 0.4), losses(0.5, 0.43))


@pytest.mark.parametrize("nudge", gate.NUDGES)
def test_a_nudge_reaches_the_peers_process(nudge: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """-1.2e-07 as an argument of its own is an option that argparse does not know."""
    started: list[float] = []
    monkeypatch.setattr(peer_study, "run", lambda search, *_: started.append(search.nudge))
    monkeypatch.setattr(sides.Bench, "_read_peer", lambda *_: {})
    monkeypatch.setattr(sides.Bench, "_timed", lambda _self, _name, command: arguments(monkeypatch, command))
    configs_of = configs.study_text(configs.SCALES["mini"], 2, 0, {"model": "mini", "data": "mini"})
    bench = sides.Bench(folder=tmp_path, trials=2, ours=(), peer=())
    bench.study_file.write_text(configs_of, encoding="utf-8")
    bench.nudge_peer("nudged", ["c00"], nudge)
    assert started == [nudge]


def arguments(monkeypatch: pytest.MonkeyPatch, command: Sequence[Any]) -> None:
    """Run the peer's study by its command line, in this process."""
    monkeypatch.setattr(sys, "argv", [str(each) for each in command[1:]])
    peer_study.main()


def test_the_gate_refuses_other_trials() -> None:
    with pytest.raises(SystemExit, match="not the same trials"):
        gate.compare({"a": losses(0.5)}, {"b": losses(0.5)}, 1e-3, lambda labels, nudge: {})


@pytest.mark.slow
def test_the_benchmark_of_scale_goes_on_with_a_prefilled_study() -> None:
    done = search_process.run(
        [sys.executable, "-m", "tests.benchmarks.scale", "--workers", "2", "--prefill", "30", "--trials", "4"],
        fresh=True,  # its workers unpickle what they find in __main__
    )
    assert done.returncode == 0, done.stderr
    label, workers, _, trials, *figures = done.stdout.splitlines()[-1].replace("+", " ").split()
    assert (label, workers, trials) == ("30", "2", "4")
    assert all(float(figure) > 0 for figure in figures)
