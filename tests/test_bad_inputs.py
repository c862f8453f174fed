"""Bad inputs: each ends in one message that names the flag and the way out, and no model was loaded, nothing left."""

import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
from huggingface_hub import constants, hf_api
from PIL import Image

from conftest import SCRIPTS
from tests.faulty_run import main_block
from tests.local_hub import HubState
from tests.processes import ROOT

NAMES = {"full": "train_dreambooth_flux.py", "lora": "train_dreambooth_lora_flux.py"}


@dataclass
class Place:
    """Where a bad input is built: an empty folder, a patch that the test undoes, and the script that will get it."""

    folder: Path
    patch: pytest.MonkeyPatch
    request: pytest.FixtureRequest
    script: ModuleType

    def write(self, name: str, content: bytes | str = b"") -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def picture(self, name: str) -> Path:
        path = self.write(name)
        Image.effect_noise((64, 48), 50).save(path, "JPEG" if path.suffix == ".jpg" else "PNG")
        return path

    def index(self, content: str) -> list[str]:
        """A model of which only the index is there."""
        self.write("model/model_index.json", content)
        return ["--pretrained_model_name_or_path=model"]

    def dataset(self, rows: list[dict[str, str]], *flags: str) -> list[str]:
        """A local dataset of pictures with more columns."""
        for number in range(len(rows)):
            self.picture(f"data/{number}.png")
        lines = [json.dumps({"file_name": f"{number}.png", **row}) for number, row in enumerate(rows)]
        self.write("data/metadata.jsonl", "\n".join(lines))
        return ["--instance_data_dir=", "--dataset_name=data", *flags]

    def checkpoint(self, step: int, script: str, damage: bool = False) -> Path:
        """A checkpoint with one file besides the state, as if `script` had written it."""
        folder = self.write(f"out/checkpoint-{step}/optimizer.bin", b"weights").parent
        files = {"optimizer.bin": zlib.crc32(b"wrong" if damage else b"weights")}
        facts = {"script": script, "state": {"step": step, "seed": 0}, "args": {}, "data": {}}
        content = {"files": files, "facts": facts, "checksum": zlib.crc32(json.dumps([files, facts]).encode())}
        self.write(f"out/checkpoint-{step}/training_state.json", json.dumps(content))
        return folder

    def without_package(self, name: str) -> None:
        self.patch.setattr(self.script, "find_spec", lambda package: None if package == name else find_spec(package))

    @property
    def own_name(self) -> str:
        return Path(self.script.__file__ or "").name

    @property
    def hub(self) -> HubState:
        state: HubState = self.request.getfixturevalue("hub")
        return state


Build = Callable[[Place], list[str]]


def given(*flags: str) -> Build:
    """An input that is bad by its flags alone."""
    return lambda place: list(flags)


def missing_package(package: str, *flags: str) -> Build:
    def build(place: Place) -> list[str]:
        place.without_package(package)
        return list(flags)

    return build


def environment(name: str, value: str) -> Build:
    def build(place: Place) -> list[str]:
        place.patch.setenv(name, value)
        return []

    return build


def truncated_jpeg(place: Place) -> list[str]:
    path = place.picture("pictures/dog.jpg")
    path.write_bytes(path.read_bytes()[:-200])
    return ["--instance_data_dir=pictures"]


def several_broken_pictures(place: Place) -> list[str]:
    place.picture("pictures/good.png")
    place.write("pictures/empty.png")
    place.write("pictures/text.jpg", "not a picture")
    place.write("pictures/half.png", place.picture("pictures/whole.png").read_bytes()[:100])
    return ["--instance_data_dir=pictures"]


def picture_bomb(place: Place) -> list[str]:
    place.picture("pictures/bomb.png")
    place.patch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    return ["--instance_data_dir=pictures"]


def no_pictures_among_files(place: Place) -> list[str]:
    for name in (".hidden.png", ".cache/a.png", "dog.txt", "folder.png/a.txt"):
        place.write(f"pictures/{name}", "x")
    return ["--instance_data_dir=pictures"]


