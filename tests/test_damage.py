"""What goes wrong outside: damaged checkpoints, a full disk, no memory, a lost network. Nothing good is lost by it."""

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from huggingface_hub import constants
from safetensors.torch import load_file

from conftest import SCRIPTS, Run, both_scripts, one_script, reset_accelerate
from tests.local_hub import HubState
from tests.processes import PATIENCE, ROOT
from tests.test_checkpoints import WEIGHTS

pytestmark = one_script

PARTIAL, OLD = ".flux-partial", ".flux-old"


def cut(size: int) -> Callable[[bytes], bytes]:
    """Leave `size` bytes, or from the end if it is negative."""
    return lambda content: content[:size]


def flip(place: float) -> Callable[[bytes], bytes]:
    """Turn one bit over, `place` of the way through the file."""

    def flipped(content: bytes) -> bytes:
        at = round(place * (len(content) - 1))
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    return flipped


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "deleted": None,
    "emptied": cut(0),
    "cut after the first byte": cut(1),
    "cut before the end": cut(-3),
    "a bit flipped at the start": flip(0),
    "a bit flipped in the middle": flip(0.5),
    "a bit flipped in the last third": flip(0.7),
}


@pytest.fixture(scope="module")
def trained(tiny_flux: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The output of a run of each script, with checkpoint-1 and checkpoint-2. Read only."""
    outputs = {}
    for kind, script in SCRIPTS.items():
        reset_accelerate()
        outputs[script.__name__] = tmp_path_factory.mktemp("trained") / kind
        flags = [
            f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", "--resolution=32",
            "--instance_prompt=a photo of sks dog", f"--output_dir={outputs[script.__name__]}", "--train_batch_size=1",
            "--max_train_steps=2", "--checkpointing_steps=1", "--max_sequence_length=16", "--report_to=none",
            "--seed=0",
        ]  # fmt: skip
        script.main(script.parse_args(flags))
    return outputs


@pytest.fixture
def output(trained: dict[str, Path], script: ModuleType, tmp_path: Path) -> Path:
    """Its two checkpoints, in the folder that `run` writes to, to be damaged."""
    for name in ("checkpoint-1", "checkpoint-2"):
        shutil.copytree(trained[script.__name__] / name, tmp_path / "out" / name)
    return tmp_path / "out"


def find(script: ModuleType, output: Path, wanted: str = "latest") -> Any:
    flags = ["--pretrained_model_name_or_path=x", "--instance_prompt=x", "--instance_data_dir=x"]
    args = script.parse_args([*flags, f"--output_dir={output}", f"--resume_from_checkpoint={wanted}"])
    return script.find_checkpoint(args)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def damage(path: Path, how: Callable[[bytes], bytes] | None) -> None:
    content = path.read_bytes()
    if how is None:
        path.unlink()
    else:
        path.write_bytes(how(content))
        assert path.read_bytes() != content


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in files_of(folder)}


def leftovers(output: Path) -> list[str]:
    return [str(path) for path in output.rglob("*") if path.name.endswith((PARTIAL, OLD))]


def final_weights(script: ModuleType, output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / WEIGHTS[script.__name__])


def assert_same_weights(script: ModuleType, output: Path, expected_output: Path) -> None:
    weights, expected = final_weights(script, output), final_weights(script, expected_output)
    assert weights.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


@both_scripts
def test_a_checkpoint_has_weights_optimizer_schedule_random_states_and_its_own_state(
    script: ModuleType, output: Path
) -> None:
    names = {path.name for path in files_of(output / "checkpoint-2")}
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl", "training_state.json"} < names
    assert Path(WEIGHTS[script.__name__]).name in names


@pytest.mark.parametrize("how", DAMAGES.values(), ids=list(DAMAGES))
def test_latest_passes_over_a_damaged_checkpoint_with_a_warning_and_takes_an_older_whole_one(
    script: ModuleType,
    trained: dict[str, Path],
    output: Path,
    caplog: pytest.LogCaptureFixture,
    how: Callable[[bytes], bytes] | None,
) -> None:
    """For each file in turn."""
    for path in files_of(output / "checkpoint-2"):
        content = path.read_bytes()
        damage(path, how)
        caplog.clear()
        found, facts = find(script, output)
        assert (found, facts["state"]["step"]) == (output / "checkpoint-1", 1), path
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(warnings) == 1 and "checkpoint-2" in warnings[0] and path.name in warnings[0], (path, warnings)
        path.write_bytes(content)
    assert tree(output / "checkpoint-2") == tree(trained[script.__name__] / "checkpoint-2")
    assert find(script, output)[0] == output / "checkpoint-2"


@pytest.mark.parametrize("how", DAMAGES.values(), ids=list(DAMAGES))
def test_latest_without_a_whole_checkpoint_is_an_error(
    script: ModuleType, output: Path, how: Callable[[bytes], bytes] | None
) -> None:
    shutil.rmtree(output / "checkpoint-1")
    for path in files_of(output / "checkpoint-2"):
        content = path.read_bytes()
        damage(path, how)
        with pytest.raises(script.UsageError, match="no checkpoint can be used"):
            find(script, output)
        path.write_bytes(content)


@pytest.mark.parametrize("how", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_checkpoint_that_is_named_is_an_error(
    script: ModuleType, output: Path, how: Callable[[bytes], bytes] | None
) -> None:
    for path in files_of(output / "checkpoint-2"):
        content = path.read_bytes()
        damage(path, how)
        for wanted in ("checkpoint-2", str(output / "checkpoint-2")):
            with pytest.raises(script.UsageError, match="checkpoint-2"):
                find(script, output, wanted)
        path.write_bytes(content)


def test_no_bit_of_the_state_file_can_flip_and_change_what_is_resumed(script: ModuleType, output: Path) -> None:
    """Every 11th bit. Harmless is only what reads as the same facts: `1e-05` and `1E-05`."""
    path = output / "checkpoint-2" / "training_state.json"
    content, whole = path.read_bytes(), script.read_checkpoint(path.parent)
    refused = harmless = 0
    for bit in range(0, 8 * len(content), 11):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            assert script.read_checkpoint(path.parent) == whole
            harmless += 1
        except script.UsageError:
            refused += 1
    assert refused > 1000 and harmless < 5


@both_scripts
def test_a_run_resumed_beside_a_damaged_checkpoint_ends_with_the_weights_of_the_undisturbed_run(
    script: ModuleType, run: Run, trained: dict[str, Path], output: Path
) -> None:
    [weights] = (output / "checkpoint-2").rglob(Path(WEIGHTS[script.__name__]).name)
    damage(weights, flip(0.5))
    run(script, "--resume_from_checkpoint=latest", "--checkpointing_steps=1")
    assert_same_weights(script, output, trained[script.__name__])
    assert find(script, output)[0] == output / "checkpoint-2", "the damaged checkpoint was not replaced"
    assert leftovers(output) == []


@both_scripts
def test_a_checkpoint_of_the_other_script_is_refused(trained: dict[str, Path], script: ModuleType) -> None:
    [other] = (folder for name, folder in trained.items() if name != script.__name__)
    for wanted in ("checkpoint-2", str(other / "checkpoint-1")):
        with pytest.raises(script.UsageError, match=rf"{other.name}.*other weights"):
            find(script, other, wanted)
    with pytest.raises(script.UsageError, match="no checkpoint can be used"):
        find(script, other)


# A full disk


def disk_without_room(script: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full once checkpoint-1 stands."""
    usage = shutil.disk_usage(output.parent)

    def disk_usage(_: object) -> Any:
        return usage._replace(free=1000) if (output / "checkpoint-1").exists() else usage

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)


