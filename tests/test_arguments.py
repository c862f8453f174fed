"""The command line: every flag with its type and default, every contradiction refused in one message, help by group."""

import contextlib
import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import both_scripts, one_script

pytestmark = one_script

ROOT = Path(__file__).parent.parent
FLAGS = json.loads((Path(__file__).parent / "flags.json").read_text())
BASE = ["--pretrained_model_name_or_path=flux", "--instance_prompt=a photo of sks dog", "--instance_data_dir=dogs"]
BOOLEANS = ["--prodigy_decouple", "--prodigy_use_bias_correction", "--prodigy_safeguard_warmup"]
SCHEDULES = ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"]
SCHEDULES += ["piecewise_constant"]
# In the help of both scripts: some flags, and the group in which a reader looks for them.
GROUPS = {
    "model": ["--pretrained_model_name_or_path", "--revision", "--variant", "--cache_dir"],
    "pictures and captions": ["--instance_data_dir", "--caption_column", "--caption_extension", "--resolution"],
    "prior preservation": ["--with_prior_preservation", "--class_prompt", "--prior_loss_weight"],
    "training": ["--train_batch_size", "--max_train_steps", "--seed"],
    "memory and speed": ["--gradient_checkpointing", "--mixed_precision", "--attention_backend"],
    "flow matching and prompts": ["--guidance_scale", "--weighting_scheme", "--max_sequence_length"],
    "optimizer and schedule": [
        "--optimizer",
        "--learning_rate",
        "--lr_scheduler",
        "--adam_beta1",
        "--prodigy_beta3",
        "--use_ema",
    ],
    "validation": ["--validation_prompt", "--num_validation_images", "--validation_epochs"],
    "output, checkpoints and the Hub": ["--output_dir", "--checkpointing_steps", "--push_to_hub", "--hub_token"],
}


def rows(script: ModuleType) -> list[dict[str, Any]]:
    return FLAGS[f"{script.__name__}.py"]


def dest(flag: str) -> str:
    return flag.removeprefix("--")


def choices(script: ModuleType, flag: str) -> Any:
    return next(action.choices for action in script.make_parser()._actions if flag in action.option_strings)


def parsed(script: ModuleType, *flags: str) -> dict[str, Any]:
    """The flags as the parser alone reads them, before they are checked against each other."""
    return vars(script.make_parser().parse_args([*BASE, *flags]))


