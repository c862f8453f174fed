"""Where people are: Windows, old tokenizers, other machines' checkpoints, files for others to read, first messages."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth_lora_flux as lora
from conftest import SCRIPTS, Run
from tests.processes import PATIENCE
from tests.spiece import write_spiece_tokenizer

ROOT = Path(__file__).parent.parent
WEIGHTS = {"full": "transformer/diffusion_pytorch_model.safetensors", "lora": lora.LORA_FILE}


def test_both_scripts_train_and_resume_where_unix_is_not(base_flags: list[str], tmp_path: Path) -> None:
    """A run that is resumed there ends with the weights of one that was not stopped, bit for bit."""
    jobs: list[list] = []
    for kind, script in SCRIPTS.items():
        flags = [*base_flags, f"--output_dir={tmp_path / kind}", "--checkpointing_steps=1", "--max_train_steps=1"]
        jobs += [[script.__name__, flags]]
        jobs += [[script.__name__, [*flags, "--max_train_steps=2", "--resume_from_checkpoint=latest"]]]
        jobs += [[script.__name__, [*base_flags, f"--output_dir={tmp_path / 'whole' / kind}"]]]
    file = tmp_path / "jobs.json"
    file.write_text(json.dumps(jobs))
    # As `accelerate launch` sets it: the launcher is watched.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_MIXED_PRECISION": "no"}
    command = [sys.executable, str(ROOT / "tests" / "bare_run.py"), str(file)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in SCRIPTS:
        got, tensors = (load_file(folder / kind / WEIGHTS[kind]) for folder in (tmp_path, tmp_path / "whole"))
        assert [name for name in tensors if not torch.equal(got[name], tensors[name])] == []
        state, card = (tmp_path / kind / name for name in ("checkpoint-2/training_state.json", "README.md"))
        names = json.loads(state.read_text())["files"]
        assert "optimizer.bin" in names and not [name for name in names if "\\" in name]
        assert "\\" not in card.read_text()
        assert (kind == "lora") or any(name.startswith("transformer/") for name in names)


def test_a_checkpoint_whose_t5_has_only_spiece_model_trains(run: Run, tiny_flux: Path, tmp_path: Path) -> None:
    """On the ids that sentencepiece gives."""
    folder, prompt = tmp_path / "older", "a photo of sks dog"
    shutil.copytree(tiny_flux, folder)
    reader = write_spiece_tokenizer(folder, [prompt, "the quick brown fox jumps over the lazy dog"])
    tokenizer = lora.T5TokenizerFast.from_pretrained(folder / "tokenizer_2")
    assert tokenizer(prompt).input_ids == [*reader.encode(prompt), 1]
    output = run(lora, f"--pretrained_model_name_or_path={folder}", "--max_train_steps=1")
    assert (output / lora.LORA_FILE).exists()


@pytest.mark.parametrize(
    ("part", "file"),
    [
        ("tokenizer_2", "tokenizer.json"),
        ("text_encoder", "config.json"),
        ("vae", "config.json"),
        ("transformer", "diffusion_pytorch_model.safetensors"),
    ],
)
def test_a_component_that_does_not_load_is_named_in_one_line(
    run: Run, tiny_flux: Path, tmp_path: Path, part: str, file: str
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(tiny_flux, folder)
    (folder / part / file).write_text("{")
    with pytest.raises(lora.UsageError) as raised:
        run(lora, f"--pretrained_model_name_or_path={folder}")
    message = str(raised.value)
    assert message.startswith(f"{part} of --pretrained_model_name_or_path={folder} does not load: ")
    assert "\n" not in message and "Check that" in message


def test_checkpoints_with_the_checksums_of_earlier_versions_resume_and_damage_in_them_is_found(
    script: ModuleType, run: Run
) -> None:
    output = run(script, "--checkpointing_steps=1", "--max_train_steps=1")
    checkpoint = output / "checkpoint-1"
    path = checkpoint / "training_state.json"
    content = json.loads(path.read_text())
    content["files"] = {name: zlib.crc32((checkpoint / name).read_bytes()) for name in content["files"]}
    content["checksum"] = zlib.crc32(json.dumps([content["files"], content["facts"]]).encode())
    path.write_text(json.dumps(content))
    run(script, "--max_train_steps=2", "--resume_from_checkpoint=checkpoint-1")
    with (checkpoint / "optimizer.bin").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    with pytest.raises(script.UsageError, match=r"optimizer\.bin: missing, or not matching"):
        run(script, "--max_train_steps=2", "--resume_from_checkpoint=checkpoint-1")


def test_the_hash_of_a_file_sees_every_byte_and_the_order_of_its_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "PIECE", 8)
    contents = [
        b"",
        b"1" * 8,
        b"1" * 8 + b"2" * 8,
        b"2" * 8 + b"1" * 8,
        b"1" * 8 + b"2" * 7,
        b"1" * 8 + b"2" * 7 + b"3",
    ]
    paths = [tmp_path / str(number) for number in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    hashes = lora.checksums(paths)
    assert list(hashes) == paths and len(set(hashes.values())) == len(paths)
    assert lora.checksums(paths[2:3]) == {paths[2]: hashes[paths[2]]}


def test_what_a_run_writes_may_be_read_by_whom_the_umask_lets_read(script: ModuleType, run: Run) -> None:
    output = run(script, "--checkpointing_steps=2")
    umask = os.umask(0)
    os.umask(umask)
    files = [path for path in output.rglob("*") if path.is_file()]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o666 & ~umask)}


def test_a_wrong_command_is_told_what_is_wrong_after_one_line_that_points_to_the_help(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, wrong in (
        (["--no_such_flag"], 1),
        (["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--rank=1.5"], 1),
        (["--pretrained_model_name_or_path=x", "--repeats=0", "--train_batch_size=0"], 4),
    ):
        with pytest.raises(SystemExit) as stop:
            script.parse_args(argv)
        lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith("error: ")]
        assert stop.value.code == 2 and len(lines) == wrong + 1, lines
        assert lines[0].startswith("usage: ") and lines[0].endswith(" --help")


def test_a_script_starts_without_warnings_of_libraries(base_flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(lora.__file__), *base_flags, "--max_train_steps=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True)
    said = [line for line in done.stderr.splitlines() if " INFO " not in line and line[:1] not in ("", " ")]
    assert said == []


def test_what_is_in_the_cache_loads_where_the_hub_hangs_up(script: ModuleType, base_flags: list[str]) -> None:
    """diffusers and the Hub's client turn to the cache for some failures only."""

    class Kind:
        @staticmethod
        def from_pretrained(name: str, subfolder: str, local_files_only: bool = False) -> str:
            if not local_files_only:
                raise RuntimeError("Server disconnected without sending a response.")
            return f"{name}/{subfolder}"

    args = script.parse_args([*base_flags, "--pretrained_model_name_or_path=me/flux"])
    assert script.from_base(Kind, args, subfolder="vae") == "me/flux/vae"
    with pytest.raises(script.UsageError, match="Server disconnected"):  # a folder is no cache
        script.from_base(Kind, script.parse_args(base_flags), subfolder="vae")


