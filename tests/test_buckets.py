"""Aspect-ratio buckets: each picture in the nearest, a micro-batch in one, every picture once an epoch."""

import itertools
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from PIL import Image

from conftest import Run, one_script

pytestmark = one_script

EXPLICIT = "--aspect_ratio_buckets=32,32;16,48;48,16"
RANDOM_SIZES = np.exp(np.random.default_rng(0).uniform(math.log(300), math.log(900), (50, 2))).astype(int).tolist()


def parse(script: ModuleType, *flags: str) -> Any:
    base = ["--pretrained_model_name_or_path=flux", "--instance_data_dir=dogs", "--instance_prompt=a sks dog"]
    return script.parse_args([*base, "--resolution=32", *flags])


def plain(script: ModuleType, sizes: Iterable[tuple[int, int]]) -> list[Any]:
    """Pictures of these sizes, as `check_pictures` returns them."""
    return [
        script.Picture(f"{number}", lambda: pytest.fail("opened"), "a sks dog", tuple(size))
        for number, size in enumerate(sizes)
    ]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Nine noisy pictures: three about square, four wide, two tall."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    sizes = [(40, 40), (50, 52), (64, 60), (90, 30), (96, 32), (80, 25), (120, 44), (30, 90), (20, 64)]
    for number, size in enumerate(sizes):
        Image.effect_noise(size, 80).save(folder / f"{number}.png")
    return folder


BUCKETS = [(32, 32)] * 3 + [(48, 16)] * 4 + [(16, 48)] * 2  # of those pictures, width and height


# ----------------------------------------------------------------------------------------------------------------------
# Which sizes, and which picture goes where
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [512, 768, 1024])
def test_automatic_buckets_have_the_area_of_the_square_in_whole_tokens_both_ways_up(
    script: ModuleType, resolution: int
) -> None:
    sizes = script.training_sizes(parse(script, "--aspect_ratio_buckets=auto", f"--resolution={resolution}"))
    assert len(set(sizes)) == len(sizes) >= 9 and (resolution, resolution) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert all(side % 16 == 0 for size in sizes for side in size)
    assert max(abs(width * height / resolution**2 - 1) for width, height in sizes) < 0.05


def test_buckets_are_given_as_height_and_width(script: ModuleType) -> None:
    assert script.training_sizes(parse(script, "--aspect_ratio_buckets=640,384;512,512")) == [(384, 640), (512, 512)]
    assert script.training_sizes(parse(script)) == [(32, 32)]


def test_fifty_pictures_of_random_sizes_lose_under_six_percent_where_a_square_loses_over_twentyfive(
    script: ModuleType,
) -> None:
    lost = {}
    for flag in ("--aspect_ratio_buckets=auto", "--resolution=512"):
        sizes = script.training_sizes(parse(script, "--resolution=512", flag))
        shares = []
        for width, height in RANDOM_SIZES:
            bucket = script.nearest_size((width, height), sizes)
            assert bucket == sizes[int(np.argmin([abs(np.log(width / height) - np.log(w / h)) for w, h in sizes]))]
            ratio = (width / height) / (bucket[0] / bucket[1])
            shares.append(1 - min(ratio, 1 / ratio))
        lost[flag] = float(np.mean(shares))
    assert lost["--aspect_ratio_buckets=auto"] < 0.06 and lost["--resolution=512"] > 0.25


def test_among_buckets_of_one_shape_the_nearest_in_area_is_taken(script: ModuleType) -> None:
    sizes = [(512, 512), (1024, 1024), (256, 256), (512, 256)]
    assert [script.nearest_size((side, side), sizes)[0] for side in (100, 300, 600, 900, 4000)] == [
        256,
        256,
        512,
        1024,
        1024,
    ]


def test_nearness_is_a_factor_of_the_aspect_ratio(script: ModuleType) -> None:
    sizes = [(512, 1024), (1024, 1024)]  # 0.5 and 1: the middle is 0.71, not 0.75
    assert [script.nearest_size((width, 1000), sizes)[0] for width in (690, 730)] == [512, 1024]