def empty_folder(flag: str, *more: str) -> Build:
    def build(place: Place) -> list[str]:
        (place.folder / "empty").mkdir()
        return [f"{flag}=empty", *more]

    return build


def broken_picture(flag: str, *more: str) -> Build:
    def build(place: Place) -> list[str]:
        place.write("broken/bad.png", "not a picture")
        return [f"{flag}=broken", *more]

    return build


def a_file(name: str, *flags: str) -> Build:
    """`flags` name, where a folder should be, a file or something in it."""

    def build(place: Place) -> list[str]:
        place.write(name, "mine")
        return list(flags)

    return build


def empty_dataset(place: Place) -> list[str]:
    place.write("data/train.jsonl", "")
    return ["--instance_data_dir=", "--dataset_name=data"]


def named_checkpoint(name: str) -> Build:
    def build(place: Place) -> list[str]:
        place.checkpoint(1, place.own_name)
        place.checkpoint(2, place.own_name)
        return [f"--resume_from_checkpoint={name}"]

    return build


def damaged_checkpoint(wanted: str) -> Build:
    def build(place: Place) -> list[str]:
        place.checkpoint(3, place.own_name, damage=True)
        return [f"--resume_from_checkpoint={wanted}"]

    return build


def broken_state(content: str) -> Build:
    def build(place: Place) -> list[str]:
        place.checkpoint(3, place.own_name)
        place.write("out/checkpoint-3/training_state.json", content)
        return ["--resume_from_checkpoint=checkpoint-3"]

    return build


def foreign_checkpoint(place: Place) -> list[str]:
    [other] = set(NAMES.values()) - {place.own_name}
    place.checkpoint(3, other)
    return ["--resume_from_checkpoint=checkpoint-3"]


def refused_token(*flags: str) -> Build:
    def build(place: Place) -> list[str]:
        place.hub.token = "another"
        return ["--push_to_hub", "--hub_token=hf_secret", *flags]

    return build


def unreachable_hub(place: Place) -> list[str]:
    assert place.hub.requests == []
    for module in (constants, hf_api):
        place.patch.setattr(module, "ENDPOINT", "http://127.0.0.1:9", raising=False)  # nobody listens there
    return ["--push_to_hub", "--hub_token=hf_secret"]


def bad_repository(place: Place) -> list[str]:
    assert place.hub.requests == []
    return ["--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=not a name"]


def token_that_may_only_read(place: Place) -> list[str]:
    place.hub.read_only = True
    place.hub.repositories["tester/sks-dog"] = {}
    return ["--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=tester/sks-dog"]


