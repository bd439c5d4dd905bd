"""Vision features, once per image: the frozen tower's output, shared by all trials, workers and later studies.

The tower has no adapter, so its output for an image never changes. One pass before training computes what the store
lacks (computing step by step would scatter the work over small batches and all workers); training then reads rows. The
Q-Former sees the instruction, so nothing after the vision tower can be kept.

A row depends on the image's bytes and on what `key_of` lists, and on nothing else: see `FORWARD_BATCH`.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers

from trainer.common.cache import cache_folder
from trainer.common.errors import DataError
from trainer.data.batches import Pixels, preprocessed
from trainer.data.feature_store import Store, Stored, bytes_of, gb
from trainer.data.images import IMAGE_ERRORS, content_of, decode, identity, problem_of
from trainer.data.read_ahead import Ahead, Reader, begun_ahead, gathered
from trainer.model.base import Base, encode_images
from trainer.model.batch import Batch
from trainer.model.library_private import attention_kernels

log = logging.getLogger("trainer.data.features")

FORWARD_BATCH = 16
"""Number of images in every forward pass of the tower: the last one is filled up with repetitions. A matrix product of
another height may be summed in another order, and an image's bits would depend on what it was computed with."""
RESIDENT_FRACTION = 0.3
"""Features stay in the GPU's memory if they take at most this share of what is free when they are opened."""
THREADS = 4
"""Threads that read, hash and decode, which releases the GIL."""
NOISE = ("_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map")
"""Entries of a configuration that say where it came from; the dtype has an entry of its own in the key."""

Progress = Callable[[int, int], None]


def default_folder() -> Path:
    """The folder for features: `features` in `cache_folder()`."""
    return cache_folder() / "features"


class Features:
    """The vision features of a set of images, ready to be gathered into batches."""

    def __init__(
        self, rows: Sequence[torch.Tensor], index: dict[Path, int], device: torch.device, *, computed: int
    ) -> None:
        """Keep the rows, (P, D) on the CPU, mapped from the store; `index` has the row number of each path."""
        self._rows = rows
        self._index = index
        self._device = device
        self.shape: tuple[int, int] = (rows[0].shape[0], rows[0].shape[1])
        """(patches + 1, vision hidden size)."""
        self.nbytes = sum(row.nbytes for row in rows)
        """Bytes on disk of what these images need."""
        self.computed = computed
        """Distinct images that were computed now."""
        self.reused = len(rows) - computed
        """Distinct images that were found in the store."""
        self._table = _upload(rows, device) if _fits(self.nbytes, device) else None
        self.reader = Reader(device) if device.type == "cuda" and self._table is None else None
        """Reads ahead; None where nothing is gained by it."""

    def index(self, image: Path) -> int:
        """The image's row number, for `take`; two paths to the same bytes share one.

        Raises:
            KeyError: an image that was not asked for when the features were opened.
        """
        return self._index[image]

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """(B,) row numbers, long, on CPU -> (B, patches + 1, vision hidden size) on the base's device."""
        if self._table is not None:
            return self._table.index_select(0, rows.to(self._device, non_blocking=True))
        return gathered(self._chosen(rows), self._device)

    def ahead(self, batches: Iterable[Batch], number: int) -> Iterator[Batch]:
        """The batches; where rows are copied to a GPU, each is begun `number` batches before (`Batch.ahead`)."""
        if self.reader is None:
            return iter(batches)
        return begun_ahead(batches, number, self._begin)

    def _begin(self, rows: torch.Tensor) -> Ahead:
        assert self.reader is not None
        return self.reader.begin(self._chosen(rows))

    def _chosen(self, rows: torch.Tensor) -> list[torch.Tensor]:
        return [self._rows[row] for row in rows.tolist()]


