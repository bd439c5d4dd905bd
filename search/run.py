"""`python -m search.run --study NAME`: the options of a search; `search.session` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperCommand

from search.captions import MOST as MOST_CAPTIONS
from search.errors import DatabaseAway, StudyError
from search.options import (
    CAPTIONS,
    SHORTEST_S,
    TEST_IMAGES,
    RunsOption,
    SearchOptions,
    StorageOption,
    TrackingOption,
    read_duration,
    read_slots,
)
from search.places import RUNS, Places
from trainer.common import cli, progress
from trainer.config import MOST

if TYPE_CHECKING:
    from search.session import Session

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

MOST_WORKERS = 64
"""Each worker takes a GPU or a core and a base model's memory: a number mistyped must not bring the machine down."""

_session: Session | None = None


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
    epochs: Annotated[
        int | None,
        typer.Option(min=1, max=MOST, help="Epochs of all trials together, instead of or beside --trials."),
    ] = None,
    timeout: Annotated[str | None, typer.Option(help="End after this time, e.g. 2h, 90m, 1h30m; resumable.")] = None,
    hang_timeout: Annotated[
        str, typer.Option(help="Kill and replace a worker that has been silent for this long.")
    ] = "30m",
    lost_after: Annotated[
        str,
        typer.Option(help="After this long without a heartbeat, other hosts take over a host's trials; at least 10s."),
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
    slots: Annotated[str, typer.Option(help="Trials that a worker trains at once: auto, or 1 to 16.")] = "auto",
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of the sampler.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Fix a field of the configuration.")
    ] = None,
    strategy: Annotated[
        Literal["rungs", "freeze-thaw", "joint"] | None,
        typer.Option(
            help="A ladder of effective rates and variants of the best, of which a third goes on at epochs 1, 3, 9, "
            "at the end the leaders (default); what is most worth an epoch, by the curves of all trials; or all "
            "parameters at once by Optuna's sampler."
        ),
    ] = None,
    pruner: Annotated[str | None, typer.Option()] = None,
    warm_start: Annotated[
        list[str] | None,
        typer.Option(metavar="STUDY|FILE.json", help="Earlier runs that say where a new study looks first."),
    ] = None,
    captions: Annotated[
        int, typer.Option(min=0, max=MOST_CAPTIONS, help="Validation images that each trial captions; 0 for none.")
    ] = CAPTIONS,
    test_images: Annotated[
        int,
        typer.Option(min=0, help="Images outside of the search for the test loss of the candidates; 0: none."),
    ] = TEST_IMAGES,
    storage: StorageOption = None,
    tracking_uri: TrackingOption = None,
    runs_dir: RunsOption = RUNS,
    confirm: Annotated[
        bool, typer.Option(help="At the end, train the leaders again with other seeds and splits, for a verdict.")
    ] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start a new study, under a new name.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show what would run, stop.")] = False,
    measure: Annotated[
        bool, typer.Option(help="With --dry-run: train a few batches, to say what the study would take.")
    ] = True,
    list_: Annotated[
        bool, typer.Option("--list", help="List the studies: those defined, and what the database has of them.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --list or --dry-run: print JSON.")] = False,
) -> None:
    """Search hyperparameters of LoRA fine-tunings of InstructBLIP. Run again to continue a study."""
    global _session
    from search import study_file

    if as_json and not (list_ or dry_run):
        raise StudyError("--json goes with --list or --dry-run; of a study that was run, search.result has the facts")
    if list_:
        from search.terminal import listing

        defined = [study_file.load(name) for name in study_file.available()]
        listing.show(defined, Places.of(runs_dir, storage, tracking_uri), as_json=as_json)
        return
    if study is None:
        raise StudyError("name a study with --study; known studies: " + ", ".join(study_file.available()))
    timeout_s = None if timeout is None else read_duration(timeout)
    hang_timeout_s = read_duration(hang_timeout, "--hang-timeout", SHORTEST_S)
    lost_after_s = read_duration(lost_after, "--lost-after", SHORTEST_S)

    from search.session import Session

    _session = Session(
        study,
        SearchOptions(
            trials=trials,
            epochs=epochs,
            timeout_s=timeout_s,
            hang_timeout_s=hang_timeout_s,
            lost_after_s=lost_after_s,
            workers=workers,
            gpus_per_worker=gpus_per_worker,
            executor=executor,
            ray_address=ray_address,
            slots=read_slots(slots),
            strategy=strategy,
            pruner=pruner,
            warm_start=tuple(warm_start or ()),
            # Workers on a cluster are in other folders.
            places=Places.of(runs_dir.resolve() if executor == "ray" else runs_dir, storage, tracking_uri),
            confirm=confirm,
            fresh=fresh,
            settings=tuple(settings or ()),
            seed=seed,
            captions=captions,
            test_images=test_images,
        ),
    )
    if dry_run:
        from search.terminal import price
        from search.terminal.dry_run import show

        with progress.bar("looking at images") as looked:
            checked = _session.check(looked)
        measured = price.measure(_session.definition, _session.budget, checked) if measure else None
        show(
            _session.definition,
            _session.options,
            _session.budget,
            checked,
            _session.prior,
            price=measured,
            as_json=as_json,
        )
        return
    raise typer.Exit(run_shown(_session))


def run_shown(session: Session) -> int:
    """Run it with what the terminal can show; returns the exit code."""
    from search.terminal import summary
    from search.terminal.live import LiveDisplay, Plain

    console = _console()
    result = session.run(lambda read: LiveDisplay(console, read) if console.is_terminal else Plain(console))
    if result.code == DatabaseAway.exit_code:
        console.print("\nthe database is away; the same command continues the study once it answers", soft_wrap=True)
    elif result.trials or not result.code:
        summary.sum_up(console, result, session.options.places)
    return result.code


def _console() -> Any:
    from rich.console import Console

    return Console(soft_wrap=False)


def log_file() -> Path | None:
    """Where a traceback goes; None until the study is open."""
    return _session.log_file if _session is not None else None


if __name__ == "__main__":
    cli.run(app, log_file)
