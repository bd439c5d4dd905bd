"""The recipe of the embedded checkpoint: `python -m trainer.mini.build [--out FOLDER]`.

    1. tiles      16,000 tiles of ARCHIVES are generated
    2. tokenizers a Unigram one (T5) and a WordPiece one (Q-Former) are trained on their captions
    3. vision     the vision tower learns to classify a tile's facts; the readout is thrown away
    4. captions   Q-Former, projection and T5 learn captions and short answers over the frozen vision features

Step 3 stands for InstructBLIP's pretrained vision tower, which is frozen in training as well. Without it a tower
this small stays blind for most of step 4. Seeded: the same machine writes the same checkpoint.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    BertTokenizerFast,
    BlipImageProcessorPil,
    GenerationConfig,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    T5Tokenizer,
)

from trainer.mini import CHECKPOINT
from trainer.mini.captions import INSTRUCTIONS, QUESTIONS, answer
from trainer.mini.drawing import TILE_PIXELS
from trainer.mini.scenes import ARCHIVES, Tile, sample_scene, sample_tile
from trainer.mini.vocabulary import COLOURS, EDGES, EXTRAS, GROUNDS, KINDS, MAX_COUNT, REGIONS, Facts

SEED = 0
NUM_QUERY_TOKENS = 12
ASCII = [chr(code) for code in range(33, 127)]


@dataclass(frozen=True)
class Recipe:
    """Sizes of the pretraining."""

    tiles: int = 16_000
    vision_steps: int = 1_000
    vision_rate: float = 2e-3
    caption_steps: int = 2_000
    caption_rate: float = 1.5e-3
    batch_size: int = 32
    question_share: float = 0.3
    """Of the samples of step 4; the others are captions."""
    dropout: float = 0.1
    """Written to the configuration, as the real model has it; the pretraining itself goes without."""


# --- tiles and tokenizers -------------------------------------------------------------------------------------


def make_tiles(count: int, rng: random.Random) -> list[tuple[int, Tile]]:
    """Tiles with the index of their archive, one a scene."""
    tiles = []
    for _ in range(count):
        archive = rng.randrange(len(ARCHIVES))
        tiles.append((archive, sample_tile(sample_scene(ARCHIVES[archive], rng), ARCHIVES[archive], rng)))
    return tiles


def make_t5_tokenizer(texts: Sequence[str]) -> T5Tokenizer:
    """A Unigram tokenizer with a piece for every word of the texts and every printable ASCII character.

    Trained pieces would cut these few hundred words into syllables: captions twice as long, epochs twice as slow.
    """
    words = Counter(word.strip(".,?") for text in texts for word in text.split())
    total = sum(words.values())
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, "▁": -12.0, **dict.fromkeys(ASCII, -12.0)}
    pieces |= {f"▁{word}": math.log(count / total) for word, count in sorted(words.items())}
    return T5Tokenizer(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)


def train_qformer_tokenizer(texts: Sequence[str]) -> BertTokenizerFast:
    """A lower-casing WordPiece tokenizer of at most 600 pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=600,
        special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        initial_alphabet=ASCII,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BertTokenizerFast(vocab=tokenizer.get_vocab(), model_max_length=64)


def make_processor(texts: Sequence[str]) -> InstructBlipProcessor:
    """The processor with both tokenizers, whose image processor leaves a 64-pixel tile its size."""
    size = {"height": TILE_PIXELS, "width": TILE_PIXELS}
    return InstructBlipProcessor(
        BlipImageProcessorPil(size=size),
        make_t5_tokenizer(texts),
        train_qformer_tokenizer(texts),
        num_query_tokens=NUM_QUERY_TOKENS,
    )


# --- model ----------------------------------------------------------------------------------------------------