def compute_or_open(
    folder: Path, base: Base, images: Sequence[Path], pixels: Pixels, *, progress: Progress | None = None
) -> Features:
    """The vision features of these images: read from the store in `folder`, those it lacks computed and added first.

    Several processes may call this at once: one computes, the others wait and read. To be called after
    `runtime.prepare`, whose settings affect the bits, and without an adapter in the vision tower.

    Every row that is needed is checked here by crc32, once in a process: 3 s for 10 GB on one core, and the file is in
    the page cache afterwards, from where training reads it. A check at first use would find damage in the middle of a
    run, which could neither lock the store nor wait.

    Args:
        folder: shared by all models and studies; see `default_folder`.
        base: its vision tower is used in evaluation mode.
        images: at least one; may repeat.
        pixels: has the preprocessing. Images are read from their files, not from those it keeps: the bytes that are
            hashed are those that are decoded.
        progress: called with (images done, all) if any must be computed, and every second while another process does.

    Raises:
        DataError: an image cannot be read, the disk lacks room, or the folder cannot be written. Finished
            segments stay in the store.
    """
    # What the features depend on, and which images there are.
    assert images
    assert not any(p.requires_grad for p in base.model.vision_model.parameters()), "the vision tower is being trained"
    key = key_of(base, pixels.image_processor)
    store = Store(folder / _short_hash(key), _shape_of(base), base.dtype)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = dict(zip(images, pool.map(_digest_of, images), strict=True))
        paths = {digest: path for path, digest in digests.items()}
        # What the store has; the rest is computed.
        found = store.find(paths)
        computed = 0
        if len(found) < len(paths) or _unsound(found, pool):
            found, computed = _complete(store, key, base, paths, pixels.image_processor, pool, progress)
    numbers = {digest: number for number, digest in enumerate(paths)}
    features = Features(
        [found[digest].data for digest in paths],
        {path: numbers[digest] for path, digest in digests.items()},
        base.device,
        computed=computed,
    )
    log.info(
        "vision features of %d images, %s: %d computed, %d found in %s",
        *(len(paths), gb(features.nbytes), features.computed, features.reused, store.folder),
    )
    return features


def key_of(base: Base, image_processor: Any) -> dict[str, Any]:
    """Everything that an image's features depend on besides its bytes, as JSON values.

    The weights are hashed whole: a sample would miss a tower in which single rows were changed. sha256 takes 0.6 to
    0.8 s a GB on two cores, some 3 s for ViT-g's 4 GB in float32: little beside loading them, and once in a process.
    """
    vision = base.model.vision_model
    on_gpu = base.device.type == "cuda"
    return {
        "weights": _weights_hash(vision),
        "vision_config": _without_noise(vision.config.to_dict()),
        "attention": attention_kernels(vision.config),
        "preprocessing": _without_noise(image_processor.to_dict()),
        "dtype": str(base.dtype),
        "device": base.device.type,
        # Generations of processors sum in different orders, and so do precision settings.
        "processor": torch.cuda.get_device_name(base.device) if on_gpu else torch.backends.cpu.get_cpu_capability(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "convolution_tf32": on_gpu and torch.backends.cudnn.allow_tf32,
        "batch": FORWARD_BATCH,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "pillow": PIL.__version__},
    }


def _complete(
    store: Store,
    key: dict[str, Any],
    base: Base,
    paths: dict[str, Path],
    image_processor: Any,
    pool: ThreadPoolExecutor,
    progress: Progress | None,
) -> tuple[dict[str, Stored], int]:
    """(all rows of `paths`, how many were computed), with the store locked."""
    report = progress or (lambda done, total: None)
    with store.locked(waiting=lambda: report(len(store.find(paths)), len(paths))):
        store.repair()
        found = store.find(paths)
        damaged = _unsound(found, pool)
        if damaged:
            log.warning("%s: %d damaged rows; their vision features are computed again", store.folder, len(damaged))
        missing = [digest for digest in paths if digest not in found or digest in damaged]
        if not missing:  # another process has computed them
            return found, 0
        store.reserve(len(missing))
        store.describe(key)
        done = len(paths) - len(missing)
        report(done, len(paths))
        with store.writer() as writer:
            for batch, pixel_values in _decoded(missing, paths, image_processor, pool):
                rows = _encode(base, pixel_values, store.shape)
                _refuse_not_finite(rows, [paths[digest] for digest in batch])
                writer.add(batch, rows)
                done += len(batch)
                report(done, len(paths))
        return {**found, **store.find(missing)}, len(missing)


