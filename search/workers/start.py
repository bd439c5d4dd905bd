"""The start of a worker process: its environment, its imports, its log, its job; and its exit code.

Importing this module loads neither torch nor Optuna nor MLflow: they read the environment that is set here.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from search.urls import LogFormatter
from search.workers.multiprocessing_private import run_exit_handlers
from search.workers.protocol import Job, Link, Order, WorkerFailed
from trainer.common.disk import no_room, out_of_room
from trainer.common.errors import UserError
from trainer.common.imports import without_collection
from trainer.common.output import keep_going
from trainer.preload import import_libraries

OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""Signals that reach a whole process group: of Ctrl-C, and of a terminal that closes. The supervisor decides."""

log = logging.getLogger("search.workers.start")


def main(connection: Connection, gpu: str | None, threads: int) -> None:
    """Run a worker, and end the process without a second of taking torch's and Transformers' modules apart.

    Exit handlers still run. SQLite's write-ahead logs are folded in by the last process that closes the databases,
    the supervisor.
    """
    code = 1
    try:
        work(connection, gpu, threads)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except Exception:  # noqa: BLE001 - whatever `work` itself did not report
        traceback.print_exc()
    finally:
        try:
            run_exit_handlers()  # semaphores given back, logs closed
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):  # its reader is gone
                    stream.flush()
        finally:
            os._exit(code)


def work(connection: Connection, gpu: str | None, threads: int) -> None:
    """Wait for a job and do it.

    The imports are made before the job is known, while the supervisor still looks at model and data.

    Args:
        connection: The worker's end of the pipe.
        gpu: CUDA_VISIBLE_DEVICES; None to leave it as it is.
        threads: BLAS threads.
    """
    # Environment and signals, before any library is loaded.
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    os.environ.update(environment(threads))
    keep_going()
    for number in OF_A_TERMINAL:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_A_TERMINAL)  # blocked for a process that starts
    link = Link(connection)
    signal.signal(signal.SIGTERM, lambda *_: link.raise_to(Order.END_NOW))
    import_early()
    # The job.
    try:
        job: Job = connection.recv()
    except EOFError:  # the search ended before it started
        return
    set_up_logging(job.folder)
    try:
        from search.workers.worker import Worker

        Worker(job, link).run()
    except UserError as error:
        link.send(WorkerFailed(text=str(error), user=True))
        raise SystemExit(error.exit_code) from None
    except Exception as error:
        log.exception("worker ended by a fault")
        if out_of_room(error):
            link.send(WorkerFailed(text=str(no_room(error, job.folder)), user=True))
            raise SystemExit(2) from None
        link.send(WorkerFailed(text=f"{type(error).__name__}: {error}", user=False))
        raise SystemExit(1) from None


def environment(threads: int) -> dict[str, str]:
    """The variables that libraries read when they are loaded."""
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # OpenMP threads that spin while they wait slow processes that share cores tenfold (measured); with none of it
        # they go to sleep between any two operations, and two threads take twice as long as one. 5,000 turns are some
        # 10 microseconds: a pass of 33 samples takes 124 ms with one thread, with two 269, and 87 with these.
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "5000" if threads > 1 else "0"),
        "TOKENIZERS_PARALLELISM": "false",
    }


def import_early() -> None:
    """Make a worker's imports: five seconds, most of them Transformers'."""
    with without_collection(), suppress(ImportError):
        import_libraries()
        import alembic.command  # as the next, what Optuna and MLflow import when they open a database

        from search.tracking.library import preload
        from search.workers import worker

        preload()
        del alembic, worker


def set_up_logging(folder: Path) -> Callable[[], None]:
    """Send all log lines of a study, with tracebacks, to one file; each line is written at once.

    Returns:
        A function that ends it, and gives the process the logging it had before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / "search.log", encoding="utf-8")
    handler.setFormatter(LogFormatter("%(asctime)s %(process)d %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    handlers, level, raises = root.handlers, root.level, logging.raiseExceptions

    def end() -> None:
        root.handlers, logging.raiseExceptions = handlers, raises
        root.setLevel(level)
        logging.captureWarnings(False)
        handler.close()

    root.handlers = [handler]
    root.setLevel(logging.INFO)
    logging.raiseExceptions = False  # a full disk is reported once, not with each line that it does not take
    logging.captureWarnings(True)
    for name in ("httpx", "alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return end
