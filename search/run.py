"""`python -m search.run --study NAME`: the command line, and the one place that wires the parts together."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from search.errors import DatabaseAway, StudyError, Unavailable
from search.options import StorageOption, TrackingOption, sqlite_url
from trainer.common import cli
from trainer.common.errors import shown
from trainer.common.imports import without_collection
from trainer.config import MOST

if TYPE_CHECKING:
    from search.study import Study
    from search.terminal.live import Display
    from search.tracking.run_store import Status
    from search.workers.executor import Executor
    from search.workers.pool import WorkerPool
    from trainer.data.dataset import Examined

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MOST_WORKERS = 64
"""Each worker takes a GPU or a core and a base model's memory: a number mistyped must not bring the machine down."""

_log_file: Path | None = None

ENDS: dict[int, Status] = {0: "FINISHED", 130: "KILLED", 143: "KILLED"}
"""MLflow's status of the study's own run by exit code; FAILED for all others."""


class _Command(TyperCommand):
    """Fills in the help of `--pruner` when help is printed: its names come from a module that imports Optuna."""

    def format_help(self, *arguments: Any) -> None:
        from search import pruning

        (option,) = (option for option in self.params if option.name == "pruner")
        option.help = pruning.help_text()  # type: ignore[attr-defined]
        super().format_help(*arguments)


@app.command(cls=_Command)
def main(
    study: Annotated[str | None, typer.Option(help="A study in studies/, or the path of a study file.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Trials in total, those already run included.")
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="End after this time, e.g. 2h, 90m, 1h30m; resumable.")] = None,
    hang_timeout: Annotated[
        str, typer.Option(help="A worker without a sign of life for so long is killed and replaced.")
    ] = "30m",
    lost_after: Annotated[
        str, typer.Option(help="Other hosts take over the trials of one that is silent for so long; at least 10s.")
    ] = "10m",
    workers: Annotated[
        int | None, typer.Option(min=1, max=MOST_WORKERS, help="Worker processes; one a GPU by default.")
    ] = None,
    gpus_per_worker: Annotated[
        int, typer.Option(min=1, help="GPUs that a worker sees; several for --set device_map=auto.")
    ] = 1,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Workers on this machine, or on the nodes of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="The Ray cluster's address, host:port; by default this machine's.")
    ] = None,
    slots: Annotated[
        str,
        typer.Option(help="Trials that a worker trains at once: auto, or 1 to 16. With --strategy staged, auto is 1."),
    ] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampler.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Fix a field of the configuration.")
    ] = None,
    strategy: Annotated[
        Literal["joint", "staged"], typer.Option(help="All parameters at once, or in the hand-run log's order.")
    ] = "joint",
    pruner: Annotated[str, typer.Option()] = "rising",
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: Annotated[Path, typer.Option(help="Folder for checkpoints, logs and databases.")] = Path("runs"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Start anew under a new name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would run, stop.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List the studies.")] = False,
) -> None:
    """Search hyperparameters of LoRA fine-tunings of InstructBLIP. Run again to continue a study."""
    from search import study_file as studies
    from search.workers.executor import Executor

    if list_:
        _list()
        return
    if study is None:
        raise StudyError("name a study with --study; known studies: " + ", ".join(studies.available()))
    timeout_s = None if timeout is None else read_duration(timeout)
    hang_timeout_s = read_duration(hang_timeout, "--hang-timeout")
    lost_after_s = read_duration(lost_after, "--lost-after")
    for option, text, seconds in (
        ("--hang-timeout", hang_timeout, hang_timeout_s),
        ("--lost-after", lost_after, lost_after_s),
    ):
        if seconds < 10:
            raise StudyError(
                f"{option} must be at least 10s, but got {shown(text)}: a busy machine is silent for seconds"
            )
    definition = studies.load(study).with_settings(settings or [], seed)
    n_trials = trials or definition.n_trials
    slots_wanted = read_slots(slots)
    if strategy == "staged" and slots_wanted is None:
        slots_wanted = 1  # a stage begins from what the one before has found, so its trials must have ended
    where = Executor(kind=executor, workers=workers, gpus_per_worker=gpus_per_worker, ray_address=ray_address)
    where.check(definition)
    if dry_run:
        _dry_run(definition, n_trials, strategy, pruner)
        return
    if executor == "ray":
        runs_dir = runs_dir.resolve()  # the workers are in other folders
    code = _search(
        definition,
        n_trials=n_trials,
        timeout_s=timeout_s,
        hang_timeout_s=hang_timeout_s,
        lost_after_s=lost_after_s,
        executor=where,
        slots=slots_wanted,
        strategy=strategy,
        pruner=pruner,
        storage_url=storage or sqlite_url(runs_dir / "optuna.db"),
        tracking_uri=tracking_uri or sqlite_url(runs_dir / "mlflow.db"),
        runs_dir=runs_dir,
        fresh=fresh,
        settings=settings or [],
    )
    raise typer.Exit(code)


