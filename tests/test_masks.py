"""Masks: where they come from, that they go the way of their pictures, and what the loss makes of them."""

import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor

from conftest import Run, both_scripts, one_script

pytestmark = one_script

BASE = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a dog", "--resolution=64"]


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Three grey pictures of different shapes, and copies of them as their masks."""
    pictures, masks, rng = tmp_path / "dogs", tmp_path / "masks", np.random.default_rng(0)
    pictures.mkdir()
    masks.mkdir()
    for number, (width, height) in enumerate([(90, 70), (64, 130), (77, 77)]):
        grey = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8), dtype=np.uint8)).resize((width, height))
        grey.convert("RGB").save(pictures / f"dog_{number}.png")
        grey.save(masks / f"dog_{number}.webp", lossless=True)
    return pictures, masks


def dataset_of(script: ModuleType, *flags: str) -> Any:
    args = script.parse_args([*BASE, *flags])
    return script.DreamBoothDataset(script.list_pictures(args)["instance"], [], args, 0)


@pytest.mark.parametrize("shape", [[], ["--aspect_ratio_buckets=auto"], ["--resolution=32,64"]])
def test_a_mask_is_resized_cropped_and_flipped_with_its_picture(
    script: ModuleType, folders: tuple[Path, Path], shape: list[str]
) -> None:
    pictures, masks = folders
    flags = [f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}", "--random_flip", "--unmasked_weight=0.2"]
    dataset = dataset_of(script, *flags, *shape)
    flips = set()
    for index in range(len(dataset)):
        for draw in range(4):
            loaded = dataset.load("instance", index, dataset.buckets[index], draw, index)
            grey = (loaded["pixels"].mean(0) + 1) / 2  # the picture is its own mask
            rows, columns = (side // 16 for side in grey.shape)
            blocks = [
                grey[16 * r : 16 * r + 16, 16 * c : 16 * c + 16].mean() for r in range(rows) for c in range(columns)
            ]
            expected = 0.2 + 0.8 * torch.stack(blocks)
            torch.testing.assert_close(loaded["token_weights"], expected, rtol=0, atol=1e-4)
            flips.add(loaded["crop"].flip)
    assert flips == {True, False}


def test_weights_are_in_the_order_of_the_tokens(script: ModuleType) -> None:
    rng = np.random.default_rng(1)
    mask = rng.integers(0, 256, (48, 32), dtype=np.uint8)
    args = SimpleNamespace(unmasked_weight=0.0, image_interpolation_mode="nearest")
    weights = script.mask_tokens(Image.fromarray(mask), script.Crop((32, 48), 0, 0, False), args)
    latents = torch.from_numpy(mask / 255).view(6, 8, 4, 8).mean((1, 3))[None, None].float()  # a latent is 8 x 8 pixels
    torch.testing.assert_close(weights, script.pack_latents(latents)[0].mean(-1))


def test_the_loss_is_the_weighted_mean_over_the_tokens(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, target = (torch.randn(2, 6, 64, generator=generator) for _ in range(2))
    weights, options = torch.rand(2, 6, generator=generator), SimpleNamespace(weighting_scheme="none")
    found = script.flow_matching_loss(velocity, target, torch.ones(2), options, weights)
    for row in range(2):
        tokens = [(velocity[row, token] - target[row, token]).square().mean().item() for token in range(6)]
        expected = np.average(tokens, weights=weights[row].numpy())
        assert found[row].item() == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    logged: list[float] = []
    names = ("loss", "validation_loss")
    monkeypatch.setattr(
        Accelerator, "log", lambda _, values, step: logged.extend(values[name] for name in names if name in values)
    )
    return logged


@pytest.mark.parametrize("level", [0, 77, 255])
def test_a_mask_of_one_grey_changes_nothing(
    script: ModuleType, run: Run, folders: tuple[Path, Path], losses: list[float], level: int
) -> None:
    pictures, masks = folders
    for path in masks.iterdir():
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, level).save(path)
    flags = [f"--instance_data_dir={pictures}", "--validation_loss", "--validation_steps=2"]
    run(script, *flags)
    plain = list(losses)
    losses.clear()
    run(script, *flags, f"--mask_data_dir={masks}")
    assert losses == pytest.approx(plain, rel=1e-5) and len(plain) == 4


@both_scripts
def test_what_a_mask_hides_does_not_train_and_a_resume_is_exact(
    script: ModuleType, run: Run, folders: tuple[Path, Path], losses: list[float]
) -> None:
    """With cached views, flips, buckets and two resolutions at once."""
    pictures, masks = folders
    for path in masks.iterdir():
        with Image.open(path) as mask:
            grey = np.zeros((mask.height, mask.width), np.uint8)
        grey[:, grey.shape[1] // 2 :] = 255
        Image.fromarray(grey).save(path)
    flags = [f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}", "--unmasked_weight=0", "--resolution=32,64"]
    flags += ["--cache_latents", "--cached_views=3", "--random_flip", "--checkpointing_steps=2", "--max_train_steps=4"]
    flags += ["--train_batch_size=2", "--aspect_ratio_buckets=auto"]
    seen: list[Tensor] = []
    prepare_inputs = script.prepare_inputs

    def keep(*given: Any) -> Any:
        inputs = prepare_inputs(*given)
        seen.append(inputs.token_weights)
        return inputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "prepare_inputs", keep)
        output = run(script, *flags)
    assert min(float(weights.min()) for weights in seen) == 0 and max(float(weights.max()) for weights in seen) == 1
    whole = list(losses)
    losses.clear()
    run(script, *flags, f"--output_dir={output}-2", f"--resume_from_checkpoint={output / 'checkpoint-2'}")
    assert losses == whole[2:] and len(losses) == 2


def test_the_transparency_of_a_picture_is_its_mask(script: ModuleType, tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 32, 64))
    image.save(tmp_path / "dog.png")
    dataset = dataset_of(script, f"--instance_data_dir={tmp_path}", "--alpha_mask", "--unmasked_weight=0.25")
    weights = dataset.load("instance", 0, (64, 64), 0, 0)["token_weights"].view(4, 4)
    assert weights.tolist() == [[0.25, 0.25, 1, 1]] * 4


@pytest.mark.parametrize("kind", ["I;16", "F"])
def test_a_mask_of_more_than_8_bits_keeps_its_greys(script: ModuleType, folders: tuple[Path, Path], kind: str) -> None:
    pictures, masks = folders
    path = masks / "dog_1.webp"
    with Image.open(path) as stored:
        greys = np.asarray(stored.convert("L"))
    path.unlink()
    deep = greys.astype(np.uint16) * 257 if kind == "I;16" else greys.astype(np.float32) / 255
    Image.fromarray(deep).save(masks / ("dog_1.png" if kind == "I;16" else "dog_1.tif"))
    dataset = dataset_of(script, f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}")
    [picture] = [one for one in dataset.sources["instance"] if one.name.endswith("dog_1.png")]
    assert picture.mask is not None and np.abs(np.asarray(picture.mask()).astype(int) - greys).max() <= 1


def test_held_out_pictures_have_masks_of_their_own(
    script: ModuleType, folders: tuple[Path, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures, masks = folders
    (tmp_path / "held").mkdir()
    flags = [*BASE, f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}", "--validation_loss"]
    flags.append(f"--validation_data_dir={tmp_path / 'held'}")
    (pictures / "dog_2.png").rename(tmp_path / "held" / "dog_2.png")
    found = script.list_pictures(script.parse_args(flags))
    assert all(picture.mask is not None for part in found.values() for picture in part)
    assert "without a picture" not in caplog.text
    (pictures / "dog_1.png").rename(tmp_path / "held" / "dog_0.png")
    with pytest.raises(script.UsageError, match=r"trained on and held out; rename: dog_0$"):
        script.list_pictures(script.parse_args(flags))


def test_masks_are_counted_and_those_without_a_picture_named(
    script: ModuleType, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pictures, masks = folders
    (masks / "dog_2.webp").rename(masks / "cat.webp")
    with caplog.at_level(logging.INFO):
        dataset = dataset_of(script, f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}")
    assert (
        "masks without a picture: cat" in caplog.text
        and "2 of 3 instance pictures have masks, which count" in caplog.text
    )
    [unmasked] = [index for index in range(3) if dataset.sources["instance"][index].mask is None]
    assert dataset.load("instance", unmasked, (64, 64), 0, 0)["token_weights"].tolist() == [1.0] * 16


def test_a_mask_of_other_proportions_is_named(script: ModuleType, folders: tuple[Path, Path]) -> None:
    pictures, masks = folders
    Image.new("L", (77, 60)).save(masks / "dog_2.webp")
    args = script.parse_args([*BASE, f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}"])
    with pytest.raises(script.UsageError, match=r"dog_2\.png: the mask has \(77, 60\) pixels, the picture \(77, 77\)"):
        script.list_pictures(args)


def test_another_mask_is_another_training(
    script: ModuleType, run: Run, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    pictures, masks = folders
    flags = [f"--instance_data_dir={pictures}", f"--mask_data_dir={masks}", "--checkpointing_steps=1"]
    run(script, *flags, "--max_train_steps=1")
    Image.new("L", (77, 77)).save(masks / "dog_2.webp")
    run(script, *flags, "--max_train_steps=2", "--resume_from_checkpoint=latest")
    assert "training pictures was" in caplog.text


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_in_a_mask_is_not_painted(script: ModuleType, tmp_path: Path, mode: str) -> None:
    mask = Image.new(mode, (8, 8), (255,) * (len(mode) - 1) + (0,))  # programs may keep white under it
    mask.paste((255,) * len(mode), (0, 0, 4, 4))
    mask.save(tmp_path / "mask.png")
    found = np.asarray(script.open_mask(tmp_path / "mask.png"))
    assert found.shape == (8, 8) and (found[:4, :4] == 255).all() and found.sum() == 255 * 16


def test_the_validation_loss_counts_masks(
    script: ModuleType, run: Run, folders: tuple[Path, Path], losses: list[float]
) -> None:
    flags = [f"--instance_data_dir={folders[0]}", "--validation_loss", "--max_train_steps=1"]
    run(script, *flags)
    plain = losses[0]
    losses.clear()
    run(script, *flags, f"--mask_data_dir={folders[1]}", "--unmasked_weight=0")
    assert losses[0] != pytest.approx(plain, rel=1e-3)
