"""Makes caption-metrics.json: 50 images with captions of two candidates, and pycocoevalcap's tokens and values.

    pip install pycocoevalcap==1.2      # and a Java runtime (17.0.15 was used)
    python tests/data/caption_metrics.py

The texts are the embedded data's, with contractions, numbers, brackets, abbreviations and the like put among them;
one caption is empty.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from trainer.data.dataset import examine

ODD = (
    "There isn't any road; it's a mid-sized (2.5 km) runway.",
    'About 1,200 houses - some with "red" roofs - can\'t be seen well...',
    "The U.S. city of St. Louis, e.g. the airport's terminal, covers 50% of it.",
    "Buildings: two, ships: three! A T-shaped dock and/or a 20m pier?",
    "They're near the rivers' banks [left] at 10:30 a.m., approx. 3 ft. away.",
    "Café tables – and a 1/2-finished car park — lie in the state-of-the-art harbour.",
    "No. 5 and no. 6 cannot be told apart.Two planes,one truck.",
    "See www.example.com/map?x=1 for the 1990s' AT&T tower's plan & more.",
)


def main() -> None:
    """Write the file beside this one."""
    rows = examine("mini").rows
    rng = random.Random(16)
    by_scene: dict[str, list[str]] = {}
    for row in rows:
        by_scene.setdefault(row.scene, []).append(row.caption)
    scenes = [texts for texts in by_scene.values() if len(texts) > 3]
    images = []
    for number, texts in enumerate(rng.sample(scenes, 50)):
        references = [*texts[: 1 + number % 3]]
        if number % 5 == 0:
            references[0] += " " + ODD[(number // 5) % len(ODD)]
        one, other = texts[-1], rng.choice(rng.choice(scenes))
        if number % 6 == 0:
            one += " " + ODD[(number // 6 + 1) % len(ODD)]
        words = other.split()
        images.append({"references": references, "one": "" if number == 7 else one, "other": " ".join(words[:12])})
    found: dict[str, object] = {"images": images}
    refs = _tokens([image["references"] for image in images])
    tokens = {"references": refs}
    values = {}
    for name in ("one", "other"):
        tokens[name] = _tokens([[image[name]] for image in images])
        gts, res = dict(enumerate(refs)), dict(enumerate(tokens[name]))
        with contextlib.redirect_stdout(io.StringIO()):
            bleu, _ = Bleu(4).compute_score(gts, res)
        rouge, per_rouge = Rouge().compute_score(gts, res)
        cider, per_cider = Cider().compute_score(gts, res)
        values[name] = {f"bleu_{n + 1}": value for n, value in enumerate(bleu)}
        values[name] |= {
            "rouge_l": float(rouge),
            "cider_d": float(cider),
            "meteor": Meteor().compute_score(gts, res)[0],
        }
        values[name] |= {"rouge_l_images": per_rouge.tolist(), "cider_d_images": per_cider.tolist()}
    found |= {"tokens": tokens, "values": values}
    file = Path(__file__).with_name("caption-metrics.json")
    file.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def _tokens(texts: list[list[str]]) -> list[list[str]]:
    captions = {n: [{"caption": text} for text in each] for n, each in enumerate(texts)}
    return list(PTBTokenizer().tokenize(captions).values())


if __name__ == "__main__":
    main()
