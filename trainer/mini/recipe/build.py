"""The recipe of the embedded checkpoint: `python -m trainer.mini.recipe.build [--out FOLDER]`.

    1. tiles      16,000 tiles of ARCHIVES are generated
    2. tokenizers a Unigram one (T5) and a WordPiece one (Q-Former) are trained on their captions
    3. vision     the vision tower learns to classify a tile's facts; the readout is thrown away
    4. captions   Q-Former, projection and T5 learn captions and short answers over the frozen vision features

Step 3 stands for InstructBLIP's pretrained vision tower, which is frozen in training as well. Without it a tower
this small stays blind for most of step 4. Everything is seeded: a machine writes the same checkpoint each time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipVisionModel,
)

from trainer.mini import CHECKPOINT
from trainer.mini.captions import INSTRUCTIONS, QUESTIONS, answer
from trainer.mini.recipe.architecture import make_model, make_processor
from trainer.mini.recipe.sizes import Recipe, batches, optimizer_for
from trainer.mini.recipe.vision import spot_map, targets, train_vision
from trainer.mini.scenes import ARCHIVES, Tile, sample_scene, sample_tile

SEED = 0


# --- tiles ----------------------------------------------------------------------------------------------------


def make_tiles(count: int, rng: random.Random) -> list[tuple[int, Tile]]:
    """Tiles, each of another scene, with the index of their archive."""
    tiles = []
    for _ in range(count):
        archive = rng.randrange(len(ARCHIVES))
        tiles.append((archive, sample_tile(sample_scene(ARCHIVES[archive], rng), ARCHIVES[archive], rng)))
    return tiles


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
    """Everything that the caption training needs, as token ids."""
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
    loss: Tensor = model.language_model(
        inputs_embeds=embeds, attention_mask=inputs["attention_mask"], labels=inputs["labels"], use_cache=False
    ).loss
    return loss


def train_captions(
    model: InstructBlipForConditionalGeneration, samples: Samples, recipe: Recipe, rng: random.Random
) -> None:
    """Train everything but the vision tower, and print the loss every 100 steps."""
    model.vision_model.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, schedule = optimizer_for(parameters, recipe.caption_rate, recipe.caption_steps)
    started, recent = time.perf_counter(), []
    for step, index in enumerate(batches(len(samples.features), recipe.batch_size, recipe.caption_steps), start=1):
        # Evaluation mode only switches dropout off: there are no running statistics.
        model.train(step > recipe.dropout_from * recipe.caption_steps)
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


# --- the scale of the Q-Former --------------------------------------------------------------------------------


@torch.no_grad()
def rescale(model: InstructBlipForConditionalGeneration, gain: float) -> None:
    """Multiply the Q-Former's states by `gain` and divide the weights that read them by it: outputs stay the same.

    An update of a given size moves the outputs further then. Adam moves each weight by about the learning rate
    whatever its gradient, so in a Q-Former of width 128 the same rate does less than in the real one of width
    768. With a gain of 16 the learning rates of the hand-run log mean here what they mean there: 5e-6 hardly moves,
    2e-4 to 5e-4 are best, 1e-3 is too much and with a large rank and alpha diverges (docs/mini-behaviour.md).
    A power of two, so that no weight is rounded.
    """
    qformer = model.qformer
    for norm in (qformer.embeddings.layernorm, model.vision_model.post_layernorm):
        _scale(norm, gain, bias=True)
    for layer in qformer.encoder.layer:
        for attention in [layer.attention, *([layer.crossattention] if layer.has_cross_attention else [])]:
            for reader in (attention.attention.query, attention.attention.key, attention.attention.value):
                _scale(reader, 1 / gain, bias=False)
            _scale(attention.output.dense, gain, bias=True)
            _scale(attention.output.LayerNorm, gain, bias=True)
        for inner, output in (
            (layer.intermediate, layer.output),
            (layer.intermediate_query, layer.output_query),
        ):
            _scale(inner.dense, 1 / gain, bias=False)
            _scale(output.dense, gain, bias=True)
            _scale(output.LayerNorm, gain, bias=True)
    _scale(model.language_projection, 1 / gain, bias=False)


def _scale(module: nn.Module, factor: float, *, bias: bool) -> None:
    assert isinstance(module.weight, Tensor)
    module.weight.mul_(factor)
    if bias and isinstance(module.bias, Tensor):
        module.bias.mul_(factor)


# --- all together ---------------------------------------------------------------------------------------------


@torch.no_grad()
def vision_features(vision: InstructBlipVisionModel, pixels: Tensor) -> Tensor:
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
    rescale(model, recipe.gain)
    save(model, processor, out)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters  {time.perf_counter() - started:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain the embedded InstructBLIP.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="folder to write (default: the embedded one)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; another number rounds differently")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    build(arguments.out, Recipe())


if __name__ == "__main__":
    main()
