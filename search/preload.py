"""The imports of a worker, made by importing this: `multiprocessing`'s fork server does it by name."""

from search.worker import import_early

import_early()
