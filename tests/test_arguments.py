"""The command line: the flags of `flags.json`, the ranges of values, what goes with what, files of flags, the help."""

import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import both_scripts, one_script

pytestmark = one_script

FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
BASE = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a photo of sks dog", "--instance_data_dir=dogs"]
PRIOR = "--with_prior_preservation --class_data_dir=pets --class_prompt=dog"


def rows(script: ModuleType) -> dict[str, dict[str, Any]]:
    return {row["flag"]: row for row in FLAGS[f"{script.__name__}.py"]}


def held(flag: str, value: Any) -> Any:
    """How the scripts hold a value of the list: resolutions are several, an optimizer is in lower case."""
    empty = {"--resolution": [], "--validation_prompt": [], "--class_prompt": ""}
    if value is None:
        return empty.get(flag)
    if flag in ("--resolution", "--validation_prompt", "--lora_layers"):
        return [value]
    return value.lower() if flag == "--optimizer" else value


def refusal(script: ModuleType, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a command line that cannot work is told, without the usage."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        script.parse_args([*BASE, *flags])
    assert exit_info.value.code == 2, flags
    _, error, message = capsys.readouterr().err.partition("error: ")
    assert error
    return message


@both_scripts
def test_every_flag_of_the_list_has_its_default(script: ModuleType) -> None:
    args = vars(script.parse_args(BASE))
    given = dict(word.split("=", 1) for word in BASE)
    wanted = {flag: given.get(flag, held(flag, row.get("default", False))) for flag, row in rows(script).items()}
    assert {flag: args[flag.removeprefix("--")] for flag in wanted} == wanted


@both_scripts
def test_a_value_is_read_as_the_type_of_the_list(script: ModuleType) -> None:
    values: dict[str, tuple[str, Any]] = {"int": ("48", 48), "float": ("0.25", 0.25), "str": ("words", "words")}
    special = {"--optimizer": "Prodigy", "--lr_scheduler": "polynomial"}
    for flag, row in rows(script).items():
        if row.get("action") == "store_true":
            words, value = [flag], True
        elif row["type"].startswith("bool"):
            words, value = [flag, "false"], False
        elif "choices" in row or flag in special:
            value = special.get(flag) or row["choices"][-1]
            words = [flag, value]
        else:
            words, value = [flag, values[row["type"]][0]], values[row["type"]][1]
        got = vars(script.make_parser().parse_args([*BASE, *words]))[flag.removeprefix("--")]
        assert (got, type(got)) == (held(flag, value), type(held(flag, value))), flag


@both_scripts
def test_without_a_flag_that_the_list_requires_a_command_is_refused(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    required = [flag for flag, row in rows(script).items() if row.get("required")]
    assert len(required) == 2
    for flag in required:  # a prompt may also come from captions
        with pytest.raises(SystemExit, match="2"):
            script.parse_args([word for word in BASE if word.split("=")[0] != flag])
        assert flag in capsys.readouterr().err.partition("error: ")[2]


@both_scripts
def test_every_choice_of_the_list_is_one(script: ModuleType) -> None:
    choices = {name: action.choices for action in script.make_parser()._actions for name in action.option_strings}
    wanted = {flag: row["choices"] for flag, row in rows(script).items() if "choices" in row}
    wanted["--optimizer"] = ["adamw", "prodigy"]
    wanted["--lr_scheduler"] = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant"]
    wanted["--lr_scheduler"] += ["constant_with_warmup", "piecewise_constant"]
    assert {flag: set(allowed) - set(choices[flag]) for flag, allowed in wanted.items()} == {
        flag: set() for flag in wanted
    }


# The flags of the three commands of diffusers' README.
DIFFUSERS = """--pretrained_model_name_or_path=black-forest-labs/FLUX.1-dev --instance_data_dir=dog --output_dir=trained
--mixed_precision=bf16 --instance_prompt=a_photo_of_sks_dog --train_batch_size=1 --guidance_scale=1 --optimizer=prodigy
--gradient_accumulation_steps=4 --learning_rate=1. --report_to=wandb --lr_scheduler=constant --lr_warmup_steps=0
--max_train_steps=500 --validation_prompt=A_photo_of_sks_dog_in_a_bucket --seed=0 --push_to_hub"""


@both_scripts
def test_the_commands_of_diffusers_readme_are_taken(script: ModuleType) -> None:
    for own, side, epochs in (
        ("--resolution=1024 --validation_epochs=25", 1024, 25),
        ("--resolution=512 --validation_epochs=25", 512, 25),
        ("--resolution=512 --train_text_encoder", 512, 50),
    ):
        args = script.parse_args([*DIFFUSERS.split(), *own.split()])
        assert (args.optimizer, args.learning_rate, args.seed, args.push_to_hub) == ("prodigy", 1.0, 0, True)
        assert (args.resolution, args.validation_epochs) == ([side], epochs)
        assert (args.validation_resolution, args.validation_prompt) == (
            (side, side),
            ["A_photo_of_sks_dog_in_a_bucket"],
        )


# Each of these alone is refused, by its own name.
OUTSIDE = """--resolution=8 --resolution=0 --resolution=-512 --resolution=512,8 --repeats=0 --train_batch_size=0
--gradient_accumulation_steps=0 --num_train_epochs=0 --max_train_steps=0 --max_train_steps=many --num_class_images=0
--sample_batch_size=0 --validation_epochs=0 --validation_steps=0 --num_validation_images=0 --checkpointing_steps=0
--checkpoints_total_limit=0 --max_sequence_length=0 --max_sequence_length=513 --dataloader_num_workers=-1
--validation_num_inference_steps=0 --validation_guidance_scale=-1 --lr_warmup_steps=-1 --lr_num_cycles=0 --lr_power=-1
--prior_loss_weight=-0.5 --learning_rate=-0.1 --learning_rate=inf --text_encoder_lr=-0.1 --adam_weight_decay=-0.1
--adam_weight_decay_text_encoder=-0.1 --adam_epsilon=-1 --max_grad_norm=-0.1 --adam_beta1=1 --adam_beta2=-0.1
--prodigy_beta3=1.5 --logit_std=0 --caption_dropout=1 --unmasked_weight=1.5 --flow_shift=0 --flow_shift=inf
--flow_shift=static --aspect_ratio_buckets=wide --aspect_ratio_buckets=512,512; --aspect_ratio_buckets=0,512
--aspect_ratio_buckets=512 --validation_resolution=8 --optimizer=foo --weighting_scheme=cosine --lr_scheduler=foo
--mixed_precision=fp8 --image_interpolation_mode=foo --traln_batch_size=1 --lr_step_rules=abc
--prodigy_decouple=maybe --caption_dropout=-0.1"""
OUTSIDE_ADAPTERS = ["--rank=0", "--lora_alpha=0", "--lora_dropout=-0.1", "--lora_dropout=1", "--base_quantization=int3"]


@both_scripts
def test_a_value_outside_its_range_is_refused_by_name(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in OUTSIDE.split() + (OUTSIDE_ADAPTERS if "lora" in script.__name__ else []):
        assert flag.split("=")[0] in refusal(script, capsys, flag), flag


@both_scripts
def test_no_number_may_be_nan_and_no_whole_number_a_fraction(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = {"float": "nan", "int": "2.5"}
    for flag, row in rows(script).items():
        if row.get("type") in wrong:
            assert flag in refusal(script, capsys, f"{flag}={wrong[row['type']]}"), flag


# Flags beside BASE, and what the message has to name. Every line of `problems` is in it.
CONTRADICTIONS = {
    "--instance_data_dir=": "--instance_data_dir --dataset_name",
    "--dataset_name=dogs": "--instance_data_dir --dataset_name",
    "--instance_prompt=": "--instance_prompt --caption_extension --caption_column",
    "--caption_column=text": "--caption_column --dataset_name --caption_extension",
    "--instance_data_dir= --dataset_name=dogs --mask_data_dir=masks": "--mask_data_dir --instance_data_dir",
    "--mask_data_dir=masks --alpha_mask": "--mask_data_dir --alpha_mask",
    "--validation_prompt={trigger}": "{trigger} --trigger_word",
    "--with_prior_preservation --class_prompt=dog": "--with_prior_preservation --class_data_dir",
    "--with_prior_preservation --class_data_dir=pets": "--with_prior_preservation --class_prompt",
    "--output_dir=./dogs": "--output_dir instance_data_dir",
    "--output_dir=": "--output_dir",
    f"{PRIOR} --class_data_dir=dogs/../dogs": "class_data_dir instance_data_dir",
    "--mask_data_dir=dogs": "mask_data_dir instance_data_dir",
    "--validation_data_dir=held": "--validation_data_dir --validation_loss",
    "--validation_steps=5": "--validation_steps --validation_prompt --validation_loss",
    "--optimizer=prodigy --learning_rate=0.05": "--learning_rate=0.05 prodigy",
    "--lr_scheduler=piecewise_constant": "--lr_scheduler=piecewise_constant --lr_step_rules",
    "--lr_scheduler=piecewise_constant --lr_step_rules=1:ten,0.1": "--lr_step_rules=1:ten,0.1",
    "--lr_scheduler=piecewise_constant --lr_step_rules=0.1.2": "--lr_step_rules=0.1.2",
}
OWN = {
    "lora": {
        f"--prior_from_base_model {PRIOR}": "--prior_from_base_model --with_prior_preservation",
        "--prior_from_base_model": "--prior_from_base_model --class_prompt --class_word",
        "--prior_from_base_model --class_word=dog": "--class_word --trigger_word",
        f"--prior_share=0.5 {PRIOR}": "--prior_share --prior_from_base_model",
        "--init_lora=x --lora_layers=attn.to_q": "--init_lora --lora_layers",
        "--blocks_to_swap=1": "--blocks_to_swap --gradient_checkpointing",
    },
    "full": {
        "--full_bf16": "--full_bf16 --mixed_precision=bf16",
        "--fused_backward_pass --mixed_precision=fp16": "--fused_backward_pass --mixed_precision=fp16 bf16",
        "--fused_backward_pass --gradient_accumulation_steps=2": "--fused_backward_pass --gradient_accumulation_steps",
        "--fused_backward_pass --optimizer=prodigy --learning_rate=1": "prodigy --fused_backward_pass",
        "--rank=8": "--rank",
    },
}


@both_scripts
def test_flags_that_contradict_each_other_are_refused_by_name(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    own = OWN["lora" if "lora" in script.__name__ else "full"]
    for flags, words in {**CONTRADICTIONS, **own}.items():
        message = refusal(script, capsys, *flags.split())
        assert [word for word in words.split() if word not in message] == [], (flags, message)


def test_all_contradictions_are_told_at_once_a_line_each(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--validation_steps=5", "--caption_column=text", "--with_prior_preservation"]
    lines = refusal(script, capsys, *flags).strip().splitlines()
    assert [sum(flag.split("=")[0] in line for line in lines) for flag in flags] == [1, 1, 1] and len(lines) == 3


def test_an_optimizer_whose_package_is_missing_says_what_to_install(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: name == "torch" or None)
    assert "pip install bitsandbytes" in refusal(script, capsys, "--use_8bit_adam")
    assert "pip install prodigyopt" in refusal(script, capsys, "--optimizer=prodigy", "--learning_rate=1")
    assert script.parse_args(BASE).optimizer == "adamw"


def test_the_edge_of_a_range_is_inside(script: ModuleType) -> None:
    edges = {
        "resolution": [16], "max_sequence_length": 512, "max_grad_norm": 0.0, "learning_rate": 0.0, "flow_shift": 3.0,
        "prior_loss_weight": 0.0, "lr_warmup_steps": 0, "adam_beta1": 0.0, "logit_mean": -1.0, "unmasked_weight": 1.0,
    }  # fmt: skip
    args = vars(script.parse_args([*BASE, *(f"--{name}={str(value).strip('[]')}" for name, value in edges.items())]))
    assert {name: args[name] for name in edges} == edges
    assert script.parse_args([*BASE, "--optimizer=Prodigy", "--learning_rate=0.1"]).learning_rate == 0.1


def test_resolutions_are_whole_tokens(script: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    assert script.parse_args([*BASE, "--resolution=64,32"]).resolution == [64, 32] and caplog.messages == []
    args = script.parse_args([*BASE, "--resolution=500,512", "--validation_resolution=64x32"])
    assert (args.resolution, args.validation_resolution) == ([496, 512], (64, 32))
    assert ["500,512" in told and "[496, 512]" in told for told in caplog.messages] == [True]


def test_shorthands_become_what_they_stand_for(script: ModuleType) -> None:
    args = script.parse_args([*BASE, "--use_8bit_adam", "--enable_npu_flash_attention", "--trigger_word=sks dog",
                              "--instance_prompt=a {trigger}", "--validation_prompt={trigger} at sea"])  # fmt: skip
    assert (args.optimizer, args.attention_backend) == ("adamw8bit", "_native_npu")
    assert (args.instance_prompt, args.validation_prompt) == ("a sks dog", ["sks dog at sea"])


def test_settings_are_all_flags_but_the_token(script: ModuleType) -> None:
    args = script.parse_args([*BASE, "--hub_token= hf_secret ", "--seed=3", "--resolution=64"])
    assert args.hub_token == "hf_secret" and "hf_secret" not in repr(script.settings(args))
    assert script.settings(args).keys() == vars(args).keys() - {"hub_token"}
    assert script.settings(args)["seed"] == 3 and script.settings(args)["resolution"] == [64]


def test_the_base_model_is_loaded_with_the_options_given_and_no_others(script: ModuleType) -> None:
    assert script.hub_options(script.parse_args(BASE)) == {}
    given = script.parse_args([*BASE, "--revision=v2", "--variant=fp16", "--cache_dir=cache", "--hub_token=hf_secret"])
    wanted = {"revision": "v2", "variant": "fp16", "cache_dir": "cache", "token": "hf_secret"}
    assert script.hub_options(given) == wanted


@both_scripts
def test_help_tells_of_every_flag_what_it_does_under_a_heading(script: ModuleType) -> None:
    parser = script.make_parser()
    groups = {group.title: [action.dest for action in group._group_actions] for group in parser._action_groups}
    assert groups["options"] == ["help"] and not groups["positional arguments"]
    assert "guidance_scale" in groups["flow matching and prompts"] and "repeats" in groups["pictures and captions"]
    assert [action.dest for action in parser._actions if len(action.help) < 8] == []
    assert re.search(r"--repeats REPEATS [^(]*\(default: 1\)", " ".join(parser.format_help().split()))


def test_a_file_of_flags_is_read_as_a_shell_reads(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my.txt"
    file.write_text("# it's mine\n\n--instance_prompt='a \"sks\" dog #1'  # whose?\n--seed=1 --resolution=32,64\n"
                    "--class_prompt='c'\"'\"'d' --center_crop\n")  # fmt: skip
    args = script.parse_args([*BASE, f"@{file}", "--seed=2"])
    assert (args.instance_prompt, args.class_prompt) == ('a "sks" dog #1', "c'd")
    assert (args.seed, args.resolution, args.center_crop) == (2, [32, 64], True)
    assert "flgas.txt" in refusal(script, capsys, "@flgas.txt")
    file.write_text("--class_prompt=my dog's toy\n")
    assert "quot" in refusal(script, capsys, f"@{file}")


def test_a_home_folder_that_the_shell_left_is_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = script.parse_args([*BASE, "--output_dir=~/trained", "--class_data_dir=~/class"])
    assert (args.output_dir, args.class_data_dir) == ("/home/me/trained", "/home/me/class")