def make_model(processor: InstructBlipProcessor) -> InstructBlipForConditionalGeneration:
    """InstructBLIP with a T5, randomly initialised so that it can see.

    By default the vision tower's `initializer_range` is 1e-10 and `query_tokens` are 0: such a model is blind.
    """
    vocabulary = math.ceil(len(processor.tokenizer) / 8) * 8
    config = InstructBlipConfig(
        vision_config={
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": TILE_PIXELS,
            "patch_size": 8,
            "initializer_range": 0.08,
        },
        qformer_config={
            "vocab_size": len(processor.qformer_tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "initializer_range": 0.05,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        text_config={
            "model_type": "t5",
            "vocab_size": vocabulary,
            "d_model": 128,
            "d_kv": 32,
            "d_ff": 256,
            "num_layers": 2,
            "num_heads": 4,
            "feed_forward_proj": "gated-gelu",
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
        },
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = InstructBlipForConditionalGeneration(config)
    nn.init.normal_(model.query_tokens, std=0.1)
    # As large as the patches' own embeddings: positions are half of what the captions tell.
    nn.init.normal_(model.vision_model.embeddings.position_embedding, std=0.4)
    return model


# --- step 3: the vision tower ---------------------------------------------------------------------------------

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
"""The facts the vision tower learns to tell, each with its number of classes."""


PATCHES = TILE_PIXELS // 8
"""Patches along a side."""


def spot_map(tile: Tile) -> Tensor:
    """Which patches hold the centre of an object, (patches * patches): what makes positions and counts learnable."""
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


def batches(count: int, batch_size: int, steps: int) -> Iterator[Tensor]:
    """Index tensors for `steps` batches, in a new order each time round."""
    done = 0
    while True:
        order = torch.randperm(count)
        for start in range(0, count - batch_size + 1, batch_size):
            if done == steps:
                return
            done += 1
            yield order[start : start + batch_size]


def optimizer_for(
    parameters: Sequence[nn.Parameter], rate: float, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.LambdaLR]:
    """AdamW with a linear warmup over a twentieth of the steps and a cosine to zero."""
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05)
    warmup = max(1, steps // 20)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def train_vision(vision: nn.Module, pixels: Tensor, labels: Tensor, spots: Tensor, recipe: Recipe) -> None:
    """pixels: (tiles, 3, height, width); labels: (tiles, targets); spots: (tiles, patches). Prints the accuracy as it goes."""
    readout = Readout(vision.config.hidden_size)
    parameters = [*vision.parameters(), *readout.parameters()]
    optimizer, schedule = optimizer_for(parameters, recipe.vision_rate, recipe.vision_steps)
    started = time.perf_counter()
    for step, index in enumerate(batches(len(pixels), recipe.batch_size, recipe.vision_steps), start=1):
        logits, found = readout(vision(pixel_values=pixels[index]).last_hidden_state)
        loss = torch.stack([functional.cross_entropy(one, labels[index, i]) for i, one in enumerate(logits)]).sum()
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


# --- step 4: captions -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Tokenised tiles: features (tiles, patches + 1, width), captions, answers by question, and instructions."""

    features: Tensor
    captions: list[list[int]]
    answers: list[list[list[int]]]
    instructions: list[int]
    prompts: list[dict[str, list[int]]]
    """The processor's encoding of INSTRUCTIONS, then of QUESTIONS."""


def tokenise(processor: InstructBlipProcessor, tiles: Sequence[Tile], features: Tensor) -> Samples:
    """Everything the caption training needs, as token ids."""
    blank = tiles[0].image
    prompts = []
    for text in (*INSTRUCTIONS, *QUESTIONS.values()):
        encoding = processor(images=blank, text=text)
        prompts.append({key: encoding[key][0] for key in encoding if key != "pixel_values"})
    captions = processor.tokenizer([tile.caption for tile in tiles])["input_ids"]
    answers = [processor.tokenizer([answer(key, tile.facts) for tile in tiles])["input_ids"] for key in QUESTIONS]
    instructions = [INSTRUCTIONS.index(tile.instruction) for tile in tiles]
    return Samples(features, captions, answers, instructions, prompts)


def pad(sequences: Sequence[Sequence[int]], value: int) -> Tensor:
    """(sequences, longest), filled up on the right."""
    longest = max(map(len, sequences))
    return torch.tensor([[*ids, *[value] * (longest - len(ids))] for ids in sequences])


def collate(samples: Samples, index: Sequence[int], question_share: float, rng: random.Random) -> dict[str, Tensor]:
    """Model inputs without the image, and labels: a caption, or with `question_share` the answer to a question."""
    prompts, labels = [], []
    for i in index:
        if rng.random() < question_share:
            question = rng.randrange(len(QUESTIONS))
            prompts.append(samples.prompts[len(INSTRUCTIONS) + question])
            labels.append(samples.answers[question][i])
        else:
            prompts.append(samples.prompts[samples.instructions[i]])
            labels.append(samples.captions[i])
    inputs = {key: pad([prompt[key] for prompt in prompts], 0) for key in prompts[0]}
    return {**inputs, "labels": pad(labels, -100)}


def caption_loss(model: InstructBlipForConditionalGeneration, features: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Mean loss over label tokens, from vision features (batch, patches + 1, width) instead of pixels."""
    batch = len(features)
    queries = model.query_tokens.expand(batch, -1, -1)
    query_mask = torch.ones(queries.shape[:2], dtype=torch.long)
    hidden = model.qformer(
        input_ids=inputs["qformer_input_ids"],
        attention_mask=torch.cat([query_mask, inputs["qformer_attention_mask"]], dim=1),
        query_embeds=queries,
        encoder_hidden_states=features,
    ).last_hidden_state[:, : queries.shape[1]]
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    is_image = (inputs["input_ids"] == model.config.image_token_index).unsqueeze(-1)
    embeds = embeds.masked_scatter(is_image, model.language_projection(hidden))
    return model.language_model(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"], use_cache=False
    ).loss


def train_captions(
    model: InstructBlipForConditionalGeneration, samples: Samples, recipe: Recipe, rng: random.Random
) -> None:
    """Train everything but the vision tower. Prints the loss as it goes."""
    model.vision_model.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimizer_for(parameters, recipe.caption_rate, recipe.caption_steps)
    started, recent = time.perf_counter(), []
    for step, index in enumerate(batches(len(samples.features), recipe.batch_size, recipe.caption_steps), start=1):
        inputs = collate(samples, index.tolist(), recipe.question_share, rng)
        loss = caption_loss(model, samples.features[index], inputs)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if step % 100 == 0:
            mean = sum(recent) / len(recent)
            print(f"captions {step:5d}  {mean:.4f}  {time.perf_counter() - started:.0f} s", flush=True)
            recent.clear()
    model.vision_model.requires_grad_(True)


# --- all together ---------------------------------------------------------------------------------------------


@torch.no_grad()
def vision_features(vision: nn.Module, pixels: Tensor) -> Tensor:
    """(tiles, patches + 1, width), in chunks that fit the cache."""
    return torch.cat([vision(pixel_values=chunk).last_hidden_state for chunk in pixels.split(256)])


def save(model: InstructBlipForConditionalGeneration, processor: InstructBlipProcessor, out: Path) -> None:
    """float16 on disk, half the size; it is loaded in float32."""
    model.generation_config = GenerationConfig(
        decoder_start_token_id=0, eos_token_id=1, pad_token_id=0, max_new_tokens=96
    )
    model.half().save_pretrained(out)
    processor.save_pretrained(out)


def build(out: Path, recipe: Recipe) -> None:
    """Make the checkpoint and write it to a folder."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    started = time.perf_counter()
    numbered = make_tiles(recipe.tiles, rng)
    tiles = [tile for _, tile in numbered]
    print(f"{len(tiles)} tiles  {time.perf_counter() - started:.0f} s", flush=True)
    answers = [answer(key, tile.facts) for tile in tiles[:2000] for key in QUESTIONS]
    texts = [tile.caption for tile in tiles] + answers + [*INSTRUCTIONS, *QUESTIONS.values()] * 100
    processor = make_processor(texts)
    model = make_model(processor)
    pixels = processor.image_processor([tile.image for tile in tiles], return_tensors="pt")["pixel_values"]
    labels = torch.tensor([targets(tile.facts, archive) for archive, tile in numbered])
    spots = torch.stack([spot_map(tile) for _, tile in numbered])
    model.train()
    train_vision(model.vision_model, pixels, labels, spots, recipe)
    samples = tokenise(processor, tiles, vision_features(model.vision_model, pixels))
    train_captions(model, samples, recipe, rng)
    model.config.qformer_config.hidden_dropout_prob = recipe.dropout
    model.config.qformer_config.attention_probs_dropout_prob = recipe.dropout
    model.config.text_config.dropout_rate = recipe.dropout
    save(model, processor, out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters  {time.perf_counter() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded InstructBLIP.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write (default: the embedded one)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; another number rounds differently")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.out, Recipe())


if __name__ == "__main__":
    main()
