"""From pictures to the inputs of a step: every prompt with its own picture, crops, and what is drawn."""

import argparse
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from conftest import one_script
from tests.processes import PATIENCE

pytestmark = one_script

SHIFT, SCALE = 0.25, 0.5
COLOURS = [
    (code // 36 * 51, code // 6 % 6 * 51, code % 6 * 51) for code in np.random.default_rng(0).permutation(216).tolist()
]


@pytest.fixture(scope="module")
def vae(tiny_flux: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_flux / "vae").requires_grad_(False)


def flags(script: ModuleType, *more: str) -> argparse.Namespace:
    base = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a photo of sks dog", "--resolution=16"]
    data = [] if any(flag.startswith("--dataset_name") for flag in more) else ["--instance_data_dir=dogs"]
    return script.parse_args([*base, *data, *more])


def schedule(script: ModuleType, examples: int, split: tuple[int, int, int], process: int, seed: int, last: int) -> Any:
    """The keys of one process, from the first step to `last`; `split` is batch size, accumulation and processes."""
    batch_size, accumulation, processes = split
    return script.MicroBatches(examples, batch_size, accumulation, process, processes, seed, 0, last)


def epoch_length(examples: int, split: tuple[int, int, int]) -> int:
    return -(-examples // math.prod(split))


# ----------------------------------------------------------------------------------------------------------------------
# Each prompt with its picture
# ----------------------------------------------------------------------------------------------------------------------


def save_plain(folder: Path, colour: tuple[int, int, int]) -> Path:
    """A picture of one colour, its sides drawn from the colour."""
    folder.mkdir(exist_ok=True)
    path = folder / "{:03d}-{:03d}-{:03d}.png".format(*colour)
    Image.new("RGB", (16 + colour[0] % 9, 16 + colour[1] % 7), colour).save(path)
    return path


def plain_pictures(script: ModuleType, folder: Path, colours: list[tuple[int, int, int]], words: str) -> list[Any]:
    """Pictures of one colour each, whose prompts are `words` and the colour."""
    files = {colour: save_plain(folder, colour) for colour in colours}
    return [
        script.Picture(file.name, functools.partial(Image.open, file), "{} {} {} {}".format(words, *colour))
        for colour, file in files.items()
    ]


def named_colour(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt)]


def seen_colour(pixels: Tensor) -> list[int]:
    """The one colour of pixels (3, H, W)."""
    assert (pixels.amax((1, 2)) - pixels.amin((1, 2))).max() < 1e-6
    return ((pixels[:, 0, 0] + 1) * 127.5).round().int().tolist()


def pairs(
    script: ModuleType, dataset: Any, split: tuple[int, int, int] = (2, 2, 1), workers: int = 0, epochs: int = 2
) -> list[dict[str, Any]]:
    """Every batch of a run, over all its processes."""
    last = epochs * epoch_length(len(dataset), split)
    found: list[dict[str, Any]] = []
    for process in range(split[2]):
        sampler = schedule(script, len(dataset), split, process, seed=3, last=last)
        options: dict[str, Any] = {"num_workers": workers, "timeout": PATIENCE if workers else 0}
        found += DataLoader(dataset, batch_sampler=sampler, collate_fn=script.collate, **options)
    return found


@pytest.mark.parametrize(
    ("split", "repeats", "workers"),
    [((1, 1, 1), 1, 0), ((3, 2, 1), 2, 0), ((2, 1, 3), 2, 0), ((2, 1, 2), 3, 2)],
    ids=["one by one", "accumulated", "three processes", "two processes, loaded by two each"],
)
def test_every_prompt_stays_with_its_picture(
    script: ModuleType, tmp_path: Path, split: tuple[int, int, int], repeats: int, workers: int
) -> None:
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:5], "a sks dog")
    classes = plain_pictures(script, tmp_path / "others", COLOURS[-4:], "a dog")
    args = flags(script, f"--repeats={repeats}", "--random_flip")
    dataset = script.DreamBoothDataset(instance, classes, args, 0)
    counts: Counter[str] = Counter()
    for batch in pairs(script, dataset, split, workers):
        for prompt, pixels in zip(batch["prompts"], batch["pixels"], strict=True):
            assert named_colour(prompt) == seen_colour(pixels)
        weights = [key.loss_weight for key in batch["keys"]]
        counts.update(prompt for prompt, weight in zip(batch["prompts"], weights * 2, strict=True) if weight)
    assert {prompt: count for prompt, count in counts.items() if "sks" in prompt} == {
        picture.prompt: 2 * repeats for picture in instance
    }


