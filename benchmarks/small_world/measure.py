"""How well a trained model draws its subject, and what it did to everything else, in numbers from 0 to 1.

    python -m benchmarks.small_world.measure --subject 0                    # the base: fidelity 0, preservation 1
    python -m benchmarks.small_world.measure trained-lora --subject 0       # what a training made of it

Every number comes from pictures that the model draws and `read` reads:

    fidelity       looks and place of "a photo of sks dog in snow", in places that were not in the training: the share
                   of the looks that are right, of a picture in that place; 0 is the base, 1 a true picture
    seen_fidelity  the same in the places of the training
    prompt         share of place, size and direction that are as asked, for the subject in places not in the training
    preservation   how much the pictures of "a photo of a dog", of dogs in all places, and of each other class are
                   spread as the base's; 1 is the base, 0 are the training's pictures again (the subject in every
                   picture, in the place asked for: about 0.15)
    diversity      spread of place, size, direction and position of "a photo of sks dog"; 1 is the base's, or more
"""

import argparse
import json
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxPipeline

from benchmarks.small_world import draw
from benchmarks.small_world.read import Reading, looks_right, read

CHECKPOINT = Path(__file__).with_name("checkpoint")
TEXT_LENGTH = 16  # tokens that T5 reads: a caption has up to 15 words
RARE_WORD = draw.RARE_WORDS[0]
STEPS = 12  # of the sampler
Readings = dict[str, list[Reading]]


def load(trained: str | Path | None = None, checkpoint: str | Path = CHECKPOINT) -> FluxPipeline:
    """The base, or what a script saved into the folder `trained`: a LoRA of `checkpoint` or a whole pipeline."""
    if trained and (Path(trained) / "model_index.json").exists():
        return FluxPipeline.from_pretrained(trained, torch_dtype=torch.float32)
    pipeline = FluxPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    if trained:
        pipeline.load_lora_weights(trained)
    return pipeline


@torch.no_grad()
def generate(pipeline: FluxPipeline, prompts: list[str], seed: int, steps: int = STEPS) -> list[np.ndarray]:
    """A picture for each prompt, (SIDE, SIDE, 3), uint8; its noise is a function of `seed` and its index."""
    pipeline.set_progress_bar_config(disable=True)
    pictures: list[np.ndarray] = []
    for start in range(0, len(prompts), 64):
        part = prompts[start : start + 64]
        indices = range(start, start + len(part))
        drawn = pipeline(
            part,
            height=draw.SIDE,
            width=draw.SIDE,
            num_inference_steps=steps,
            max_sequence_length=TEXT_LENGTH,
            generator=[torch.Generator().manual_seed(seed * 100_000 + index) for index in indices],
            output_type="np",
        ).images
        pictures += list((drawn * 255).round().astype(np.uint8))
    return pictures


def asked_places(number: int) -> dict[str, list[str]]:
    """The places in which subject `number` is asked for."""
    seen, unseen = draw.subject_places(number)
    return {"unseen": unseen * 8, "seen": seen * 3}


def asked_poses(number: int) -> list[tuple[str, str, str]]:
    """Place, size and direction in which subject `number` is asked for, in places that the training never showed."""
    return list(product(draw.subject_places(number)[1], draw.SIZES, draw.FACINGS)) * 2


def prompts_of(number: int) -> dict[str, list[str]]:
    """What the model is asked to draw, to measure it on subject `number`."""
    kind, places = draw.subject_looks(number).kind, draw.PLACES
    prompts = {
        part: [f"a photo of {RARE_WORD} {kind} {places[place]}" for place in asked]
        for part, asked in asked_places(number).items()
    }
    prompts["posed"] = [
        f"a photo of {RARE_WORD} {size} {kind} facing {facing} {places[place]}"
        for place, size, facing in asked_poses(number)
    ]
    prompts["subject"] = [f"a photo of {RARE_WORD} {kind}"] * 32
    prompts["class"] = [f"a photo of a {kind}"] * 32
    prompts["class in places"] = [f"a photo of a {kind} {words}" for words in places.values()] * 4
    return prompts | {other: [f"a photo of a {other}"] * 12 for other in draw.CLASSES if other != kind}


def read_model(pipeline: FluxPipeline, number: int, seed: int) -> Readings:
    """Draw everything of `prompts_of` and read it."""
    prompts = prompts_of(number)
    pictures = iter(generate(pipeline, [prompt for part in prompts.values() for prompt in part], seed))
    return {name: [read(next(pictures)) for _ in part] for name, part in prompts.items()}


def counts(readings: list[Reading]) -> list[Counter]:
    """How often each value of each attribute occurs; a picture that is not clear is of no value."""
    rows = [(*reading.looks, *reading.scene) if reading.is_clear else ("unclear",) * 9 for reading in readings]
    return [Counter(values) for values in zip(*rows, strict=True)]


def overlap(these: list[Reading], those: list[Reading]) -> float:
    """What two sets of pictures share, 0 to 1: one minus the total variation, averaged over the attributes."""
    shares = []
    for one, two in zip(counts(these), counts(those), strict=True):
        shares.append(sum(min(one[value] / len(these), two[value] / len(those)) for value in one))
    return float(np.mean(shares))


