"""Every command of the README runs to its end, with the model, the pictures and the sizes made small."""

import importlib
import operator
import os
import re
import shlex
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from PIL import Image

from conftest import SCRIPTS, Run, one_script
from tests.local_hub import HubState

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
JOINED = README.replace("\\\n", "")  # each command on one line
COMMANDS = re.findall(r"^accelerate launch .*", JOINED, re.MULTILINE)
TOOLS = re.findall(r"python (tools/\w+\.py [^`\n]+)", JOINED)  # in a block, or in a sentence
MAKE = (ROOT / "Makefile").read_text()


def read_command(command: str) -> tuple[str, list[str]]:
    """The script and its flags."""
    words = shlex.split(command)
    script = next(number for number, word in enumerate(words) if word.endswith(".py"))
    return words[script], words[script + 1 :]


def read_cases() -> list[tuple[str, list[str]]]:
    """The commands, and diffusers' with the full script, as the README says below it."""
    cases = [read_command(command) for command in COMMANDS]
    cases += [("train_dreambooth_flux.py", flags) for _, flags in cases if "--push_to_hub" in flags]
    return cases


def count_wandb_runs() -> int:
    return len(list(Path(os.environ["WANDB_DIR"]).glob("wandb/offline-run-*/*.wandb")))


@pytest.mark.parametrize(("name", "flags"), read_cases(), ids=lambda part: part if isinstance(part, str) else part[2])
def test_a_command_runs_to_its_end(
    name: str, flags: list[str], run: Run, hub: HubState, pictures: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    wandb_runs = count_wandb_runs()
    monkeypatch.setenv("HF_TOKEN", "hf_from_the_login")
    [script] = [script for script in SCRIPTS.values() if Path(script.__file__).name == name]
    (tmp_path / "masks").mkdir()
    for path in pictures.iterdir():
        with Image.open(path) as picture:
            picture.convert("L").save(tmp_path / "masks" / f"{path.stem}.png")
    small = {
        "--mask_data_dir": str(tmp_path / "masks"), "--validation_resolution": "48x32",
        "--pretrained_model_name_or_path": None, "--instance_data_dir": None, "--output_dir": None,
        "--resolution": "32", "--max_train_steps": "6",
        "--class_data_dir": str(tmp_path / "class"), "--num_class_images": "2",
    }  # fmt: skip
    kept = [flag for flag in flags if flag.split("=")[0] not in small]
    kept += [f"{flag}={small[flag]}" for flag in (flag.split("=")[0] for flag in flags) if small.get(flag)]
    output = run(script, *kept)
    result = "pytorch_lora_weights.safetensors" if "lora" in name else "model_index.json"
    assert (output / result).is_file()
    assert count_wandb_runs() - wandb_runs == ("--report_to=wandb" in flags)
    if "--push_to_hub" in flags:
        assert result in hub.repositories["tester/out"]
    if any(flag.startswith("--validation_prompt") for flag in flags):
        assert (output / "image_0.png").is_file()


def test_there_are_commands_for_both_scripts_and_all_tools() -> None:
    names = [read_command(command)[0] for command in COMMANDS]
    assert len(names) >= 4 and set(names) == {Path(script.__file__).name for script in SCRIPTS.values()}
    tools = {f"tools/{name}.py" for name in ("contact_sheet", "lora_to_kohya", "memory_plan")}
    assert {shlex.split(command)[0] for command in TOOLS} == tools


@pytest.mark.parametrize("command", TOOLS, ids=lambda command: command.split()[0])
def test_a_tool_does_what_the_readme_says(
    command: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn = ("--validation_prompt=a", "--validation_prompt=b", "--validation_steps=1", "--skip_final_inference")
    output = run(SCRIPTS["lora"], *drawn, "--max_train_steps=1")
    monkeypatch.chdir(tmp_path)
    for script in SCRIPTS.values():
        Path(Path(str(script.__file__)).name).symlink_to(str(script.__file__))
    for name in ("trained-dog", "trained-flux-lora"):
        shutil.copytree(output, name)
    monkeypatch.setattr("sys.argv", shlex.split(command))
    importlib.import_module(command.split()[0].removesuffix(".py").replace("/", ".")).main()
    said = capsys.readouterr().out
    assert said.startswith("Wrote trained-") or re.search(r"24 GB +would fit with --.*80 GB +fits", said, re.DOTALL)


def test_the_launch_configurations_are_those_that_the_readme_names() -> None:
    there = {path.name for path in (ROOT / "accelerate_configs").iterdir()}
    assert set(re.findall(r"(?<!/)\b\w+\.yaml", README.replace("accelerate_configs/", ""))) == there
    for name in there:
        assert load_config_from_file(str(ROOT / "accelerate_configs" / name)).num_processes >= 1


def test_every_flag_that_the_readme_names_exists() -> None:
    parsers = [script.make_parser() for script in SCRIPTS.values()]
    known = {option for parser in parsers for action in parser._actions for option in action.option_strings}
    known |= {*launch_command_parser()._option_string_actions, "--prompts"}  # the last is the contact sheet's
    named = set(re.findall(r"(?<![\w-])--[a-z]\w+", README))
    assert len(named) > 30 and named <= known


def test_what_the_readme_and_the_makefile_point_to_exists() -> None:
    sections = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", section.lower()).replace(" ", "-") for section in sections}
    links = re.findall(r"\]\((?!http)(.*?)\)", README)
    assert links and [link for link in links if link[0] == "#" and link[1:] not in anchors] == []
    assert [link for link in links if link[0] != "#" and not (ROOT / link.split("#")[0]).exists()] == []
    assert set(re.findall(r"README.md under '(.*)'", MAKE)) <= set(sections)
    assert {f"{name}:" for name in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE)} <= set(
        re.findall(r"^\w+:", MAKE, re.MULTILINE)
    )


@one_script
def test_every_function_that_a_script_sends_readers_to_exists(script: ModuleType) -> None:
    table = (script.__doc__ or "").split("To change something, edit this")[1]
    names = [name for name in re.findall(r"`([\w.]+)`", table) if not name.endswith("NAME")]
    assert len(names) > 10 and [operator.attrgetter(name)(script) for name in names]
