"""Every command of the README runs to its end, with the model, the pictures and the sizes made small."""

import os
import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from conftest import SCRIPTS, Run
from tests.local_hub import HubState

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = [block for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) if "accelerate launch" in block]


def read_command(block: str) -> tuple[str, list[str]]:
    """The script and its flags, variables replaced as a shell would."""
    variables = dict(re.findall(r'^\s*export (\w+)="(.*?)"$', block, re.MULTILINE))
    line = re.sub(r"\\\n", "", block[block.index("accelerate launch") :])
    words = shlex.split(re.sub(r"\$(\w+)", lambda match: variables[match[1]], line))
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return words[script], words[script + 1 :]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: read_command(block)[1][2].split("=")[1])
def test_a_command_runs_to_its_end(
    block: str, run: Run, hub: HubState, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb_runs = len(list(Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*/*.wandb")))
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_login")
    name, flags = read_command(block)
    [script] = [script for script in SCRIPTS.values() if Path(script.__file__).name == name]
    (tmp_path / "masks").mkdir()
    for path in pictures.iterdir():
        with Image.open(path) as picture:
            picture.convert("L").save(tmp_path / "masks" / f"{path.stem}.png")
    lora = None
    if any(flag.startswith("--init_lora") for flag in flags):
        lora = run(script, "--rank=16", f"--output_dir={tmp_path / 'first'}", "--max_train_steps=1")
    small = {
        "--mask_data_dir": str(tmp_path / "masks"), "--init_lora": str(lora), "--validation_resolution": "48x32",
        "--pretrained_model_name_or_path": None, "--instance_data_dir": None, "--output_dir": None,
        "--resolution": "32", "--max_train_steps": "6",
        "--class_data_dir": str(tmp_path / "class"), "--num_class_images": "2",
    }  # fmt: skip
    kept = [flag for flag in flags if flag.split("=")[0] not in small]
    kept += [f"{flag}={small[flag]}" for flag in (flag.split("=")[0] for flag in flags) if small.get(flag)]
    output = run(script, *kept)
    result = "pytorch_lora_weights.safetensors" if "lora" in name else "model_index.json"
    assert (output / result).is_file()
    new_wandb_runs = len(list(Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*/*.wandb"))) - wandb_runs
    assert new_wandb_runs == ("--report_to=wandb" in flags)
    if "--push_to_hub" in flags:
        assert result in hub.repositories["tester/out"]
    if any(flag.startswith("--validation_prompt") for flag in flags):
        assert (output / "image_0.png").is_file()


def test_the_launch_configurations_are_those_that_the_readme_names() -> None:
    there = {path.name for path in (ROOT / "accelerate_configs").iterdir()}
    assert set(re.findall(r"(?<!/)\b\w+\.yaml", README.replace("accelerate_configs/", ""))) == there
    for name in there:
        assert load_config_from_file(str(ROOT / "accelerate_configs" / name)).num_processes >= 1


def test_there_are_commands_for_both_scripts() -> None:
    names = [read_command(block)[0] for block in BLOCKS]
    assert len(names) >= 4 and set(names) == {Path(script.__file__).name for script in SCRIPTS.values()}


def test_every_flag_that_the_readme_names_exists() -> None:
    known = {
        option
        for script in SCRIPTS.values()
        for action in script.make_parser()._actions
        for option in action.option_strings
    }
    known |= set(launch_command_parser()._option_string_actions) | {
        "--nodes",
        "--ntasks",
        "--gpus",
        "--signal",
    }  # SLURM's
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", README))
    assert len(named) > 30 and named <= known


def test_every_function_that_the_readme_sends_readers_to_exists_in_both_scripts() -> None:
    table = README.split("## To change something")[1].split("Functions of the same name")[0]
    names = {name for row in table.splitlines()[4:] if row.startswith("|") for name in re.findall(r"`(\w+)`", row)}
    assert len(names) > 10
    for script in SCRIPTS.values():
        assert [name for name in names - {"TRANSFORMER_TARGETS", "add_adapter"} if not hasattr(script, name)] == []