def refusal(script: ModuleType, capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """What a command line that cannot work is told, without the usage lines, which name every flag."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        script.parse_args([*BASE, *flags])
    assert exit_info.value.code == 2
    _, error, message = capsys.readouterr().err.partition("error: ")
    assert error
    return message


@both_scripts
def test_defaults_are_those_of_the_list(script: ModuleType) -> None:
    required = [row["flag"] for row in rows(script) if row.get("required")]
    args = vars(script.make_parser().parse_args([f"{flag}=given" for flag in required]))
    wanted = {row["flag"]: row.get("default", False) for row in rows(script)} | dict.fromkeys(required, "given")
    assert {flag: args[dest(flag)] for flag in wanted} == wanted


@both_scripts
def test_values_are_read_as_the_type_of_the_list(script: ModuleType) -> None:
    values: dict[str, tuple[str, Any]] = {"int": ("7", 7), "float": ("0.25", 0.25), "str": ("some words", "some words")}
    got: dict[str, Any] = {}
    wanted: dict[str, Any] = {}
    value: Any
    several = [flag.name for flag in script.FLAG_OF.values() if flag.kind is list]  # may be given more than once
    for row in rows(script):
        flag = row["flag"]
        if row.get("action") == "store_true":
            argv, value = [flag], True
        elif row["type"].startswith("bool"):
            argv, value = [flag, "false"], False
        elif allowed := row.get("choices") or (SCHEDULES if flag == "--lr_scheduler" else None):
            argv, value = [flag, allowed[0]], allowed[0]
        else:
            text, value = values[row["type"]]
            argv, value = [flag, text], [value] if flag in several else value
        got[flag], wanted[flag] = parsed(script, *argv)[dest(flag)], value
    assert got == wanted
    assert {flag: type(value) for flag, value in got.items()} == {flag: type(value) for flag, value in wanted.items()}


@both_scripts
def test_whole_numbers_take_no_fractions(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    whole = [row["flag"] for row in rows(script) if row.get("type") == "int"]
    assert len(whole) > 10
    for flag in whole:
        assert flag in refusal(script, capsys, f"{flag}=2.5")


@both_scripts
def test_choices_are_those_of_the_list(script: ModuleType) -> None:
    wanted = {row["flag"]: row.get("choices") for row in rows(script)} | {"--lr_scheduler": SCHEDULES}
    assert {flag: choices(script, flag) for flag in wanted} == wanted


def test_a_flow_shift_of_none_is_none(script: ModuleType) -> None:
    assert parsed(script, "--flow_shift=none")["flow_shift"] is parsed(script)["flow_shift"] is None


def test_other_choices_are_refused(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    limited = [row["flag"] for row in rows(script) if choices(script, row["flag"])]
    assert len(limited) >= 4
    for flag in limited:
        message = refusal(script, capsys, f"{flag}=junk")
        assert flag in message and "junk" in message


@both_scripts
def test_required_flags_are_those_of_the_list(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        script.parse_args([])
    assert exit_info.value.code == 2
    message = capsys.readouterr().err.partition("error: ")[2].partition("All flags: ")[0]
    assert set(re.findall(r"--\w+", message)) == {row["flag"] for row in rows(script) if row.get("required")}


def test_a_boolean_means_what_it_says(script: ModuleType) -> None:
    words = {"true": True, "True": True, "false": False, "False": False}
    for flag, (text, value) in itertools.product(BOOLEANS, words.items()):
        assert parsed(script, flag, text)[dest(flag)] is value, (flag, text)


def test_a_boolean_refuses_junk(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, text in itertools.product(BOOLEANS, ["maybe", "2", ""]):
        message = refusal(script, capsys, flag, text)
        assert flag in message and f"got {text} but expected" in message and "true/false" in message


def test_a_misspelt_flag_is_refused_by_name(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--validation_promt" in refusal(script, capsys, "--validation_promt=a dog")


@both_scripts
def test_adapter_flags_belong_to_the_lora_script(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for flag, value in (("--rank", 8), ("--lora_alpha", 8), ("--lora_dropout", 0.5), ("--lora_layers", "attn.to_q")):
        if "lora" in script.__name__:
            assert parsed(script, f"{flag}={value}")[dest(flag)] == value
        else:
            assert flag in refusal(script, capsys, f"{flag}={value}")


REFUSED: list[tuple[str, list[str]]] = [
    ("--instance_data_dir=", ["--instance_data_dir", "--dataset_name"]),
    ("--dataset_name=dogs", ["--instance_data_dir", "--dataset_name"]),
    ("--instance_prompt=", ["--instance_prompt", "--caption_column", "--caption_extension"]),
    ("--caption_column=text", ["--caption_column", "--dataset_name", "metadata.jsonl", "--caption_extension"]),
    (
        "--instance_data_dir= --dataset_name=dogs --caption_extension=.txt",
        ["--caption_extension", "--instance_data_dir", "--caption_column"],
    ),
    ("--caption_extension=txt", ["--caption_extension", "'txt'", ".txt"]),
    ("--aspect_ratio_buckets=wide", ["--aspect_ratio_buckets", "'wide'", "auto", "16"]),
    ("--aspect_ratio_buckets=512,512;", ["--aspect_ratio_buckets", "'512,512;'", "height,width"]),
    ("--aspect_ratio_buckets=512,500", ["--aspect_ratio_buckets", "'512,500'", "16"]),
    ("--aspect_ratio_buckets=0,512", ["--aspect_ratio_buckets", "'0,512'", "16"]),
    ("--flow_shift=0", ["--flow_shift", "'0'", "above 0"]),
    ("--flow_shift=inf", ["--flow_shift", "'inf'", "dynamic"]),
    ("--flow_shift=static", ["--flow_shift", "'static'", "dynamic"]),
    ("--caption_dropout=1", ["--caption_dropout", "1.0", "below 1"]),
    ("--with_prior_preservation --class_prompt=dog", ["--with_prior_preservation", "--class_data_dir"]),
    ("--with_prior_preservation --class_data_dir=pets", ["--with_prior_preservation", "--class_prompt"]),
    ("--validation_data_dir=held-out", ["--validation_data_dir", "--validation_loss"]),
    ("--validation_steps=5", ["--validation_steps", "--validation_prompt", "--validation_loss"]),
    ("--validation_steps=0", ["--validation_steps", "0", "1 or more"]),
    ("--validation_num_inference_steps=0", ["--validation_num_inference_steps", "0", "1 or more"]),
    ("--validation_guidance_scale=-1", ["--validation_guidance_scale", "-1", "0 or more"]),
    ("--optimizer=sgd", ["--optimizer", "sgd", "AdamW", "prodigy"]),
    ("--lr_scheduler=piecewise_constant", ["--lr_scheduler=piecewise_constant", "--lr_step_rules"]),
    ("--lr_scheduler=piecewise_constant --lr_step_rules=1:ten,0.1", ["--lr_step_rules", "1:ten,0.1"]),
    ("--hub_model_id=a/b/c", ["--hub_model_id", "a/b/c"]),
    ("--resolution=8", ["--resolution", "8", "16"]),
    ("--resolution=0", ["--resolution", "0", "16"]),
    ("--resolution=-512", ["--resolution", "-512", "16"]),
    ("--repeats=0", ["--repeats", "0", "1 or more"]),
    ("--train_batch_size=0", ["--train_batch_size", "0", "1 or more"]),
    ("--gradient_accumulation_steps=0", ["--gradient_accumulation_steps", "0", "1 or more"]),
    ("--num_train_epochs=0", ["--num_train_epochs", "0", "1 or more"]),
    ("--max_train_steps=0", ["--max_train_steps", "0", "1 or more"]),
    ("--num_class_images=0", ["--num_class_images", "0", "1 or more"]),
    ("--sample_batch_size=0", ["--sample_batch_size", "0", "1 or more"]),
    ("--validation_epochs=0", ["--validation_epochs", "0", "1 or more"]),
    ("--num_validation_images=0", ["--num_validation_images", "0", "1 or more"]),
    ("--checkpointing_steps=0", ["--checkpointing_steps", "0", "1 or more"]),
    ("--checkpoints_total_limit=0", ["--checkpoints_total_limit", "0", "1 or more"]),
    ("--max_sequence_length=0", ["--max_sequence_length", "0", "1 or more"]),
    ("--max_sequence_length=513", ["--max_sequence_length", "513", "512"]),
    ("--dataloader_num_workers=-1", ["--dataloader_num_workers", "-1", "0 or more"]),
    ("--lr_warmup_steps=-1", ["--lr_warmup_steps", "-1", "0 or more"]),
    ("--lr_num_cycles=0", ["--lr_num_cycles", "0", "1 or more"]),
    ("--prior_loss_weight=-0.5", ["--prior_loss_weight", "-0.5", "0 or more"]),
    ("--learning_rate=-0.1", ["--learning_rate", "-0.1", "0 or more"]),
    ("--learning_rate=inf", ["--learning_rate", "inf"]),
    ("--text_encoder_lr=-0.1", ["--text_encoder_lr", "-0.1", "0 or more"]),
    ("--adam_weight_decay=-0.1", ["--adam_weight_decay", "-0.1", "0 or more"]),
    ("--adam_weight_decay_text_encoder=-0.1", ["--adam_weight_decay_text_encoder", "-0.1", "0 or more"]),
    ("--adam_epsilon=0", ["--adam_epsilon", "0.0", "above 0"]),
    ("--lr_power=-1", ["--lr_power", "-1", "0 or more"]),
    ("--max_grad_norm=-0.1", ["--max_grad_norm", "-0.1", "0 or more"]),
    ("--adam_beta1=1", ["--adam_beta1", "1.0", "below 1"]),
    ("--adam_beta2=-0.1", ["--adam_beta2", "-0.1", "0 or more"]),
    ("--prodigy_beta3=1.5", ["--prodigy_beta3", "1.5", "below 1"]),
    ("--ema_decay=1", ["--ema_decay", "1.0", "below 1"]),
    ("--logit_std=0", ["--logit_std", "0.0", "above 0"]),
    ("--optimizer=prodigy --learning_rate=0", ["prodigy", "--learning_rate"]),
    ("--lr_scheduler=polynomial --learning_rate=1e-7", ["--lr_scheduler=polynomial", "--learning_rate is 1e-07"]),
]
REFUSED_ADAPTERS: list[tuple[str, list[str]]] = [
    ("--rank=0", ["--rank", "0", "1 or more"]),
    ("--lora_alpha=0", ["--lora_alpha", "0", "1 or more"]),
    ("--lora_dropout=-0.1", ["--lora_dropout", "-0.1", "0 or more"]),
    ("--lora_dropout=1", ["--lora_dropout", "1.0", "below 1"]),
    ("--use_dora --train_text_encoder", ["--use_dora", "--train_text_encoder", "CLIP"]),
    ("--use_dora --base_quantization=int8", ["--use_dora", "--base_quantization"]),
]


@both_scripts
def test_what_cannot_work_is_refused_by_name(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    table = [*REFUSED, *(REFUSED_ADAPTERS if "lora" in script.__name__ else [])]
    for flags, words in table:
        message = refusal(script, capsys, *flags.split())
        assert [word for word in words if word not in message] == [], (flags, message)


def test_no_number_may_be_nan(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    accepted = []
    for flag in (row["flag"] for row in rows(script) if row.get("type") == "float"):
        with contextlib.suppress(SystemExit):
            script.parse_args([*BASE, f"{flag}=nan"])
            accepted.append(flag)
    capsys.readouterr()
    assert accepted == []


PACKAGES = {
    "--use_8bit_adam": "bitsandbytes",
    "--optimizer=prodigy": "prodigyopt",
    "--instance_data_dir= --dataset_name=dogs": "datasets",
    "--enable_npu_flash_attention": "torch_npu",
    "--report_to=tensorboard": "tensorboard",
    "--report_to=wandb": "wandb",
}


def test_a_flag_whose_package_is_missing_says_what_to_install(
    script: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    for flags, package in PACKAGES.items():
        message = refusal(script, capsys, "--report_to=none", *flags.split())
        assert flags.split()[-1].split("=dogs")[0] in message and f"pip install {package}" in message, flags


def test_packages_that_no_flag_needs_may_be_missing(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    assert script.parse_args([*BASE, "--report_to=none"]).report_to == "none"


def test_all_mistakes_are_told_at_once(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(script, capsys, "--repeats=0", "--optimizer=sgd", "--resolution=8", "--with_prior_preservation")
    told = [line for line in message.splitlines() if line.strip()]
    assert len(told) == 5
    for flag in ("--repeats", "--optimizer", "--resolution", "--class_data_dir", "--class_prompt"):
        assert sum(flag in line for line in told) == 1


EDGES: list[tuple[str, Any]] = [
    ("--resolution", 16),
    ("--resolution", 1008),
    ("--max_sequence_length", 1),
    ("--max_sequence_length", 512),
    ("--max_grad_norm", 0.0),
    ("--learning_rate", 0.0),
    ("--prior_loss_weight", 0.0),
    ("--dataloader_num_workers", 0),
    ("--lr_warmup_steps", 0),
    ("--adam_beta1", 0.0),
    ("--logit_mean", -1.0),
    ("--checkpoints_total_limit", 1),
    ("--hub_model_id", "owner/name"),
    ("--optimizer", "Prodigy"),
    ("--mixed_precision", "bf16"),
    ("--aspect_ratio_buckets", "16,1008"),
    ("--aspect_ratio_buckets", "auto"),
    ("--flow_shift", 3.0),
    ("--flow_shift", "dynamic"),
]


def test_the_edge_of_a_range_is_inside(script: ModuleType) -> None:
    for flag, value in EDGES:
        assert vars(script.parse_args([*BASE, f"{flag}={value}"]))[dest(flag)] == value, flag


NOTES: list[tuple[str, list[str]]] = [
    (
        "--aspect_ratio_buckets=auto --with_prior_preservation --class_data_dir=pets --class_prompt=dog",
        ["--aspect_ratio_buckets", "class pictures", "cropped"],
    ),
    ("--class_data_dir=pets", ["--class_data_dir", "--with_prior_preservation"]),
    ("--class_prompt=dog", ["--class_prompt", "--with_prior_preservation"]),
    ("--optimizer=prodigy --learning_rate=1 --use_8bit_adam", ["--use_8bit_adam", "prodigy"]),
    ("--optimizer=prodigy --learning_rate=0.0001", ["--learning_rate", "0.0001", "prodigy"]),
    ("--optimizer=Prodigy --learning_rate=1 --train_text_encoder", ["CLIP", "--learning_rate=1.0"]),
    ("--cache_latents", ["--cache_latents", "crop"]),
    ("--cache_latents --center_crop --random_flip", ["--cache_latents", "flip"]),
    ("--instance_data_dir= --dataset_name=dogs", ["--caption_column", "--instance_prompt"]),
]


def test_what_works_otherwise_than_it_seems_is_noted_once(script: ModuleType) -> None:
    for flags, words in NOTES:
        (note,) = script.notes_on_args(script.parse_args([*BASE, *flags.split()]))
        assert [word for word in words if word not in note] == [], flags


def test_what_works_as_it_seems_is_not_noted(script: ModuleType) -> None:
    for flags in (
        "",
        "--with_prior_preservation --class_data_dir=pets --class_prompt=dog",
        "--use_8bit_adam --train_text_encoder",
        "--optimizer=prodigy --learning_rate=1",
        "--cache_latents --center_crop",
        "--instance_data_dir= --dataset_name=dogs --caption_column=text",
    ):
        assert list(script.notes_on_args(script.parse_args([*BASE, *flags.split()]))) == [], flags


def test_settings_are_all_flags_but_the_token(script: ModuleType) -> None:
    args = script.parse_args([*BASE, "--hub_token=hf_secret", "--seed=3"])
    settings = script.settings(args)
    assert "hf_secret" not in repr(settings)
    assert settings.keys() == vars(args).keys() - {"hub_token"}
    assert settings["seed"] == 3 and settings["instance_prompt"] == "a photo of sks dog"


def test_the_base_model_is_loaded_with_the_options_given_and_no_others(script: ModuleType) -> None:
    assert script.hub_options(script.parse_args(BASE)) == {}
    given = script.parse_args([*BASE, "--revision=v2", "--variant=fp16", "--cache_dir=cache", "--hub_token=hf_secret"])
    wanted = {"revision": "v2", "variant": "fp16", "cache_dir": "cache", "token": "hf_secret"}
    assert script.hub_options(given) == wanted


def help_sections(script: ModuleType) -> dict[str, list[str]]:
    """The flags of each section of the help text, without what it prints above the sections."""
    found: dict[str, list[str]] = {}
    for line in script.make_parser().format_help().splitlines():
        if re.fullmatch(r"\S.*:", line):
            flags = found.setdefault(line.removesuffix(":"), [])
        elif match := re.match(r"  (?:-\w, )?(--\w+)", line):
            flags.append(match[1])
    return found


@both_scripts
def test_help_is_grouped_by_topic(script: ModuleType) -> None:
    sections = help_sections(script)
    assert sections.pop("options") == ["--help"]
    if "lora" in script.__name__:
        adapters = ["--rank", "--lora_alpha", "--lora_dropout", "--lora_layers"]
        assert sections.pop("adapters") == [*adapters, "--use_rslora", "--use_dora"]
    assert sections.keys() == GROUPS.keys()
    assert {name: [flag for flag in flags if flag in sections[name]] for name, flags in GROUPS.items()} == GROUPS


@both_scripts
def test_help_tells_of_every_flag_what_it_does(script: ModuleType) -> None:
    actions = script.make_parser()._actions
    assert [action.dest for action in actions if not (action.help or "").strip()] == []


def test_help_shows_the_defaults_that_say_something(script: ModuleType) -> None:
    text = " ".join(script.make_parser().format_help().split())
    assert re.search(r"--repeats REPEATS [^(]*\(default: 1\)", text)
    assert re.search(r"--weighting_scheme \{[^}]*\} [^(]*\(default: none\)", text)
    assert "default: None" not in text and "default: False" not in text and "%(" not in text


def test_a_value_may_begin_with_the_sign_of_a_file(script: ModuleType) -> None:
    args = script.parse_args([*BASE, "--instance_prompt", "@sks dog", "--validation_prompt", "@" + "very " * 99])
    assert args.instance_prompt == "@sks dog" and args.validation_prompt == ["@" + "very " * 99]


def test_a_file_of_flags_is_read_as_a_shell_reads(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "my.txt"
    file.write_text("--instance_data_dir=dog#2 # whose?\n# it's mine\n", encoding="utf-8-sig")
    assert list(script.read_words(["-x", f"@{file}"])) == ["-x", "--instance_data_dir=dog#2"]
    file.write_text("--validation_prompt '#1 dog' --seed=1  # 'one\n--class_prompt='c'\"'\"'d'\n")
    assert list(script.read_words([f"@{file}"])) == [
        "--validation_prompt", "#1 dog", "--seed=1", "--class_prompt=c'd",
    ]  # fmt: skip
    with pytest.raises(script.UsageError, match=r"^@flgas.txt: there is no file flgas.txt$"):
        script.parse_args(["--center_crop=x", "@flgas.txt"])
    file.write_text("--instance_prompt=my dog's toy\n")
    with pytest.raises(
        script.UsageError, match="No closing quotation; quote as in a shell: --instance_prompt=my dog's toy"
    ):
        script.parse_args([f"@{file}"])


def test_a_home_folder_that_the_shell_left_is_found(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    args = script.parse_args([*BASE, "--output_dir=~/trained", "--class_data_dir=~/class"])
    assert (args.output_dir, args.class_data_dir) == ("/home/me/trained", "/home/me/class")


@pytest.mark.parametrize(
    ("flags", "note"),
    [
        (["--resolution=500"], "--resolution=500: trained at [496], multiples of 16"),
        (["--resolution=512,600"], "--resolution=[512, 600]: trained at [512, 592], multiples of 16"),
        (["--resolution=512,768"], None),
        (["--trigger_word=ohwx"], "--trigger_word has no effect: --instance_prompt has neither it nor {trigger}"),
        (["--trigger_word=ohwx", "--caption_extension=.txt"], None),
        (["--hub_model_id=me/dog"], "--hub_model_id has no effect without --push_to_hub"),
    ],
)
def test_what_a_flag_does_not_do_as_it_says_is_noted(script: ModuleType, flags: list[str], note: str | None) -> None:
    notes = script.notes_on_args(script.parse_args([*BASE, *flags]))
    assert [found.startswith(note) for found in notes] == [True] if note else notes == []