def test_a_gated_model_says_how_to_get_in(
    script: ModuleType, base_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As diffusers has it: the Hub's own words are the error's context."""

    def load_config(*_: object, **__: object) -> None:
        try:
            raise ValueError("Access to model me/flux is restricted.")
        except ValueError as error:
            raise OSError("me/flux is not a local folder\nIf this is a private repository ...") from error

    monkeypatch.setattr(script.FluxPipeline, "load_config", load_config)
    with pytest.raises(script.UsageError, match=r"not a local folder.*is restricted.*`hf auth login`"):
        script.check_model(script.parse_args([*base_flags, "--pretrained_model_name_or_path=me/flux"]))


@pytest.mark.parametrize("error", [errno.EINVAL, errno.EIO])
def test_a_disk_that_cannot_flush_a_folder_keeps_checkpoints(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", fsync)
    assert list(script.list_checkpoints(run(script, "--checkpointing_steps=1"))) == [1, 2]


def test_a_checkpoint_that_was_moved_and_linked_is_pruned_without_harm(
    script: ModuleType, run: Run, tmp_path: Path
) -> None:
    output = run(script, "--checkpointing_steps=1")
    (output / "checkpoint-1").rename(tmp_path / "moved")
    (output / "checkpoint-1").symlink_to(tmp_path / "moved")
    flags = ("--checkpointing_steps=1", "--checkpoints_total_limit=1", "--max_train_steps=3")
    run(script, *flags, "--resume_from_checkpoint=latest")
    assert list(script.list_checkpoints(output)) == [3] and (tmp_path / "moved" / script.STATE_FILE).is_file()
    assert not list(output.glob(f".*{script.PARTIAL}"))


def test_flags_that_cannot_be_written_do_not_end_the_run(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_text

    def write_text(path: Path, *given: Any, **options: Any) -> int:
        if script.FLAGS_FILE in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *given, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    output = run(script)
    assert "flags.txt could not be written" in caplog.text and (output / script.RESULT_FILE).is_file()


def test_what_the_command_line_cannot_spell_in_utf_8_is_written_as_it_came(script: ModuleType, tmp_path: Path) -> None:
    script.write_file(tmp_path / "flags.txt", "--instance_data_dir=M\udcfcller\n")
    assert (tmp_path / "flags.txt").read_bytes() == b"--instance_data_dir=M\xfcller\n"
    assert list(script.read_words([f"@{tmp_path / 'flags.txt'}"])) == ["--instance_data_dir=M\udcfcller"]


def test_a_checkpoint_of_a_moved_folder_is_found_by_its_name(
    script: ModuleType, run: Run, base_flags: list[str]
) -> None:
    output = run(script, "--checkpointing_steps=1")
    found = script.find_checkpoint(
        script.parse_args(
            [*base_flags, f"--output_dir={output}", "--resume_from_checkpoint=elsewhere/out/checkpoint-1"]
        )
    )
    assert found.folder == output / "checkpoint-1"


def test_another_run_that_draws_the_same_class_pictures_is_waited_for(
    script: ModuleType, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, drawn = tmp_path / "class", threading.Event()
    folder.mkdir()

    def draw_the_others() -> None:
        with FileLock(folder / ".flux.lock"):
            drawn.set()
            end = time.monotonic() + PATIENCE
            while "Another run is using" not in caplog.text and time.monotonic() < end:
                time.sleep(0.01)
            for number in range(2):
                Image.new("RGB", (32, 32), "navy").save(folder / f"class_{number:05d}.png")

    other = threading.Thread(target=draw_the_others, daemon=True)
    other.start()
    drawn.wait()
    prior = ("--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={folder}", "--num_class_images=2")
    run(script, *prior)
    other.join()
    assert {path.name for path in folder.iterdir()} == {"class_00000.png", "class_00001.png"}
    assert [Image.open(path).getpixel((0, 0)) for path in folder.iterdir()] == [(0, 0, 128)] * 2


def test_a_whole_result_has_the_bases_tokenizers_and_names_them_so(run: Run, tiny_flux: Path, tmp_path: Path) -> None:
    """What transformers 5 writes of them transformers 4 cannot read; FLUX.1 [dev]'s have files for both."""
    base = Path(shutil.copytree(tiny_flux, tmp_path / "base"))
    for name, file in (("tokenizer", "vocab.json"), ("tokenizer_2", "spiece.model")):
        (base / name / file).write_text("of transformers 4")
    output = run(SCRIPTS["full"], f"--pretrained_model_name_or_path={base}", "--max_train_steps=1")
    for path in [*base.glob("tokenizer*/*")]:
        assert (output / path.relative_to(base)).read_bytes() == path.read_bytes()
    index = json.loads((output / "model_index.json").read_text())
    assert index["tokenizer_2"] == ["transformers", "T5TokenizerFast"]
    assert (index["transformer"], index["text_encoder"]) == (
        ["diffusers", "FluxTransformer2DModel"], ["transformers", "CLIPTextModel"],
    )  # fmt: skip
