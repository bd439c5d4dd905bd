"""What each trial taught: the replayed hand-run says what its author's six lessons say; causes need several trials."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest

from search import records
from search.diagnosis.noise import VAL_NOISE
from search.report.facts import Facts, gather
from search.report.measured_noise import measure
from search.report.render import markdown, sigmas
from tests.support.report_data import Losses, falling, hand_run, study, trial

SLOW = {"learning_rate": 5e-6, "lora_r": 8, "lora_alpha": 16, "batch_size": 8, "num_epochs": 8, "warmup_steps": 0}
USUAL = {**SLOW, "learning_rate": 2e-4}


def line(first: float, step: float, epochs: int = 8) -> Losses:
    return [(first - step * n, first - step * n) for n in range(epochs)]


def kinds(facts: Facts, number: int) -> dict[str, Any]:
    return {item.kind: item.values for item in facts.experiment(number).learnt}


@pytest.fixture(scope="module")
def hand() -> Facts:
    return gather(hand_run())


class TestTheHandRun:
    """In the author's words: what went wrong, what was changed, whether that helped."""

    def test_1_float16_is_the_root_and_float32_the_way_out(self, hand: Facts) -> None:
        first, second = kinds(hand, 0), kinds(hand, 1)
        assert first["advice"]["advice"][0].parameter == "torch_dtype"
        assert second["remedy_worked"]["finding"] == "non_finite" and second["remedy_worked"]["now"] == "float32"

    def test_2_is_stable_and_falls_too_little(self, hand: Facts) -> None:
        assert "first" in kinds(hand, 1)
        assert hand.experiment(1).has("too_slow") and not hand.experiment(1).has("diverged")

    def test_3_the_rate_is_too_high_and_the_best_epoch_is_an_early_one(self, hand: Facts) -> None:
        third = kinds(hand, 2)
        assert third["changed"]["rate"] > 100
        assert third["best_before_last"]["best"] == 2
        assert [a.parameter for a in third["advice"]["advice"]][:2] == ["learning_rate", "lora_r"]

    def test_4_the_lower_rate_repairs_it_and_is_better(self, hand: Facts) -> None:
        fourth = kinds(hand, 3)
        assert fourth["remedy_worked"]["finding"] == "diverged"
        assert fourth["better"]["reference"] == 1 and fourth["better"]["sigmas"] > 3

    def test_5_and_5b_are_compared_by_time_where_their_losses_do_not_compare(self, hand: Facts) -> None:
        assert "incomparable" in kinds(hand, 4) and "incomparable" in kinds(hand, 5)
        pace = kinds(hand, 5)["pace"]
        assert (pace["seconds"], pace["before"], pace["samples"]) == (640.0, 75.0, 25.0)
        text = markdown(hand, "en", {})
        assert "An epoch takes 10.7 min against 75 s" in text and "for 25 times the samples" in text


class TestTooLowARate:
    def rated(self, *others: tuple[dict[str, Any], Losses]) -> Facts:
        made = [trial(0, line(2.0, 0.004), values=SLOW)]
        made += [trial(n, losses, values=values) for n, (values, losses) in enumerate(others, start=1)]
        return gather(study(made))

    def test_two_trials_with_higher_rates_that_came_lower_show_it(self) -> None:
        fast = falling(2.0, 1.4, 8)
        facts = self.rated((USUAL, fast), ({**USUAL, "learning_rate": 1e-4}, fast))
        main = facts.experiment(0).main_finding
        assert main is not None and main.cause == "low_rate" and main.evidence["witnesses"] == "1, 2"
        assert main.evidence["rate_times"] == pytest.approx(20)
        assert 0 in facts.tree["not_falling"] and [a.parameter for a in main.advice] == ["learning_rate"]
        assert "(1, 2) were at least" in markdown(facts, "en", {})

    def test_one_does_not(self) -> None:
        cause = self.rated((USUAL, falling(2.0, 1.4, 8))).experiment(0).main_finding
        assert cause is not None and cause.cause != "low_rate"

    def test_a_low_learning_rate_that_alpha_makes_up_for_is_not_low(self) -> None:
        fast = falling(2.0, 1.4, 8)
        scaled = {**SLOW, "learning_rate": 5e-5, "lora_alpha": 64}  # times 4: the effective rate of 2e-4 with 16
        made = [trial(0, fast, values=scaled), trial(1, fast, values=USUAL), trial(2, fast, values=USUAL)]
        causes = {f.cause for e in gather(study(made)).experiments for f in e.findings}
        assert "low_rate" not in causes

    def test_the_best_trial_is_told_to_train_longer_though_its_curve_is_a_line(self) -> None:
        facts = self.rated(*[({**USUAL, "learning_rate": rate}, line(2.1, 0.003)) for rate in (1e-4, 2e-4, 4e-4)])
        main = facts.experiment(0).main_finding
        assert main is not None and main.cause is None and 0 in facts.tree["longer"]


