"""Which workers the nodes of a Ray cluster have room for. Pure: Ray is not imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from search.errors import StorageError, StudyError


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs that a node has for workers."""

    cpus: int
    gpus: int


@dataclass(frozen=True)
class Layout:
    """How many workers there are, and what each asks of its node."""

    workers: int
    threads: int
    """CPUs, in Ray's terms."""
    gpus: int


def lay_out(nodes: Sequence[Node], workers: int | None, gpus_per_worker: int) -> Layout:
    """The workers of a cluster: one for each `gpus_per_worker` GPUs, without GPUs one for each node.

    Raises:
        StudyError: no node has what a worker needs.
    """
    gpus = gpus_per_worker if gpus_per_worker > 1 or any(node.gpus for node in nodes) else 0
    able = [node for node in nodes if node.cpus >= 1 and node.gpus >= gpus]
    if not able:
        most = max((node.gpus for node in nodes), default=0)
        raise StudyError(
            f"no node of the Ray cluster has room for a worker: it needs {amount(gpus, 'GPU')} and 1 CPU, and the "
            f"largest of {amount(len(nodes), 'node')} has {amount(most, 'GPU')}; lower --gpus-per-worker"
        )
    places = sum(node.gpus // gpus for node in able) if gpus else len(able)
    count = workers or places
    # No more threads than each such node has for every worker of its share: any node must do for any worker.
    shares = [node.gpus // gpus if gpus else -(-count // len(able)) for node in able]
    threads = min(node.cpus // max(share, 1) for node, share in zip(able, shares, strict=True))
    return Layout(count, max(1, threads), gpus)


def check_shared(databases: Mapping[str, str], nodes: int) -> None:
    """Refuse databases that workers on several nodes cannot share.

    Args:
        databases: URL by the option that sets it.
        nodes: Nodes of the cluster.

    Raises:
        StorageError: a SQLite file; all of them are named.
    """
    files = [f"{option} {url}" for option, url in databases.items() if url.startswith("sqlite")]
    if nodes > 1 and files:
        raise StorageError(
            f"the Ray cluster has {nodes} nodes, and workers on several nodes cannot share a SQLite file "
            f"({', '.join(files)}); name a server that all nodes reach: --storage postgresql+psycopg://... and "
            "--tracking-uri http://... or postgresql://..."
        )


def node_of(resources: Mapping[str, float]) -> Node:
    """A node, from what Ray lists as its resources."""
    return Node(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


def amount(number: int, what: str) -> str:
    """`1 GPU`, `2 GPUs`."""
    return f"{number} {what}" + ("" if number == 1 else "s")
