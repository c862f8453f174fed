"""Where people are: Windows, old tokenizers, other machines' checkpoints, files for others to read, first messages."""

import json
import os
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
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