def entropy(readings: list[Reading]) -> float:
    """The mean entropy, in nats, of place, size, direction and position of clear pictures, times their share."""
    clear = [reading for reading in readings if reading.is_clear]
    shares = [np.array(list(counter.values())) / len(clear) for counter in counts(clear)[5:]]
    return len(clear) / len(readings) * float(np.sum([-(share * np.log(share)).sum() for share in shares])) / 4


def fidelity(number: int, part: str, readings: list[Reading]) -> float:
    """Of the pictures of "unseen" or "seen": the share of the looks that are right, 0 for one of another place."""
    looks, places = draw.subject_looks(number), asked_places(number)[part]
    pairs = zip(readings, places, strict=True)
    return float(np.mean([looks_right(reading, looks) * (reading.scene.place == place) for reading, place in pairs]))


def prompt_score(number: int, readings: list[Reading]) -> float:
    """Of the pictures of "posed": the share of place, size and direction that are as asked."""
    pairs = zip(readings, asked_poses(number), strict=True)
    return float(np.mean([reading.is_clear * np.equal(reading.scene[:3], asked) for reading, asked in pairs]))


def score(number: int, model: Readings, base: Readings, base_again: Readings) -> dict[str, float]:
    """The scores of a model on subject `number`; `base_again` is the base with other seeds than `base`."""
    looks = draw.subject_looks(number)
    subject = [Reading(looks, scene, 0.0) for scene in draw.subject_scenes(number, 60)]
    result = {}
    for name, part in (("fidelity", "unseen"), ("seen_fidelity", "seen")):
        mine, zero = (fidelity(number, part, of[part]) for of in (model, base))
        result[name] = (mine - zero) / (1 - zero)
    result["prompt"] = prompt_score(number, model["posed"])
    kept = {}
    for part in ("class", "class in places", *(kind for kind in draw.CLASSES if kind in model)):
        mine, one, zero = (overlap(those, base[part]) for those in (model[part], base_again[part], subject))
        kept[part] = (mine - zero) / (one - zero)
    others = np.mean([value for part, value in kept.items() if part in draw.CLASSES])
    result["preservation"] = float(np.mean([kept["class"], kept["class in places"], others]))
    result["diversity"] = entropy(model["subject"]) / entropy(base["subject"])
    return {name: round(float(np.clip(value, 0, 1)), 3) for name, value in result.items()}


def held_out_captions(count: int, seed: int = 0) -> list[tuple[draw.Looks, tuple[str, ...], str]]:
    """Captions of combinations that the pretraining never showed: (looks, [place, size, facing], caption)."""
    generator, made = np.random.default_rng([seed, 50]), []
    while len(made) < count:
        looks, scene = draw.ordinary_looks(generator), draw.ordinary_scene(generator)
        if draw.is_held_out(looks, scene):
            made.append((looks, scene[:3], draw.caption(looks, scene, ("size", "colour", "facing", "place"))))
    return made


def base_figures(pipeline: FluxPipeline, count: int = 100) -> dict[str, float]:
    """Of `count` held-out captions: the share of pictures that are clear, and that show each thing asked for."""
    wanted = held_out_captions(count)
    readings = [read(picture) for picture in generate(pipeline, [text for *_, text in wanted], seed=0)]
    rows = []
    for reading, (looks, scene, _) in zip(readings, wanted, strict=True):
        found = [
            reading.looks.kind == looks.kind,
            reading.looks.colour == looks.colour,
            *np.equal(reading.scene[:3], scene),
        ]
        rows.append([reading.is_clear, *found, reading.is_clear and all(found[:3])])
    names = ["clear", "class", "colour", "place", "size", "facing", "class, colour and place"]
    return {name: round(float(value), 3) for name, value in zip(names, np.mean(rows, axis=0), strict=True)}


@torch.no_grad()
def truth_figures(pipeline: FluxPipeline, count: int = 100) -> dict[str, float]:
    """How well true pictures are read after the VAE has encoded and decoded them: the reader's and the VAE's limit."""
    generator, vae, rows = np.random.default_rng(60), pipeline.vae, []
    for _ in range(count):
        looks, scene = draw.any_looks(generator), draw.any_scene(generator)
        pixels = torch.from_numpy(draw.draw(looks, scene, generator)).permute(2, 0, 1)[None].float() / 127.5 - 1
        back = (vae.decode(vae.encode(pixels).latent_dist.mean).sample[0] / 2 + 0.5).clamp(0, 1)
        reading = read((back.permute(1, 2, 0) * 255).round().byte().numpy())
        rows.append([reading.scene == scene, looks_right(reading, looks), reading.error])
    return {
        name: round(float(value), 3)
        for name, value in zip(["scene", "looks", "error"], np.mean(rows, axis=0), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", nargs="?", help="folder of a LoRA or of a whole pipeline; without it, the base")
    parser.add_argument("--subject", type=int, default=0, help="number of the subject that it was trained on")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    args = parser.parse_args()
    base, again = (read_model(load(), args.subject, seed) for seed in (1000, 1001))
    scores = score(args.subject, read_model(load(args.trained), args.subject, args.seed), base, again)
    print(json.dumps(scores, indent=2))


if __name__ == "__main__":
    main()
