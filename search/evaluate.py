"""`python -m search.evaluate --study NAME`: BLEU, ROUGE-L and CIDEr-D of a study's best trials and of the base."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from search.options import RunsOption, StorageOption, StudyOption, TrackingOption, find_study
from search.places import RUNS, Places
from trainer.common import cli
from trainer.common.errors import UserError

if TYPE_CHECKING:
    import optuna

    from search.evaluation.candidates import Evaluation
    from search.records import TrialRecord

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: StudyOption,
    trials: Annotated[
        str, typer.Option(help="best (the winner and the best other), all, or numbers such as 3,7.")
    ] = "best",
    data: Annotated[str | None, typer.Option(help="Another data folder, in any layout of docs/data.md.")] = None,
    rows: Annotated[
        str, typer.Option(help="test, validation or all; auto takes a given test split where there is one.")
    ] = "auto",
    base: Annotated[bool, typer.Option(help="Evaluate the base without an adapter too.")] = True,
    num_beams: Annotated[int, typer.Option(min=1, max=64, help="Beams of the beam search; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=4096, help="Longest caption in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, max=1024, help="Images at once.")] = 8,
    model: Annotated[str | None, typer.Option(help="The base, if it lies elsewhere now.")] = None,
    meteor: Annotated[
        bool | None, typer.Option(help="METEOR too, which needs Java and pycocoevalcap; by default where they are.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON, captions included.")] = False,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
) -> None:
    """Caption rows that the trials were not trained on, and judge the captions. The figures become metrics of the
    trials' MLflow runs, at once or, while MLflow is away, through the outbox."""
    import optuna

    from search.evaluation import candidates
    from search.evaluation import rows as rows_of
    from search.evaluation.java import why_no_meteor
    from search.storage import lifecycle
    from search.storage.database import open_storage
    from search.storage.identity import check_folder
    from search.verdict.leaders import verdict_of

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if rows not in ("auto", "test", "validation", "all"):
        raise UserError(f"--rows must be auto, test, validation or all, but got {rows!r}")
    without = why_no_meteor()
    if meteor and without is not None:
        raise UserError(f"METEOR is {without}")
    places = Places.of(runs_dir, storage, tracking_uri)
    _check_storage(places)
    found = find_study(open_storage(places.storage_url), study)
    folder = places.study(found.study_name)
    check_folder(folder, found)
    listed = lifecycle.read_trials(found)
    chosen = candidates.choose_trials(listed, trials, folder, verdict_of(listed, found.user_attrs))
    before = found.user_attrs.get(candidates.ATTRIBUTE, {})
    judged = rows_of.choose_rows(rows_of.configs_of(chosen), data, rows, before)  # type: ignore[arg-type]

    from trainer import preload

    preload.import_libraries()
    from trainer.captions.generate import Decoding
    from trainer.common.progress import bar

    with bar("captioning") as show:
        total = (len(chosen) + base) * len(judged.rows)
        seen = {"": 0}

        def progress(what: str, done: int, _: int) -> None:
            seen[what] = done
            show(sum(seen.values()), total)

        result = candidates.evaluate(
            chosen,
            folder,
            judged,
            Decoding(num_beams=num_beams, max_new_tokens=max_new_tokens),
            with_base=base,
            batch_size=batch_size,
            device=device,
            model=model,
            meteor=without is None if meteor is None else meteor,
            progress=progress,
        )
    away = record(result, found, chosen, places)
    if as_json:
        captions = {name: list(texts) for name, texts in result.captions.items()}
        images = [str(row.image) for row in judged.rows]
        print(json.dumps({**result.to_dict(), "files": images, "captions": captions}, ensure_ascii=False, indent=1))
    else:
        print(describe(result))
        if away:
            print(away)


def _check_storage(places: Places) -> None:
    """MLflow may be away; Optuna's database has to be there."""
    from search.places import sqlite_file

    file = sqlite_file(places.storage_url)
    if file is not None and not file.is_file():
        places.check_recorded()


def record(result: Evaluation, study: optuna.Study, trials: list[TrialRecord], places: Places) -> str | None:
    """Keep an evaluation: in Optuna's study for log and export, in MLflow's runs as metrics, its captions as a file.

    Returns:
        What to tell the user where MLflow has not taken it yet.
    """
    from search.evaluation.candidates import ATTRIBUTE, BASE, points
    from search.records import STUDY_ID
    from search.tracking.outbox import CAPTIONS, STUDY, Point
    from search.tracking.runs import StudyRuns
    from trainer.common.files import write_whole

    name = result.rows.name
    told = result.to_dict()
    study.set_user_attr(ATTRIBUTE, {**study.user_attrs.get(ATTRIBUTE, {}), name: told})
    file = places.study(study.study_name) / "captions" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {"image": str(row.image), "references": row.captions, **{c: texts[n] for c, texts in result.captions.items()}}
        for n, row in enumerate(result.rows.rows)
    ]
    write_whole(file, json.dumps(listed, ensure_ascii=False, indent=1))
    runs = StudyRuns(places, study.study_name, study.user_attrs.get(STUDY_ID))
    by_name = {str(trial.number): trial for trial in trials}
    now = time.time_ns() // 1_000_000
    tags = {f"caption.{name}": f"{result.rows.where}; fingerprint {result.rows.fingerprint}"}
    for candidate, estimates in result.estimates().items():
        trial = by_name.get(candidate)
        run_id = STUDY if trial is None else trial.run_id
        if run_id is None:
            continue
        prefix = f"{CAPTIONS}{name}/{BASE}" if trial is None else f"{CAPTIONS}{name}"
        step = 1 if trial is None else trial.best_epoch or 1
        runs.add(run_id, [Point(key, value, step, now) for key, value in points(estimates, prefix).items()], tags)
    runs.keep(file, "captions")
    left = len(runs.outbox.runs())
    return f"MLflow is away: the metrics of {left} runs are kept in {runs.outbox.folder}" if left else None


def describe(result: Evaluation) -> str:
    """The figures as a table, what differs, and what to beware of."""
    from search.evaluation.compare import LEVEL

    estimates = result.estimates()
    names = list(next(iter(estimates.values())))
    lines = [f"{result.rows.where}; intervals of {LEVEL:.0%} from resampling the images", ""]
    lines.append(f"{'':<10}" + "".join(f"{name:>22}" for name in names))
    for candidate, found in estimates.items():
        cells = [f"{found[n].value:.3f} [{found[n].low:.3f}, {found[n].high:.3f}]" for n in names]
        label = candidate if candidate == "base" else f"trial {candidate}"
        lines.append(f"{label:<10}" + "".join(f"{cell:>22}" for cell in cells))
    lines.append("")
    for (a, b), found_d in result.differences().items():
        d = found_d["cider_d"]
        against = "the base" if a == "base" else f"trial {a}"
        verdict = "a real difference" if d.differs else "no difference that chance would not make"
        lines.append(
            f"trial {b} against {against}: CIDEr-D {d.value:+.3f} [{d.low:+.3f}, {d.high:+.3f}], p = {d.p:.3f}: "
            f"{verdict}"
        )
    disagreement = result.disagreement()
    lines += [f"note: {disagreement}"] if disagreement else []
    lines += [f"warning: {warning}" for warning in result.rows.warnings]
    lines += [f"{metric.upper()} is {why}" for metric, why in result.not_computed.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    cli.run(app)
