"""What serving a reward costs: eight rollout actors' images through reward actors, against the model alone.

    python benchmarks/reward_service.py [--rounds 5] [--actors 8] [--chunks 1] [--batch 16]

The model is a CLIP of random weights in the published layout (ViT-S/32, text of the same width), on one
thread, as reward ``clip_score``. Eight rollout actors hold chunks of ``batch`` images of 224 x 224 each,
hand them out one after another, and every chunk is scored by the one reward actor at that batch size. Bare
is the same reward on the same chunks in a process of its own, nothing else. ``driver`` is a run's way
(chunks are submitted as they come, the driver collects); ``asked`` is that of guidance (all actors ask the
reward actor themselves, at once). Rounds alternate; medians over rounds of images per second, and of each
round's ratio. Writes docs/benchmarks/reward_service.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

OUT = Path(__file__).parents[1] / "docs" / "benchmarks" / "reward_service.md"
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
PIXELS = 224


def write_model(directory: Path) -> None:
    """A CLIP of random weights with its processor, as CLIPProcessor saves them."""
    import torch
    from transformers import (
        CLIPConfig,
        CLIPImageProcessorPil,
        CLIPModel,
        CLIPProcessor,
        CLIPTokenizer,
    )

    tower = {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    }
    words = ["<|startoftext|>", "<|endoftext|>", *CHARACTERS, *(f"{c}</w>" for c in CHARACTERS)]
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 77}
    text |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = tower | {"image_size": PIXELS, "patch_size": 32}
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(directory)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}
    )
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])
    CLIPProcessor(images, tokenizer).save_pretrained(directory)


def images(actor: int, chunk: int, batch: int) -> np.ndarray:
    """uint8 (batch, 1, PIXELS, PIXELS, 3), the same every time."""
    generator = np.random.default_rng((actor, chunk))
    return generator.integers(0, 256, (batch, 1, PIXELS, PIXELS, 3), dtype=np.uint8)


def prompts(batch: int) -> list[str]:
    """A chunk's prompts."""
    return ["a red cat on a blue chair"] * batch


def bare(model: str, actors: int, chunks: int, batch: int) -> None:
    """Print the images per second of the reward alone, once warm."""
    import torch

    from rewards.clip_score import ClipScore

    torch.set_num_threads(1)
    function = ClipScore(model=model).build()
    parts = [list(images(a, c, batch)) for c in range(chunks) for a in range(actors)]
    function(prompts(batch), parts[0])
    started = time.perf_counter()
    for part in parts:
        function(prompts(batch), part)
    print(batch * len(parts) / (time.perf_counter() - started))


class Holder:
    """A rollout actor's end: chunks that are there, and the reward asked for them."""

    def __init__(self, actor: int, chunks: int, batch: int) -> None:
        self.parts = [images(actor, chunk, batch) for chunk in range(chunks)]

    def part(self, chunk: int) -> np.ndarray:
        """A chunk of media, as a job returns it."""
        return self.parts[chunk]

    def ask(self, score: Any) -> int:
        """Score all chunks, one after another; returns how many images."""
        for part in self.parts:
            score(prompts(len(part)), list(part), {})
        return sum(map(len, self.parts))


def served(model: str, directory: str, rounds: int, actors: int, chunks: int, batch: int) -> Any:
    """Yields, a round at a time, images per second of both ways; the caller measures in between."""
    import ray

    from cluster.ray_cluster import connected
    from cluster.reward_actors import RayScorer
    from recipes.schema import Recipe
    from recipes.source import load
    from rl.contracts import Sampled
    from rollout.draws import groups_for
    from rollout.flow_sampler import FlowSummary

    reward = f"rewards=[{{kind: clip_score, model: '{model}', batch_size: {batch}, cpus: 1}}]"
    sets = [reward, "evaluation.rewards=[]", f"run_dir={directory}", "tracking=[]"]
    recipe = load(Path("digits/flash_grpo"), Recipe, sets).value
    groups = groups_for(recipe.prompts.load(), seed=0, step=0, count=actors * chunks, size=batch)
    summary = FlowSummary(0, 0)
    with connected(recipe):
        scorer = RayScorer(recipe, directory)
        scorer.start()
        kind: Any = ray.remote(num_cpus=0)(Holder)
        holders = [kind.remote(actor, chunks, batch) for actor in range(actors)]
        (score,) = scorer.remote_scores().values()

        def stream() -> Iterator[Sampled]:
            for number, group in enumerate(groups):
                media = holders[number % actors].part.remote(number // actors)
                yield Sampled(group, number, None, media, summary, {}, 0, 0.0, 0)

        scorer.score(stream())  # warm, both ways
        ray.get([holder.ask.remote(score) for holder in holders])
        for _ in range(rounds):
            started = time.perf_counter()
            scorer.score(stream())
            driver = batch * len(groups) / (time.perf_counter() - started)
            started = time.perf_counter()
            count = sum(ray.get([holder.ask.remote(score) for holder in holders]))
            yield driver, count / (time.perf_counter() - started)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser()
    for name, value in (("rounds", 5), ("actors", 8), ("chunks", 1), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    given = parser.parse_args()
    sizes = given.actors, given.chunks, given.batch
    if given.bare:
        bare(given.bare, *sizes)
        return
    rows: list[tuple[float, float, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        model = f"{directory}/clip"
        write_model(Path(model))
        command = [sys.executable, __file__, "--bare", model]
        command += ["--actors", str(sizes[0]), "--chunks", str(sizes[1]), "--batch", str(sizes[2])]
        for driver, asked in served(model, directory, given.rounds, *sizes):
            alone = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append((float(alone), driver, asked))
            print(f"bare {rows[-1][0]:.1f}, driver {driver:.1f}, asked {asked:.1f} images/s")
    text = [
        "| | images per second | share of the model alone | range |",
        "|---|---|---|---|",
    ]
    for column, name in enumerate(("the model alone", "driver", "asked by the actors")):
        speeds = [row[column] for row in rows]
        shares = [row[column] / row[0] for row in rows]
        text.append(
            f"| {name} | {statistics.median(speeds):.1f} | {statistics.median(shares):.3f} "
            f"| {min(shares):.3f} to {max(shares):.3f} |"
        )
    OUT.write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
