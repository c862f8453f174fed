"""Bad inputs: each ends in one message that names the flag and the way out, and no model was loaded, nothing left."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import constants, hf_api
from PIL import Image
from transformers import CLIPTextModel, T5EncoderModel

from conftest import SCRIPTS
from tests.processes import ROOT

MODELS = (FluxTransformer2DModel, FluxPipeline, AutoencoderKL, CLIPTextModel, T5EncoderModel)
PRIOR = ("--with_prior_preservation", "--class_prompt=a dog")


@dataclass
class Place:
    """Where a bad input is built, an empty folder, with a patch that the test undoes."""

    folder: Path
    patch: pytest.MonkeyPatch
    request: pytest.FixtureRequest

    def write(self, name: str, content: bytes | str = "") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def picture(self, name: str) -> Path:
        path = self.write(name)
        Image.effect_noise((64, 48), 50).save(path, "JPEG" if path.suffix == ".jpg" else "PNG")
        return path


Build = Callable[[Place], list[str]]


def given(*flags: str) -> Build:
    """An input that is bad by its flags alone."""
    return lambda _: list(flags)


def files(flags: str, **contents: bytes | str) -> Build:
    """Flags, and files in the folder `data`, whose names end in .png unless they have another ending, after __."""

    def build(place: Place) -> list[str]:
        (place.folder / "data").mkdir()
        for name, content in contents.items():
            place.write(f"data/{name.replace('__', '.') if '__' in name else name + '.png'}", content)
        return flags.split()

    return build


def environment(name: str, value: str, *flags: str) -> Build:
    return lambda place: place.patch.setenv(name, value) or list(flags)


def dataset(captions: list[str], *flags: str) -> Build:
    """A local dataset of pictures with captions in the column text."""

    def build(place: Place) -> list[str]:
        for number in range(len(captions)):
            place.picture(f"data/{number}.png")
        rows = [json.dumps({"file_name": f"{number}.png", "text": text}) for number, text in enumerate(captions)]
        place.write("data/metadata.jsonl", "\n".join(rows))
        return ["--instance_data_dir=", "--dataset_name=data", *flags]

    return build


def checkpoint(wanted: str, *flags: str, size: int = 7) -> Build:
    """Two checkpoints with one file each, which should have `size` bytes and has seven."""

    def build(place: Place) -> list[str]:
        args = {"rank": 4, "optimizer": "adamw", "lora_layers": None}
        args |= dict.fromkeys(["train_text_encoder", "full_bf16", "fused_backward_pass"], False)
        for step in (1, 2):
            place.write(f"out/checkpoint-{step}/optimizer.bin", "weights")
            state = {"state": {"step": step, "seed": 0, "seconds": 1.0}, "args": args, "processes": 1}
            content = json.dumps({**state, "files": {"optimizer.bin": size}})
            place.write(f"out/checkpoint-{step}/training_state.json", content)
        return [f"--resume_from_checkpoint={wanted}", "--max_train_steps=3", *flags]

    return build


def several_broken_pictures(place: Place) -> list[str]:
    place.picture("pictures/good.png")
    place.write("pictures/empty.png")
    place.write("pictures/text.jpg", "not a picture")
    for name, size in {"half.png": 100, "cut.jpg": -200}.items():
        place.write(f"pictures/{name}", place.picture(f"pictures/{name}").read_bytes()[:size])
    return ["--instance_data_dir=pictures"]


def hub_that(reason: str) -> Build:
    def build(place: Place) -> list[str]:
        hub = place.request.getfixturevalue("hub")
        if reason == "refuses":
            hub.token = "another"
        elif reason == "may be read":
            hub.read_only = True
        else:
            for module in (constants, hf_api):
                place.patch.setattr(module, "ENDPOINT", "http://127.0.0.1:9", raising=False)  # nobody listens there
        return ["--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=tester/sks-dog"]

    return build


MODEL = "--pretrained_model_name_or_path="
RESUME = "--resume_from_checkpoint="
BAD_PICTURE = "not a picture"
# What is bad: how it is made, and the words of the message.
TABLE: dict[str, tuple[Build, str]] = {
    "a tracker that is not installed": (given("--report_to=comet_ml"), "--report_to=comet_ml"),
    "a tracker that does not exist": (given("--report_to=notebook"), "--report_to=notebook"),
    "a precision that the configuration cannot have": (
        environment("ACCELERATE_MIXED_PRECISION", "fp8"), "--mixed_precision fp8"
    ),
    "an engine that is not supported": (environment("ACCELERATE_USE_DEEPSPEED", "true"), "accelerate_configs/ .yaml"),
    "an unknown attention": (given("--attention_backend=foo"), "--attention_backend=foo"),
    "an attention of a package that is missing": (given("--attention_backend=flash"), "--attention_backend=flash"),
    "a model that is not there": (given(f"{MODEL}./nothing"), f"{MODEL}./nothing"),
    "a model on the Hub, offline": (given(f"{MODEL}nobody/nothing"), f"{MODEL}nobody/nothing"),
    "a folder that is no model": (files(f"{MODEL}data"), f"{MODEL}data model_index.json"),
    "a model of another kind": (files(f"{MODEL}data", model_index__json='{"_class_name": "Other"}'), MODEL[:-1]),
    "a model in part": (files(f"{MODEL}data", model_index__json='{"_class_name": "FluxPipeline"}'), MODEL[:-1]),
    "a model with a damaged index": (files(f"{MODEL}data", model_index__json='{"_class_name": "Flux'), MODEL[:-1]),
    "a LoRA that is not there": (given("--init_lora=nowhere.safetensors"), "--init_lora=nowhere.safetensors"),
    "a picture folder that is not there": (given("--instance_data_dir=nothing"), "--instance_data_dir=nothing"),
    "a folder that is a file": (files("--instance_data_dir=data/dog.png", dog=""), "--instance_data_dir=data/dog.png"),
    "a folder of an impossible name": (given(f"--instance_data_dir={'n' * 300}"), "--instance_data_dir nnnn"),
    "a folder with everything but pictures": (
        files("--instance_data_dir=data", dog__txt="x", __hidden__png="x"), "--instance_data_dir=data .png"
    ),
    "several broken pictures": (several_broken_pictures, "empty.png text.jpg half.png cut.jpg remove"),
    "a caption in Latin-1": (
        files("--instance_data_dir=data --caption_extension=.txt", a="", a__txt=b"caf\xe9"), "a.txt UTF-8"
    ),
    "no held-out folder": (given("--validation_loss", "--validation_data_dir=none"), "--validation_data_dir=none"),
    "a broken held-out picture": (files("--validation_loss --validation_data_dir=data", bad=BAD_PICTURE), "bad.png"),
    "a broken class picture": (files("--class_data_dir=data --num_class_images=1", bad=BAD_PICTURE), "bad.png"),
    "a class folder that is a file": (files("--class_data_dir=data/a.png", a=""), "--class_data_dir"),
    "no dataset": (given("--instance_data_dir=", "--dataset_name=./nothing"), "--dataset_name=./nothing"),
    "a dataset without rows": (files("--instance_data_dir= --dataset_name=data", a__jsonl=""), "--dataset_name=data"),
    "no picture column": (dataset(["a dog"], "--image_column=photo"), "photo image text"),
    "no caption column": (dataset(["a dog"], "--caption_column=words"), "words image text"),
    "a picture column of words": (dataset(["a dog"], "--image_column=text"), "row 0"),
    "captions that miss": (
        dataset(["a dog", "", "  "], "--caption_column=text", "--instance_prompt="), "row 1 row 2 --instance_prompt"
    ),
    "an output folder that is a file": (files("--output_dir=data/a.png", a=""), "--output_dir=data/a.png"),
    "an output folder that the system refuses": (given("--output_dir=/proc/out"), "--output_dir=/proc/out"),
    "no such checkpoint": (checkpoint("checkpoint-9"), f"{RESUME}checkpoint-9"),
    "a checkpoint with a file cut short": (checkpoint("checkpoint-2", size=9), f"{RESUME}checkpoint-2"),
    "a checkpoint of another optimizer": (checkpoint("latest", "--use_8bit_adam"), "--optimizer adamw adamw8bit"),
    "a checkpoint beyond the end": (checkpoint("latest", "--max_train_steps=1"), "step 2 --max_train_steps=1"),
    "a token that the Hub refuses": (hub_that("refuses"), "--push_to_hub tester/sks-dog"),
    "a token that may only read": (hub_that("may be read"), "--push_to_hub tester/sks-dog"),
    "a Hub that cannot be reached": (hub_that("is silent"), "--push_to_hub tester/sks-dog"),
}  # fmt: skip
OWN: dict[str, tuple[Build, str]] = {  # of one script
    "lora: layers that are not there": (given("--lora_layers=attn.to_q, attn.to_x"), "--lora_layers attn.to_x"),
    "lora: more blocks than there are": (
        given("--gradient_checkpointing", "--blocks_to_swap=9"), "--blocks_to_swap=9 4 blocks"
    ),
    "lora: a checkpoint of another rank": (checkpoint("latest", "--rank=8"), "checkpoint-2 --rank 4 8"),
    "lora: an engine that shards": (environment("ACCELERATE_USE_FSDP", "true"), "accelerate_configs/ddp.yaml"),
    "full: a precision of the configuration that does not go with a flag": (
        environment("ACCELERATE_MIXED_PRECISION", "fp16", "--fused_backward_pass"), "--fused_backward_pass bf16"
    ),
}  # fmt: skip
ROWS = [pytest.param(("full", "lora")[number % 2], name, id=name) for number, name in enumerate(TABLE)]
ROWS += [pytest.param(name.partition(":")[0], name, id=name) for name in OWN]


def base_flags(model: Path, pictures: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={pictures}", "--instance_prompt=a sks dog",
        "--output_dir=out", "--resolution=32", "--train_batch_size=1", "--max_train_steps=1", "--report_to=none",
    ]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content, but for the lock; an empty folder made on the way does no harm."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.mark.parametrize(("kind", "name"), ROWS)
def test_a_bad_input_ends_in_one_message_before_a_model_is_loaded_and_leaves_nothing(
    kind: str, name: str, tiny_flux: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for model in MODELS:
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    build, words = {**TABLE, **OWN}[name]
    flags = build(Place(tmp_path, monkeypatch, request))
    if any(flag.startswith("--class_data_dir") for flag in flags):
        flags += PRIOR
    before, script = tree(tmp_path), SCRIPTS[kind]
    try:
        script.main(script.parse_args([*base_flags(tiny_flux, pictures), *flags]))
        pytest.fail("it trained")
    except SystemExit as exit_info:
        assert exit_info.code == 2
        message = capsys.readouterr().err.partition("error: ")[2]  # without the usage
    except script.UsageError as error:
        message = str(error)
    assert [word for word in words.split() if word not in message] == [], message
    assert "Traceback" not in message and tree(tmp_path) == before


# Started as a command, and then says which of the packages that only some flags need were imported.
COMMAND = """import runpy, sys; sys.argv = sys.argv[1:]
try: runpy.run_path(sys.argv[0], run_name="__main__")
finally: print("imported:", *{"datasets", "prodigyopt", "tensorboard", "wandb"} & set(sys.modules))"""


def test_the_command_itself_exits_with_2_and_imports_nothing_that_it_does_not_need(
    tmp_path: Path, tiny_flux: Path
) -> None:
    command = [sys.executable, "-c", COMMAND, str(ROOT / "train_dreambooth_lora_flux.py"), "--report_to=none"]
    command += [f"{MODEL}{tiny_flux}", "--instance_data_dir=dogs", "--instance_prompt=a sks dog"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == "imported:\n" and list(tmp_path.iterdir()) == []
    assert "Traceback" not in ended.stderr
    assert ended.stderr.startswith("train_dreambooth_lora_flux.py: error: --instance_data_dir=dogs is not a folder")
