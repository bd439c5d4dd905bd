"""The facts of the tuning log: what it says must be what the records show."""

from __future__ import annotations

import math
import random
import re
import shlex
from dataclasses import replace
from itertools import pairwise
from typing import Any

import optuna
import pytest

from search import records
from search import study_file as studies
from search.diagnosis.messages import LANGS
from search.diagnosis.noise import VAL_NOISE
from search.records import StudyRecord, TrialRecord
from search.report.blocks import MARKS
from search.report.epochs import epoch_rows
from search.report.facts import Facts, gather
from search.report.measured_noise import measure
from search.report.render import markdown
from search.sampling.params import distribution
from search.space import from_dict, param_name
from tests.support import candidate_trials
from tests.support.report_data import EXPERIMENT_3, START_S, falling, hand_run, many, recorded, study, trial


@pytest.fixture(scope="module")
def hand() -> Facts:
    return gather(hand_run())


@pytest.fixture(scope="module")
def sixty() -> Facts:
    return gather(many(60))


def ended_at(record: TrialRecord, value: float, **config: Any) -> TrialRecord:
    """The same trial with another value and configuration, begun after all others."""
    changed = {**record.config, **config}
    return replace(record, value=value, config=changed, attrs={**record.attrs, records.CONFIG: changed})


class TestEpochs:
    def test_experiment_3_gets_the_marks_its_author_gave_it(self) -> None:
        rows = gather(study([trial(0, EXPERIMENT_3)])).experiment(0).rows
        assert "".join(MARKS[row.mark] for row in rows) == "✅✅⚠️❌"
        assert rows[2].val_rise == pytest.approx(0.03 / 1.57)
        assert rows[3].train_rise == pytest.approx(0.18 / 1.69)

    def test_a_rise_within_noise_is_good(self) -> None:
        rows = epoch_rows(trial(0, [(2.0, 1.5), (1.9, 1.5 * (1 + 0.9 * VAL_NOISE)), (1.8, 1.4)]))
        assert [row.mark for row in rows] == ["good", "good", "good"]

    def test_a_noisy_training_loss_alone_is_no_failure(self) -> None:
        losses = [(0.587, 0.515), (0.575, 0.514), (0.596, 0.513), (0.570, 0.512), (0.579, 0.511)]
        rows = gather(study([trial(0, losses)])).experiment(0).rows
        assert [row.mark for row in rows] == ["good", "good", "warning", "good", "warning"]

    def test_what_was_not_recorded_is_not_called_bad(self) -> None:
        assert [row.mark for row in epoch_rows(trial(0, [(2.0, 1.5), (1.9, None)]))] == ["good", "unknown"]

    def test_what_was_not_finite_is_bad(self) -> None:
        broken = trial(0, [(2.0, 1.5), (1.9, None)], tags={"nonfinite.val_loss": "epoch 2"})
        assert [row.mark for row in epoch_rows(broken)] == ["good", "bad"]


