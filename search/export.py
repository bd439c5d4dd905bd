"""`python -m search.export --study NAME --out DIR`: the winner's adapter as a folder that PEFT alone can load."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from search.errors import StudyError, Unavailable
from search.options import RunsOption, StorageOption, StudyOption, TrackingOption, find_study
from search.places import RUNS, Places
from trainer.common import cli
from trainer.common.errors import ModelError, shown
from trainer.common.files import whole_folder

if TYPE_CHECKING:
    import optuna

    from search.records import StudyRecord, TrialRecord

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    study: StudyOption,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    trial: Annotated[int | None, typer.Option(min=0, help="The study's winner by default.")] = None,
    model: Annotated[str | None, typer.Option(help="The base, under a name that its users have.")] = None,
    merge: Annotated[bool, typer.Option(help="Also write the whole model, the adapter merged in: merged/.")] = False,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
) -> None:
    """Write an adapter with a model card, its configuration and the tuning log into a folder, for others."""
    import optuna

    from search.evaluation.candidates import check_adapter
    from search.storage.database import open_storage
    from search.storage.identity import check_folder

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _check_free(out)
    places = Places.of(runs_dir, storage, tracking_uri)
    places.check_recorded()
    found = find_study(open_storage(places.storage_url), study)
    check_folder(places.study(found.study_name), found)
    record = read(found, places)
    chosen = choose(record, trial)
    check_adapter(chosen, places.study(record.name))
    try:
        with whole_folder(out, replace=True) as folder:
            write(folder, record, chosen, places, model)
            if merge:
                write_merged(folder, chosen, places.study(record.name), model)
            _check_free(out)  # a merge takes minutes, and what lies there by now is not ours
    except OSError as error:
        raise StudyError(f"the folder {shown(str(out))} cannot be written: {error.strerror or error}") from None
    print(out)
    if Path(described(model or str(chosen.config["model"]))[0]).is_dir():
        print("the base is a folder of this machine; with --model HUB-ID the export loads elsewhere", file=sys.stderr)
    words = ["hf", "upload", f"YOUR-NAME/{record.name}-{chosen.number}", str(out)]
    print(f"look at README.md, fill in licence and data, then: {shlex.join(words)}", file=sys.stderr)


def _check_free(out: Path) -> None:
    if out.resolve() == Path.cwd():
        raise StudyError(f"--out {shown(str(out))} is the folder you are in, which cannot be replaced; name another")
    if out.exists() and not out.is_dir():
        raise StudyError(f"{shown(str(out))} is there already and no folder; name another with --out")
    if out.exists() and any(out.iterdir()):
        raise StudyError(f"the folder {shown(str(out))} is there already and not empty; name another with --out")


def read(study: optuna.Study, places: Places) -> StudyRecord:
    """The study's records, from Optuna and the outbox alone while MLflow is away."""
    from search import reading
    from search.records import STUDY_ID
    from search.tracking.client import open_tracking
    from search.tracking.outbox import Outbox

    outbox = Outbox(places.outbox(study.study_name))
    try:
        tracking = open_tracking(places.tracking_uri, places.artifacts, study.user_attrs.get(STUDY_ID))
        return reading.read_study(study, tracking, outbox)
    except Unavailable as error:
        print(f"{error}; exporting what Optuna has recorded", file=sys.stderr)
        return reading.read_study(study, None, outbox, away=True)


def choose(record: StudyRecord, number: int | None) -> TrialRecord:
    """The trial of this number; without one the trial that the study's verdict names, or its best.

    Raises:
        StudyError: there is none, or it is a repeat: log and card tell of the search's trials alone.
    """
    from search.leaderboard import is_repeat
    from search.records import REPEAT_OF
    from search.verdict.leaders import verdict_of, winner

    if number is None:
        best = winner(record.trials, verdict_of(record.trials, record.attrs))
        if best is None:
            raise StudyError(f"no trial of the study {record.name!r} has completed yet; name one with --trial")
        return best
    known = {trial.number: trial for trial in record.trials}
    if number not in known:
        has = f"it has {min(known)} to {max(known)}" if known else "it has none yet"
        raise StudyError(f"the study {record.name!r} has no trial {number}; {has}")
    trial = known[number]
    if is_repeat(trial):
        of = trial.attrs[REPEAT_OF]
        raise StudyError(
            f"trial {number} repeats trial {of} with another seed and split, for the verdict; export that one "
            f"(--trial {of})"
        )
    return trial


