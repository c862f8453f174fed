"""The model card: what it tells, that it is what the Hub takes, and the pictures that it shows."""

import json
import re
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.repocard_data import ModelCardData

from conftest import Run, both_scripts, one_script
from tests.local_hub import HubState, card_errors

pytestmark = one_script

PROMPTS = ('a "sks" dog: running | barking', "un chien sks à la plage")
DRAWN = (*(f"--validation_prompt={prompt}" for prompt in PROMPTS), "--num_validation_images=2")
DRAWN += ("--validation_num_inference_steps=1",)


@both_scripts
def test_the_card_is_what_the_hub_takes(script: ModuleType, run: Run, hub: HubState) -> None:
    output = run(script, *DRAWN)
    card = ModelCard.load(output / "README.md")
    card.validate()  # asks the stand-in, which refuses what the Hub refuses
    assert len(hub.cards) == 1 and card_errors(hub.cards[0]) == []
    data = metadata_load(output / "README.md")
    assert data is not None and ModelCardData(**data).to_dict() == data == yaml.safe_load(card.content.split("---")[1])
    assert [entry["text"] for entry in data["widget"]] == [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    assert [entry["output"]["url"] for entry in data["widget"]] == [f"image_{number}.png" for number in range(4)]


REFUSED = (  # by what is wrong: a part of a good card, and what stands in its place
    ("license: other", "license: mine", "license"),
    ("license_name: flux", "license_name: FLUX", "license_name"),
    ("pipeline_tag: text-to-image", "pipeline_tag: drawing", "pipeline_tag"),
    ("library_name: diffusers", "library_name: [diffusers]", "library_name"),
    ("- dreambooth", "- {dreambooth: 1}", "tags"),
    ("  output:", "  picture:", "widget"),
    ("library_name", "base_model: /home/me/flux\nlibrary_name", "base_model"),
)


def test_the_stand_in_refuses_cards_that_the_hub_refuses(script: ModuleType, run: Run, hub: HubState) -> None:
    content = (run(script, *DRAWN) / "README.md").read_text()
    for old, new, named in REFUSED:
        assert content.count(old) >= 1
        with pytest.raises(ValueError, match=named):
            ModelCard(content.replace(old, new)).validate()


def test_the_card_tells_of_data_steps_hardware_versions_and_flags(script: ModuleType, run: Run, tmp_path: Path) -> None:
    class_dir = tmp_path / "class"
    flags = ["--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={class_dir}"]
    output = run(script, *DRAWN, *flags, "--num_class_images=2", "--gradient_accumulation_steps=2", "--repeats=3")
    text = (output / "README.md").read_text().split("## Training")[1]
    assert "5 of the subject (1 prompts), 2 of the class" in text
    assert re.search(r"2 steps of 2 pictures each, in \d\d:\d\d\n", text)
    assert "1 x CPU, mixed precision no, seed 0" in text
    assert all(f"{name} {version(name)}" in text for name in ("torch", "diffusers"))
    flags_told = set(re.findall(r"^    --(\w+)=", text, re.MULTILINE))
    changed = {"gradient_accumulation_steps", "repeats", "num_class_images", "seed", "resolution", "validation_prompt"}
    assert changed <= flags_told and not {"adam_beta1", "rank", "output_dir", "hub_token"} & flags_told
    assert flags_told <= script.FLAG_OF.keys()


def test_the_card_tells_no_path_of_this_machine(
    script: ModuleType, run: Run, base_flags: list[str], tmp_path: Path
) -> None:
    text = (run(script, *DRAWN, "--train_text_encoder") / "README.md").read_text()
    settings = text.split("## Training")[1]
    assert str(tmp_path.parent) not in settings and "--instance_data_dir=" in settings
    args = script.parse_args([*base_flags, "--instance_data_dir=", f"--dataset_name={tmp_path}"])
    state = script.RunState(1, 0)
    assert str(tmp_path.parent) not in script.describe_training(args, Accelerator(), {"instance": []}, state)


def test_the_card_names_a_model_of_the_hub_whole_and_a_folder_by_its_last_name(
    script: ModuleType, base_flags: list[str]
) -> None:
    flags = ["--pretrained_model_name_or_path=owner/flux", "--instance_data_dir=/home/me/dogs"]
    args = script.parse_args([*base_flags, *flags])
    text = script.describe_training(args, Accelerator(), {"instance": []}, script.RunState(1, 0))
    assert "--pretrained_model_name_or_path=owner/flux\n" in text and "--instance_data_dir=dogs\n" in text
    args.scale_lr, args.learning_rate = True, 0.25  # as `resolve_steps` leaves it: already scaled
    text = script.describe_training(args, Accelerator(), {"instance": []}, script.RunState(1, 0))
    assert "--learning_rate=0.25" in text and "scale_lr" not in text


def test_the_card_shows_only_pictures_that_exist(script: ModuleType, run: Run) -> None:
    output = run(script, *DRAWN, "--validation_steps=1")
    shown = re.findall(r"!\[.*?\]\((.*?)\)", (output / "README.md").read_text())
    assert "contact_sheet.jpg" in shown and all((output / name).is_file() for name in shown)
    output = run(script, f"--output_dir={output}-plain")
    text = (output / "README.md").read_text()
    assert "contact_sheet.jpg" not in text and "<Gallery />" not in text


def test_a_resumed_run_tells_of_the_time_of_all_its_steps(script: ModuleType, run: Run) -> None:
    output = run(script, "--max_train_steps=2", "--checkpointing_steps=1")
    before = read_seconds(script, output / "checkpoint-1")
    run(script, "--max_train_steps=4", "--checkpointing_steps=1", "--resume_from_checkpoint=checkpoint-1")
    seconds = [read_seconds(script, output / f"checkpoint-{step}") for step in (1, 2, 3, 4)]
    assert 0 < before == seconds[0] < seconds[1] < seconds[2] < seconds[3]


def read_seconds(script: ModuleType, checkpoint: Path) -> float:
    return float(json.loads((checkpoint / script.STATE_FILE).read_text())["facts"]["state"]["seconds"])
