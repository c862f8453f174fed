"""Six changes as patches: each applies, takes as few places as it says, and does what it says."""

import importlib.util
import math
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth_lora_flux as plain
from conftest import Run

EDITS = Path(__file__).parent / "edits"
PLACES = {  # how many, at most
    "huber_loss": 2, "sgd": 2, "logged_number": 1, "second_term": 2, "second_caption": 5, "single_blocks_lr": 2,
}  # fmt: skip
Edited = Callable[[str], ModuleType]


@pytest.fixture
def edited(tmp_path: Path) -> Iterator[Edited]:
    """`edited(name)` is the LoRA script with a patch of `edits/`, as a module."""
    name = "edited_lora_script"

    def apply(patch: str) -> ModuleType:
        copy = Path(shutil.copy(plain.__file__, tmp_path))
        subprocess.run(["git", "apply", str(EDITS / f"{patch}.patch")], cwd=tmp_path, check=True)
        spec = importlib.util.spec_from_file_location(name, copy)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield apply
    sys.modules.pop(name, None)


def equal(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same weights, bit for bit."""
    states = [load_file(folder / plain.LORA_FILE) for folder in (one, other)]
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_patches_are_those_that_are_tested_here() -> None:
    counts = {path.stem: path.read_text().count("\n@@ ") for path in EDITS.iterdir()}
    assert counts.keys() == PLACES.keys() and [name for name in counts if counts[name] > PLACES[name]] == []


def test_a_huber_loss_is_the_squared_one_up_to_its_delta_and_linear_above(
    edited: Edited, run: Run, logged: list[dict[str, float]]
) -> None:
    script = edited("huber_loss")
    for flags in ([], ["--huber_delta=1000"], ["--huber_delta=0.5"]):
        run(script, *flags, "--validation_loss", "--validation_steps=2")
    for name in ("loss", "validation_loss"):
        squared, wide, narrow = np.reshape([values[name] for values in logged if name in values], (3, 2))
        assert squared == pytest.approx(wide, rel=1e-6) and narrow[0] < 0.8 * squared[0]
    error = torch.tensor([[[0.2]], [[3.0]]])
    options = Namespace(weighting_scheme="none", huber_delta=0.5)
    found = script.flow_matching_loss(error, torch.zeros_like(error), torch.ones(2), options)
    assert found.tolist() == pytest.approx([0.2**2, 2 * 0.5 * (3.0 - 0.5 / 2)])


def test_sgd_with_momentum_takes_its_steps_and_keeps_its_momentum_over_a_resume(
    edited: Edited, run: Run, tmp_path: Path
) -> None:
    script = edited("sgd")
    flags = ("--optimizer=SGD", "--learning_rate=0.1", "--adam_weight_decay=0", "--checkpointing_steps=1")
    whole = run(script, *flags, "--max_train_steps=3", f"--output_dir={tmp_path / 'whole'}")
    run(script, *flags)
    assert equal(run(script, *flags, "--max_train_steps=3", "--resume_from_checkpoint=latest"), whole)
    # With momentum m, the change of step 2 is m times that of step 1 and the learning rate times its own gradient.
    state = torch.load(whole / "checkpoint-2" / "optimizer.bin")["state"]
    weights = [load_file(whole / f"checkpoint-{step}" / script.LORA_FILE) for step in (1, 2)]
    change = torch.cat([(weights[0][name] - weights[1][name]).flatten() for name in weights[0]]).norm()
    momentum = torch.cat([buffers["momentum_buffer"].flatten() for buffers in state.values()]).norm()
    assert change.item() == pytest.approx(0.1 * momentum.item(), rel=1e-3)


def test_another_number_is_logged(edited: Edited, run: Run, logged: list[dict[str, float]]) -> None:
    output = run(edited("logged_number"), "--upcast_before_saving")
    weights = load_file(output / plain.LORA_FILE).values()  # with a scale of 1, those that were trained
    expected = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
    assert logged[1]["weight_norm"] == pytest.approx(expected, rel=1e-5)


def test_a_second_term_is_a_part_of_the_loss_with_a_number_of_its_own_and_of_the_validation_loss(
    edited: Edited, run: Run, logged: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    script, pictures = edited("second_term"), list[tuple[float, float]]()
    flow_matching_loss = script.flow_matching_loss

    def record(velocity: torch.Tensor, target: torch.Tensor, *given: Any) -> torch.Tensor:
        losses = flow_matching_loss(velocity, target, *given)
        for loss, *vectors in zip(losses, velocity, target, strict=True):
            one, other = (vector.detach().double().flatten().numpy() for vector in vectors)
            pictures.append((loss.item(), 1 - one @ other / np.sqrt(one @ one * (other @ other))))
        return losses

    monkeypatch.setattr(script, "flow_matching_loss", record)
    flags = ("--train_batch_size=2", "--gradient_accumulation_steps=2", "--validation_loss", "--validation_steps=2")
    run(script, *flags, "--direction_weight=2")
    parts = [np.mean(pictures[start:stop], axis=0) for start, stop in ((0, 40), (40, 44), (44, 45), (45, 85))]
    assert len(pictures) == 85 and parts[0][1] > 0.1
    for values, name, part in zip(logged, ("validation_loss", "loss", "loss", "validation_loss"), parts, strict=True):
        assert values[name] == pytest.approx(part[0] + 2 * part[1], rel=1e-5)
    assert [values["direction_loss"] for values in logged[1:3]] == pytest.approx([parts[1][1], parts[2][1]], rel=1e-5)


def test_a_second_caption_is_drawn_by_its_share_the_same_with_cached_latents_and_over_a_resume(
    edited: Edited, run: Run, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, folder = edited("second_caption"), Path(shutil.copytree(pictures, tmp_path / "dogs"))
    for number, path in enumerate(sorted(folder.iterdir())):
        path.with_suffix(".txt").write_text(f"a dog {number}")
        if number < 4:
            path.with_suffix(".long.txt").write_text(f"a long dog {number}")
    drawn, prepare_inputs = list[tuple[int, str]](), script.prepare_inputs

    def record(running: Any, batch: dict) -> Any:
        drawn.extend((key.example, prompt) for key, prompt in zip(batch["keys"], batch["prompts"], strict=True))
        return prepare_inputs(running, batch)

    monkeypatch.setattr(script, "prepare_inputs", record)
    flags = [f"--instance_data_dir={folder}", "--caption_extension=.txt", "--trigger_word=ohwx", "--max_train_steps=12"]
    flags += ["--second_caption_extension=.long.txt", "--second_caption_share=0.7", "--train_batch_size=5"]
    run(script, *flags)
    run(script, *flags, "--cache_latents", "--checkpointing_steps=6", f"--output_dir={tmp_path / 'cached'}")
    run(script, *flags, f"--resume_from_checkpoint={tmp_path / 'cached' / 'checkpoint-6'}")
    first = drawn[:60]
    assert drawn == first * 2 + first[30:]
    assert {prompt for _, prompt in first} == {
        *(f"ohwx a dog {number}" for number in range(5)), *(f"ohwx a long dog {number}" for number in range(4))
    }  # fmt: skip
    assert all(prompt.endswith(str(example)) for example, prompt in first)
    assert 0.5 < sum("long" in prompt for _, prompt in first) / 48 < 0.9


def test_the_single_blocks_have_a_learning_rate_of_their_own(edited: Edited, run: Run, tmp_path: Path) -> None:
    script, flags = edited("single_blocks_lr"), ("--learning_rate=1e-2", "--max_train_steps=3")
    assert equal(run(script, *flags), run(plain, *flags, f"--output_dir={tmp_path / 'plain'}"))
    rates = (*flags, "--single_blocks_lr=1e-3", "--checkpointing_steps=1")
    whole = run(script, *rates, f"--output_dir={tmp_path / 'rates'}")
    resumed = run(script, *rates, f"--resume_from_checkpoint={whole / 'checkpoint-2'}")
    assert equal(resumed, whole)
    first = load_file(whole / "checkpoint-1" / plain.LORA_FILE)  # B was zero; Adam's first step is the rate
    for name, weight in first.items():
        if "lora_B" in name:
            rate = 1e-3 if "single_transformer_blocks" in name else 1e-2
            assert weight.abs().max().item() == pytest.approx(rate, rel=1e-3), name
