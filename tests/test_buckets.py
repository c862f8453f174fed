"""Sizes and the order of examples: each picture in the nearest bucket, a micro-batch in one, all once an epoch."""

import itertools
import math
import shutil
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from conftest import Run, one_script

pytestmark = one_script

EXPLICIT = "--aspect_ratio_buckets=32,32;16,48;48,16"
RANDOM_SIZES = np.exp(np.random.default_rng(0).uniform(math.log(300), math.log(900), (50, 2))).astype(int).tolist()


def parse(script: ModuleType, *flags: str) -> Any:
    base = ["--pretrained_model_name_or_path=flux", "--instance_data_dir=dogs", "--instance_prompt=a sks dog"]
    return script.parse_args([*base, "--resolution=32", *flags])


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


def test_automatic_buckets_have_the_area_of_the_square_in_whole_tokens_both_ways_up(script: ModuleType) -> None:
    for resolution in (512, 768, 1024):
        sizes = script.training_sizes(parse(script, "--aspect_ratio_buckets=auto"), resolution)
        assert len(set(sizes)) == len(sizes) == 15 and (resolution, resolution) in sizes
        assert {(height, width) for width, height in sizes} == set(sizes)
        assert all(side % 16 == 0 for size in sizes for side in size)
        assert max(abs(width * height / resolution**2 - 1) for width, height in sizes) < 0.05


def test_buckets_are_given_as_height_and_width(script: ModuleType) -> None:
    args = parse(script, "--aspect_ratio_buckets=640,384;512,500")
    assert script.training_sizes(args, 32) == [(384, 640), (496, 512)]
    assert script.training_sizes(parse(script), 48) == [(48, 48)]


def test_a_picture_goes_to_the_nearest_aspect_ratio_by_its_factor_and_then_to_the_nearest_area(
    script: ModuleType,
) -> None:
    sizes = script.training_sizes(parse(script, "--aspect_ratio_buckets=auto"), 512)
    lost = []
    for width, height in RANDOM_SIZES:
        bucket = script.nearest_size((width, height), sizes)
        assert bucket == sizes[int(np.argmin([abs(np.log(width / height) - np.log(w / h)) for w, h in sizes]))]
        ratio = (width / height) / (bucket[0] / bucket[1])
        lost.append(1 - min(ratio, 1 / ratio))
    assert np.mean(lost) < 0.06  # where a square loses 0.30
    halves = [(512, 1024), (1024, 1024)]  # 0.5 and 1: the middle is 0.71, not 0.75
    assert [script.nearest_size((width, 1000), halves)[0] for width in (690, 730)] == [512, 1024]
    sizes = [(512, 512), (1024, 1024), (256, 256), (512, 256)]
    nearest = [script.nearest_size((side, side), sizes)[0] for side in (100, 300, 600, 900, 4000)]
    assert nearest == [256, 256, 512, 1024, 1024]


SPLITS = [(1, 1, 1), (4, 1, 1), (2, 3, 1), (1, 4, 2), (2, 1, 3), (3, 2, 2), (8, 1, 2)]  # batch, accumulation, processes
Step = list[list[list[Any]]]  # a step's keys: by process, by micro-batch


def batches(script: ModuleType, buckets: Any, split: tuple[int, int, int], process: int, first: int, last: int) -> Any:
    return script.MicroBatches(
        buckets, batch_size=split[0], accumulation=split[1], process=process, processes=split[2],
        seed=7, first_step=first, last_step=last,
    )  # fmt: skip


def steps(script: ModuleType, buckets: Any, split: tuple[int, int, int], first: int = 0, epochs: int = 2) -> list[Step]:
    """All processes' steps of a run from its step `first` to the end of its last epoch."""
    run: dict[int, Step] = {}
    for process in range(split[2]):
        last = epochs * batches(script, buckets, split, process, 0, 0).steps_per_epoch
        number = first
        for batch in batches(script, buckets, split, process, first, last):
            run.setdefault(number, [[] for _ in range(split[2])])[process].append(batch)
            number += batch[0].last
        assert number == last
    return [step for _, step in sorted(run.items())]


@pytest.fixture
def buckets(script: ModuleType) -> list[tuple[int, int]]:
    """Of the fifty pictures of random sizes."""
    sizes = script.training_sizes(parse(script, "--aspect_ratio_buckets=auto"), 512)
    found = [script.nearest_size(size, sizes) for size in RANDOM_SIZES]
    assert len(set(found)) > 8
    return found


@pytest.mark.parametrize("split", SPLITS)
def test_an_epoch_trains_every_picture_once_in_micro_batches_of_one_bucket_that_are_full_but_for_its_last(
    script: ModuleType, buckets: Any, split: tuple[int, int, int]
) -> None:
    run = [batch for step in steps(script, buckets, split) for batch in itertools.chain(*step)]
    trained = [key for batch in run for key in batch if key.loss_weight]
    wanted = list(itertools.product(range(2), range(50)))
    assert sorted((key.epoch, key.example) for key in trained) == wanted
    assert sorted((key.epoch, key.position) for key in trained) == wanted
    small = Counter()
    for batch in run:
        (bucket,) = {buckets[key.example] for key in batch}
        assert len(batch) <= split[0]
        small[batch[0].epoch, bucket] += len(batch) < split[0] and batch[0].loss_weight > 0
    assert max(small.values()) <= 1


