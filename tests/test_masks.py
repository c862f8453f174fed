"""Masks: where they come from, that they go the way of their pictures, and what the loss makes of them."""

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from conftest import Run, both_scripts, one_script

pytestmark = one_script

BASE = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a dog", "--resolution=64"]


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Flags of three grey pictures of different shapes, and of copies of them as their masks."""
    (tmp_path / "dogs").mkdir()
    (tmp_path / "masks").mkdir()
    rng = np.random.default_rng(0)
    for number, (width, height) in enumerate([(90, 70), (64, 130), (77, 77)]):
        grey = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8), dtype=np.uint8)).resize((width, height))
        grey.convert("RGB").save(tmp_path / "dogs" / f"dog_{number}.png")
        grey.save(tmp_path / "masks" / f"dog_{number}.webp", lossless=True)
    return [f"--instance_data_dir={tmp_path / 'dogs'}", f"--mask_data_dir={tmp_path / 'masks'}"]


def read_pictures(script: ModuleType, *flags: str) -> Any:
    return script.list_pictures(script.parse_args([*BASE, *flags]))


@pytest.mark.parametrize("shape", ["--center_crop", "--aspect_ratio_buckets=auto", "--resolution=32,64"])
def test_a_mask_is_resized_cropped_and_flipped_with_its_picture_and_weighs_its_tokens(
    script: ModuleType, folders: list[str], shape: str
) -> None:
    flags = [*folders, "--random_flip", "--unmasked_weight=0.2", shape]
    pictures = read_pictures(script, *flags)["instance"]
    dataset = script.DreamBoothDataset(pictures, [], script.parse_args([*BASE, *flags]), 0)
    for index in range(len(dataset)):
        for draw in range(4):
            loaded = dataset.load("instance", index, dataset.buckets[index], draw, index)
            grey = (loaded["pixels"].mean(0) + 1) / 2  # the picture is its own mask
            latents = torch.nn.functional.avg_pool2d(grey[None, None], 8)  # a latent is 8 x 8 pixels
            expected = 0.2 + 0.8 * script.pack_latents(latents)[0].mean(-1)
            torch.testing.assert_close(loaded["token_weights"], expected, rtol=0, atol=1e-4)


def test_the_loss_is_the_weighted_mean_over_the_tokens(script: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    velocity, target = (torch.randn(2, 6, 64, generator=generator) for _ in range(2))
    weights, options = torch.rand(2, 6, generator=generator), SimpleNamespace(weighting_scheme="none")
    found = script.flow_matching_loss(velocity, target, torch.ones(2), options, weights)
    for row in range(2):
        tokens = [(velocity[row, token] - target[row, token]).square().mean().item() for token in range(6)]
        assert found[row].item() == pytest.approx(np.average(tokens, weights=weights[row].numpy()), rel=1e-5)


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses that are logged, of training and validation."""
    logged: list[float] = []
    keep = lambda _, values, step: logged.extend(value for name, value in values.items() if "loss" in name)  # noqa: E731
    monkeypatch.setattr(Accelerator, "log", keep)
    return logged


@pytest.mark.parametrize("level", [0, 77])
def test_a_mask_of_one_grey_changes_nothing_and_another_does(
    script: ModuleType, run: Run, folders: list[str], losses: list[float], level: int, tmp_path: Path
) -> None:
    flags = [folders[0], "--validation_loss", "--validation_steps=2"]
    run(script, *flags)
    run(script, *flags, folders[1], "--unmasked_weight=0.1")
    for path in (tmp_path / "masks").iterdir():
        with Image.open(path) as mask:
            size = mask.size
        Image.new("L", size, level).save(path)
    run(script, *flags, folders[1])
    plain, masked, grey = losses[:4], losses[4:8], losses[8:]
    assert grey == pytest.approx(plain, rel=1e-5)
    assert all(abs(one - other) > 1e-3 * other for one, other in zip(masked, plain, strict=True))


