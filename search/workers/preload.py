"""The imports of a worker, made by importing this module: `multiprocessing`'s fork server does so by name."""

import signal

# Ctrl-C in a terminal, SIGHUP when it closes, and SIGTERM as schedulers send it, reach the whole process group. This
# process ends with the supervisor, which would lose sight of its workers if it went first; they set handlers of their
# own.
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)

from search.workers.start import import_early  # noqa: E402

import_early()
