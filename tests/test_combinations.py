"""What changes the shape of a batch trains together: every two of these settings meet in a row of the table."""

import itertools
import json
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file

from conftest import Run


class Row(NamedTuple):
    """The settings of a run."""

    batch_size: int
    captions: bool
    prior: bool
    clip: bool
    cached: bool


TABLE = [
    Row(1, captions=False, prior=True, clip=True, cached=False),
    Row(1, captions=True, prior=False, clip=False, cached=True),
    Row(2, captions=False, prior=True, clip=False, cached=True),
    Row(2, captions=True, prior=False, clip=True, cached=False),
    Row(3, captions=False, prior=False, clip=False, cached=False),
    Row(3, captions=True, prior=True, clip=True, cached=True),
]


def test_every_two_settings_meet_in_the_table() -> None:
    levels: dict[str, tuple[Any, ...]] = dict.fromkeys(Row._fields, (False, True)) | {"batch_size": (1, 2, 3)}
    for one, other in itertools.combinations(Row._fields, 2):
        met = {(getattr(row, one), getattr(row, other)) for row in TABLE}
        assert met == set(itertools.product(levels[one], levels[other])), (one, other)


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_two_epochs_train(
    script: ModuleType, run: Run, row: Row, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two epochs of five pictures: with batch size 2 and 3 the last batch is smaller."""
    losses: list[float] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: losses.append(values["loss"]))
    steps = 2 * -(-5 // row.batch_size)
    flags = [f"--train_batch_size={row.batch_size}", "--num_train_epochs=2", f"--max_train_steps={steps}"]
    flags += ["--train_text_encoder"] * row.clip + ["--cache_latents"] * row.cached
    if row.prior:
        (tmp_path / "class").mkdir()
        for number in range(4):
            Image.new("RGB", (40, 40), (60 * number, 100, 200)).save(tmp_path / "class" / f"{number}.png")
        flags += ["--with_prior_preservation", "--class_prompt=a dog", "--num_class_images=4"]
        flags += [f"--class_data_dir={tmp_path / 'class'}"]
    if row.captions:
        (tmp_path / "data").mkdir()
        rows = []
        for path in pictures.iterdir():
            (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
            rows.append(json.dumps({"file_name": path.name, "text": f"sks dog number {path.stem}"}))
        (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows))
        flags += ["--instance_data_dir=", f"--dataset_name={tmp_path / 'data'}", "--caption_column=text"]
    output = run(script, *flags, "--learning_rate=1e-3")
    assert len(losses) == steps and all(0.1 < loss < 100 for loss in losses) and len(set(losses)) == steps
    lora = "lora" in script.__name__
    weights = load_file(output / ("pytorch_lora_weights.safetensors" if lora else "text_encoder/model.safetensors"))
    if lora:
        assert any(name.startswith("text_encoder.") for name in weights) == row.clip
        assert all(tensor.abs().max() > 0 for name, tensor in weights.items() if "lora_B" in name)
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