def write(folder: Path, record: StudyRecord, trial: TrialRecord, places: Places, model: str | None) -> None:
    """Everything but the merged model, into a new folder."""
    from search import leaderboard
    from search.diagnosis.messages import LANGS
    from search.evaluation.candidates import ATTRIBUTE
    from search.report import card, write
    from search.report.facts import gather
    from trainer.captions.adapter import CONFIG, use_of
    from trainer.model.peft_format import AUTO_MAPPING

    # The adapter, under the base's name for others.
    adapter = leaderboard.adapter(places.study(record.name), trial)
    use = use_of(adapter)
    for file in adapter.iterdir():
        shutil.copy(file, folder / file.name)
    base, revision, config = described(model or str(trial.config["model"]))
    told = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    told |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    told["auto_mapping"] = AUTO_MAPPING  # adapters of earlier versions lack it
    (folder / CONFIG).write_text(json.dumps(told, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "training_config.json").write_text(json.dumps(trial.config, indent=1) + "\n", encoding="utf-8")
    # The log, and the card.
    facts = gather(record, options=places.options())
    drawn = write.drawings(facts, places.study(record.name))
    for lang in LANGS:
        write.write_markdown(facts, lang, folder / write.default_name(lang), drawn)
    curves = next((name for name in drawn if name.startswith("loss-curves")), None)
    first = record.attrs.get("generation") == 1  # its own name stands for the latest generation
    exact = f"{record.name}-1" if first else record.name
    evaluations = {
        key: each for key, each in record.attrs.get(ATTRIBUTE, {}).items() if str(trial.number) in each["candidates"]
    }
    handed = card.Handed(
        trial=trial,
        base=base,
        revision=revision,
        decoder_only=_decoder_only(config),
        instruction=use.instruction,
        max_new_tokens=use.max_new_tokens,
        evaluations=evaluations,
        curves=None if curves is None else f"{write.plots_folder(write.NAME)}/{curves}",
        evaluate=places.command("python", "-m", "search.evaluate", "--study", exact, "--trials", str(trial.number)),
        replay=places.command("python", "-m", "search.replay", "--study", exact, "--trial", str(trial.number)),
    )
    (folder / "README.md").write_text(card.card(facts, handed), encoding="utf-8")


def described(model: str) -> tuple[str, str | None, dict[str, Any]]:
    """(the base as others name it, the commit of a hub id, its config).

    Raises:
        ModelError: there is no such folder, or its config cannot be read.
    """
    from trainer.model.files import read_config
    from trainer.model.locate import locate

    found = Path(locate(model))
    config: dict[str, Any] = {}
    if (found / "config.json").is_file():
        try:
            config = read_config(found)
        except ModelError as error:
            raise ModelError(f"the model {shown(model)}: {error}") from None
    if found.parent.name == "snapshots":  # the hub's cache: the id is the same everywhere
        return model, found.name, config
    return (str(found.resolve()), None, config) if found.is_dir() else (model, None, config)


def _decoder_only(config: dict[str, Any]) -> bool:
    text = config.get("text_config")
    default = str(text.get("model_type", "t5") if isinstance(text, dict) else "t5") != "t5"
    return bool(config.get("use_decoder_only_language_model", default))


def write_merged(folder: Path, trial: TrialRecord, study: Path, model: str | None) -> None:
    """The whole model with the adapter's weights added to its own, and its processor: `merged/`."""
    from search import leaderboard
    from trainer import preload

    preload.import_libraries()
    import torch

    from trainer import runtime
    from trainer.captions.adapter import load

    dtype = runtime.DTYPES[trial.config["torch_dtype"]]
    adapter = leaderboard.adapter(study, trial)
    base, adapted = load(model or trial.config["model"], adapter, dtype=dtype, device=torch.device("cpu"))
    adapted.merge_and_unload().save_pretrained(folder / "merged")
    base.processor.save_pretrained(folder / "merged")


if __name__ == "__main__":
    cli.run(app)