class TestExperiments:
    def test_changes_are_against_the_best_before_in_the_telling(self, hand: Facts) -> None:
        aggressive = hand.experiment(2)
        assert aggressive.against is not None
        assert (aggressive.against.trial.number, aggressive.against.kind) == (1, "best")
        changed = {line.name: (line.before, line.value) for line in aggressive.lines if line.changed}
        assert changed["learning_rate"] == (5e-6, 1e-3)
        assert changed["lora_r"] == (8, 16)
        assert "max_samples" not in changed

    def test_trials_that_ran_side_by_side_are_told_one_after_the_other(self) -> None:
        first = trial(0, falling(2.0, 1.4, 5))
        second = replace(trial(1, falling(2.0, 1.5, 5)), start_s=START_S + 1)
        against = gather(study([first, second])).experiment(1).against
        assert against is not None and against.trial.number == 0

    def test_before_any_success_changes_are_against_the_one_before(self, hand: Facts) -> None:
        against = hand.experiment(1).against
        assert against is not None and (against.trial.number, against.kind) == (0, "previous")

    def test_on_other_samples_changes_are_against_the_most_alike(self, hand: Facts) -> None:
        against = [hand.experiment(n).against for n in (4, 5)]
        assert [(a.trial.number, a.kind) for a in against if a] == [(3, "elsewhere"), (4, "elsewhere")]

    def test_the_main_findings_parameter_is_marked(self, hand: Facts) -> None:
        assert [line.name for line in hand.experiment(0).lines if line.blamed] == ["torch_dtype"]
        assert [line.name for line in hand.experiment(2).lines if line.blamed] == ["learning_rate"]

    def test_other_samples_do_not_compare(self, hand: Facts) -> None:
        assert "incomparable" in [item.kind for item in hand.experiment(4).learnt]
        assert hand.incomparable == (4, 5)

    def test_a_difference_within_noise_is_called_that(self) -> None:
        base = trial(0, falling(2.0, 1.5, 8))
        near = ended_at(trial(1, falling(2.0, 1.5, 8)), (base.value or 0) * 0.99, learning_rate=3e-4)
        far = ended_at(trial(2, falling(2.0, 1.5, 8)), (base.value or 0) * 0.95, learning_rate=4e-4)
        facts = gather(study([base, near, far]))
        kinds = [[item.kind for item in facts.experiment(n).learnt] for n in (1, 2)]
        assert kinds[0][:2] == ["changed", "within_noise"] and "one_change" not in kinds[0]
        assert kinds[1][:3] == ["changed", "better", "one_change"]
        effect = facts.experiment(2).learnt[1].values
        assert effect["sigmas"] == pytest.approx(effect["share"] / (VAL_NOISE * 2**0.5))

    def test_a_stopped_trial_sets_no_record(self) -> None:
        made = [trial(0, falling(2.0, 1.7, 8)), trial(1, EXPERIMENT_3, state="PRUNED", reason=records.DIVERGED)]
        low = [(a, b - 0.6) for a, b in EXPERIMENT_3]
        made.append(trial(2, low, state="PRUNED", reason=records.DIVERGED))
        facts = gather(study(made))
        assert "pruned_lower" in [item.kind for item in facts.experiment(2).learnt]
        assert facts.best is not None
        assert facts.best.best.number == 0

    def test_advice_is_given_once(self, hand: Facts) -> None:
        given = [item for _, advice in hand.experiment(2).analysis for item in advice]
        assert len(given) == len(set(given)) >= 4

    def test_notes_are_told(self, hand: Facts) -> None:
        assert "312 batches" in (hand.experiment(4).note or "")


class TestNoise:
    def repeats(self, *values: float, seeds: tuple[int, ...] = (1, 2, 3, 4, 5)) -> list[TrialRecord]:
        made = [trial(i, falling(2.0, 1.5, 8)) for i in range(len(values))]
        return [ended_at(t, v, seed=s) for t, v, s in zip(made, values, seeds, strict=False)]

    def test_without_repeats_the_diagnosis_figure_is_taken_and_named(self, hand: Facts) -> None:
        assert (hand.noise.deviation, hand.noise.measured, hand.noise.is_measured) == (VAL_NOISE, None, False)

    def test_repeated_seeds_are_measured(self) -> None:
        noise = measure(self.repeats(1.00, 1.02, 0.98, 1.00))
        assert noise.is_measured
        assert noise.deviation == pytest.approx((0.0008 / 3) ** 0.5)
        assert noise.trials == (0, 1, 2, 3)

    def test_the_same_seed_again_is_no_repeat(self) -> None:
        assert measure(self.repeats(1.0, 1.0, seeds=(7, 7))).measured is None

    def test_equal_losses_do_not_say_that_a_last_digit_counts(self) -> None:
        noise = measure(self.repeats(1.0, 1.0, 1.0, 1.0))
        assert noise.is_measured and noise.measured == 0
        assert math.isfinite(noise.sigmas(0.01)) and noise.difference > 0
        assert not measure(self.repeats(0.0, 0.0, 0.0, 0.0)).is_measured

    @pytest.mark.parametrize("missing", [None, (1, 2), (0, 1), (2, 3)])
    def test_the_leaders_repeats_are_compared_on_the_blocks_that_all_have(
        self, missing: tuple[int, int] | None
    ) -> None:
        """A split moves all losses by 10 %, a training by 0.1 %."""
        blocks, own = {1: 1.0, 2: 1.1, 3: 0.92}, ((1e-3, -1e-3, 0.0), (0.0, 1e-3, -1e-3), (-1e-3, 0.0, 1e-3))
        trials = [candidate_trials.trial(number, 0.40 + 0.01 * number) for number in range(3)]
        for block, common in blocks.items():
            for number in range(3):
                lost = (number, block) == missing
                loss = None if lost else 0.4 * common * (1 + own[number][block - 1])
                more: dict[str, Any] = {"state": "FAIL", "reason": records.ERROR} if lost else {}
                trials.append(candidate_trials.repeat(len(trials), number, block, loss, **more))
        noise = measure(trials)
        assert noise.freedoms == (4 if missing is None else 2)
        assert noise.measured is not None and 5e-4 < noise.measured < 2.5e-3

    def test_two_repeats_may_raise_the_figure_and_never_lower_it(self) -> None:
        assert measure(self.repeats(1.0, 1.0)).deviation == VAL_NOISE
        wide = measure(self.repeats(1.0, 1.2))
        assert wide.deviation > 0.1
        assert not wide.is_measured