@both_scripts
def test_a_masked_run_resumes_exactly(
    script: ModuleType, run: Run, folders: list[str], losses: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With cached latents, flips, buckets and two resolutions at once."""
    seen: list[float] = []
    loss = script.flow_matching_loss
    monkeypatch.setattr(script, "flow_matching_loss", lambda *given: seen.extend(given[-1].flatten()) or loss(*given))
    flags = [*folders, "--unmasked_weight=0", "--resolution=32,64", "--aspect_ratio_buckets=auto", "--random_flip"]
    flags += ["--cache_latents", "--checkpointing_steps=2", "--max_train_steps=4", "--train_batch_size=2"]
    output = run(script, *flags)
    run(script, *flags, f"--output_dir={output}-2", f"--resume_from_checkpoint={output / 'checkpoint-2'}")
    assert losses[4:] == losses[2:4] and len(losses) == 6 and min(seen) < 0.3 and max(seen) > 0.7


def test_the_transparency_of_a_picture_is_its_mask(script: ModuleType, tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (10, 20, 30, 255))
    image.paste((200, 0, 0, 0), (0, 0, 32, 64))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned to the left
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "dog.png", exif=exif)
    flags = [f"--instance_data_dir={tmp_path}", "--alpha_mask", "--unmasked_weight=0.25"]
    [picture] = read_pictures(script, *flags)["instance"]
    weights = script.load_picture(picture, (64, 64), script.parse_args([*BASE, *flags]))["token_weights"]
    assert weights.view(4, 4).tolist() == [[0.25, 0.25, 1, 1]] * 4


def test_a_mask_of_16_bits_keeps_its_greys_and_what_is_transparent_in_one_is_not_painted(
    script: ModuleType, folders: list[str], tmp_path: Path
) -> None:
    pictures = [picture.read() for picture in read_pictures(script, *folders)["instance"]]
    for number, (_, mask) in enumerate(pictures):
        (tmp_path / "masks" / f"dog_{number}.webp").unlink()
        Image.fromarray(np.asarray(mask).astype(np.uint16) * 257).save(tmp_path / "masks" / f"dog_{number}.png")
    for (_, before), picture in zip(pictures, read_pictures(script, *folders)["instance"], strict=True):
        assert np.array_equal(np.asarray(picture.read()[1]), np.asarray(before))
    clear = Image.new("RGBA", (77, 77), (255, 255, 255, 0))  # programs may keep white under it
    clear.paste((255,) * 4, (0, 0, 40, 77))
    clear.save(tmp_path / "masks" / "dog_2.png")
    mask = np.asarray(read_pictures(script, *folders)["instance"][2].read()[1])
    assert (mask[:, :40] == 255).all() and (mask[:, 40:] == 0).all()


def test_held_out_pictures_have_masks_of_their_own_and_not_those_of_training_pictures_of_their_name(
    script: ModuleType, folders: list[str], tmp_path: Path
) -> None:
    held = tmp_path / "held"
    held.mkdir()
    (tmp_path / "dogs" / "dog_2.png").rename(held / "dog_2.png")
    flags = [*folders, "--validation_loss", f"--validation_data_dir={held}"]
    found = read_pictures(script, *flags)
    assert [picture.mask.stem for part in found.values() for picture in part] == ["dog_0", "dog_1", "dog_2"]
    (tmp_path / "dogs" / "dog_1.png").rename(held / "dog_0.png")
    with pytest.raises(script.UsageError, match=r"--mask_data_dir: .* held out"):
        read_pictures(script, *flags)


def test_masks_without_a_picture_are_named_and_pictures_without_a_mask_count_fully(
    script: ModuleType, folders: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "masks" / "dog_2.webp").rename(tmp_path / "masks" / "cat.webp")
    pictures = read_pictures(script, *folders)["instance"]
    assert caplog.messages == ["--mask_data_dir has masks without a picture: cat.webp"]
    loaded = script.load_picture(pictures[2], (64, 64), script.parse_args([*BASE, *folders]))
    assert pictures[2].mask is None and loaded["token_weights"].tolist() == [1.0] * 16


def test_a_mask_of_other_proportions_is_named(script: ModuleType, folders: list[str], tmp_path: Path) -> None:
    Image.new("L", (77, 60)).save(tmp_path / "masks" / "dog_2.webp")
    with pytest.raises(script.UsageError, match=r"dog_2\.png: its mask has \(77, 60\) pixels, the picture \(77, 77\)"):
        read_pictures(script, *folders)