PRIOR = ("--with_prior_preservation", "--class_prompt=a dog")
# What is bad: how it is made, and the words of the message.
TABLE: dict[str, tuple[Build, list[str]]] = {
    # flags
    "no source of pictures": (given("--instance_data_dir="), ["--instance_data_dir", "--dataset_name"]),
    "two sources of pictures": (given("--dataset_name=dogs"), ["--instance_data_dir", "--dataset_name", "both"]),
    "masks among the pictures": (
        given("--instance_data_dir=dogs", "--mask_data_dir=dogs"),
        ["--mask_data_dir", "--instance_data_dir", "same folder"],
    ),
    "a trigger word in Latin-1": (given("--trigger_word=caf\udce9"), ["word", "UTF-8", "caf"]),
    "no prompts": (given("--instance_prompt="), ["--instance_prompt", "--caption_column", "--caption_extension"]),
    "a caption column of no table": (
        given("--caption_column=text", "--instance_prompt="),
        ["--caption_column", "metadata.jsonl", "metadata.csv", "--dataset_name"],
    ),
    "a prompt in Latin-1": (given("--instance_prompt=caf\udce9"), ["prompt", "UTF-8", "caf"]),
    "an output folder of no name": (given("--output_dir="), ["--output_dir", "empty"]),
    "output among the pictures": (
        given("--instance_data_dir=dogs", "--output_dir=./dogs"),
        ["--output_dir", "--instance_data_dir", "same folder"],
    ),
    "class pictures among those of the subject": (
        given("--instance_data_dir=dogs", "--class_data_dir=dogs/../dogs", *PRIOR),
        ["--class_data_dir", "--instance_data_dir", "same folder"],
    ),
    "a class folder that the system refuses": (
        given("--class_data_dir=/proc/class", *PRIOR),
        ["--class_data_dir", "'/proc/class'", "cannot be written"],
    ),
    "a folder of an impossible name": (given(f"--instance_data_dir={'n' * 300}"), ["--instance_data_dir", "nnnn"]),
    "prior preservation without a folder": (given(*PRIOR), ["--with_prior_preservation", "--class_data_dir"]),
    "prior preservation without a prompt": (
        given("--with_prior_preservation", "--class_data_dir=class"),
        ["--with_prior_preservation", "--class_prompt"],
    ),
    "held-out pictures without a validation loss": (
        given("--validation_data_dir=dogs"),
        ["--validation_data_dir", "--validation_loss"],
    ),
    "an unknown optimizer": (given("--optimizer=sgd"), ["--optimizer", "'sgd'", "AdamW", "prodigy"]),
    "a schedule without its rules": (given("--lr_scheduler=piecewise_constant"), ["--lr_step_rules"]),
    "rules of a schedule that are none": (
        given("--lr_scheduler=piecewise_constant", "--lr_step_rules=1:ten,0.1"),
        ["--lr_step_rules", "1:ten,0.1"],
    ),
    "a repository's name in three parts": (given("--hub_model_id=a/b/c"), ["--hub_model_id", "'a/b/c'"]),
    "a resolution below a token": (given("--resolution=8"), ["--resolution", "8", "16"]),
    "a resolution of nothing": (given("--resolution=0"), ["--resolution", "16"]),
    "a batch of nothing": (given("--train_batch_size=0"), ["--train_batch_size", "1 or more"]),
    "a rate that is no number": (given("--learning_rate=nan"), ["--learning_rate", "nan"]),
    "a prompt too long for the model": (given("--max_sequence_length=600"), ["--max_sequence_length", "512"]),
    "several flags at once": (
        given("--resolution=8", "--train_batch_size=0", "--optimizer=sgd"),
        ["--resolution", "--train_batch_size", "--optimizer"],
    ),
    "a misspelt flag": (given("--traln_batch_size=1"), ["--traln_batch_size"]),
    "an unknown choice": (given("--weighting_scheme=cosine"), ["--weighting_scheme", "'cosine'", "cosmap"]),
    "words where a number should be": (given("--max_train_steps=many"), ["--max_train_steps", "'many'"]),
    # what is installed, and the environment
    "no bitsandbytes": (missing_package("bitsandbytes", "--use_8bit_adam"), ["--use_8bit_adam", "bitsandbytes"]),
    "no prodigyopt": (missing_package("prodigyopt", "--optimizer=prodigy"), ["--optimizer=prodigy", "prodigyopt"]),
    "no datasets": (
        missing_package("datasets", "--instance_data_dir=", "--dataset_name=dogs"),
        ["--dataset_name", "pip install datasets"],
    ),
    "no tensorboard": (missing_package("tensorboard", "--report_to=tensorboard"), ["--report_to", "tensorboard"]),
    "no wandb": (missing_package("wandb", "--report_to=wandb"), ["--report_to", "wandb"]),
    "a tracker that is not installed": (given("--report_to=comet_ml"), ["--report_to", "comet_ml"]),
    "a tracker that does not exist": (given("--report_to=notebook"), ["--report_to", "notebook"]),
    "an accelerate configuration of an unknown precision": (
        environment("ACCELERATE_MIXED_PRECISION", "fp12"),
        ["--mixed_precision", "fp12"],
    ),
    # the model
    "a model that is not there": (
        given("--pretrained_model_name_or_path=./nothing"),
        ["--pretrained_model_name_or_path", "'./nothing'"],
    ),
    "a model on the Hub, offline": (
        given("--pretrained_model_name_or_path=nobody/nothing"),
        ["--pretrained_model_name_or_path", "'nobody/nothing'"],
    ),
    "a folder that is no model": (
        empty_folder("--pretrained_model_name_or_path"),
        ["--pretrained_model_name_or_path", "'empty'", "model_index.json"],
    ),
    "a model of another kind": (
        lambda place: place.index('{"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}'),
        ["--pretrained_model_name_or_path", "StableDiffusionPipeline"],
    ),
    "a model without a transformer": (
        lambda place: place.index('{"_class_name": "FluxPipeline"}'),
        ["--pretrained_model_name_or_path"],
    ),
    "a model with a damaged index": (
        lambda place: place.index('{"_class_name": "Flux'),
        ["--pretrained_model_name_or_path"],
    ),
    # pictures and captions
    "a picture folder that is not there": (given("--instance_data_dir=nothing"), ["--instance_data_dir", "'nothing'"]),
    "a picture folder that is a file": (
        a_file("dog.png", "--instance_data_dir=dog.png"),
        ["--instance_data_dir", "'dog.png'", "folder"],
    ),
    "an empty picture folder": (empty_folder("--instance_data_dir"), ["--instance_data_dir", "'empty'", ".png"]),
    "a folder with everything but pictures": (no_pictures_among_files, ["--instance_data_dir", "no picture files"]),
    "a truncated picture": (truncated_jpeg, ["dog.jpg", "truncated"]),
    "several broken pictures": (several_broken_pictures, ["empty.png", "text.jpg", "half.png", "replace or remove"]),
    "a picture too large to be one": (picture_bomb, ["bomb.png"]),
    "a held-out folder that is not there": (
        given("--validation_loss", "--validation_data_dir=nothing"),
        ["--validation_data_dir", "'nothing'"],
    ),
    "an empty held-out folder": (
        empty_folder("--validation_data_dir", "--validation_loss"),
        ["--validation_data_dir", "'empty'"],
    ),
    "a broken held-out picture": (broken_picture("--validation_data_dir", "--validation_loss"), ["bad.png"]),
    "a broken class picture": (broken_picture("--class_data_dir", *PRIOR), ["bad.png"]),
    "a class folder that is a file": (
        a_file("class.png", "--class_data_dir=class.png", *PRIOR),
        ["--class_data_dir", "'class.png'"],
    ),
    "a dataset that is not there": (
        given("--instance_data_dir=", "--dataset_name=./nothing"),
        ["--dataset_name", "'./nothing'"],
    ),
    "a dataset without rows": (empty_dataset, ["--dataset_name", "'data'"]),
    "a dataset without the picture column": (
        lambda place: place.dataset([{"text": "a dog"}], "--image_column=photo"),
        ["--image_column", "'photo'", "image, text"],
    ),
    "a dataset without the caption column": (
        lambda place: place.dataset([{"text": "a dog"}], "--caption_column=words"),
        ["--caption_column", "'words'", "image, text"],
    ),
    "a picture column of words": (
        lambda place: place.dataset([{"text": "a dog"}], "--image_column=text"),
        ["--image_column", "'text'"],
    ),
    "captions that miss": (
        lambda place: place.dataset(
            [{"text": "a dog"}, {"text": ""}, {"text": "  "}], "--caption_column=text", "--instance_prompt="
        ),
        ["--caption_column", "row 1, 2", "--instance_prompt"],
    ),
    # the output folder and its checkpoints
    "an output folder that is a file": (a_file("result", "--output_dir=result"), ["--output_dir", "'result'"]),
    "an output folder in a file": (a_file("result", "--output_dir=result/out"), ["--output_dir", "'result/out'"]),
    "an output folder that the system refuses": (given("--output_dir=/proc/out"), ["--output_dir", "'/proc/out'"]),
    "an output folder of an impossible name": (given(f"--output_dir=new/{'n' * 300}"), ["--output_dir", "nnnn"]),
    "a checkpoint that is not there, of several": (
        named_checkpoint("checkpoint-9"),
        ["--resume_from_checkpoint", "'checkpoint-9'", "checkpoint-1, checkpoint-2"],
    ),
    "a checkpoint in an empty folder": (
        given("--resume_from_checkpoint=checkpoint-9"),
        ["--resume_from_checkpoint", "'checkpoint-9'", "none"],
    ),
    "a checkpoint with a damaged file": (
        damaged_checkpoint("checkpoint-3"),
        ["checkpoint-3", "damaged", "optimizer.bin"],
    ),
    "no checkpoint that is whole": (damaged_checkpoint("latest"), ["--resume_from_checkpoint=latest", "can be used"]),
    "a checkpoint with half a state": (broken_state('{"files": {'), ["checkpoint-3", "training_state.json", "damaged"]),
    "a checkpoint with an edited state": (
        broken_state('{"files": {}, "facts": {}, "checksum": 1}'),
        ["checkpoint-3", "training_state.json", "checksum"],
    ),
    "a checkpoint of the other script": (foreign_checkpoint, ["checkpoint-3", "train_dreambooth", "other weights"]),
    # the Hub
    "a token that the Hub refuses": (refused_token(), ["--push_to_hub", "--hub_token"]),
    "a refused token and a new folder in a new folder": (
        refused_token("--output_dir=new/deeper/out"),
        ["--push_to_hub", "--hub_token"],
    ),
    "a token that may only read": (token_that_may_only_read, ["--push_to_hub", "tester/sks-dog"]),
    "a Hub that cannot be reached": (unreachable_hub, ["--push_to_hub", "leave --push_to_hub out"]),
    "a repository's name that the Hub refuses": (bad_repository, ["--push_to_hub", "--hub_model_id", "'not a name'"]),
}
BOTH = {  # run with both scripts: their way through the code differs, or much depends on it
    "no source of pictures",
    "several flags at once",
    "several broken pictures",
    "a model of another kind",
    "an output folder that is a file",
    "a checkpoint of the other script",
    "a token that the Hub refuses",
}
ROWS = [
    pytest.param(SCRIPTS[kind], name, id=f"{kind}-{name}")
    for number, name in enumerate(TABLE)
    for kind in (("full", "lora") if name in BOTH else (("full", "lora")[number % 2],))
]