def test_a_resized_picture_covers_its_bucket_and_exceeds_it_one_way_only(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    for width, height, *bucket in np.concatenate(
        [rng.integers(1, 5000, (500, 2)), rng.integers(1, 80, (500, 2)) * 16], 1
    ).tolist():
        resized = script.resized_size(width, height, tuple(bucket))
        assert (resized[0] == bucket[0] and resized[1] >= bucket[1]) or (
            resized[1] == bucket[1] and resized[0] >= bucket[0]
        )
        scale = max(bucket[0] / width, bucket[1] / height)
        assert all(abs(got - scale * side) <= 1 for got, side in zip(resized, (width, height), strict=True))


def test_the_report_says_which_picture_went_where_and_how_much_was_cropped(
    script: ModuleType, shapes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = parse(script, EXPLICIT, f"--instance_data_dir={shapes}")
    with caplog.at_level(logging.INFO, script.__name__):
        script.list_pictures(args)
    lines = {line.split(":")[0].strip(): line for line in caplog.messages[-1].splitlines()}
    for name, bucket, numbers in (
        ("32x32", (32, 32), (0, 1, 2)),
        ("48x16", (48, 16), (3, 4, 5, 6)),
        ("16x48", (16, 48), (7, 8)),
    ):
        shares = {}
        for number in numbers:
            with Image.open(shapes / f"{number}.png") as image:
                scale = max(bucket[0] / image.width, bucket[1] / image.height)
                resized = math.floor(image.width * scale + 1e-9) * math.floor(image.height * scale + 1e-9)
            shares[number] = 100 - 100 * bucket[0] * bucket[1] / resized
        assert f"{name}: {len(numbers)}, cropped by {np.mean(list(shares.values())):.1f} %" in lines[name]
        assert [
            number for number, share in shares.items() if f"shapes/{number}.png {share:.1f} %" not in lines[name]
        ] == []


# ----------------------------------------------------------------------------------------------------------------------
# Which examples make up a step
# ----------------------------------------------------------------------------------------------------------------------

SPLITS = [(1, 1, 1), (4, 1, 1), (2, 3, 1), (1, 4, 2), (2, 1, 3), (3, 2, 2), (8, 1, 2)]  # batch, accumulation, processes
Step = list[list[list[Any]]]  # a step's keys: by process, by micro-batch


def steps(script: ModuleType, buckets: Any, split: tuple[int, int, int], first: int = 0, epochs: int = 2) -> list[Step]:
    """All processes' steps of a run from its step `first` to the end of its last epoch."""
    processes = split[2]
    run: dict[int, Step] = {}
    for process in range(processes):
        length = script.MicroBatches(len(buckets), *split[:2], process, processes, 3, 0, 0, buckets).steps_per_epoch
        schedule = script.MicroBatches(len(buckets), *split[:2], process, processes, 3, first, epochs * length, buckets)
        number = first
        for batch in schedule:
            run.setdefault(number, [[] for _ in range(processes)])[process].append(batch)
            number += batch[0].last
        assert number == epochs * length
    return [step for _, step in sorted(run.items())]


@pytest.fixture
def buckets(script: ModuleType) -> list[tuple[int, int]]:
    """Of the fifty pictures of random sizes."""
    args = parse(script, "--aspect_ratio_buckets=auto", "--resolution=512")
    found: list[tuple[int, int]] = script.DreamBoothDataset(plain(script, RANDOM_SIZES), [], args, 0).buckets
    assert len(set(found)) > 8
    return found


def test_every_picture_is_trained_once_an_epoch(script: ModuleType, buckets: Any) -> None:
    for split in SPLITS:
        keys = [key for step in steps(script, buckets, split) for batch in itertools.chain(*step) for key in batch]
        trained = [key for key in keys if key.loss_weight]
        wanted = list(itertools.product(range(2), range(50)))
        assert sorted((key.epoch, key.example) for key in trained) == wanted, split
        assert sorted((key.epoch, key.position) for key in trained) == wanted, split


def test_a_micro_batch_is_of_one_bucket_and_small_only_where_its_bucket_ends(script: ModuleType, buckets: Any) -> None:
    for split in SPLITS:
        small: Counter[Any] = Counter()
        for step in steps(script, buckets, split, epochs=1):
            for batch in itertools.chain(*step):
                (bucket,) = {buckets[key.example] for key in batch}
                assert len(batch) <= split[0], split
                small[bucket] += len(batch) < split[0] and batch[0].loss_weight > 0
        assert max(small.values()) <= 1, split


def test_the_weights_of_a_step_are_equal_and_sum_to_one_and_processes_do_equally_many_micro_batches(
    script: ModuleType, buckets: Any
) -> None:
    for split in SPLITS:
        for step in steps(script, buckets, split):
            batches = [batch for own in step for batch in own]
            examples = sum(len(batch) for batch in batches if batch[0].loss_weight)
            assert {key.loss_weight for batch in batches for key in batch} <= {0.0, 1 / examples}, split
            assert all(len(batch) == 1 for batch in batches if batch[0].loss_weight == 0), split
            assert len({len(own) for own in step}) == 1 and len(step[0]) <= split[1], split
            for own in step:
                assert [{key.last for key in batch} for batch in own] == [{False}] * (len(own) - 1) + [{True}], split


@pytest.mark.parametrize("alike", [False, True], ids=["buckets", "no buckets"])
def test_a_run_that_starts_later_is_the_tail_of_the_whole_run(script: ModuleType, buckets: Any, alike: bool) -> None:
    for split in SPLITS:
        sizes = [(32, 32)] * 17 if alike else buckets
        whole = steps(script, sizes, split)
        for first in range(1, len(whole), 1 if alike else 3):
            assert steps(script, sizes, split, first) == whole[first:], (split, first)


def test_a_finished_run_has_nothing_left(script: ModuleType) -> None:
    for first in (4, 6):
        assert list(script.MicroBatches(5, 1, 1, 0, 1, 0, first, 4)) == []


def test_each_epoch_and_seed_has_an_order_of_its_own(script: ModuleType, buckets: Any) -> None:
    runs = {seed: list(script.MicroBatches(50, 1, 1, 0, 1, seed, 0, 100, buckets)) for seed in (0, 1)}
    orders = [[batch[0].example for batch in runs[seed][start : start + 50]] for seed in (0, 1) for start in (0, 50)]
    assert len({tuple(order) for order in orders}) == 4


@pytest.mark.parametrize("alike", [False, True], ids=["no buckets", "one bucket"])
def test_without_buckets_steps_are_slices_of_the_shuffle(script: ModuleType, alike: bool) -> None:
    """Every key, fillers included, against slices of the shuffle by hand."""
    for (batch_size, accumulation, processes), examples in itertools.product(SPLITS, (1, 3, 5, 12, 17)):
        sizes = [(32, 32)] * examples if alike else None
        per_step = batch_size * accumulation * processes
        length = -(-examples // per_step)
        for process in range(processes):
            wanted = sliced_shuffle(script, examples, (batch_size, accumulation, processes), process)
            got = script.MicroBatches(examples, batch_size, accumulation, process, processes, 7, 0, 2 * length, sizes)
            assert list(got) == wanted, (batch_size, accumulation, processes, examples)


def sliced_shuffle(script: ModuleType, examples: int, split: tuple[int, int, int], process: int) -> list[list[Any]]:
    """The keys of two epochs of one process with seed 7: its part of each step of the shuffled examples."""
    batch_size, processes, per_step = split[0], split[2], math.prod(split)
    keys = []
    for epoch in range(2):
        shuffle = torch.randperm(examples, generator=script.generator_for(7, "order", epoch)).tolist()
        for start in range(0, examples, per_step):
            places = list(range(examples))[start : start + per_step]
            rounds = [places[at : at + batch_size * processes] for at in range(0, len(places), batch_size * processes)]
            for number, part in enumerate(rounds):
                own, weight = part[process * batch_size :][:batch_size], 1 / len(places)
                if not own:
                    own, weight = part[:1], 0.0
                keys.append([(epoch, at, shuffle[at], weight, number == len(rounds) - 1) for at in own])
    return keys


# ----------------------------------------------------------------------------------------------------------------------
# What is trained
# ----------------------------------------------------------------------------------------------------------------------


def dataset_of(script: ModuleType, shapes: Path, *flags: str) -> Any:
    """The nine pictures, and two square class pictures."""
    args = parse(script, EXPLICIT, f"--instance_data_dir={shapes}", "--center_crop", *flags)
    classes = [
        script.Picture(f"class {side}", lambda side=side: Image.new("RGB", (side, side)), "a dog") for side in (32, 64)
    ]
    return script.DreamBoothDataset(script.list_pictures(args)["instance"], classes, args, 0)


def test_a_class_picture_has_the_bucket_of_its_instance_picture(script: ModuleType, shapes: Path) -> None:
    dataset = dataset_of(script, shapes)
    for number, (width, height) in enumerate(BUCKETS):
        example = dataset[script.ExampleKey(0, number, number, 1.0, True)]
        assert {half: example[half]["pixels"].shape for half in ("instance", "class")} == dict.fromkeys(
            ("instance", "class"), (3, height, width)
        )


def test_a_wide_picture_keeps_its_ends(script: ModuleType, shapes: Path) -> None:
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :8, 0] = image[:, -8:, 1] = 255
    Image.fromarray(image).save(shapes / "4.png")
    pixels = dataset_of(script, shapes)[script.ExampleKey(0, 4, 4, 1.0, True)]["instance"]["pixels"]
    assert pixels[0, :, 0].min() > 0.9 and pixels[1, :, -1].min() > 0.9


def test_cached_latents_are_those_of_the_buckets_pixels(script: ModuleType, shapes: Path, tiny_flux: Path) -> None:
    vae = AutoencoderKL.from_pretrained(tiny_flux / "vae").requires_grad_(False)
    dataset = dataset_of(script, shapes)
    keys = [script.ExampleKey(0, number, number, 1.0, True) for number in range(9)]
    live = [dataset[key] for key in keys]
    script.cache_latents(Accelerator(), vae, dataset)
    for number, key in enumerate(keys):
        for half in ("instance", "class"):
            expected = script.encode_pixels(vae, live[number][half]["pixels"][None])
            got = dataset[key][half]["latents"]
            assert got.mean.shape[1:] == (BUCKETS[number][1] // 8, BUCKETS[number][0] // 8)
            assert torch.allclose(got.mean, expected.mean[0], atol=1e-5)


CASES = {
    "accumulated": ["--train_batch_size=2", "--gradient_accumulation_steps=2"],
    "prior, cached, clip": ["--train_batch_size=2", "--cache_latents", "--train_text_encoder", "prior"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_bit_for_bit_the_run_never_stopped(
    script: ModuleType, run: Run, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(
        Accelerator, "log", lambda _, values, step: seen.append((step, values["loss"], values["grad_norm"]))
    )
    monkeypatch.setattr(
        script, "save_results", lambda *inputs: seen.append([part.detach().clone() for part in inputs[2].parameters])
    )
    flags = [EXPLICIT, f"--instance_data_dir={shapes}", "--max_train_steps=7", "--random_flip", *CASES[case]]
    if "prior" in flags:
        flags[flags.index("prior")] = "--with_prior_preservation"
        shutil.copytree(shapes, tmp_path / "class")
        flags += [f"--class_data_dir={tmp_path / 'class'}", "--class_prompt=a dog", "--num_class_images=2"]
    output = run(script, *flags, "--checkpointing_steps=2")
    *logged, weights = list(seen)
    seen.clear()
    run(script, *flags, f"--output_dir={tmp_path / 'resumed'}", f"--resume_from_checkpoint={output / 'checkpoint-4'}")
    *tail, resumed = seen
    assert tail == logged[4:] and len(tail) == 3
    assert all(torch.equal(one, other) for one, other in zip(weights, resumed, strict=True))


def test_the_validation_loss_is_that_of_the_buckets_shapes(
    script: ModuleType, run: Run, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[Any] = []
    monkeypatch.setattr(script, "validation_loss", lambda run: validated.append(run.data.validation) or 1.0)
    run(script, EXPLICIT, f"--instance_data_dir={shapes}", "--validation_loss", "--max_train_steps=1")
    wanted = [(1, 16, height // 8, width // 8) for width, height in BUCKETS]
    assert [tuple(latents.shape) for _, latents, _ in validated[0]] == wanted