class TestParameters:
    def test_few_trials_are_not_yet_known(self, hand: Facts) -> None:
        assert {row.verdict for row in hand.tables["learning_rate"].rows} == {"unknown"}

    def test_verdicts_follow_the_truth_that_was_planted(self, sixty: Facts) -> None:
        rows = {row.low: row for row in sixty.tables["learning_rate"].rows}
        verdicts = [rows[low].verdict for low in sorted(rows)]
        assert verdicts[0] == "conservative"
        assert "good" in verdicts
        assert verdicts.index("conservative") < verdicts.index("good")

    def test_rates_that_mostly_break_are_too_aggressive(self) -> None:
        made = [trial(i, falling(2.0, 1.5, 8), values={"learning_rate": 2e-4}) for i in range(3)]
        made += [trial(i, EXPERIMENT_3, reason=records.RISING, values={"learning_rate": 1e-3}) for i in range(3, 6)]
        table = gather(study(made)).tables["learning_rate"]
        assert [(row.low, row.n, row.verdict) for row in table.rows] == [(2e-4, 3, "good"), (1e-3, 3, "aggressive")]

    def test_a_good_range_ends_at_trials_that_are_as_low_as_the_best(self) -> None:
        """It ended at those that were stopped behind, and at one told as worse."""

        def one(number: int, rate: float, last: float, epochs: int = 8) -> TrialRecord:
            cut = {"state": "PRUNED", "reason": records.SUPERSEDED} if epochs < 8 else {}
            losses = falling(last + 0.5, last, 8)[:epochs]
            return trial(number, losses, values={"learning_rate": rate, "num_epochs": 8}, **cut)

        rates = ((3.1e-4, 1.60), (3.5e-4, 1.50), (4e-4, 1.501), (5e-4, 1.60), (6e-4, 1.502), (1.1e-4, 1.503))
        made = [one(n, rate, loss) for n, (rate, loss) in enumerate(rates)]
        made += [one(6, 5.5e-4, 1.9, 2), one(7, 9e-4, 1.9, 2)]
        facts = gather(study(made))
        table = facts.tables["learning_rate"]
        low, high = table.rows
        assert (high.low, high.high, high.n, high.stopped, high.verdict) == (3.1e-4, 9e-4, 7, 2, "good")
        assert high.level is not None and low.level is not None
        assert (high.level.low, high.level.high, high.level.trials) == (3.5e-4, 6e-4, (1, 2, 4))
        assert (high.level.behind, high.level.stopped) == ((3,), (6,))
        assert low.verdict == "unknown" and [each.low for each in table.as_low] == [1.1e-4, 3.5e-4]
        english, chinese = markdown(facts, "en", {}), markdown(facts, "zh", {})
        assert "within noise: 3.5e-4 – 6e-4 (3 of 5 trials with a result; 2 more stopped before one)" in english
        assert "3.5e-4 – 6e-4（有结果的 5 次中的 3 次；另有 2 次未得结果即被终止）" in chinese
        rates_line = next(line for line in english.splitlines() if line.startswith("- As low as the best"))
        assert re.findall(r"\[(\d)\]", rates_line) == ["5", "1", "2", "4", "3", "6"]
        assert "behind by more than noise: trial [3]" in rates_line and "stopped there: trial [6]" in rates_line
        assert "this configuration is good" not in english and "no fault seen  [" in english

    def test_a_rate_that_the_warmup_held_back_is_not_called_too_low(self) -> None:
        slow = {"learning_rate": 1e-5, "warmup_steps": 5000}
        made = [trial(i, falling(2.0, 1.6, 15), values=slow) for i in range(3)]
        made += [trial(i, falling(2.0, 1.2, 15), values={"learning_rate": 2e-4}) for i in range(3, 6)]
        assert gather(study(made)).tables["learning_rate"].rows[0].verdict == "masked"

    def test_schedules_and_epochs_are_compared_where_they_vary(self, sixty: Facts) -> None:
        def one(number: int, schedule: str, epochs: int) -> TrialRecord:
            last = 1.3 + 0.2 * (schedule == "linear") + 0.001 * number
            values = {"lr_scheduler_type": schedule, "num_epochs": epochs}
            return trial(number, falling(2.0, last, epochs), values=values)

        made = [one(n, ("cosine", "linear")[n % 2], (6, 12)[n // 8]) for n in range(16)]
        facts = gather(study(made))
        assert [(row.low, row.n, row.verdict) for row in facts.tables["lr_scheduler_type"].rows] == [
            ("cosine", 8, "good"),
            ("linear", 8, "behind"),
        ]
        assert facts.tables["lr_scheduler_type"].differs and not facts.tables["num_epochs"].differs
        assert [(row.low, row.n) for row in facts.tables["num_epochs"].rows] == [(6, 8), (12, 8)]
        assert not {"lr_scheduler_type", "num_epochs"} & set(sixty.tables), "of one value, they say nothing"
        text = markdown(facts, "en", {})
        assert "| `lr_scheduler_type` | cosine | 8 |" in text and "`num_epochs` (6 – 12)" in text

    def test_every_finished_trial_is_in_one_row(self, sixty: Facts) -> None:
        judged = sorted(e.number for e in sixty.experiments if e.record.state in ("COMPLETE", "PRUNED"))
        for table in sixty.tables.values():
            assert sorted(n for row in table.rows for n in row.trials) == judged

    def test_a_parameter_without_effect_shows_no_direction(self, sixty: Facts) -> None:
        trend = sixty.tables["lora_r"].trend
        assert trend is not None
        assert not trend.shown
        assert sixty.tables["lora_r"].within_noise
        assert not sixty.tables["lora_r"].says

    @pytest.mark.long
    def test_where_nothing_matters_hardly_any_study_shows_something(self) -> None:
        """Of nine tables at 5 % each, a third did."""
        noise = measure([])
        shown = 0
        for seed in range(30):
            rng = random.Random(seed)
            made = []
            for number in range(16):
                rank = rng.choice((4, 8, 16, 32))
                values = {
                    "learning_rate": 10 ** rng.uniform(-5.3, -3),
                    "lora_r": rank,
                    "warmup_steps": rng.randrange(20),
                }
                values |= {"lora_alpha": rank * rng.choice((1, 2, 4)), "lora_dropout": rng.uniform(0, 0.2)}
                values |= {"batch_size": rng.choice((2, 4, 8, 16)), "num_epochs": 2}
                loss = 1.5 * math.exp(rng.gauss(0, 0.05))
                made.append(trial(number, [(loss + 0.1, loss + 0.01), (loss, loss)], values=values))
            facts = gather(study(made))
            shown += any(table.differs or table.direction is not None for table in facts.tables.values())
        assert shown <= 4, noise

    def test_a_spread_that_shuffling_reproduces_is_not_the_parameters_doing(self, sixty: Facts) -> None:
        rate, dropout = sixty.tables["learning_rate"], sixty.tables["lora_dropout"]
        assert rate.chance is not None
        assert dropout.chance is not None
        assert rate.chance < 0.05 < dropout.chance

    def test_a_planted_direction_is_shown(self) -> None:
        made = [
            trial(i, falling(2.0, 1.2 + 0.01 * r, 8), values={"lora_r": r, "lora_alpha": r})
            for i, r in enumerate((4, 6, 8, 12, 16, 20, 24, 28, 32, 10))
        ]
        trend = gather(study(made)).tables["lora_r"].trend
        assert trend is not None
        assert trend.rho == pytest.approx(1.0)
        assert trend.shown

    def test_importance_finds_the_rate_and_says_how_sure_it_is(self, sixty: Facts) -> None:
        first = sixty.importances[0]
        assert first.name == "learning_rate"
        assert first.first >= 0.9
        assert 0 <= first.low <= first.high <= 1
        assert sum(i.share for i in sixty.importances) == pytest.approx(1.0)

    def test_importance_is_the_dashboard_s_figure(self, sixty: Facts) -> None:
        """optuna-dashboard asks this evaluator, with its defaults, for these trials."""
        made = optuna.create_study()
        space = {param_name(f, p): distribution(p) for f, p in from_dict(sixty.record.definition["space"]).items()}
        for t in sixty.record.trials:
            if t.state == "COMPLETE":
                made.add_trial(optuna.trial.create_trial(params=t.params, distributions=space, value=t.value))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator()
        shown = optuna.importance.get_param_importances(made, evaluator=evaluator)
        assert {i.name: i.share for i in sixty.importances} == pytest.approx(shown)

    def test_importance_needs_ten_trials(self) -> None:
        assert gather(study([trial(i, falling(2.0, 1.5, 8)) for i in range(9)])).importances == ()


class TestSummary:
    def test_budget_of_the_hand_run(self, hand: Facts) -> None:
        (saved,) = hand.budget.saved
        assert (saved.reason, saved.trials, saved.epochs) == (records.RISING, (2,), 11)
        assert saved.seconds == pytest.approx(11 * 75)
        (lost,) = hand.budget.lost
        assert (lost.reason, lost.trials, lost.epochs, lost.seconds) == (records.NON_FINITE, (0,), 0, 20)
        assert hand.budget.epochs == 10 + 4 + 15 + 15 + 15

    def test_epochs_of_a_resumed_trial_are_counted_once(self) -> None:
        losses = falling(2.0, 1.5, 8)
        lost = trial(0, losses[:3], state="FAIL", reason=records.LOST)
        heir = trial(1, losses, attrs={records.RESUMES: 0, records.ATTEMPT: 1})
        facts = gather(study([lost, heir]))
        assert facts.budget.epochs == 8
        assert facts.budget.lost == ()
        assert (facts.experiment(0).resumed_by, facts.experiment(1).resumes) == (1, 0)

    def test_every_judged_trial_ends_in_one_leaf(self, sixty: Facts) -> None:
        placed = sorted(n for trials in sixty.tree.values() for n in trials)
        assert placed == sorted(e.number for e in sixty.experiments if e.findings)

    def test_the_leaves_of_the_hand_run(self, hand: Facts) -> None:
        assert hand.tree["non_finite"] == (0,)
        assert hand.tree["unstable"] == (2,)

    def test_float16_is_shown_to_be_the_cause(self, hand: Facts) -> None:
        half = hand.lessons.dtypes[0]
        assert (half.name, half.broke, half.trials) == ("float16", 1, 1)
        assert half.shown is not None
        assert half.shown[1].cause == "zero_over_zero"

    def test_recommended_and_the_runner_up_within_noise(self) -> None:
        base = trial(0, falling(2.0, 1.5, 8))
        near = ended_at(trial(1, falling(2.0, 1.5, 8)), (base.value or 0) * 1.01, learning_rate=3e-4)
        best = gather(study([base, near])).best
        assert best is not None
        assert (best.best.number, best.within_noise) == (0, (1,))
        assert gather(study([base, near])).next.command("confirm") == "python -m search.confirm --study rsicap"

    def test_signs_of_health(self, hand: Facts) -> None:
        signs = {sign.name: sign for sign in (*hand.health, *hand.trouble)}
        assert signs["finite"].no == (0,)
        assert 2 in signs["train_falls"].no
        assert signs["val_rises"].yes == (2,)
        assert signs["warmup"].yes == (4,)
        assert signs["slow_epoch"].yes == (5,)

    def test_stage_order_follows_the_importances(self, sixty: Facts) -> None:
        assert sixty.strategy == ("stability", "rate", "capacity", "overfitting")


class TestNextSteps:
    def settings(self, command: str) -> list[str]:
        words = shlex.split(command)
        return [value for flag, value in pairwise(words) if flag == "--set"]

    def test_going_on_is_the_same_study(self) -> None:
        record = hand_run()
        mine = studies.load("rsicap").with_settings(["max_samples=400", "num_epochs=15"])
        record = replace(record, definition=mine.definition())
        settings = self.settings(gather(record).next.command("more") or "")
        assert studies.load("rsicap").with_settings(settings).definition() == mine.definition()

    def test_going_on_keeps_the_rule_for_stopping_early(self) -> None:
        record = hand_run()
        rule = replace(record, attrs={**record.attrs, "stop_rule": {"patience": 5, "min_delta": 0.0}})
        base = {**record.definition["base"], "patience": 5, "min_delta": 0.0}
        older = replace(record, definition={**record.definition, "base": base})
        for each in (rule, older):
            settings = self.settings(gather(each).next.command("more") or "")
            assert "patience=5" in settings and not any(text.startswith("min_delta") for text in settings)

    def test_settings_on_record_are_said_again_and_quoted(self) -> None:
        record = hand_run()
        record = replace(record, attrs={**record.attrs, "settings": ["data=/a b/$(x)", "num_epochs=3"]})
        command = gather(record, options=["--runs-dir", "my runs"]).next.command("more") or ""
        assert self.settings(command) == ["data=/a b/$(x)", "num_epochs=3"]
        assert shlex.split(command)[-2:] == ["--runs-dir", "my runs"]

    def test_more_trials_are_a_total_beyond_those_there(self, hand: Facts) -> None:
        assert hand.next.more_trials == 12
        assert "--trials 12" in (hand.next.command("more") or "")

    def test_commands_take_the_study_and_the_pruner_as_they_were_given(self) -> None:
        """A name is looked up in studies/ alone, and another pruner would go on with the study."""
        record = hand_run()
        assert "--pruner" not in (gather(record).next.command("more") or "")
        given = replace(record, attrs={**record.attrs, records.GIVEN_STUDY: "my studies/x.py", records.PRUNER: "none"})
        for name in ("more", "widen"):
            words = shlex.split(gather(given).next.command(name) or "")
            assert words[words.index("--study") + 1] == "my studies/x.py"
            assert words[words.index("--pruner") + 1] == "none"

    def test_a_budget_of_epochs_stays_one(self) -> None:
        """More of them, not a number of trials: of trials alone, `--strategy rungs` trains few beyond an epoch."""
        record = hand_run()
        budgeted = replace(record, attrs={**record.attrs, records.EPOCHS: 71, "strategy": {"strategy": "rungs"}})
        facts = gather(budgeted)
        more, anew = facts.next.command("more") or "", facts.next.command("widen") or ""
        assert facts.next.more_epochs == 107
        assert "--strategy rungs" in more and "--epochs 107" in more and "--trials" not in more
        assert "--fresh" in anew and "--epochs 71" in anew
        assert "up to 107 epochs in total" in markdown(facts, "en", {}) and "107 个 epoch" in markdown(facts, "zh", {})

    def test_edges_and_gaps(self, hand: Facts) -> None:
        assert ("warmup_steps", False) in [(edge.name, edge.is_low) for edge in hand.next.edges]
        gap = next(gap for gap in hand.next.gaps if gap.name == "learning_rate")
        assert (gap.low, gap.high) == (pytest.approx(5e-6), pytest.approx(2e-4))
        assert ("lora_alpha/lora_r", (1, 4)) in hand.next.untried

    def test_no_gap_lies_beyond_a_rate_that_was_shown_to_be_wrong(self) -> None:
        """5e-6 to 5.9e-5 was "not looked at yet", although the trial at 5.9e-5 was far behind, for its rate."""
        same = {"num_epochs": 6, "lora_alpha": 16, "lora_r": 8}

        def one(number: int, rate: float, loss: float) -> TrialRecord:
            return trial(number, falling(2.0, loss, 6), values={**same, "learning_rate": rate})

        def gap(*rates: tuple[float, float]) -> tuple[float, float] | None:
            facts = gather(study([one(n, *each) for n, each in enumerate(rates)]))
            found = [(each.low, each.high) for each in facts.next.gaps if each.name == "learning_rate"]
            return (pytest.approx(found[0][0]), pytest.approx(found[0][1])) if found else None

        low, high = 5e-6, 1e-3
        assert gap((6e-4, 1.4), (6e-5, 1.4), (2e-4, 1.4)) == (low, 6e-5)
        assert gap((6e-4, 1.4), (6e-5, 1.9), (2e-4, 1.4)) is None
        assert gap((6e-6, 1.4), (5e-5, 1.9), (2e-5, 1.4)) is None, "beyond one that is too high"
        assert gap((6e-6, 1.4), (5e-5, 1.4), (2e-5, 1.4)) == (5e-5, high)

    def test_a_schedule_and_more_data_are_advised_where_neither_was_tried(self) -> None:
        """The hand-run log's own next steps 2 and 3."""
        each_of = ({"num_epochs": 6, "learning_rate": 1e-4 * (n + 1)} for n in (0, 1))
        made = [trial(n, falling(2.0, 1.4, 6), values=values) for n, values in enumerate(each_of)]
        record = study(made)
        rungs = {**record.attrs, "strategy": {"strategy": "rungs"}, records.EPOCHS: 60}
        facts = gather(replace(record, attrs=rungs), options=("--runs-dir", "my runs"))
        kinds = [step.kind for step in facts.next.steps]
        assert kinds[kinds.index("more") :] == ["more", "schedule", "data"] and facts.next.rows == 400
        for kind, change in (("schedule", "lr_scheduler_type=cosine"), ("data", "max_samples=none")):
            words = shlex.split(facts.next.command(kind) or "")
            assert [word for word in words if word.split("=")[0] == change.split("=")[0]] == [change]
            assert words[-7:] == ["--fresh", "--warm-start", "rsicap-1", "--epochs", "60", "--runs-dir", "my runs"]
            assert all((facts.next.command(kind) or "-") in markdown(facts, lang, {}) for lang in LANGS)
        whole = [replace(t, config={**t.config, "max_samples": None}) for t in made]
        large = [replace(t, config={**t.config, "max_samples": 4000}) for t in made]
        decayed = [replace(t, config={**t.config, "lr_scheduler_type": "linear"}) for t in made]
        exact = [replace(t, tags={**t.tags, "split.left_out": "0"}) for t in made]
        assert all(gather(study(each)).next.command("data") is None for each in (whole, large, exact))
        assert gather(study(decayed)).next.command("schedule") is None
        searched = replace(record, definition={**record.definition, "space": {
            **record.definition["space"], "lr_scheduler_type": {"type": "Choice", "values": ["linear", "cosine"]},
        }})  # fmt: skip
        assert gather(searched).next.command("schedule") is None

    def test_long_warmups_are_to_be_shortened(self) -> None:
        slow = {"warmup_steps": 5000}
        facts = gather(study([trial(i, falling(2.0, 1.6, 15), values=slow) for i in range(2)]))
        assert (facts.next.long_warmups, facts.next.warmup_limit) == ((0, 1), 120)

    def test_an_even_cover_leaves_no_gap(self, sixty: Facts) -> None:
        assert [gap.name for gap in sixty.next.gaps] == []


@pytest.mark.parametrize("make", [hand_run, recorded, lambda: many(14), lambda: study([])])
def test_the_same_records_give_the_same_facts(make: Any) -> None:
    assert gather(make()) == gather(make())


@pytest.mark.parametrize("state", ["RUNNING", "WAITING", "FAIL"])
def test_a_study_without_any_result(state: str) -> None:
    record: StudyRecord = study([trial(0, [], state=state, reason=records.ERROR)])
    facts = gather(record)
    assert facts.best is None
    assert facts.tables == {}
    assert facts.next.more_trials == 7