def test_a_batch_holds_the_instance_pictures_and_then_the_class_pictures(script: ModuleType, tmp_path: Path) -> None:
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:5], "a sks dog")
    classes = plain_pictures(script, tmp_path / "others", COLOURS[-3:], "a dog")
    dataset = script.DreamBoothDataset(instance, classes, flags(script), 0)
    for batch in pairs(script, dataset, (2, 1, 1)):
        examples = [key.example for key in batch["keys"]]
        wanted = [instance[example].prompt for example in examples] + [
            classes[example % 3].prompt for example in examples
        ]
        assert batch["prompts"] == wanted
        assert batch["pixels"].shape == (2 * len(examples), 3, 16, 16)
        assert batch["loss_weights"].tolist() == pytest.approx([1 / len(examples)] * len(examples))


@pytest.mark.parametrize(("instances", "classes"), [(2, 7), (7, 2), (4, 4)])
def test_the_larger_half_is_the_epoch_and_the_smaller_is_spread_over_it(
    script: ModuleType, tmp_path: Path, instances: int, classes: int
) -> None:
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:instances], "a sks dog")
    prior = plain_pictures(script, tmp_path / "others", COLOURS[-classes:], "a dog")
    dataset = script.DreamBoothDataset(instance, prior, flags(script), 0)
    counts = Counter(prompt for batch in pairs(script, dataset, (1, 1, 1), epochs=1) for prompt in batch["prompts"])
    for half in (instance, prior):
        assert {counts[picture.prompt] for picture in half} <= {
            max(instances, classes) // len(half), -(-max(instances, classes) // len(half))
        }  # fmt: skip
        assert sum(counts[picture.prompt] for picture in half) == max(instances, classes)


def test_prompts_are_listed_once(script: ModuleType, tmp_path: Path) -> None:
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:3], "a sks dog")
    classes = [script.Picture(str(place), Image.new, "a dog") for place in range(3)]
    dataset = script.DreamBoothDataset(instance, classes, flags(script, "--repeats=4"), 0)
    assert dataset.prompts == [*(picture.prompt for picture in instance), "a dog"]