def disk_that_fills_up(script: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk becomes full in the middle of the second checkpoint."""
    save_state = Accelerator.save_state

    def save(self: Accelerator, folder: str, **options: Any) -> Any:
        saved = save_state(self, folder, **options)
        if (output / "checkpoint-1").exists():
            with (Path(folder) / "optimizer.bin").open("r+b") as file:
                file.truncate(100)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return saved

    monkeypatch.setattr(Accelerator, "save_state", save)


def disk_that_refuses_the_state(script: ModuleType, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk becomes full with the last file of the second checkpoint."""
    replace_path = script.replace_path

    def replace(new: Path, final: Path) -> None:
        if final.name == "checkpoint-2":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace_path(new, final)

    monkeypatch.setattr(script, "replace_path", replace)


@pytest.mark.parametrize("fill", [disk_without_room, disk_that_fills_up, disk_that_refuses_the_state])
def test_a_full_disk_ends_the_run_and_the_last_good_checkpoint_goes_on(
    script: ModuleType,
    run: Run,
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fill: Callable[[ModuleType, Path, pytest.MonkeyPatch], None],
) -> None:
    output = tmp_path / "out"
    flags = ("--checkpointing_steps=1", "--checkpoints_total_limit=1")
    with monkeypatch.context() as patch:
        fill(script, output, patch)
        with pytest.raises(script.RunError) as error:
            run(script, *flags)
    message = str(error.value)
    needed = re.search(r"needs about ([\d,]+) bytes", message)
    assert needed and "checkpoint-2" in message and "\n" not in message
    size = sum(path.stat().st_size for path in files_of(output / "checkpoint-1"))
    assert size <= int(needed[1].replace(",", "")) < size + 2**21
    assert sorted(path.name for path in output.iterdir()) == ["checkpoint-1", "flags.txt"]
    run(script, *flags, "--resume_from_checkpoint=latest")
    assert_same_weights(script, output, trained[script.__name__])


def test_a_disk_that_is_full_at_the_result_ends_the_run_with_one_line_and_no_leftovers(
    script: ModuleType, run: Run, trained: dict[str, Path], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(script, "replace_path", refuse)
        with pytest.raises(script.RunError, match=r"^[^\n]*[\d,]+ bytes[^\n]*--resume_from_checkpoint=latest[^\n]*$"):
            run(script, "--resume_from_checkpoint=latest", "--checkpointing_steps=1")
    left = {path.name for path in output.iterdir()}
    assert left - {".flux.lock"} == {"checkpoint-1", "checkpoint-2"}
    run(script, "--resume_from_checkpoint=latest")
    assert_same_weights(script, output, trained[script.__name__])


# Out of memory

STAGES = {  # the function that runs out of memory, what the run was doing, and flags that get it there
    "encode_prompts": ("Encoding 1 prompts", ()),
    "load_vae": ("Loading the VAE", ()),
    "cache_latents": ("Encoding the pictures", ("--cache_latents",)),
    "generate_class_pictures": (
        "Generating class pictures",
        ("--with_prior_preservation", "--class_prompt=a dog", "--class_data_dir=class"),
    ),
    "load_transformer": ("Loading the transformer", ()),
    "training_loss": ("Training", ()),
    "save_results": ("Saving the result", ("--max_train_steps=1",)),
    "draw_final_pictures": ("Drawing the final pictures", ("--max_train_steps=1", "--validation_prompt=a dog")),
}


def run_out_of_memory(*_: object, **__: object) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


@pytest.mark.parametrize("function", STAGES)
def test_out_of_memory_says_in_which_stage_and_what_was_in_use(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, function: str
) -> None:
    """The stages are the same text in both scripts, so each is tried with one of them."""
    monkeypatch.chdir(tmp_path)
    script = list(SCRIPTS.values())[list(STAGES).index(function) % 2]
    name, flags = STAGES[function]
    monkeypatch.setattr(script, function, run_out_of_memory)
    with pytest.raises(script.RunError) as error:
        run(script, *flags)
    message = str(error.value)
    assert message.startswith(f"out of memory while: {name} (") and "\n" not in message
    assert "Tried to allocate 2.00 GiB" in message
    used = re.search(r"peak_host_memory (\d+\.\d\d) GiB", message)
    assert used and 0.1 < float(used[1]) < 64


@both_scripts
def test_out_of_memory_names_flags_that_exist_and_the_memory_plan(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "encode_prompts", run_out_of_memory)
    with pytest.raises(script.RunError) as error:
        run(script)
    advice = str(error.value).partition("To use less: ")[2]
    named = re.findall(r"--(\w+)", advice)
    assert len(named) > 6 and set(named) <= script.FLAG_OF.keys()
    [tool] = re.findall(r"tools/\w+\.py", advice)
    assert (ROOT / tool).is_file()


# A lost network


def test_a_network_lost_at_the_push_keeps_the_result_and_says_how_to_push_again(
    script: ModuleType,
    run: Run,
    hub: HubState,
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The command of the message is then run, with the network back: it uploads the result."""
    address, output = constants.ENDPOINT, tmp_path / "my dog"
    train_and_save = script.train_and_save

    def lose_the_network(*given: Any) -> None:
        train_and_save(*given)
        monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there

    monkeypatch.setattr(script, "train_and_save", lose_the_network)
    with pytest.raises(script.RunError) as error:
        run(script, "--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=sks-dog", f"--output_dir={output}")
    assert_same_weights(script, output, trained[script.__name__])
    assert (output / "README.md").is_file() and leftovers(output) == []
    message = str(error.value)
    assert "hf_secret" not in message and "result is whole" in message
    command = re.search(r"hf upload .*", message)
    assert command
    words = [str(Path(sys.executable).with_name("hf")), *shlex.split(command[0])[1:]]
    environment = os.environ | {"HF_ENDPOINT": address, "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HOME": str(tmp_path)}
    done = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-2000:]
    uploaded = hub.repositories["tester/sks-dog"]
    assert uploaded["README.md"] == (output / "README.md").read_bytes()
    assert uploaded[WEIGHTS[script.__name__]] == (output / WEIGHTS[script.__name__]).read_bytes()


def test_a_hub_that_fails_at_the_commit_keeps_the_result(
    script: ModuleType, run: Run, hub: HubState, trained: dict[str, Path], tmp_path: Path
) -> None:
    hub.refuse_commits = 100
    with pytest.raises(script.RunError, match=r"(?s)upload to tester/sks-dog failed .* hf upload tester/sks-dog "):
        run(script, "--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=sks-dog")
    assert hub.refuse_commits < 100 and "README.md" not in hub.repositories["tester/sks-dog"]
    assert_same_weights(script, tmp_path / "out", trained[script.__name__])


def test_a_state_file_is_valid_json_that_names_every_other_file(script: ModuleType, output: Path) -> None:
    checkpoint = output / "checkpoint-2"
    content = json.loads((checkpoint / "training_state.json").read_text())
    others = {str(path.relative_to(checkpoint)) for path in files_of(checkpoint)} - {"training_state.json"}
    assert set(content["files"]) == others


def test_a_disk_that_is_full_for_the_curves_does_not_end_the_run(
    script: ModuleType,
    run: Run,
    trained: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls = []

    def refuse(*_: object, **__: object) -> NoReturn:
        calls.append(1)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(TensorBoardTracker, "log", refuse)
    run(script, "--report_to=tensorboard")
    assert len(calls) == 1 and caplog.text.count("--report_to: nothing more is logged, after OSError") == 1
    assert_same_weights(script, tmp_path / "out", trained[script.__name__])
    monkeypatch.undo()
    monkeypatch.setattr(TensorBoardTracker, "finish", refuse)
    run(script, "--report_to=tensorboard", f"--output_dir={tmp_path / 'other'}")
    assert (tmp_path / "other" / script.RESULT_FILE).is_file()


def test_a_validation_that_was_due_when_the_run_died_is_made_up(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--checkpointing_steps=2", "--validation_steps=2", "--max_train_steps=4", "--validation_prompt=a dog"]
    flags += ["--num_validation_images=1", "--validation_epochs=99", "--resume_from_checkpoint=latest"]
    drawn: list[int] = []
    draw = script.draw_validation_pictures

    def die_at_2(of: Any) -> None:
        drawn.append(of.state.step)
        draw(of) if of.state.step != 2 else (_ for _ in ()).throw(KeyboardInterrupt)

    with monkeypatch.context() as patch:
        patch.setattr(script, "draw_validation_pictures", die_at_2)
        with pytest.raises(KeyboardInterrupt):
            run(script, *flags)
    monkeypatch.setattr(script, "draw_validation_pictures", lambda of: (drawn.append(of.state.step), draw(of)))
    output = run(script, *flags)
    assert (output / "validation" / "step_000002_0.png").is_file()
    run(script, *flags, "--max_train_steps=5")  # from a checkpoint whose pictures are there; 5 steps are an epoch
    assert drawn == [0, 2, 2, 4, 5]
