"""Pretraining of the embedded model's vision tower: it learns to recognise a tile's facts.

It stands for InstructBLIP's pretrained tower, which is frozen in fine-tuning as this one is. Without it a model this
small stays blind for most of its caption training.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import InstructBlipVisionModel

from trainer.mini.drawing import TILE_PIXELS
from trainer.mini.recipe.architecture import PATCH_PIXELS
from trainer.mini.recipe.sizes import Recipe, batches, optimizer_for
from trainer.mini.scenes import ARCHIVES, Tile
from trainer.mini.vocabulary import COLOURS, EDGES, EXTRAS, GROUNDS, KINDS, MAX_COUNT, REGIONS, Facts

TARGETS = {
    "kind": len(KINDS),
    "ground": len(GROUNDS),
    "colour": len(COLOURS),
    "count": MAX_COUNT + 1,
    "region": len(REGIONS),
    "extra": 1 + len(EXTRAS),
    "edge": 1 + len(EDGES),
    "panchromatic": 2,
    "archive": len(ARCHIVES),
}
"""The facts that the vision tower learns to recognise, each with its number of classes."""


PATCHES = TILE_PIXELS // PATCH_PIXELS
"""Patches along a side."""


def spot_map(tile: Tile) -> Tensor:
    """The patches that hold the centre of an object, (patches * patches): they make positions and counts learnable."""
    grid = torch.zeros(PATCHES, PATCHES)
    for x, y in tile.spots:
        grid[int(y * PATCHES), int(x * PATCHES)] = 1.0
    return grid.flatten()


def targets(facts: Facts, archive: int) -> list[int]:
    """Class indices in the order of TARGETS."""
    extra = facts.extra
    return [
        list(KINDS).index(facts.kind),
        list(GROUNDS).index(facts.ground),
        list(COLOURS).index(facts.colour),
        facts.count,
        REGIONS.index(facts.region),
        0 if extra is None else 1 + EXTRAS.index(extra.name),
        0 if extra is None else 1 + EDGES.index(extra.edge),
        int(facts.panchromatic),
        archive,
    ]


class Readout(nn.Module):
    """One attention pooling and one linear classifier for each target, and a detector of objects at each patch."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(len(TARGETS), width) * 0.1)
        self.detector = nn.Linear(width, 1)
        self.heads = nn.ModuleList([nn.Linear(width, classes) for classes in TARGETS.values()])

    def forward(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """features: (batch, patches + 1, width) -> logits for each target, (batch, classes), and each patch."""
        weights = functional.softmax(self.queries @ features.transpose(1, 2), dim=-1)
        pooled = weights @ features
        return [head(pooled[:, i]) for i, head in enumerate(self.heads)], self.detector(features[:, 1:]).squeeze(-1)


def train_vision(
    vision: InstructBlipVisionModel, pixels: Tensor, labels: Tensor, spots: Tensor, recipe: Recipe
) -> None:
    """Train the tower with a readout that is thrown away, and print the accuracy every 100 steps.

    Args:
        vision: InstructBLIP's vision model.
        pixels: (tiles, 3, height, width).
        labels: (tiles, targets), class indices.
        spots: (tiles, patches), 1 where an object stands.
        recipe: steps and rate.
    """
    readout = Readout(vision.config.hidden_size)
    parameters = [*vision.parameters(), *readout.parameters()]
    optimizer, schedule = optimizer_for(parameters, recipe.vision_rate, recipe.vision_steps)
    started = time.perf_counter()
    for step, index in enumerate(batches(len(pixels), recipe.batch_size, recipe.vision_steps), start=1):
        logits, found = readout(vision(pixel_values=pixels[index]).last_hidden_state)
        loss = 10 * functional.binary_cross_entropy_with_logits(found, spots[index])
        for i, one in enumerate(logits):
            loss = loss + functional.cross_entropy(one, labels[index, i])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            right = [
                f"{name} {(one.argmax(-1) == labels[index, i]).float().mean():.2f}"
                for i, (name, one) in enumerate(zip(TARGETS, logits, strict=True))
            ]
            print(
                f"vision {step:5d}  {loss:.3f}  {' '.join(right)}  {time.perf_counter() - started:.0f} s", flush=True
            )