def base_flags(model: Path, pictures: Path) -> list[str]:
    return [
        f"--pretrained_model_name_or_path={model}", f"--instance_data_dir={pictures}", "--instance_prompt=a sks dog",
        "--output_dir=out", "--resolution=32", "--train_batch_size=1", "--max_train_steps=1", "--report_to=none",
    ]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` with its content; an empty folder made on the way does no harm.

    Not the lock of the run, which goes with the process.
    """
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != ".flux.lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def exit_of(script: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str]:
    """Exit code and message of a command line, run in this process; any other error would be a traceback."""
    capsys.readouterr()
    try:
        script.main(script.parse_args(argv))
    except SystemExit as exit_info:
        return exit_info.code, capsys.readouterr().err.partition("error: ")[2]  # without the usage, which has all flags
    except script.UsageError as error:
        return 2, str(error)
    except script.RunError as error:
        return 1, str(error)
    return 0, ""


@pytest.mark.parametrize(("script", "name"), ROWS)
def test_a_bad_input_ends_in_one_message_before_a_model_is_loaded_and_leaves_nothing(
    script: ModuleType,
    name: str,
    tiny_flux: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model in (FluxTransformer2DModel, FluxPipeline, AutoencoderKL):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    build, words = TABLE[name]
    flags = build(Place(tmp_path, monkeypatch, request, script))
    before = tree(tmp_path)
    code, message = exit_of(script, [*base_flags(tiny_flux, pictures), *flags], capsys)
    assert code == 2
    assert [word for word in words if word not in message] == [], message
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "flags", "words"),
    [
        ("lora", ["--lora_layers=attn.to_q, attn.to_x,proj_out"],
         "--lora_layers is 'attn.to_q, attn.to_x,proj_out', and no layer's name ends in attn.to_x"),
        ("lora", ["--gradient_checkpointing", "--blocks_to_swap=9"], "--blocks_to_swap is 9; this transformer has"),
        ("full", ["--gradient_checkpointing", "--gradient_checkpointing_blocks=9"], "_checkpointing_blocks is 9; this"),
        ("lora", ["--init_lora=nowhere.safetensors"], "--init_lora is 'nowhere.safetensors', which does not load"),
        ("full", ["--init_lora=nowhere.safetensors"], "--init_lora is 'nowhere.safetensors', which does not load"),
    ],
)  # fmt: skip
def test_what_the_model_does_not_have_is_said_before_it_is_loaded(
    kind: str,
    flags: list[str],
    words: str,
    tiny_flux: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for model in (FluxTransformer2DModel, FluxPipeline, AutoencoderKL):
        monkeypatch.setattr(model, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    code, message = exit_of(SCRIPTS[kind], [*base_flags(tiny_flux, pictures), *flags], capsys)
    assert code == 2 and words in message and tree(tmp_path) == {}


def test_what_only_the_machine_knows_not_to_work_is_said_before_a_model_is_loaded(
    tiny_flux: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FluxTransformer2DModel, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.chdir(tmp_path)
    code, message = exit_of(SCRIPTS["lora"], [*base_flags(tiny_flux, pictures), "--attention_backend=flash"], capsys)
    assert code == 2 and "--attention_backend is flash" in message and "flash-attn" in message
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    AcceleratorState._reset_state(True)
    code, message = exit_of(SCRIPTS["full"], [*base_flags(tiny_flux, pictures), "--fused_backward_pass"], capsys)
    assert code == 2 and "--fused_backward_pass cannot scale losses" in message and "give bf16" in message


@pytest.mark.parametrize(
    ("kind", "name"), [("full", "a resolution below a token"), ("lora", "a checkpoint with a damaged file")]
)
def test_the_command_itself_exits_with_2_and_without_a_traceback(
    kind: str,
    name: str,
    tiny_flux: Path,
    pictures: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = SCRIPTS[kind]
    monkeypatch.chdir(tmp_path)
    build, words = TABLE[name]
    flags = build(Place(tmp_path, monkeypatch, request, script))
    before = tree(tmp_path)
    monkeypatch.setattr(sys, "argv", [NAMES[kind], *base_flags(tiny_flux, pictures), *flags])
    with pytest.raises(SystemExit) as stop:
        exec(main_block(script), script.__dict__)
    told = capsys.readouterr().err
    assert stop.value.code == 2
    assert [word for word in words if word not in told] == []
    assert len(re.findall(r"^\S+: error: ", told, re.MULTILINE)) == 1
    assert tree(tmp_path) == before


def test_an_error_of_another_process_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Out of memory on one GPU of several: nobody else says why."""
    script = SCRIPTS["lora"]
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(script, "parse_args", lambda: (_ for _ in ()).throw(script.RunError("out of memory")))
    with pytest.raises(SystemExit):
        exec(main_block(script), script.__dict__)
    assert capsys.readouterr().err == "train_dreambooth_lora_flux.py, process 3: error: out of memory\n"


# Started as a command, and then says which of the packages that only some flags need were imported.
COMMAND = """
import runpy, sys
script, *sys.argv[1:] = sys.argv[1:]
sys.argv[0] = script
try:
    runpy.run_path(script, run_name="__main__")
finally:
    print("imported:", *{"datasets", "deepspeed", "prodigyopt", "tensorboard", "wandb"} & set(sys.modules))
"""


@pytest.mark.parametrize(
    ("name", "flags", "code", "told"),
    [
        ("train_dreambooth_flux.py", ["--help"], 0, "--instance_prompt"),
        (
            "train_dreambooth_lora_flux.py",
            ["--instance_data_dir=dogs", "--instance_prompt=a sks dog", "--report_to=none"],
            2,
            "error: --instance_data_dir is 'dogs'",
        ),
    ],
    ids=["help", "wrong folder"],
)
def test_a_real_process_answers_and_imports_nothing_that_it_does_not_need(
    tmp_path: Path, tiny_flux: Path, name: str, flags: list[str], code: int, told: str
) -> None:
    command = [sys.executable, "-c", COMMAND, str(ROOT / name), *flags]
    command.append(f"--pretrained_model_name_or_path={tiny_flux}")
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == code
    assert told in (ended.stderr if code else ended.stdout)
    assert "Traceback" not in ended.stderr
    assert ended.stdout.endswith("imported:\n")
    assert list(tmp_path.iterdir()) == []
