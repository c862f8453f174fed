"""Where people are: bases that are gated or broken, files for others to read, first messages."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import train_dreambooth_lora_flux as lora
from conftest import SCRIPTS, Run
from tests.processes import PATIENCE


def test_a_component_that_does_not_load_is_named(run: Run, tiny_flux: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_flux, tmp_path / "broken"))
    (folder / "vae" / "config.json").write_text("{")
    with pytest.raises(lora.UsageError, match=f"vae of --pretrained_model_name_or_path={folder} does not load: "):
        run(lora, f"--pretrained_model_name_or_path={folder}")


def test_a_gated_model_says_how_to_get_in(base_flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def load_config(*_: object, **__: object) -> None:
        raise OSError("Access to model me/flux is restricted.")

    monkeypatch.setattr(lora.FluxPipeline, "load_config", load_config)
    with pytest.raises(lora.UsageError, match=r"is restricted.*`hf auth login`, or give --hub_token"):
        lora.check_model(lora.parse_args([*base_flags, "--pretrained_model_name_or_path=me/flux"]))


def test_what_a_run_writes_may_be_read_by_others(script: ModuleType, run: Run) -> None:
    """As far as the umask lets them; safetensors itself writes for the owner alone."""
    before = os.umask(0o022)
    try:
        output = run(script, "--checkpointing_steps=2")
    finally:
        os.umask(before)
    files = [path for path in output.rglob("*") if path.is_file() and path.name != ".lock"]
    assert any(path.suffix == ".safetensors" for path in files)
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o644)}


def test_a_script_starts_without_warnings_of_libraries(base_flags: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(lora.__file__), *base_flags, "--max_train_steps=1", "--max_sequence_length=64"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE, check=True)
    lines = [line for line in done.stderr.splitlines() if line[:1] not in ("", " ")]
    assert [line for line in lines if " INFO " not in line and "%|" not in line] == []  # the latter are bars


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
    assert index["transformer"] == ["diffusers", "FluxTransformer2DModel"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