class TestTheFirstOfItsSamplesThatIsComplete:
    def told(self, *others: Any) -> Facts:
        cut = trial(0, falling(2.0, 1.6, 8)[:3], state="PRUNED", reason=records.SUPERSEDED, values=USUAL)
        return gather(study([cut, *others]))

    def test_is_told_against_the_latest_that_is_not(self) -> None:
        whole = falling(2.0, 1.4, 8)
        facts = self.told(trial(1, whole, values={**USUAL, "lora_r": 4}))
        found = kinds(facts, 1)
        assert found["first_complete"]["reference"] == 0 and found["first_complete"]["at"] == 3
        assert found["first_complete"]["level"] == whole[2][1] and "incomparable" not in found
        for lang, words in (("en", "The first that is complete: 1."), ("zh", "第一个完成的实验：1.")):
            assert words in markdown(facts, lang, {})  # type: ignore[arg-type]

    def test_what_is_not_complete_either_is_compared_too(self) -> None:
        rising = [(1.9, 1.5), (1.8, 1.6), (1.7, 1.7), (1.6, 1.8)]
        found = kinds(self.told(trial(1, rising, state="PRUNED", reason=records.RISING, values=USUAL)), 1)
        assert "pruned_lower" in found and "incomparable" not in found

    def test_a_failure_in_between_is_no_reference(self) -> None:
        failed = trial(1, [], state="FAIL", reason=records.ERROR, values=USUAL)
        whole = trial(2, falling(2.0, 1.4, 8), values=USUAL)
        assert kinds(self.told(failed, whole), 2)["first_complete"]["reference"] == 0

    def test_other_samples_do_not_compare(self) -> None:
        whole = trial(1, falling(2.0, 1.4, 8), values={**USUAL, "max_samples": 100})
        assert kinds(self.told(whole), 1)["incomparable"]["reference"] == 0


class TestACure:
    """It counts where it could be seen: by a trial that went as far as the one that was ill, or to its end."""

    def after(self, losses: Losses, **more: Any) -> dict[str, Any]:
        ill = trial(0, line(2.0, 0.004), values=SLOW)
        return kinds(gather(study([ill, trial(1, losses, values=USUAL, **more)])), 1)

    def test_is_told_of_a_trial_that_went_as_far(self) -> None:
        flat = [(loss, loss) for loss in (2.0, 1.6, 1.45, 1.41, 1.405, 1.404, 1.404, 1.404)]
        assert "remedy_worked" in self.after(flat)

    @pytest.mark.parametrize(
        ("epochs", "more"),
        [
            (1, {"state": "PRUNED", "reason": records.SUPERSEDED}),
            (0, {"state": "PRUNED", "reason": records.OUT_OF_MEMORY, "violated": ("out_of_memory",)}),
            (0, {"state": "FAIL", "reason": records.ERROR}),
        ],
    )
    def test_is_not_told_of_one_that_could_not_show_it(self, epochs: int, more: dict[str, Any]) -> None:
        assert not {"remedy_worked", "remedy_failed"} & set(self.after(falling(2.0, 1.4, 8)[:epochs], **more))


class TestTrialsThatWereStopped:
    def stopped(self, losses: Losses) -> dict[str, Any]:
        full = trial(0, falling(2.0, 1.4, 8), values=USUAL)
        cut = trial(1, losses, state="PRUNED", reason=records.SUPERSEDED, values={**USUAL, "lora_r": 4})
        return kinds(gather(study([full, cut])), 1)

    def test_are_compared_at_the_epoch_at_which_they_were_stopped(self) -> None:
        there = falling(2.0, 1.4, 8)[:3]
        assert {"stopped_level", "by_curves"} <= set(self.stopped(there))
        lower = self.stopped([(a, b * 0.95) for a, b in there])
        assert lower["stopped_ahead"]["epoch"] == 3 and lower["stopped_ahead"]["share"] == pytest.approx(0.05)
        assert "stopped_behind" in self.stopped([(a, b * 1.05) for a, b in there])

    def test_are_not_told_to_run_on(self) -> None:
        cut = trial(0, [(2.0, 1.7)], state="PRUNED", reason=records.SUPERSEDED, values=USUAL)
        facts = gather(study([cut]))
        assert facts.experiment(0).findings[0].advice == () and facts.experiment(0).mark == "unknown"


def test_where_nothing_was_repeated_the_curves_say_how_much_a_loss_jumps() -> None:
    rng = random.Random(0)

    def noisy(number: int) -> Any:
        losses = [(a, b * (1 + rng.gauss(0, 0.02))) for a, b in falling(2.0, 1.4, 15)]
        return trial(number, losses, values={"max_samples": 160})

    noise = measure([noisy(n) for n in range(6)])
    assert not noise.is_measured and noise.jumps is not None
    assert noise.deviation == noise.jumps == pytest.approx(0.02, rel=0.5)
    assert noise.split == 32 and noise.widened == pytest.approx((500 / 32) ** 0.5)
    assert measure([trial(n, falling(2.0, 1.4, 15)) for n in range(6)]).deviation == VAL_NOISE


