"""Three changes as patches: each applies, takes as few places as it says, and does what it says."""

import importlib.util
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

import train_dreambooth_lora_flux as plain
from conftest import Run

EDITS = Path(__file__).parent / "edits"
PLACES = {"huber_loss": 2, "sgd": 2, "logged_number": 1}
Edited = Callable[[str], ModuleType]


@pytest.fixture
def edited(tmp_path: Path) -> Iterator[Edited]:
    """`edited(name)` is the LoRA script with a patch of `edits/`, as a module."""
    name = "edited_lora_script"

    def apply(patch: str) -> ModuleType:
        copy = tmp_path / Path(plain.__file__).name
        copy.write_text(Path(plain.__file__).read_text())
        subprocess.run(["git", "apply", str(EDITS / f"{patch}.patch")], cwd=tmp_path, check=True)
        spec = importlib.util.spec_from_file_location(name, copy)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield apply
    sys.modules.pop(name, None)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    values: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, step_values, step: values.append(step_values))
    return values


def test_the_patches_are_those_that_are_tested_here() -> None:
    assert {path.stem for path in EDITS.iterdir()} == PLACES.keys()
    for name, places in PLACES.items():
        assert (EDITS / f"{name}.patch").read_text().count("\n@@ ") == places, name


def test_a_huber_loss_is_the_squared_one_up_to_its_delta_and_linear_above(
    edited: Edited, run: Run, logged: list[dict[str, float]]
) -> None:
    script = edited("huber_loss")
    for flags in ([], ["--huber_delta=1000"], ["--huber_delta=0.5"]):
        run(script, *flags, "--validation_loss", "--validation_steps=2")
    losses = [[values["loss"] for values in logged[part : part + 5] if "loss" in values] for part in (0, 4, 8)]
    validation = [values["validation_loss"] for values in logged if "validation_loss" in values]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[2][0] < 0.8 * losses[0][0]
    assert validation[0] == pytest.approx(validation[2], rel=1e-6) and validation[4] < 0.8 * validation[0]
    error = torch.tensor([[[0.2]], [[3.0]]])
    args = script.parse_args(["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--instance_prompt=z"])
    args.huber_delta = 0.5
    found = script.flow_matching_loss(error, torch.zeros_like(error), torch.ones(2), args)
    assert found.tolist() == pytest.approx([0.2**2, 2 * 0.5 * (3.0 - 0.5 / 2)])


def test_sgd_with_momentum_takes_its_steps_and_keeps_its_momentum_over_a_resume(
    edited: Edited, run: Run, tmp_path: Path
) -> None:
    script = edited("sgd")
    flags = ("--optimizer=sgd", "--learning_rate=0.1", "--adam_weight_decay=0", "--checkpointing_steps=1")
    whole = run(script, *flags, "--max_train_steps=3", f"--output_dir={tmp_path / 'whole'}")
    run(script, *flags, "--max_train_steps=2")
    resumed = run(script, *flags, "--max_train_steps=3", "--sgd_momentum=0.9", "--resume_from_checkpoint=latest")
    expected, got = (load_file(folder / script.LORA_FILE) for folder in (whole, resumed))
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    # With momentum m, the change of step 2 is m times that of step 1 and the learning rate times its own gradient.
    first, second = (torch.load(whole / f"checkpoint-{step}" / "optimizer.bin")["state"] for step in (1, 2))
    weights = [load_file(whole / f"checkpoint-{step}" / script.LORA_FILE) for step in (1, 2)]
    change = torch.cat([(weights[0][name] - weights[1][name]).flatten() for name in weights[0]]).norm()
    momentum = torch.cat([state["momentum_buffer"].flatten() for state in second.values()]).norm()
    assert change.item() == pytest.approx(0.1 * momentum.item(), rel=1e-3) and first.keys() == second.keys()


def test_another_number_is_logged(edited: Edited, run: Run, logged: list[dict[str, float]]) -> None:
    output = run(edited("logged_number"), "--upcast_before_saving")
    weights = load_file(output / plain.LORA_FILE).values()  # with a scale of 1, those that were trained
    expected = math.sqrt(sum(float(weight.double().square().sum()) for weight in weights))
    assert logged[1]["weight_norm"] == pytest.approx(expected, rel=1e-5)