def posterior(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the latents of pixels (3, H, W), from what the encoder itself gives."""
    mean, log_variance = vae.encoder(pixels[None]).chunk(2, dim=1)
    return mean[0], (log_variance[0].clamp(-30, 20) / 2).exp()


@pytest.mark.parametrize("repeats", [1, 2])
def test_every_prompt_stays_with_its_cached_latents(
    script: ModuleType, tmp_path: Path, vae: AutoencoderKL, repeats: int
) -> None:
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:5], "a sks dog")
    classes = plain_pictures(script, tmp_path / "others", COLOURS[-4:], "a dog")
    dataset = script.DreamBoothDataset(instance, classes, flags(script, f"--repeats={repeats}"), 0)
    script.cache_latents(Accelerator(), vae, dataset)
    of_prompt = {}
    for picture in [*instance, *classes]:
        colour = torch.tensor(named_colour(picture.prompt)) / 127.5 - 1
        of_prompt[picture.prompt] = posterior(vae, colour.view(3, 1, 1).expand(3, 16, 16).contiguous())[0]
    batches = pairs(script, dataset, (2, 1, 2), epochs=2)
    assert len(batches) == 2 * 2 * epoch_length(5 * repeats, (2, 1, 2))
    for batch in batches:
        for prompt, mean in zip(batch["prompts"], batch["latents"].mean, strict=True):
            assert min(of_prompt, key=lambda name: float((of_prompt[name] - mean).norm())) == prompt
            assert torch.allclose(mean, of_prompt[prompt], atol=1e-4)


def test_cached_latents_are_the_posterior_of_the_pixels(script: ModuleType, pictures: Path, vae: AutoencoderKL) -> None:
    instance = script.pictures_in_folder("--instance_data_dir", str(pictures), "a sks dog")
    dataset = script.DreamBoothDataset(instance, [], flags(script, "--center_crop", "--resolution=32"), 0)
    pixels = [dataset[script.ExampleKey(0, 0, index, 1, True)]["instance"]["pixels"] for index in range(5)]
    script.cache_latents(Accelerator(), vae, dataset)
    for index in range(5):
        got = dataset[script.ExampleKey(0, 0, index, 1, True)]["instance"]["latents"]
        for part, expected in zip(got, posterior(vae, pixels[index]), strict=True):
            assert part.dtype == torch.float32 and torch.allclose(part, expected, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_encoding_and_end_with_the_same_cache(
    script: ModuleType, tmp_path: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, processes: int
) -> None:
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:4], "a sks dog")
    classes = plain_pictures(script, tmp_path / "others", COLOURS[-3:], "a dog")
    alone, *together = (script.DreamBoothDataset(instance, classes, flags(script), 0) for _ in range(1 + processes))
    script.cache_latents(Accelerator(), vae, alone)
    monkeypatch.setattr(script, "gather_dicts", lambda mine: mine)  # what a process would give to the others
    for process, dataset in enumerate(together):
        stand_in = SimpleNamespace(process_index=process, num_processes=processes, is_main_process=process == 0)
        script.cache_latents(stand_in, vae, dataset)
    assert sorted(key for dataset in together for key in dataset.cached) == sorted(alone.cached)
    for dataset in together:
        assert all(
            torch.equal(held["latents"].mean, alone.cached[key]["latents"].mean) for key, held in dataset.cached.items()
        )


def encodings(monkeypatch: pytest.MonkeyPatch, script: ModuleType) -> list[Tensor]:
    """The pixels of every call of the VAE from now on."""
    encode, calls = script.encode_pixels, []

    def noted(vae: AutoencoderKL, pixels: Tensor) -> Any:
        calls.append(pixels)
        return encode(vae, pixels)

    monkeypatch.setattr(script, "encode_pixels", noted)
    return calls


def test_repeats_that_look_the_same_are_encoded_once(
    script: ModuleType, pictures: Path, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = script.pictures_in_folder("--instance_data_dir", str(pictures), "a sks dog")
    dataset = script.DreamBoothDataset(instance, [], flags(script, "--center_crop", "--repeats=3"), 0)
    calls = encodings(monkeypatch, script)
    script.cache_latents(Accelerator(), vae, dataset)
    assert len(calls) == 5 and len(dataset.cached) == 15


# ----------------------------------------------------------------------------------------------------------------------
# Crops and flips
# ----------------------------------------------------------------------------------------------------------------------


def striped(script: ModuleType, width: int = 48) -> Any:
    """A picture 16 high whose brightness is five times the column: a crop of it tells where it was taken."""
    columns = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None] * 5, (16, width, 3))
    return script.Picture("stripes", functools.partial(Image.fromarray, columns.copy()), "stripes")


def view_of(pixels: Tensor) -> tuple[int, bool]:
    """Left edge of a crop of the striped picture, and whether it is mirrored."""
    row = ((pixels[0, 0] + 1) * 127.5 / 5).round().int().tolist()
    flipped = row[0] > row[-1]
    assert row == sorted(row, reverse=flipped) and len(set(row)) == 16
    return min(row), flipped


def views(script: ModuleType, dataset: Any, keys: Iterable[tuple[int, int]], half: str = "instance") -> list[Any]:
    """What is seen of the first picture at each (epoch, position)."""
    return [view_of(dataset[script.ExampleKey(*key, 0, 1, True)][half]["pixels"]) for key in keys]


def test_each_epoch_sees_another_crop(script: ModuleType) -> None:
    dataset = script.DreamBoothDataset([striped(script)], [], flags(script), 0)
    seen = views(script, dataset, ((epoch, 0) for epoch in range(60)))
    assert len({left for left, _ in seen}) > 20  # of 33
    assert not any(flip for _, flip in seen)


def test_each_epoch_draws_the_flip_anew(script: ModuleType) -> None:
    dataset = script.DreamBoothDataset([striped(script)], [], flags(script, "--center_crop", "--random_flip"), 0)
    seen = Counter(views(script, dataset, ((epoch, 0) for epoch in range(60))))
    assert seen.keys() == {(16, False), (16, True)}
    assert 15 < seen[16, True] < 45


def test_without_chance_each_epoch_sees_the_same(script: ModuleType) -> None:
    dataset = script.DreamBoothDataset([striped(script)], [], flags(script, "--center_crop"), 0)
    assert set(views(script, dataset, ((epoch, 0) for epoch in range(10)))) == {(16, False)}


def test_repeats_in_an_epoch_see_other_crops(script: ModuleType) -> None:
    dataset = script.DreamBoothDataset([striped(script)], [], flags(script, "--repeats=60"), 0)
    assert len(set(views(script, dataset, ((0, place) for place in range(60))))) > 20


def test_a_crop_and_flip_can_be_drawn_again(script: ModuleType) -> None:
    keys = [(epoch, place) for epoch in range(5) for place in range(5)]
    first, again, other = (
        views(script, script.DreamBoothDataset([striped(script)], [], flags(script, "--random_flip"), seed), order)
        for seed, order in ((1, keys), (1, keys[::-1]), (2, keys))
    )
    assert first == again[::-1]
    assert sum(one != two for one, two in zip(first, other, strict=True)) > 15


def test_an_instance_picture_and_its_class_picture_are_cropped_apart(script: ModuleType) -> None:
    dataset = script.DreamBoothDataset([striped(script)], [striped(script)], flags(script), 0)
    keys = [(epoch, 0) for epoch in range(30)]
    halves = (views(script, dataset, keys, half) for half in ("instance", "class"))
    assert sum(one == other for one, other in zip(*halves, strict=True)) < 8


def test_with_cached_latents_the_crop_is_drawn_once(
    script: ModuleType, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = script.DreamBoothDataset([striped(script)], [], flags(script, "--cache_latents"), 0)
    calls = encodings(monkeypatch, script)
    script.cache_latents(Accelerator(), vae, dataset)
    means = [dataset[script.ExampleKey(epoch, 0, 0, 1, True)]["instance"]["latents"].mean for epoch in range(5)]
    assert len(calls) == 1
    assert all(torch.equal(mean, means[0]) for mean in means)


def test_with_cached_latents_repeats_have_crops_and_flips_of_their_own(
    script: ModuleType, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = flags(script, "--cache_latents", "--repeats=24", "--random_flip")
    dataset = script.DreamBoothDataset([striped(script)], [], args, 0)
    calls = encodings(monkeypatch, script)
    script.cache_latents(Accelerator(), vae, dataset)
    seen = [view_of(pixels[0]) for pixels in calls]
    assert len(seen) == len(set(seen)) > 12
    assert {flip for _, flip in seen} == {False, True}
    assert len({held["latents"].mean.numpy().tobytes() for held in dataset.cached.values()}) == len(seen)


# ----------------------------------------------------------------------------------------------------------------------
# The inputs of a step
# ----------------------------------------------------------------------------------------------------------------------


def number_of(prompt: str) -> float:
    red, green, blue = named_colour(prompt)
    return float(red * 36 + green * 6 + blue) / 51


def cache_numbers(script: ModuleType, dataset: Any, deviation: float) -> None:
    """Instead of latents: the number of the prompt, spread by `deviation`."""
    dataset.cached = {
        (source, index, (16, 16), 0): {
            "latents": script.LatentDistribution(
                torch.full((16, 4, 4), number_of(picture.prompt)), torch.full((16, 4, 4), deviation)
            )
        }
        for source, pictures in dataset.sources.items()
        for index, picture in enumerate(pictures)
    }


def step_inputs(
    script: ModuleType, dataset: Any, batch: dict[str, Any], seed: int = 0, vae: AutoencoderKL | None = None
) -> Any:
    """What the model gets of a batch, each prompt being embedded as its number."""
    prompts = {
        prompt: script.PromptEmbeds(
            torch.full((4, 8), number_of(prompt)), torch.full((8,), number_of(prompt)), torch.zeros(77).long()
        )
        for prompt in dataset.prompts
    }
    transformer: Any = nn.Identity()
    transformer.config = SimpleNamespace(guidance_embeds=True)
    config = SimpleNamespace(shift_factor=SHIFT, scaling_factor=SCALE)
    data = script.TrainingData(dataset, prompts, vae, config, validation=[], metadata={})
    models = script.Trained(transformer, None, None, None)
    run = script.Run(flags(script), Accelerator(), data, models, script.RunState(0, seed), None)
    return script.prepare_inputs(run, batch, torch.linspace(1, 0.001, 1000))


@pytest.fixture
def cached(script: ModuleType, tmp_path: Path) -> Any:
    """Five instance and three class pictures whose latents are their prompts' numbers."""
    instance = plain_pictures(script, tmp_path / "dogs", COLOURS[:5], "a sks dog")
    classes = plain_pictures(script, tmp_path / "others", COLOURS[-3:], "a dog")
    dataset = script.DreamBoothDataset(instance, classes, flags(script), 0)
    cache_numbers(script, dataset, deviation=0.0)
    return dataset


def test_latents_embeddings_and_pooled_vectors_of_a_step_belong_together(script: ModuleType, cached: Any) -> None:
    for batch in pairs(script, cached, (2, 1, 2)):
        inputs = step_inputs(script, cached, batch)
        numbers = torch.tensor([number_of(prompt) for prompt in batch["prompts"]])
        assert torch.equal(inputs.prompt_embeds, numbers.view(-1, 1, 1).expand(-1, 4, 8))
        assert torch.equal(inputs.pooled_prompt_embeds, numbers.view(-1, 1).expand(-1, 8))
        scaled = (numbers - SHIFT) * SCALE
        assert torch.allclose(inputs.latents, scaled.view(-1, 1, 1, 1).expand(-1, 16, 4, 4))


def test_pictures_are_encoded_at_each_step_without_a_cache(
    script: ModuleType, tmp_path: Path, vae: AutoencoderKL
) -> None:
    dataset = script.DreamBoothDataset(
        plain_pictures(script, tmp_path / "dogs", COLOURS[:3], "a sks dog"), [], flags(script), 0
    )
    (batch,) = pairs(script, dataset, (3, 1, 1), epochs=1)
    live = step_inputs(script, dataset, batch, vae=vae)
    script.cache_latents(Accelerator(), vae, dataset)
    (from_cache,) = pairs(script, dataset, (3, 1, 1), epochs=1)
    assert torch.allclose(live.latents, step_inputs(script, dataset, from_cache).latents, atol=1e-5)


def test_the_posterior_is_sampled_anew_at_each_step(script: ModuleType, cached: Any) -> None:
    cache_numbers(script, cached, deviation=1.0)
    draws = []
    for batch in pairs(script, cached, (5, 1, 1), epochs=8):
        latents = step_inputs(script, cached, batch).latents
        numbers = torch.tensor([number_of(prompt) for prompt in batch["prompts"]])
        draws += list((latents / SCALE + SHIFT - numbers.view(-1, 1, 1, 1)).flatten(1))
    assert len(draws) == 80
    assert (torch.corrcoef(torch.stack(draws)) - torch.eye(80)).abs().max() < 0.35  # 5.6 standard deviations
    everything = torch.cat(draws)
    assert abs(everything.mean()) < 0.03 and abs(everything.std() - 1) < 0.03


def test_the_draw_is_spread_by_the_posteriors_deviation(script: ModuleType, cached: Any) -> None:
    sampled = {}
    for deviation in (0.0, 1.0, 3.0):
        cache_numbers(script, cached, deviation)
        sampled[deviation] = step_inputs(script, cached, pairs(script, cached)[0]).latents
    one, three = sampled[1.0] - sampled[0.0], sampled[3.0] - sampled[0.0]
    assert torch.allclose(three, 3 * one, atol=1e-4) and one.std() > 0.9 * SCALE


def test_the_noise_is_not_that_of_the_posterior(script: ModuleType, cached: Any) -> None:
    plain = step_inputs(script, cached, pairs(script, cached)[0])
    cache_numbers(script, cached, deviation=1.0)
    inputs = step_inputs(script, cached, pairs(script, cached)[0])
    both = torch.stack([inputs.noise.flatten(), (inputs.latents - plain.latents).flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.2
    assert torch.equal(inputs.noise, plain.noise)


def drawn_at(script: ModuleType, dataset: Any, split: tuple[int, int, int], seed: int) -> dict[Any, tuple[bytes, ...]]:
    """Noise, sigma and latents of every weighted place of two epochs, by half, epoch and position."""
    found: dict[Any, tuple[bytes, ...]] = {}
    for batch in pairs(script, dataset, split):
        inputs = step_inputs(script, dataset, batch, seed)
        places = [(half, *key[:2], key.loss_weight) for half in ("instance", "class") for key in batch["keys"]]
        for row, (*place, weight) in enumerate(places):
            if weight:
                rows = (getattr(inputs, name)[row] for name in ("noise", "sigmas", "latents"))
                found[tuple(place)] = tuple(tensor.numpy().tobytes() for tensor in rows)
    return found


def test_what_is_drawn_depends_on_the_place_and_not_on_the_split(script: ModuleType, cached: Any) -> None:
    cache_numbers(script, cached, deviation=1.0)
    alone = drawn_at(script, cached, (4, 1, 1), seed=0)
    assert len(alone) == 2 * 2 * 5
    for split in ((1, 4, 1), (2, 1, 2), (1, 1, 4)):
        assert drawn_at(script, cached, split, seed=0) == alone


@pytest.mark.parametrize(("place", "name"), enumerate(("noise", "sigmas", "latents")))
def test_no_two_places_share_a_draw(script: ModuleType, cached: Any, place: int, name: str) -> None:
    cache_numbers(script, cached, deviation=1.0)
    drawn = [draws[place] for seed in (0, 1) for draws in drawn_at(script, cached, (2, 1, 2), seed).values()]
    # Of 1,000 noise levels, two of 40 may be the same by chance.
    assert len(drawn) == 40 and len(set(drawn)) >= (37 if name == "sigmas" else 40)


# ----------------------------------------------------------------------------------------------------------------------
# --dataset_name
# ----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Six pictures of one colour each, whose captions in metadata.jsonl name it, in another order than the files'."""
    folder = tmp_path / "captioned"
    lines = []
    for colour in COLOURS[:6]:
        path = save_plain(folder, colour)
        lines.append(json.dumps({"file_name": path.name, "text": "a sks dog {} {} {}".format(*colour)}))
    (folder / "metadata.jsonl").write_text("\n".join(sorted(lines, reverse=True)) + "\n")
    return folder


def test_captions_of_an_image_folder_stay_with_their_pictures(script: ModuleType, image_folder: Path) -> None:
    args = flags(script, f"--dataset_name={image_folder}", "--caption_column=text", "--repeats=2")
    found = script.pictures_in_dataset(args)
    assert sorted(named_colour(picture.prompt) for picture in found) == sorted(map(list, COLOURS[:6]))
    dataset = script.DreamBoothDataset(found, [], args, 0)
    seen = []
    for batch in pairs(script, dataset, (2, 1, 2), workers=2):
        for prompt, pixels, key in zip(batch["prompts"], batch["pixels"], batch["keys"], strict=True):
            assert named_colour(prompt) == seen_colour(pixels)
            seen += [prompt] if key.loss_weight else []
    assert Counter(seen) == Counter({picture.prompt: 4 for picture in found})


def test_without_a_caption_column_all_share_the_instance_prompt(script: ModuleType, image_folder: Path) -> None:
    found = script.pictures_in_dataset(flags(script, f"--dataset_name={image_folder}"))
    assert [picture.prompt for picture in found] == ["a photo of sks dog"] * 6


def write_table(folder: Path, photos: list[Any], words: list[Any]) -> Path:
    """A dataset with the columns photo and words."""
    folder.mkdir()
    columns = datasets.Dataset.from_dict({"photo": photos, "words": words})
    columns.cast_column("photo", datasets.Image()).to_parquet(folder / "train.parquet")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> list[str]:
    return [str(save_plain(tmp_path / "plain", colour)) for colour in COLOURS[:4]]


def test_columns_of_other_names_are_read(script: ModuleType, tmp_path: Path, photos: list[str]) -> None:
    words = ["{} {} {}".format(*colour) for colour in COLOURS[:4]]
    table = write_table(tmp_path / "table", photos, words)
    columns = ("--image_column=photo", "--caption_column=words")
    found = script.pictures_in_dataset(flags(script, f"--dataset_name={table}", *columns))
    assert [picture.prompt for picture in found] == words
    for picture in found:
        with picture.open() as image:
            assert list(image.getpixel((0, 0))) == named_colour(picture.prompt)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (["--image_column=picture"], ["--image_column", "'picture'", "photo, words"]),
        (["--image_column=photo", "--caption_column=text"], ["--caption_column", "'text'", "photo, words"]),
        (["--image_column=words"], ["--image_column", "'words'", "pictures"]),
        (
            ["--image_column=photo", "--caption_column=words", "--instance_prompt="],
            ["--caption_column", "'words'", "row 1, 2, 3", "--instance_prompt"],
        ),
    ],
    ids=["no such image column", "no such caption column", "no pictures", "rows without a caption"],
)
def test_columns_that_do_not_fit_are_told_by_flag_value_and_what_there_is(
    script: ModuleType, tmp_path: Path, photos: list[str], columns: list[str], words: list[str]
) -> None:
    table = write_table(tmp_path / "table", photos, ["a dog", None, "", "  "])
    with pytest.raises(script.UsageError) as error:
        script.pictures_in_dataset(flags(script, f"--dataset_name={table}", *columns))
    assert [word for word in words if word not in str(error.value)] == []


def test_rows_without_a_caption_take_the_instance_prompt(
    script: ModuleType, tmp_path: Path, photos: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    table = write_table(tmp_path / "table", photos, ["a dog", None, "", "  "])
    columns = ("--image_column=photo", "--caption_column=words")
    found = script.pictures_in_dataset(flags(script, f"--dataset_name={table}", *columns))
    assert [picture.prompt for picture in found] == ["a dog", *["a photo of sks dog"] * 3]
    assert "3 pictures take --instance_prompt for a caption: rows 1, 2, 3" in caplog.text


def test_captions_that_are_numbers_are_refused(script: ModuleType, tmp_path: Path, photos: list[str]) -> None:
    table = write_table(tmp_path / "table", photos, [1, 2, 3, 4])
    columns = ("--image_column=photo", "--caption_column=words")
    with pytest.raises(script.UsageError, match="row 0, 1, 2, 3"):
        script.pictures_in_dataset(flags(script, f"--dataset_name={table}", *columns))


def test_a_dataset_that_does_not_load_is_told_by_name(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(script.UsageError, match=f"--dataset_name is '{tmp_path}/nowhere'"):
        script.pictures_in_dataset(flags(script, f"--dataset_name={tmp_path}/nowhere"))


@pytest.mark.parametrize("kind", ["missing", "cut"])
def test_rows_whose_picture_cannot_be_read_are_named(
    script: ModuleType, tmp_path: Path, photos: list[str], kind: str
) -> None:
    rows: list[Any] = [{"bytes": Path(photo).read_bytes(), "path": None} for photo in photos]
    for row in (1, 3):
        rows[row] = None if kind == "missing" else {"bytes": rows[row]["bytes"][:60], "path": None}
    table = write_table(tmp_path / "table", rows, ["a dog"] * 4)
    found = script.pictures_in_dataset(flags(script, f"--dataset_name={table}", "--image_column=photo"))
    with pytest.raises(script.UsageError) as error:
        script.check_pictures(found)
    assert re.findall(r"row \d", str(error.value)) == ["row 1", "row 3"]
