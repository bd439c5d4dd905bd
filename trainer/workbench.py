"""The workbench: base model and data, loaded once by a process and used for all its runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trainer import runtime
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.batches import CaptionDataset, Pixels, Tokenizer
from trainer.data.dataset import Examined
from trainer.data.features import Features, compute_or_open, default_folder
from trainer.data.splits import SplitFacts
from trainer.model import memory, peft_format
from trainer.model.base import Base, load_base


@dataclass(frozen=True)
class Inputs:
    """Everything that a run of one configuration takes from the workbench."""

    base: Base
    tokenizer: Tokenizer
    train: CaptionDataset
    """Its images are rows of `features`, or pixels where there are none."""
    val: CaptionDataset
    features: Features | None
    skipped_rows: tuple[str, ...]
    """Rows left out because of `skip_bad_rows`, each with its reason."""
    fingerprints: dict[str, str]
    """Of `data` and `model`."""
    split: SplitFacts
    """How training and validation rows were told apart."""


class Workbench:
    """Base model and data, loaded on first use and kept.

    One base and one data folder are held at a time: a run in another dtype or on other data replaces them.
    """

    def __init__(self, examined: Examined | None = None, data: str | None = None) -> None:
        """Start empty, or with a data folder that was examined already (`data` is the configuration's name for it)."""
        self.progress: Callable[[int, int], None] | None = None
        """Called with (done, total) while vision outputs are computed."""
        self._examined = (data, examined) if data is not None and examined is not None else None
        self._base: tuple[tuple[str, ...], Base] | None = None
        self._began = False
        """Whether a base was loaded, or failed to: nothing is to be released before, which takes 0.4 s on the CPU."""
        self._datasets: dict[tuple[object, ...], tuple[CaptionDataset, CaptionDataset]] = {}
        self._splits: dict[tuple[object, ...], SplitFacts] = {}
        self._tokenizers: dict[int, Tokenizer] = {}
        self._pixels: Pixels | None = None
        self._features: dict[tuple[object, ...], Features] = {}

    def inputs(self, config: TrainConfig) -> Inputs:
        """All that a run of this configuration needs, vision outputs included.

        Raises:
            UserError: model or data cannot be used.
        """
        base = self.base(config)
        train, val = self.datasets(config)
        features = self.features(config)
        if features is not None:
            row_of = features.index
            train, val = (part.seen_through(lambda path: torch.tensor(row_of(path))) for part in (train, val))
        examined = self.examined(config)
        return Inputs(
            base=base,
            tokenizer=self.tokenizer(config),
            train=train,
            val=val,
            features=features,
            skipped_rows=examined.bad,
            fingerprints={"data": examined.fingerprint, "model": base.fingerprint},
            split=self._splits[_rows_key(config)],
        )

    def base(self, config: TrainConfig) -> Base:
        """The frozen base of this configuration.

        Raises:
            ModelError: it cannot be loaded, or does not fit on its device.
        """
        device = runtime.resolve_device(config.device)
        key = (config.model, config.dtype_of_base, str(device), config.device_map)
        if self._base is None or self._base[0] != key:
            if self._base is not None and self._base[0][0] != config.model:
                self._tokenizers.clear()
                self._datasets.clear()
                self._pixels = None
            self._base = None
            self._features.clear()
            if self._began:  # first: two bases, or one and what is left of one that failed, would not fit on a GPU
                runtime.release_memory(device)
            self._began = True
            memory.check(config, device)
            dtype = runtime.DTYPES[config.dtype_of_base]
            spread = config.device_map == "auto"
            self._base = (key, load_base(config.model, dtype=dtype, device=device, spread=spread))
        return self._base[1]

    def examined(self, config: TrainConfig) -> Examined:
        """The data folder of this configuration, checked once."""
        if self._examined is None or self._examined[0] != config.data:
            self._datasets.clear()
            self._features.clear()
            self._pixels = None
            self._examined = (config.data, dataset.examine(config.data))
        return self._examined[1]

    def tokenizer(self, config: TrainConfig) -> Tokenizer:
        """The tokenizer pair of the base."""
        base = self.base(config)
        if config.max_target_length not in self._tokenizers:
            tokenizer = Tokenizer(base.processor, base.model.config, config.max_target_length)
            self._tokenizers[config.max_target_length] = tokenizer
        return self._tokenizers[config.max_target_length]

    def datasets(self, config: TrainConfig) -> tuple[CaptionDataset, CaptionDataset]:
        """(training, validation) rows of this configuration, tokenized."""
        examined = dataset.usable(self.examined(config), config)
        tokenizer = self.tokenizer(config)
        key = (*_rows_key(config), config.max_target_length)
        if key not in self._datasets:
            parts = dataset.split(examined, config)
            self._splits[_rows_key(config)] = parts.facts
            self._pixels = self._pixels or Pixels(self.base(config).processor.image_processor)
            self._datasets[key] = (
                CaptionDataset(parts.train, tokenizer, self._pixels),
                CaptionDataset(parts.val, tokenizer, self._pixels),
            )
        return self._datasets[key]

    def uses_features(self, config: TrainConfig) -> bool:
        """Whether vision outputs are kept: not if the configuration says so, or an adapter changes them."""
        if not config.cache_features:
            return False
        modules = peft_format.resolve_targets(self.base(config).model, config.target_modules)
        return not any(name.startswith("vision_model.") for name in modules)

    def features(self, config: TrainConfig) -> Features | None:
        """The vision outputs of this configuration's images, computed at the first call unless they are on disk.

        None where they are not kept, see `uses_features`.

        Raises:
            DataError: an image went bad, or the disk has no room.
        """
        if not self.uses_features(config):
            return None
        key = _rows_key(config)
        if key not in self._features:
            parts = self.datasets(config)
            assert self._pixels is not None
            images = list(dict.fromkeys(row.image for part in parts for row in part.rows))
            self._features[key] = compute_or_open(
                default_folder(), self.base(config), images, self._pixels, progress=self.progress
            )
        return self._features[key]


def _rows_key(config: TrainConfig) -> tuple[object, ...]:
    """The fields that decide which rows are used."""
    return (
        config.data,
        config.max_samples,
        config.val_fraction,
        config.split_seed,
        config.split,
        config.full_data,
    )
