"""BLEU-1 to 4, ROUGE-L and CIDEr-D of captions against their references, for each image and for all.

The formulas are those of the papers as `pycocoevalcap` 1.2 computes them: what published figures are made with. For
tests/data/caption-metrics.json the values are its own to 1e-9. They are written out here since that package brings
100 MB of Java programs, its BLEU is not free for commercial use, and comparing two candidates needs the counts of each
image.

CIDEr-D weighs words by how rare they are in the references of the images that are evaluated: figures of other images,
or of fewer, are not on one scale.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from search.evaluation.tokens import tokenize

ORDER = 4
"""Longest n-gram."""
BETA = 1.2
"""ROUGE-L's weight of recall (Lin 2004, as in COCO's evaluation)."""
SIGMA = 6.0
"""Width in tokens of CIDEr-D's penalty for another length (Vedantam et al. 2015, section 5.1)."""
NAMES = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")

Gram = tuple[str, ...]


@dataclass(frozen=True)
class Scores:
    """What one candidate's captions score: everything that is needed to score any sample of the images."""

    counts: np.ndarray
    """(images, 2 + 2 x ORDER): tokens of the caption, of the reference nearest in length, n-grams found, n-grams."""
    rouge_l: np.ndarray
    """(images,)."""
    cider_d: np.ndarray
    """(images,), with the words' rarity from all images."""

    def __len__(self) -> int:
        return len(self.rouge_l)

    def values(self) -> dict[str, float]:
        """The metrics of all images by `NAMES`."""
        return {name: float(value[0]) for name, value in self.weighted(np.ones((1, len(self)))).items()}

    def weighted(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """The metrics of samples of the images, each (samples,).

        Args:
            weights: (samples, images), how often each sample has each image.
        """
        return figures(weights @ self.counts, weights @ self.rouge_l, weights @ self.cider_d, weights.sum(1))


def figures(counts: np.ndarray, rouge_l: np.ndarray, cider_d: np.ndarray, images: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics from their sums over images: (samples, 2 + 2 x ORDER), and (samples,) for the others."""
    return dict(zip(NAMES, (*_bleu(counts), rouge_l / images, cider_d / images), strict=True))


def score(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Scores:
    """Scores of captions.

    Args:
        captions: one for each image.
        references: one or more for each image.
    """
    assert len(captions) == len(references) > 0
    ours = [tokenize(caption) for caption in captions]
    theirs = [[tokenize(reference) for reference in each] for each in references]
    return Scores(
        counts=np.array([_counts(caption, refs) for caption, refs in zip(ours, theirs, strict=True)], dtype=float),
        rouge_l=np.array([_rouge_l(caption, refs) for caption, refs in zip(ours, theirs, strict=True)]),
        cider_d=np.array(_cider_d(ours, theirs)),
    )


def _grams(tokens: Sequence[str]) -> Counter[Gram]:
    return Counter(tuple(tokens[i : i + n]) for n in range(1, ORDER + 1) for i in range(len(tokens) - n + 1))


# --- BLEU (Papineni et al. 2002) -----------------------------------------------------------------------------------


def _counts(caption: Sequence[str], references: Sequence[Sequence[str]]) -> list[int]:
    most: Counter[Gram] = Counter()
    for reference in references:
        most |= _grams(reference)
    found = [0] * ORDER
    for gram, count in (_grams(caption) & most).items():
        found[len(gram) - 1] += count
    length = len(caption)
    nearest = min((abs(len(reference) - length), len(reference)) for reference in references)[1]
    return [length, nearest, *found, *(max(0, length - n) for n in range(ORDER))]


def _bleu(counts: np.ndarray) -> list[np.ndarray]:
    """BLEU-1 to ORDER of summed counts. The tiny numbers stand in pycocoevalcap, against divisions by zero."""
    length, nearest, found, grams = counts[:, 0], counts[:, 1], counts[:, 2 : 2 + ORDER], counts[:, 2 + ORDER :]
    ratio = (length + 1e-15) / (nearest + 1e-9)
    brevity = np.exp(np.minimum(0, 1 - 1 / ratio))
    products = np.cumprod((found + 1e-15) / (grams + 1e-9), axis=1)
    return [products[:, n] ** (1 / (n + 1)) * brevity for n in range(ORDER)]


# --- ROUGE-L (Lin 2004) --------------------------------------------------------------------------------------------


def _rouge_l(caption: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    # An empty text counts as one token that matches only another empty text, as in pycocoevalcap.
    ours = list(caption) or [""]
    common = [(_common(ours, list(reference) or [""]), len(reference) or 1) for reference in references]
    precision = max(length / len(ours) for length, _ in common)
    recall = max(length / size for length, size in common)
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    before = [0] * (len(other) + 1)
    for word in one:
        row = [0]
        for i, there in enumerate(other):
            row.append(before[i] + 1 if word == there else max(before[i + 1], row[i]))
        before = row
    return before[-1]


# --- CIDEr-D (Vedantam et al. 2015) --------------------------------------------------------------------------------


def _cider_d(captions: Sequence[Sequence[str]], references: Sequence[Sequence[Sequence[str]]]) -> list[float]:
    grams = [[_grams(reference) for reference in each] for each in references]
    rarity: Counter[Gram] = Counter()
    for each in grams:
        rarity.update(set().union(*each))
    log_images = math.log(len(captions))

    def vectors(counts: Counter[Gram]) -> tuple[list[dict[Gram, float]], list[float], int]:
        """(weights by n-gram for each n, their norms, number of bigrams: the length that the penalty compares)."""
        found: list[dict[Gram, float]] = [{} for _ in range(ORDER)]
        for gram, count in counts.items():
            found[len(gram) - 1][gram] = count * (log_images - math.log(max(1, rarity[gram])))
        bigrams = sum(count for gram, count in counts.items() if len(gram) == 2)
        return found, [math.sqrt(sum(w * w for w in each.values())) for each in found], bigrams

    values = []
    for caption, refs in zip(captions, grams, strict=True):
        ours, our_norms, our_length = vectors(_grams(caption))
        total = 0.0
        for counts in refs:
            theirs, their_norms, their_length = vectors(counts)
            penalty = math.exp(-((our_length - their_length) ** 2) / (2 * SIGMA**2))
            for n in range(ORDER):
                shared = sum(
                    min(w, theirs[n].get(gram, 0.0)) * theirs[n].get(gram, 0.0) for gram, w in ours[n].items()
                )
                norms = our_norms[n] * their_norms[n]
                total += penalty * (shared / norms if norms else shared)
        values.append(10 * total / ORDER / len(refs))
    return values
