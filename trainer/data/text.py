"""Captions and prompts as the model reads them: what its tokenizers lack, what is cut, what is empty or repeated.

A tokenizer of SentencePiece's kind makes one `<unk>` of all characters that it has not seen: with Chinese captions in
a T5 the loss falls as usual, and `<unk>` is what is learnt. All of it is checked before torch is loaded (0.1 s for the
640 captions of the embedded data, 1.1 s for 10,000).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trainer.common.errors import DataError, shown
from trainer.data.words import (
    IMAGE,
    Count,
    Lacking,
    Words,
    beginning,
    qformer_room,
    qformer_words_of,
    special_pattern,
    words_of,
)

if TYPE_CHECKING:
    from trainer.data.dataset import Row

REFUSED_ABOVE = 0.1
"""Share of unknown text with which nothing is trained."""
WARNED_ABOVE = 0.01


@dataclass(frozen=True)
class Special:
    """Texts in which a special token is written out."""

    token: str
    texts: int
    example: str
    what: str
    """`captions` or `prompts`."""


@dataclass(frozen=True)
class Text:
    """Counts of a set of captions and prompts under one model's tokenizers and `max_target_length`."""

    captions: int
    empty: int
    """Captions without a letter or digit."""
    repeated: int
    """Captions that another row has too, the first of each not counted."""
    most_repeated: tuple[str, int]
    """(caption, how many rows have it)."""
    tokens: int
    """Tokens of all captions, EOS and the cut not counted."""
    lacking: Lacking
    """Of the captions."""
    cut: int
    """Captions that are longer than `max_target_length`."""
    max_target_length: int
    lengths: tuple[int, ...] = field(repr=False)
    """Tokens of each caption, EOS included, before the cut."""
    prompts: Lacking = field(default_factory=Lacking)
    """Of the prompts in the language model's tokenizer."""
    qformer: Lacking = field(default_factory=Lacking)
    """Of the prompts in the Q-Former's, which sees nothing else of a row."""
    special: tuple[Special, ...] = ()
    prompts_cut: int = 0
    """Prompts that are longer than the Q-Former reads: it sees their beginning alone."""
    longest_prompt: int = 0
    """Tokens of the longest prompt in the Q-Former's tokenizer, special ones included."""
    room: int | None = None
    """Tokens that the Q-Former reads; None where that is not known."""

    @property
    def unknown(self) -> float:
        """Share of the captions' text that the tokenizer lacks."""
        return self.lacking.share

    def problem(self) -> str | None:
        """Why this text must not be trained on, if so."""
        for special in self.special:
            if special.token == IMAGE:
                return (
                    f"{special.texts} {special.what} hold '{IMAGE}', which stands for the tokens of a picture and is "
                    f"put there by the model itself (for example {shown(special.example)}); take it out of them"
                )
        for what, lacking, tokenizer in self._parts():
            if lacking.share > REFUSED_ABOVE:
                return (
                    f"{_lacks(what, lacking, tokenizer, f'{lacking.share:.0%}', f'limit {REFUSED_ABOVE:.0%}, ')}; use "
                    f"a model whose tokenizer has this script, or translate the {what}"
                )
        return None

    def warnings(self) -> list[str]:
        """What is odd about this text, a sentence each."""
        found = [
            _lacks(what, lacking, tokenizer, f"{lacking.share:.1%}")
            for what, lacking, tokenizer in self._parts()
            if WARNED_ABOVE < lacking.share <= REFUSED_ABOVE
        ]
        if self.cut:
            found.append(
                f"{self.cut} of {self.captions} captions are cut at max_target_length={self.max_target_length} "
                f"tokens; the longest has {max(self.lengths)}"
            )
        if self.prompts_cut:
            found.append(
                f"{self.prompts_cut} prompts are cut at the {self.room} tokens that the model's Q-Former reads; the "
                f"longest has {self.longest_prompt}"
            )
        if self.empty:
            found.append(f"{self.empty} of {self.captions} captions have no letter or digit")
        found += [
            f"{each.texts} {each.what} hold {shown(each.token)}, which the model's tokenizer reads as a token of its "
            f"own and not as text (for example {shown(each.example)})"
            for each in self.special
            if each.token != IMAGE
        ]
        return found

    def summary(self) -> str:
        """One line on lengths and repetitions."""
        ordered = sorted(self.lengths)
        middle = ordered[len(ordered) // 2]
        caption, times = self.most_repeated
        repeated = f"{self.repeated} repeated" + (f" (most: {shown(caption, 60)}, {times} times)" if times > 1 else "")
        return (
            f"captions: {self.captions}, {middle} tokens in the middle, {ordered[-1]} at most, {self.cut} cut at "
            f"{self.max_target_length}; {self.unknown:.2%} unknown; {self.empty} empty; {repeated}"
        )

    def lines(self) -> list[str]:
        """For a terminal and the log: the counts, the warnings."""
        return [self.summary(), *(f"warning: {warning}" for warning in self.warnings())]

    def counts(self) -> dict[str, int | float]:
        """The counts by name."""
        return {
            "captions": self.captions,
            "captions_unknown": round(self.unknown, 4),
            "captions_cut": self.cut,
            "captions_empty": self.empty,
            "captions_repeated": self.repeated,
            "prompts_cut": self.prompts_cut,
            "prompts_unknown": round(max(self.prompts.share, self.qformer.share), 4),
        }

    def tags(self) -> dict[str, str]:
        """For MLflow: one value a tag, the warnings as one text."""
        found = {f"text.{name}": str(value) for name, value in self.counts().items()}
        warnings = self.warnings()
        return {**found, **({"text.warnings": "\n".join(warnings)} if warnings else {})}

    def _parts(self) -> Iterator[tuple[str, Lacking, str]]:
        yield "captions", self.lacking, "the model's tokenizer"
        yield "prompts", self.prompts, "the model's tokenizer"
        yield "prompts", self.qformer, "the tokenizer of the model's Q-Former"


def examine_text(
    captions: Sequence[str],
    words: Words,
    max_target_length: int,
    prompts: Sequence[str] = (),
    qformer: Words | None = None,
    room: int | None = None,
) -> Text:
    """Count what the tokenizers make of these captions, of which there is at least one, and of the prompts.

    Args:
        captions: Of all rows.
        words: The language model's tokenizer.
        max_target_length: See `TrainConfig`.
        prompts: Of all rows.
        qformer: The Q-Former's tokenizer.
        room: Tokens that the Q-Former reads.
    """
    assert captions
    times, asked = Counter(captions), Counter(prompts)
    count = Count(words)
    lengths = {caption: count.add(caption, rows) + 1 for caption, rows in times.items()}  # with EOS
    pattern = special_pattern(words)
    asked_lengths = {} if qformer is None else {prompt: len(qformer.tokenizer.encode(prompt).ids) for prompt in asked}
    return Text(
        captions=len(captions),
        empty=sum(rows for caption, rows in times.items() if not any(map(str.isalnum, caption))),
        repeated=len(captions) - len(times),
        most_repeated=times.most_common(1)[0],
        tokens=count.tokens,
        lacking=count.result(),
        cut=sum(rows for caption, rows in times.items() if lengths[caption] > max_target_length),
        max_target_length=max_target_length,
        lengths=tuple(lengths[caption] for caption in captions),
        prompts=_lacking(asked, words),
        qformer=_lacking(asked, qformer) if qformer is not None else Lacking(),
        prompts_cut=sum(n for prompt, n in asked.items() if room and asked_lengths.get(prompt, 0) > room),
        longest_prompt=max(asked_lengths.values(), default=0),
        room=room,
        special=(*_special(times, pattern, "captions"), *_special(asked, pattern, "prompts")),
    )


def captions_of(rows: Sequence[Row]) -> list[str]:
    """All captions of these rows."""
    return [caption for row in rows for caption in row.captions]


def text_of(rows: Sequence[Row], model: str, max_target_length: int) -> Text | None:
    """The counts of these rows' captions and prompts, None where the checkpoint's tokenizer is not at hand.

    Raises:
        ModelError: a tokenizer cannot be read.
    """
    found = words_of(model)
    if found is None or not rows:
        return None
    prompts = [row.prompt for row in rows]
    qformer, room = qformer_words_of(model), qformer_room(model)
    return examine_text(captions_of(rows), found, max_target_length, prompts, qformer, room)


def check_text(rows: Sequence[Row], model: str, max_target_length: int) -> Text | None:
    """The same, if the text can be trained on.

    Raises:
        DataError: more than `REFUSED_ABOVE` of the text is unknown, or it holds `<image>`.
        ModelError: a tokenizer cannot be read.
    """
    text = text_of(rows, model, max_target_length)
    problem = text.problem() if text is not None else None
    if problem is not None:
        raise DataError(problem)
    return text


def _lacking(texts: Counter[str], words: Words) -> Lacking:
    count = Count(words)
    for text, times in texts.items():
        count.add(text, times)
    return count.result()


def _special(texts: Counter[str], pattern: re.Pattern[str], what: str) -> Iterator[Special]:
    """The special tokens that these texts hold, the most frequent first."""
    found: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for text, times in texts.items():
        for token in set(pattern.findall(text)):
            found[token] += times
            examples.setdefault(token, beginning(text))
    for token, times in found.most_common():
        yield Special(token, times, examples[token], what)


def _lacks(what: str, lacking: Lacking, tokenizer: str, share: str, limit: str = "") -> str:
    return (
        f"{tokenizer} lacks {share} of the {what}' text ({limit}{lacking.with_unknown} of {lacking.texts} {what}): "
        f"{shown(lacking.example)} is read as {shown(lacking.example_read)}"
    )