def _encode(base: Base, pixel_values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Features of at most FORWARD_BATCH images, (N, *shape) on CPU."""
    number = len(pixel_values)
    full = pixel_values[torch.arange(FORWARD_BATCH) % number].to(base.device)
    vision = base.model.vision_model
    training = vision.training
    vision.eval()
    try:
        with torch.no_grad():
            output = encode_images(base.model, full)
    finally:
        vision.train(training)
    assert output.shape[1:] == shape and output.dtype == base.dtype
    return output[:number].cpu().contiguous()


def _refuse_not_finite(rows: torch.Tensor, paths: Sequence[Path]) -> None:
    """In float32 no image makes a sound tower overflow; in half precision one may, which the run reports itself."""
    if rows.dtype != torch.float32:
        return
    finite = torch.isfinite(rows).flatten(1).all(dim=1).tolist()
    bad = [str(path) for path, whole in zip(paths, finite, strict=True) if not whole]
    if bad:
        raise DataError(
            f"{', '.join(bad)}: the vision tower's output is not finite in float32; take the image out, or check the "
            "model's weights"
        )


def _decoded(
    digests: Sequence[str], paths: dict[str, Path], image_processor: Any, pool: ThreadPoolExecutor
) -> Iterator[tuple[Sequence[str], torch.Tensor]]:
    """Batches of (digests, pixels (N, 3, height, width)), each decoded while the one before is in use."""

    def load(digest: str) -> torch.Tensor:
        return _pixels_of(paths[digest], digest, image_processor)

    chunks = [digests[start : start + FORWARD_BATCH] for start in range(0, len(digests), FORWARD_BATCH)]
    upcoming = pool.map(load, chunks[0])
    for chunk, after in zip(chunks, [*chunks[1:], ()], strict=True):
        current, upcoming = upcoming, pool.map(load, after)
        yield chunk, torch.stack(list(current))


def _pixels_of(path: Path, digest: str, image_processor: Any) -> torch.Tensor:
    """(3, height, width) of the very bytes with this digest."""
    try:
        content = content_of(path)
        image = decode(content).image
    except IMAGE_ERRORS as error:
        raise DataError(f"{path}: {problem_of(error)}") from error
    if identity(content) != digest:
        raise DataError(f"{path}: the image was changed while its features were being computed")
    return preprocessed(image_processor, image, path)


def _digest_of(path: Path) -> str:
    try:
        return identity(content_of(path))
    except IMAGE_ERRORS as error:
        raise DataError(f"{path}: {problem_of(error)}") from error


def _unsound(found: dict[str, Stored], pool: ThreadPoolExecutor) -> set[str]:
    """The digests whose rows are damaged."""
    sound = pool.map(Stored.sound, found.values())
    return {digest for digest, whole in zip(found, sound, strict=True) if not whole}


def _shape_of(base: Base) -> tuple[int, int]:
    """(patches + 1, vision hidden size)."""
    config = base.model.vision_model.config
    return (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size


def _weights_hash(vision: torch.nn.Module) -> str:
    """sha256 over name, dtype, shape and bytes of every tensor, whatever device they are on."""

    def digest(item: tuple[str, torch.Tensor]) -> bytes:
        name, tensor = item
        whole = hashlib.sha256(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        whole.update(bytes_of(tensor.detach().cpu().contiguous()))
        return whole.digest()

    with ThreadPoolExecutor(THREADS) as pool:
        return hashlib.sha256(b"".join(pool.map(digest, sorted(vision.state_dict().items())))).hexdigest()


def _without_noise(config: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(config, default=str))
    return {name: value for name, value in values.items() if name not in NOISE}


def _short_hash(key: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _fits(nbytes: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return nbytes <= RESIDENT_FRACTION * free


def _upload(rows: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """All rows in one tensor on the device, (number of rows, P, D)."""
    table = torch.empty((len(rows), *rows[0].shape), dtype=rows[0].dtype, device=device)
    for start in range(0, len(rows), FORWARD_BATCH):
        table[start : start + FORWARD_BATCH].copy_(torch.stack(list(rows[start : start + FORWARD_BATCH])))
    return table
