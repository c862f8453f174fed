"""From pictures to the inputs of a step: every prompt with its own picture, crops, and what is drawn."""

import functools
import json
import math
import pickle
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
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from conftest import one_script
from tests.processes import PATIENCE

pytestmark = one_script

SHIFT, SCALE = 0.25, 0.5
COLOURS = [
    (code // 36 * 51, code // 6 % 6 * 51, code % 6 * 51) for code in np.random.default_rng(0).permutation(216).tolist()
]
Split = tuple[int, int, int]  # batch size, accumulation, processes


@pytest.fixture(scope="module")
def vae(tiny_flux: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(tiny_flux / "vae").requires_grad_(False)


def flags(script: ModuleType, *more: str) -> Any:
    base = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a photo of sks dog", "--resolution=16"]
    return script.parse_args([*base, "--instance_data_dir=dogs", *more])


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
        script.Picture(file.name, functools.partial(Image.open, file), ("{} {} {} {}".format(words, *colour),))
        for colour, file in files.items()
    ]


def dataset_of(script: ModuleType, folder: Path, instances: int, classes: int, *more: str) -> Any:
    instance = plain_pictures(script, folder / "dogs", COLOURS[:instances], "a sks dog")
    prior = plain_pictures(script, folder / "others", COLOURS[-classes:] if classes else [], "a dog")
    return script.DreamBoothDataset(instance, prior, flags(script, *more), 0)


def named_colour(prompt: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", prompt)]


def seen_colour(pixels: Tensor) -> list[int]:
    """The one colour of pixels (3, H, W)."""
    assert (pixels.amax((1, 2)) - pixels.amin((1, 2))).max() < 1e-6
    return ((pixels[:, 0, 0] + 1) * 127.5).round().int().tolist()


def run_batches(
    script: ModuleType, dataset: Any, split: Split = (2, 2, 1), workers: int = 0, epochs: int = 2
) -> list[dict[str, Any]]:
    """Every batch of a run, over all its processes."""
    found: list[dict[str, Any]] = []
    for process in range(split[2]):
        sampler = script.MicroBatches(
            dataset.buckets, batch_size=split[0], accumulation=split[1], process=process, processes=split[2],
            seed=3, first_step=0, last_step=epochs * -(-len(dataset) // math.prod(split)),
        )  # fmt: skip
        options: dict[str, Any] = {"num_workers": workers, "timeout": PATIENCE if workers else 0}
        found += DataLoader(dataset, batch_sampler=sampler, collate_fn=script.collate, **options)
    return found


@pytest.mark.parametrize(
    ("split", "repeats", "workers", "instances", "classes"),
    [((1, 1, 1), 1, 0, 2, 7), ((3, 2, 1), 2, 0, 5, 4), ((2, 1, 2), 3, 2, 3, 4)],
    ids=["one by one, more of the class", "accumulated", "two processes, loaded by two each"],
)
def test_every_prompt_stays_with_its_picture_and_all_are_seen_equally_often(
    script: ModuleType, tmp_path: Path, split: Split, repeats: int, workers: int, instances: int, classes: int
) -> None:
    """The larger half is the epoch, and the smaller is spread over it."""
    dataset = dataset_of(script, tmp_path, instances, classes, f"--repeats={repeats}", "--random_flip")
    counts: Counter[str] = Counter()
    for batch in run_batches(script, dataset, split, workers):
        half = len(batch["keys"])
        assert batch["pixels"].shape == (2 * half, 3, 16, 16)
        for prompt, pixels in zip(batch["prompts"], batch["pixels"], strict=True):
            assert named_colour(prompt) == seen_colour(pixels)
        assert ["sks" in prompt for prompt in batch["prompts"]] == [True] * half + [False] * half
        weights = [key.loss_weight for key in batch["keys"]]
        assert batch["loss_weights"].tolist() == pytest.approx(weights)
        counts.update(prompt for prompt, weight in zip(batch["prompts"], 2 * weights, strict=True) if weight)
    most = max(instances * repeats, classes)
    for words, pictures, examples in (("sks", instances, instances * repeats), ("a dog", classes, classes)):
        found = [count for prompt, count in counts.items() if words in prompt]
        assert len(found) == pictures and sum(found) == 2 * most
        slack = 0 if examples == most else 2 * repeats
        assert all(abs(count - 2 * most / pictures) <= slack for count in found)


def posterior(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Mean and deviation of the latents of pixels (3, H, W), from what the encoder itself gives."""
    mean, log_variance = vae.encoder(pixels[None]).chunk(2, dim=1)
    return torch.stack([mean[0], (log_variance[0].clamp(-30, 20) / 2).exp()])


@pytest.mark.parametrize("repeats", [1, 2])
def test_every_prompt_stays_with_its_cached_posterior(
    script: ModuleType, tmp_path: Path, vae: AutoencoderKL, repeats: int
) -> None:
    dataset = dataset_of(script, tmp_path, 5, 4, f"--repeats={repeats}")
    script.cache_latents(vae, dataset)
    batches = run_batches(script, dataset, (2, 1, 2), epochs=2)
    assert len(batches) == 2 * 2 * -(-5 * repeats // 4)
    for batch in batches:
        assert "pixels" not in batch
        for prompt, got in zip(batch["prompts"], batch["posterior"], strict=True):
            colour = torch.tensor(named_colour(prompt)) / 127.5 - 1
            expected = posterior(vae, colour.view(3, 1, 1).expand(3, 16, 16).contiguous())
            assert got.dtype == torch.float32 and torch.allclose(got, expected, atol=1e-4)


def striped(script: ModuleType) -> Any:
    """A picture 16 high whose brightness is five times the column: a crop of it tells where it was taken."""
    columns = np.broadcast_to(np.arange(48, dtype=np.uint8)[None, :, None] * 5, (16, 48, 3))
    return script.Picture("stripes", functools.partial(Image.fromarray, columns.copy()), ("stripes",), size=(48, 16))


def crop_of(pixels: Tensor) -> tuple[int, bool]:
    """Left edge of a crop of the striped picture, and whether it is mirrored."""
    row = ((pixels[0, 0] + 1) * 127.5 / 5).round().int().tolist()
    flipped = row[0] > row[-1]
    assert row == sorted(row, reverse=flipped) and len(set(row)) == 16
    return min(row), flipped


def crops(
    script: ModuleType, keys: Iterable[tuple[int, int]], *more: str, seed: int = 0, half: str = "instance"
) -> list[Any]:
    """What is seen of the striped picture at each (epoch, position)."""
    dataset = script.DreamBoothDataset([striped(script)], [striped(script)], flags(script, *more), seed)
    return [crop_of(dataset[script.ExampleKey(*key, 0, 1.0, True)][half]["pixels"]) for key in keys]


def test_each_epoch_and_each_repeat_see_another_crop(script: ModuleType) -> None:
    for keys in ([(epoch, 0) for epoch in range(60)], [(0, place) for place in range(60)]):
        seen = crops(script, keys)
        assert len({left for left, _ in seen}) > 20 and not any(flip for _, flip in seen)  # of 33 places
        other = crops(script, keys, half="class")
        assert sum(one == two for one, two in zip(seen, other, strict=True)) < 12


def test_a_crop_and_flip_can_be_drawn_again(script: ModuleType) -> None:
    keys = [(epoch, place) for epoch in range(5) for place in range(5)]
    first, again = (crops(script, order, "--random_flip", seed=1) for order in (keys, keys[::-1]))
    other = crops(script, keys, "--random_flip", seed=2)
    assert first == again[::-1]
    assert sum(one != two for one, two in zip(first, other, strict=True)) > 15


def test_with_cached_latents_each_repeat_keeps_a_crop_and_flip_of_its_own(
    script: ModuleType, vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = script.encode_pixels, []
    monkeypatch.setattr(script, "encode_pixels", lambda vae, pixels: encoded.append(pixels) or encode(vae, pixels))
    dataset = script.DreamBoothDataset([striped(script)], [], flags(script, "--repeats=24", "--random_flip"), 0)
    script.cache_latents(vae, dataset)
    seen = [crop_of(pixels) for (pixels,) in encoded]
    assert len(seen) == 24 and len(set(seen)) > 12 and {flip for _, flip in seen} == {False, True}
    for epoch in (0, 1, 7):
        for repeat, pixels in enumerate(encoded):
            example = dataset[script.ExampleKey(epoch, repeat, repeat, 1.0, True)]["instance"]
            assert torch.allclose(example["posterior"], posterior(vae, pixels[0]), atol=1e-5)
    assert len(encoded) == 24


def number_of(prompt: str) -> float:
    red, green, blue = named_colour(prompt)
    return float(red * 36 + green * 6 + blue) / 51


def cache_numbers(dataset: Any, deviation: float) -> None:
    """Instead of latents: the number of the prompt, spread by `deviation`."""
    dataset.cached = {}
    for source, pictures in dataset.sources.items():
        for index, picture in enumerate(pictures):
            mean = torch.full((16, 4, 4), number_of(picture.prompts[0]))
            dataset.cached[source, index, (16, 16)] = {
                "posterior": torch.stack([mean, torch.full_like(mean, deviation)])
            }


def step_inputs(script: ModuleType, dataset: Any, batch: dict[str, Any], seed: int = 0) -> Any:
    """What the model gets of a batch, each prompt being embedded as its number."""
    prompts = {}
    for prompt in dataset.prompts:
        number = number_of(prompt)
        prompts[prompt] = script.PromptEmbeds(torch.full((4, 8), number), torch.full((8,), number), torch.zeros(77))
    config = SimpleNamespace(shift_factor=SHIFT, scaling_factor=SCALE)
    scheduler = FlowMatchEulerDiscreteScheduler()
    run: Any = SimpleNamespace(
        args=flags(script, "--prior_loss_weight=0.5"),
        data=SimpleNamespace(dataset=dataset, prompts=prompts, vae=SimpleNamespace(config=config), scheduler=scheduler),
        state=SimpleNamespace(seed=seed, step=0),
        accelerator=SimpleNamespace(device=torch.device("cpu")),
    )
    return script.prepare_inputs(run, batch)


@pytest.fixture
def cached(script: ModuleType, tmp_path: Path) -> Any:
    """Five instance and three class pictures whose latents are their prompts' numbers."""
    dataset = dataset_of(script, tmp_path, 5, 3)
    cache_numbers(dataset, deviation=0.0)
    return dataset


def test_latents_embeddings_and_weights_of_a_step_belong_together(script: ModuleType, cached: Any) -> None:
    for batch in run_batches(script, cached, (2, 1, 2)):
        inputs = step_inputs(script, cached, batch)
        numbers = torch.tensor([number_of(prompt) for prompt in batch["prompts"]])
        assert torch.equal(inputs.prompt_embeds, numbers.view(-1, 1, 1).expand(-1, 4, 8))
        assert torch.equal(inputs.pooled_prompt_embeds, numbers.view(-1, 1).expand(-1, 8))
        scaled = (numbers - SHIFT) * SCALE
        assert torch.allclose(inputs.latents, scaled.view(-1, 1, 1, 1).expand(-1, 16, 4, 4))
        weights = [key.loss_weight for key in batch["keys"]]
        assert inputs.loss_weights.tolist() == pytest.approx([*weights, *(weight / 2 for weight in weights)])


def test_the_posterior_is_sampled_anew_at_each_step_and_not_with_the_noise(script: ModuleType, cached: Any) -> None:
    draws: dict[float, list[Tensor]] = {1.0: [], 3.0: []}
    noise = []
    for deviation, found in draws.items():
        cache_numbers(cached, deviation)
        for batch in run_batches(script, cached, (5, 1, 1), epochs=8):
            inputs = step_inputs(script, cached, batch)
            numbers = torch.tensor([number_of(prompt) for prompt in batch["prompts"]])
            found += list((inputs.latents / SCALE + SHIFT - numbers.view(-1, 1, 1, 1)).flatten(1))
            noise += list(inputs.noise.flatten(1))
    one, three = torch.stack(draws[1.0]), torch.stack(draws[3.0])
    assert len(one) == 80 and torch.allclose(three, 3 * one, atol=1e-3)
    together = torch.cat([one, torch.stack(noise[:80])])
    assert (torch.corrcoef(together) - torch.eye(160)).abs().max() < 0.35  # 5.6 standard deviations
    assert abs(one.mean()) < 0.03 and abs(one.std() - 1) < 0.03


def drawn_at(script: ModuleType, dataset: Any, split: Split, seed: int) -> dict[Any, list[bytes]]:
    """Noise, sigma and latents of every weighted place of two epochs, by half, epoch and position."""
    found: dict[Any, list[bytes]] = {}
    for batch in run_batches(script, dataset, split):
        inputs = step_inputs(script, dataset, batch, seed)
        places = [(half, key) for half in ("instance", "class") for key in batch["keys"]]
        for row, (half, key) in enumerate(places):
            if key.loss_weight:
                rows = (inputs.noise[row], inputs.sigmas[row], inputs.latents[row])
                found[half, key.epoch, key.position] = [tensor.numpy().tobytes() for tensor in rows]
    return found


def test_what_is_drawn_depends_on_the_place_and_not_on_the_split(script: ModuleType, cached: Any) -> None:
    cache_numbers(cached, deviation=1.0)
    alone = drawn_at(script, cached, (4, 1, 1), seed=0)
    assert len(alone) == 2 * 2 * 5
    for split in ((1, 4, 1), (2, 1, 2), (1, 1, 4)):
        assert drawn_at(script, cached, split, seed=0) == alone
    drawn = [*alone.values(), *drawn_at(script, cached, (4, 1, 1), seed=1).values()]
    noise, sigmas, latents = ({draws[part] for draws in drawn} for part in range(3))
    assert len(noise) == len(latents) == 40 and len(sigmas) > 36  # of a thousand, so that two may be the same


def test_captions_of_an_image_folder_stay_with_their_pictures(script: ModuleType, tmp_path: Path) -> None:
    """In metadata.jsonl they are in another order than the files."""
    rows = []
    for colour in COLOURS[:6]:
        path = save_plain(tmp_path / "captioned", colour)
        rows.append(json.dumps({"file_name": path.name, "text": "a sks dog {} {} {}".format(*colour)}))
    (tmp_path / "captioned" / "metadata.jsonl").write_text("\n".join(sorted(rows, reverse=True)) + "\n")
    args = flags(script, "--instance_data_dir=", f"--dataset_name={tmp_path / 'captioned'}", "--caption_column=text")
    found = pickle.loads(pickle.dumps(script.list_pictures(args)["instance"]))  # as a process that loads pictures does
    assert sorted(named_colour(picture.prompts[0]) for picture in found) == sorted(map(list, COLOURS[:6]))
    for picture in found:
        assert list(picture.read()[0].getpixel((0, 0))) == named_colour(picture.prompts[0])


def write_table(folder: Path, photos: list[Any], words: list[Any]) -> list[str]:
    """A dataset with the columns photo and words, as flags."""
    folder.mkdir()
    columns = datasets.Dataset.from_dict({"photo": photos, "words": words})
    columns.cast_column("photo", datasets.Image()).to_parquet(folder / "train.parquet")
    return ["--instance_data_dir=", f"--dataset_name={folder}", "--image_column=photo"]


def test_columns_of_other_names_are_read_and_rows_without_a_caption_take_the_instance_prompt(
    script: ModuleType, tmp_path: Path
) -> None:
    photos = [str(save_plain(tmp_path / "plain", colour)) for colour in COLOURS[:4]]
    table = write_table(tmp_path / "table", photos, [" a dog", None, "", "  "])
    for more, first in ((["--caption_column=words"], "a dog"), ([], "a photo of sks dog")):
        found = script.list_pictures(flags(script, *table, *more))["instance"]
        assert [picture.prompts[0] for picture in found] == [first, *["a photo of sks dog"] * 3]
        assert [picture.read()[0].getpixel((0, 0)) for picture in found] == COLOURS[:4]


def test_rows_whose_picture_cannot_be_read_are_named(script: ModuleType, tmp_path: Path) -> None:
    photos = [save_plain(tmp_path / "plain", colour).read_bytes() for colour in COLOURS[:4]]
    rows: list[Any] = [{"bytes": photo, "path": None} for photo in photos]
    rows[1], rows[3]["bytes"] = None, photos[3][:60]
    table = write_table(tmp_path / "table", rows, ["a dog"] * 4)
    with pytest.raises(script.UsageError) as error:
        script.list_pictures(flags(script, *table))
    assert re.findall(r"row \d", str(error.value)) == ["row 1", "row 3"]