def read_duration(text: str, option: str = "--timeout") -> float:
    """Seconds of `2h`, `90m`, `45s`, `1h30m`.

    Raises:
        StudyError: it is no duration.
    """
    match = re.fullmatch(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?", text.strip().lower())
    seconds = sum(float(n) * unit for n, unit in zip(match.groups("0"), (3600, 60, 1), strict=True)) if match else 0
    if not 0 < seconds < math.inf:
        raise StudyError(f"{option} must be a time such as 2h, 90m, 1h30m or 45s, but got {shown(text)}")
    return seconds


def read_slots(text: str) -> int | None:
    """The number of slots, None for `auto`.

    Raises:
        StudyError: it is neither.
    """
    if text == "auto":
        return None
    if not re.fullmatch("[1-9]|1[0-6]", text):
        raise StudyError(f"--slots must be auto or a number from 1 to 16, but got {shown(text)}")
    return int(text)


def _make_folder(path: Path) -> None:
    """Make a folder for the study's files.

    Raises:
        StudyError: it cannot be made, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StudyError(
            f"the folder {shown(str(path))} cannot be made: {error.strerror}; name another with --runs-dir"
        ) from None


def _list() -> None:
    from search import study_file as studies

    names = studies.available()
    width = max(map(len, names))
    for name in names:
        print(f"{name:<{width}}  {studies.load(name).description}")


def _dry_run(study: Study, n_trials: int, strategy: str, pruner: str) -> None:
    """Check model and data, and show what would run; writes nothing into the runs folder."""
    import optuna

    from search import leaderboard, preflight, pruning
    from search.sampling import samplers, staged
    from trainer.model import memory

    pruning.check_name(pruner)
    examined = preflight.check(study)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    print(f"study {study.name}: {study.description}")
    print(f"{n_trials} trials, strategy {strategy}, sampler {study.sampler}, pruner {pruner}, seed {study.seed}")
    skipped = f", {len(examined.bad)} bad ones skipped" if examined.bad else ""
    print(f"data {examined.folder}: {len(examined.rows)} rows{skipped}, fingerprint {examined.fingerprint}")
    need = memory.needed(study.base_config().model, study.base_config().torch_dtype)
    if need is not None:
        print(f"base {study.base_config().model}: {need} in {study.base_config().torch_dtype}")
    print("search space:")
    for name, param in study.space.items():
        print(f"  {name}: {param}")
    for fixed in study.enqueue:
        print(f"given by hand: {fixed.label}: {dict(fixed.config)}")
    dry = optuna.create_study(sampler=samplers.make_sampler(study, strategy, n_trials))
    trial = dry.ask()
    samplers.suggest(trial, study)
    config = study.config(trial.params, staged.stage_overrides(trial))
    print("the first sampled trial would be")
    print(leaderboard.training_config(config.model_dump(mode="json")))
    print("nothing was run (--dry-run)")


def _search(definition: Study, *, executor: Executor, storage_url: str, tracking_uri: str, **options: Any) -> int:
    """Check, start the workers, and run the search; returns the exit code."""
    from search import preflight

    crew = executor.crew({"--storage": storage_url, "--tracking-uri": tracking_uri})
    with crew.importing():
        from search import pruning  # Optuna takes 0.3 s to import, which the workers' imports need not wait for

        pruning.check_name(options["pruner"])
        examined = preflight.check(definition)
        with crew:
            return _run(definition, crew, examined, storage_url=storage_url, tracking_uri=tracking_uri, **options)


def _run(
    definition: Study,
    crew: WorkerPool,
    examined: Examined,
    *,
    n_trials: int,
    timeout_s: float | None,
    hang_timeout_s: float,
    lost_after_s: float,
    slots: int | None,
    strategy: str,
    pruner: str,
    storage_url: str,
    tracking_uri: str,
    runs_dir: Path,
    fresh: bool,
    settings: Sequence[str],
) -> int:
    """Open everything, run the workers, sum up; returns the exit code."""
    global _log_file
    with without_collection():
        import optuna

        from search import pruning, records
        from search.report.keeper import LogKeeper
        from search.sampling import samplers
        from search.storage import lifecycle
        from search.storage import studies as store
        from search.storage.database import open_storage
        from search.terminal import summary
        from search.terminal.live import LiveDisplay, Plain
        from search.tracking.address import masked
        from search.tracking.courier import DeliveryThread
        from search.tracking.delivery import Delivery
        from search.tracking.runs import StudyRuns
        from search.workers.job import Job
        from search.workers.supervisor import Supervisor
        from search.workers.worker import set_up_logging

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _make_folder(runs_dir)
    storage = open_storage(storage_url, heartbeat_s=1, grace_s=round(lost_after_s))
    sampler = samplers.make_sampler(definition, strategy, n_trials)
    study = store.open_study(
        storage,
        definition,
        fresh=fresh,
        sampler=sampler,
        pruner=pruning.pruner_for(pruner, definition),
    )
    store.check_strategy(study, strategy)
    study.set_user_attr("settings", list(settings))  # for the commands that the tuning log proposes
    name = study.study_name
    _make_folder(runs_dir / name)
    set_up_logging(runs_dir / name)
    _log_file = runs_dir / name / "search.log"
    book = StudyRuns(tracking_uri, runs_dir / "artifacts", name, runs_dir / name)
    delivery = Delivery(book.spool, name, book.connect)
    caught_up = False
    with suppress(Unavailable):
        caught_up = delivery.once().records > 0  # what an earlier search left
    away = book.start_study({"data_fingerprint": examined.fingerprint})
    job = Job(
        study=definition,
        study_name=name,
        storage_url=storage_url,
        tracking_uri=tracking_uri,
        runs_dir=runs_dir,
        n_trials=n_trials,
        strategy=strategy,
        pruner=pruner,
        examined=examined,
        threads=crew.threads,
        workers=crew.size,
        slots=slots,
        lost_after_s=lost_after_s,
    )

    def look() -> lifecycle.Unfinished:
        gone = lifecycle.requeue_lost(study, is_alive=crew.alive)
        for lost in gone:
            goes_on = "tried too often" if lost.successor is None else f"trial {lost.successor} takes up its work"
            display.say(f"trial {lost.number} was lost: {lost.detail}; {goes_on}")
            if lost.run_id is not None:
                book.end(lost.run_id, "KILLED", {"state": "FAIL", "reason": records.LOST})
        if gone:  # a worker may have died before it wrote down which run it had begun
            book.close_dangling(_is_dead)
        return lifecycle.unfinished(study)

    console = _console()
    display: Display = (
        LiveDisplay(console, lambda: lifecycle.read_trials(study)) if console.is_terminal else Plain(console)
    )
    keeper = LogKeeper(study, book, job.folder, _options(storage_url, tracking_uri, runs_dir))
    courier = DeliveryThread(delivery, masked(tracking_uri), display.say)
    storage.say = display.say
    book.close_dangling(_is_dead)
    left = look()
    waiting = left.waiting
    done = lifecycle.counted(study)
    with display:
        display.say(summary.headline(job, study, done, waiting))
        courier.start(away)
        code = 0
        if waiting or left.running or done < n_trials:
            keeper.start()
            supervisor = Supervisor(
                job,
                crew,
                timeout_s=timeout_s,
                display=display,
                look=look,
                trial_ended=keeper.due,
                hang_timeout_s=hang_timeout_s,
            )
            code = supervisor.run()
        elif caught_up:
            keeper.start()  # the log was written without
    if code == DatabaseAway.exit_code:
        book.end_study("KILLED", {})
        courier.close()
        console.print("\nthe database is away; the same command continues the study once it answers", soft_wrap=True)
        return code
    courier.close()  # first, so that the log has what MLflow has
    logs = keeper.close() if keeper.is_alive() else []
    trials = lifecycle.read_trials(study)
    book.end_study(ENDS.get(code, "FAILED"), summary.study_tags(trials))
    undelivered = courier.close(0)
    book.close_dangling(_is_dead)
    summary.sum_up(console, trials, job, code, logs)
    if undelivered is not None:
        console.print(summary.undelivered(undelivered, job), markup=False, highlight=False, soft_wrap=True)
    return code


def _options(storage_url: str, tracking_uri: str, runs_dir: Path) -> tuple[str, ...]:
    """The options that the commands in the log need to find this study again, none for the usual places.

    URLs with a password are left to the environment of whoever reads the log.
    """
    options: list[str] = []
    if runs_dir != Path("runs"):
        options += ["--runs-dir", str(runs_dir)]
    if storage_url != sqlite_url(runs_dir / "optuna.db") and "@" not in storage_url:
        options += ["--storage", storage_url]
    if tracking_uri != sqlite_url(runs_dir / "mlflow.db") and "@" not in tracking_uri:
        options += ["--tracking-uri", tracking_uri]
    return tuple(options)


def _is_dead(tags: Any) -> bool:
    """Whether the process of an MLflow run on this host is gone."""
    import socket

    import psutil

    if tags.get("kind") != "trial" or tags.get("host") != socket.gethostname():
        return False
    return not psutil.pid_exists(int(tags.get("pid", "0") or 0))


def _console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=False)


if __name__ == "__main__":
    cli.run(app, lambda: _log_file)