@pytest.mark.parametrize("split", SPLITS)
def test_the_weights_of_a_step_are_equal_and_sum_to_one_and_processes_do_equally_many_micro_batches(
    script: ModuleType, buckets: Any, split: tuple[int, int, int]
) -> None:
    for step in steps(script, buckets, split):
        run = [batch for own in step for batch in own]
        examples = sum(len(batch) for batch in run if batch[0].loss_weight)
        assert {key.loss_weight for batch in run for key in batch} <= {0.0, 1 / examples}
        assert all(len(batch) == 1 for batch in run if batch[0].loss_weight == 0)
        assert len({len(own) for own in step}) == 1 and len(step[0]) <= split[1]
        for own in step:
            assert [{key.last for key in batch} for batch in own] == [{False}] * (len(own) - 1) + [{True}]


def test_a_run_that_starts_later_is_the_tail_of_the_whole_run(script: ModuleType, buckets: Any) -> None:
    for split, sizes in itertools.product(SPLITS, (buckets, [(32, 32)] * 17)):
        whole = steps(script, sizes, split)
        for first in range(1, len(whole), 3):
            assert steps(script, sizes, split, first) == whole[first:], (split, first)


@pytest.mark.parametrize("split", SPLITS)
def test_with_one_bucket_steps_are_slices_of_the_shuffle(script: ModuleType, split: tuple[int, int, int]) -> None:
    """Every key, fillers included, against slices of the shuffle by hand."""
    batch_size, processes, per_step = split[0], split[2], math.prod(split)
    for examples, process in itertools.product((1, 3, 5, 12, 17), range(processes)):
        wanted = []
        for epoch in range(2):
            shuffle = torch.randperm(examples, generator=script.generator_for(7, "order", epoch)).tolist()
            for start in range(0, examples, per_step):
                places = list(range(examples))[start : start + per_step]
                for at in range(0, len(places), batch_size * processes):
                    part = places[at : at + batch_size * processes]
                    own, weight = part[process * batch_size :][:batch_size], 1 / len(places)
                    if not own:
                        own, weight = part[:1], 0.0
                    last = at + batch_size * processes >= len(places)
                    wanted.append([(epoch, place, shuffle[place], weight, last) for place in own])
        got = batches(script, [(32, 32)] * examples, split, process, 0, 2 * -(-examples // per_step))
        assert list(got) == wanted, (examples, process)


def test_a_class_picture_has_the_bucket_of_its_instance_picture(script: ModuleType, shapes: Path) -> None:
    args = parse(script, EXPLICIT, f"--instance_data_dir={shapes}", "--center_crop")
    wide = np.zeros((32, 96, 3), np.uint8)
    wide[:, :8, 0] = wide[:, -8:, 1] = 255
    Image.fromarray(wide).save(shapes / "4.png")
    classes = [
        script.Picture(f"{side}", lambda side=side: Image.new("RGB", (side, side)), ("a dog",)) for side in (32, 64)
    ]
    dataset = script.DreamBoothDataset(script.list_pictures(args)["instance"], classes, args, 0)
    assert dataset.buckets == BUCKETS
    for number, (width, height) in enumerate(BUCKETS):
        example = dataset[script.ExampleKey(0, number, number, 1.0, True)]
        assert example["instance"]["pixels"].shape == example["class"]["pixels"].shape == (3, height, width)
    pixels = dataset[script.ExampleKey(0, 4, 4, 1.0, True)]["instance"]["pixels"]
    assert pixels[0, :, 0].min() > 0.9 and pixels[1, :, -1].min() > 0.9  # a wide picture keeps its ends


def test_a_resumed_run_of_buckets_is_bit_for_bit_the_run_never_stopped(
    script: ModuleType, run: Run, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With accumulation, cached latents, class pictures and CLIP at once."""
    losses: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: losses.append(values["loss"]))
    flags = [EXPLICIT, f"--instance_data_dir={shapes}", "--random_flip", "--train_batch_size=2", "--cache_latents"]
    flags += ["--gradient_accumulation_steps=2", "--train_text_encoder", "--with_prior_preservation"]
    flags += [f"--class_data_dir={shutil.copytree(shapes, tmp_path / 'class')}", "--class_prompt=a dog"]
    flags += ["--num_class_images=2", "--upcast_before_saving", "--checkpointing_steps=4", "--max_train_steps=7"]
    whole = run(script, *flags)
    resumed = run(
        script, *flags, f"--output_dir={tmp_path / 'resumed'}", f"--resume_from_checkpoint={whole / 'checkpoint-4'}"
    )
    assert losses[7:] == losses[4:7] and len(losses) == 10
    files = [file for file in whole.rglob("*.safetensors") if "checkpoint" not in str(file)]
    assert files
    for file in files:
        one, other = load_file(file), load_file(resumed / file.relative_to(whole))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_validation_loss_is_that_of_the_buckets_shapes(
    script: ModuleType, run: Run, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validated: list[Any] = []
    monkeypatch.setattr(script, "validation_loss", lambda run: validated.append(run.data.validation) or 1.0)
    run(script, EXPLICIT, f"--instance_data_dir={shapes}", "--validation_loss", "--max_train_steps=1")
    wanted = [(1, 16, height // 8, width // 8) for width, height in BUCKETS]
    assert [tuple(latents.shape) for _, latents, _ in validated[0]] == wanted
