"""Every combination of what changes the shape of a batch trains, in both scripts."""

import itertools
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from conftest import Run

SWITCHES = {
    "captions": [],
    "prior": ["--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=4"],
    "clip": ["--train_text_encoder"],
    "cached": ["--cache_latents"],
}
COMBINATIONS = [
    (batch_size, {name for name, on in zip(SWITCHES, choice, strict=True) if on})
    for batch_size in (1, 2, 3)
    for choice in itertools.product((False, True), repeat=len(SWITCHES))
]


@pytest.fixture(scope="module")
def captioned(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five pictures as a local dataset with captions."""
    folder = tmp_path_factory.mktemp("captioned")
    rows = []
    for number, path in enumerate(sorted(pictures.iterdir())):
        (folder / path.name).write_bytes(path.read_bytes())
        rows.append(json.dumps({"file_name": path.name, "text": f"sks dog number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture(scope="module")
def class_pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("class")
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 100, 200)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize(
    ("batch_size", "on"), COMBINATIONS, ids=[f"{size}-{'-'.join(sorted(on)) or 'plain'}" for size, on in COMBINATIONS]
)
def test_two_epochs_train(
    script: ModuleType,
    run: Run,
    batch_size: int,
    on: set[str],
    captioned: Path,
    class_pictures: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two epochs of five pictures: with batch size 2 and 3 the last batch is smaller."""
    losses: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: losses.append(values["loss"]))
    flags = [f"--train_batch_size={batch_size}", "--num_train_epochs=2", "--learning_rate=1e-3"]
    steps = 2 if batch_size == 1 else 2 * -(-5 // batch_size)
    flags.append(f"--max_train_steps={steps}")
    for name in on:
        flags += SWITCHES[name]
    if "prior" in on:
        flags.append(f"--class_data_dir={class_pictures}")
    if "captions" in on:
        flags += ["--instance_data_dir=", f"--dataset_name={captioned}", "--caption_column=text"]
    output = run(script, *flags)
    assert len(losses) == steps and all(0.1 < loss < 100 for loss in losses) and len(set(losses)) == steps
    lora = "lora" in script.__name__
    weights = load_file(output / ("pytorch_lora_weights.safetensors" if lora else "text_encoder/model.safetensors"))
    trained_clip = any(name.startswith("text_encoder.") for name in weights) if lora else None
    if lora:
        assert trained_clip == ("clip" in on)
        assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