def test_a_forecast_has_an_interval_and_says_whether_to_train_longer() -> None:
    still = gather(study([trial(n, falling(2.0, 1.4 + 0.01 * n, 6), values={"num_epochs": 6}) for n in range(4)]))
    assert still.curves is not None and still.promise is not None
    assert still.promise.low < still.promise.loss < still.promise.high and still.promise.epoch == 12
    assert still.next.longer_epochs == 12 and "num_epochs=12" in (still.next.command("longer") or "")
    assert f"80 % interval {still.promise.low:.4f} to {still.promise.high:.4f}" in markdown(still, "en", {})
    flat = [(1.5, 1.6), (1.4, 1.41), *[(1.4, 1.4)] * 10]
    done = gather(study([trial(n, flat, values={"num_epochs": 12, "lora_r": 4 * (n + 1)}) for n in range(4)]))
    assert done.next.longer_epochs is None and done.next.command("longer") is None
    two = gather(study([trial(n, falling(2.0, 1.4, 6)) for n in range(2)]))
    assert two.curves is None and "interval" not in markdown(two, "en", {}).split("## 📋")[0]


@pytest.mark.parametrize(
    ("value", "told"), [(0.22, "0.22"), (2.94, "2.9"), (2.96, "2.96"), (2.9996, "2.9996"), (3.04, "3"), (27.4, "27")]
)
def test_deviations_are_rounded_to_no_other_side_of_the_bound(value: float, told: str) -> None:
    """A trial was stopped "while level" at "3 σ", beside "from 3 σ on it counts"."""
    assert sigmas(value) == told
    made = [trial(0, falling(2.0, 1.4, 6), values={"num_epochs": 6})]
    noise = gather(study(made)).noise
    above = [(a, b * (1 + value * noise.deviation * 2**0.5)) for a, b in falling(2.0, 1.4, 6)]
    text = markdown(gather(study([*made, trial(1, above, values={"num_epochs": 6, "lora_r": 32})])), "en", {})
    assert f"% higher, {told} σ" in text and ("**Worse**" in text) == (value > 3)


def test_a_stopped_trial_is_held_against_the_lowest_by_the_same_model() -> None:
    """It was told as "the lowest so far", beside other trials' measured losses, and was a later trial's."""
    made = [trial(n, falling(2.0, 1.4 + 0.01 * n, 6), values={"num_epochs": 6}) for n in (0, 1)]
    cut = {"state": "PRUNED", "reason": records.SUPERSEDED}
    made.append(trial(2, falling(2.0, 1.4, 6)[:2], values={"num_epochs": 6}, **cut))
    made.append(trial(3, falling(2.0, 1.38, 6), values={"num_epochs": 6}))
    facts = gather(study(made))
    assert facts.curves is not None and facts.curves.lowest[:2] == (3, 6)
    english, chinese = markdown(facts, "en", {}), markdown(facts, "zh", {})
    lowest = f"{facts.curves.lowest[2]:.4f}"
    assert re.search(rf"at epoch 6; the lowest by the same model is {lowest}, \[trial 3\]\(\S+\), epoch 6\.", english)
    assert re.search(rf"；按同一模型，最低的是\[实验 3\]\(\S+\) epoch 6，{lowest}。", chinese)
    assert "lowest so far" not in english


def test_epochs_are_too_few_only_by_what_the_log_counts_as_a_difference() -> None:
    """0.7 % to 1.1 % were called "more than noise" beside "from 3 σ on (1.8 %) it counts", and led the advice."""
    curve = [(a, 1.40 + 0.035 / n) for n, (a, _) in enumerate(falling(2.0, 1.4, 6), start=1)]
    made = [trial(n, curve, values={"num_epochs": 6, "lora_r": 4 * (n + 1)}) for n in range(4)]
    facts = gather(study(made))
    assert facts.curves is not None and facts.promise is not None
    assert all(facts.noise.deviation < f.gain <= facts.noise.difference for f in facts.curves.longer)
    assert facts.next.ran == (0, 1, 2, 3) and facts.next.falling == () and facts.next.command("longer") is None
    english, chinese = markdown(facts, "en", {}), markdown(facts, "zh", {})
    line = next(line for line in english.splitlines() if line.startswith("- **Epochs**"))
    bound = f"by more than counts as a difference ({100 * facts.noise.difference:.1f} %)"
    assert f"none of the 4 trials that ran all of theirs {bound}" in line
    assert f"from {facts.promise.now:.4f} to {facts.promise.loss:.4f} by epoch 12" in line and " % lower." in line
    assert "没有一次预计继续训练会有算得上差别" in chinese and "Train longer" not in english


def test_full_are_the_best_the_first_of_each_failure_and_the_surprising() -> None:
    calm = {**USUAL, "num_epochs": 8}
    made = [trial(0, falling(2.0, 1.4, 8), values=calm)]
    made += [trial(n, falling(2.0, 1.401, 8), values={**calm, "lora_dropout": 0.01 * n}) for n in range(1, 6)]
    broken = {"state": "PRUNED", "reason": records.NON_FINITE, "violated": (records.NON_FINITE,)}
    made += [trial(n, [], values=calm, **broken) for n in (6, 7)]
    facts = gather(study(made))
    assert facts.full == (0, 6)
    noted = gather(study([*made, trial(8, falling(2.0, 1.401, 8), values=calm, note="asked for")]))
    assert 8 in noted.full
