"""A folder that is used again: nothing of an earlier run is lost, and nothing of it is taken for the new one's."""

import itertools
import json
import os
import shutil
import signal
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from PIL import Image
from safetensors.torch import load_file

from conftest import Run, both_scripts, one_script
from tests.local_hub import HubState
from tests.test_checkpoints import WEIGHTS

pytestmark = one_script

LATEST = "--resume_from_checkpoint=latest"
EVERY = "--checkpointing_steps=1"
EXTRA = {"train_dreambooth_flux": "--save_single_file", "train_dreambooth_lora_flux": "--upcast_before_saving"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".flux.lock"}  # which goes with the process


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, float]]:
    """What was logged of each step."""
    steps: dict[int, dict[str, float]] = {}
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: steps.setdefault(step, {}).update(values))
    return steps


@pytest.fixture(autouse=True)
def signals_arrive() -> Iterator[None]:
    """Whatever started the tests may ignore signals, and a run leaves those ignored."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stopping_at(script: ModuleType, step: int) -> Callable[..., Any]:
    """`log_step`, and a signal after that step."""
    plain = script.log_step

    def log_step(run: Any, *given: Any) -> Any:
        if run.state.step == step:
            os.kill(os.getpid(), signal.SIGUSR1)
        return plain(run, *given)

    return log_step


@both_scripts
def test_a_new_run_moves_what_an_earlier_one_left_and_latest_goes_on_with_the_new(
    script: ModuleType, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pictures = ("--validation_prompt=a dog", "--validation_epochs=1", "--train_batch_size=5")
    weights = WEIGHTS[script.__name__]
    output = run(script, "--max_train_steps=4", EVERY, EXTRA[script.__name__], *pictures)
    (output / "README.md").write_text("mine")
    old = (output / weights).read_bytes()
    new = ("--max_train_steps=3", "--checkpointing_steps=2", "--seed=1", "--checkpoints_total_limit=1")
    run(script, *new)
    earlier = output / "earlier-1"
    assert f"Moved what an earlier run left to {earlier}" in caplog.text
    assert (earlier / weights).read_bytes() == old and (earlier / "README.md").read_text() == "mine"
    assert {"checkpoint-1", "checkpoint-4", "validation", "image_0.png", "contact_sheet.jpg"} <= names(earlier)
    assert {"step_000001_0.png", "step_000004_0.png"} <= names(earlier / "validation")
    assert list(script.list_checkpoints(output)) == [2] and names(output / "validation") == set()
    assert not names(output) & {"image_0.png", "contact_sheet.jpg", *script.ON_REQUEST}
    (output / "validation" / "mine.png").write_bytes(b"")
    expected = load_file(run(script, *new, f"--output_dir={tmp_path / 'alone'}") / weights)
    run(script, *new, LATEST, EXTRA[script.__name__])
    found = load_file(output / weights)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_that_goes_on_from_an_earlier_checkpoint_moves_the_later_ones(script: ModuleType, run: Run) -> None:
    output = run(script, "--max_train_steps=4", EVERY)
    run(script, "--max_train_steps=3", EVERY, "--resume_from_checkpoint=checkpoint-1", "--learning_rate=1e-2")
    assert names(output / "earlier-1") >= {
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-4",
        WEIGHTS[script.__name__].split("/")[0],
    }
    assert list(script.list_checkpoints(output)) == [1, 2, 3]


@pytest.mark.parametrize("place", ["other/checkpoint-2", "out/earlier-1/checkpoint-2"])
def test_a_run_that_goes_on_from_another_folder_does_not_mix_with_what_is_there(
    script: ModuleType, run: Run, tmp_path: Path, place: str
) -> None:
    run(script, "--max_train_steps=3", EVERY, f"--output_dir={tmp_path / 'other'}")
    output = run(script, "--max_train_steps=3", EVERY)
    run(script, "--max_train_steps=3", EVERY, "--seed=4")  # the one before is in earlier-1
    run(script, "--max_train_steps=3", EVERY, f"--resume_from_checkpoint={tmp_path / place}")
    assert list(script.list_checkpoints(output)) == [3]
    assert list(script.list_checkpoints(output / "earlier-2")) == [1, 2, 3]


def test_a_changed_run_that_goes_on_keeps_its_sheet(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was stopped before its end, so there is nothing to move."""
    flags = ("--validation_prompt=a dog", "--validation_steps=1", "--skip_final_inference", EVERY)
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(script, "log_step", stopping_at(script, 1))
        run(script, *flags)
    output = run(script, *flags, LATEST, "--learning_rate=1e-3")
    assert not (output / "earlier-1").exists() and (output / script.SHEET_FILE).is_file()


def test_a_finished_result_is_kept_where_other_flags_train_it_again(script: ModuleType, run: Run) -> None:
    weights = WEIGHTS[script.__name__]
    flags = ("--max_train_steps=4", "--checkpointing_steps=3")
    output = run(script, *flags)
    old = (output / weights).read_bytes()
    run(script, *flags, LATEST, "--learning_rate=1e-1")
    assert (output / "earlier-1" / weights).read_bytes() == old != (output / weights).read_bytes()


def test_a_result_that_no_checkpoint_has_is_kept_where_the_run_is_made_longer(script: ModuleType, run: Run) -> None:
    weights = WEIGHTS[script.__name__]
    output = run(script, "--max_train_steps=4", "--checkpointing_steps=3")
    old = (output / weights).read_bytes()
    run(script, "--max_train_steps=6", "--checkpointing_steps=3", LATEST)
    assert (output / "earlier-1" / weights).read_bytes() == old != (output / weights).read_bytes()
    run(script, "--max_train_steps=7", "--checkpointing_steps=3", LATEST)  # checkpoint-6 has that result's weights
    assert not (output / "earlier-2").exists()


def test_a_finished_run_whose_pictures_were_sorted_out_stays_finished(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(script, "--validation_prompt=a dog")
    (output / "image_0.png").unlink()
    run(script, "--validation_prompt=a dog", LATEST)
    assert "Nothing to do" in caplog.text and not (output / "earlier-1").exists()


def test_a_result_that_was_taken_away_is_made_again(script: ModuleType, run: Run) -> None:
    output = run(script, EVERY)
    (output / script.RESULTS[1]).rename(output / "mine")
    run(script, EVERY, LATEST)
    assert (output / script.RESULTS[1]).read_bytes() == (output / "mine").read_bytes()


def test_a_signal_cuts_a_validation_short_and_the_resumed_run_makes_it_up(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--validation_prompt=a dog", "--validation_steps=2", "--num_validation_images=3", "--max_train_steps=3")
    whole = run(script, *flags, f"--output_dir={tmp_path / 'whole'}")
    draw, drawn = script.draw_pictures, itertools.count()

    def draw_pictures(*given: Any, **options: Any) -> Any:
        if next(drawn) == 4:  # the second one of step 2; three are of step 0
            os.kill(os.getpid(), signal.SIGUSR1)
        return draw(*given, **options)

    output, saves = tmp_path / "out", list[int]()
    save_checkpoint = script.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(script, "save_checkpoint", lambda run: (saves.append(run.state.step), save_checkpoint(run))[1])
        patch.setattr(script, "draw_pictures", draw_pictures)
        with pytest.raises(SystemExit):
            run(script, *flags, "--checkpointing_steps=2")  # the checkpoint that owes it is there
        assert next(drawn) == 5 and saves == [2]
        drawn = itertools.count(4)
        with pytest.raises(SystemExit):  # and once more while it is made up
            run(script, *flags, LATEST)
    assert list(script.list_checkpoints(output)) == [2]
    assert names(output / "validation") == {f"step_000000_{number}.png" for number in range(3)}
    run(script, *flags, LATEST)
    for path in (whole / "validation").iterdir():
        assert (output / "validation" / path.name).read_bytes() == path.read_bytes()


def test_pictures_after_the_step_of_a_checkpoint_are_not_shown_once_it_goes_another_way(
    script: ModuleType, run: Run
) -> None:
    flags = ("--validation_prompt=a dog", "--max_train_steps=3", EVERY)
    output = run(script, *flags, "--validation_steps=1")
    again = ("--resume_from_checkpoint=checkpoint-1", "--learning_rate=1e-1", "--validation_steps=3")
    run(script, *flags, *again)
    assert names(output / "validation") == {f"step_00000{step}_0.png" for step in (0, 1, 3)}
    assert names(output / "earlier-1" / "validation") == {"step_000002_0.png", "step_000003_0.png"}


def test_a_checkpoint_of_an_earlier_version_is_not_said_to_differ(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    output = run(script, EVERY, "--validation_loss")
    path = output / "checkpoint-2" / script.STATE_FILE
    content = json.loads(path.read_text())
    facts = content["facts"]
    facts["data"] = {"pictures and prompts": "5 (00000000)"} | {
        name: value for name, value in facts["data"].items() if "pictures" not in name
    }
    del facts["state"]["owes_validation"]
    content["checksum"] = zlib.crc32(json.dumps([content["files"], facts]).encode())
    path.write_text(json.dumps(content))
    caplog.clear()
    run(script, "--max_train_steps=3", LATEST, "--validation_loss", "--validation_steps=3")
    assert "Differs from" not in caplog.text and "validation_loss_relative" in logged[3]


def test_a_relative_loss_outlives_a_part_without_it(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]]
) -> None:
    run(script, EVERY, "--validation_loss")
    run(script, EVERY, LATEST, "--max_train_steps=3")
    run(script, EVERY, LATEST, "--max_train_steps=4", "--validation_loss", "--validation_steps=4")
    assert "validation_loss_relative" in logged[4]


def test_another_picture_under_the_name_of_an_earlier_one_is_told(
    script: ModuleType, run: Run, pictures: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(pictures, tmp_path / "dogs"))
    run(script, f"--instance_data_dir={folder}", EVERY)
    Image.new("RGB", (32, 32), "navy").save(folder / "dog_00.png")
    run(script, f"--instance_data_dir={folder}", "--max_train_steps=3", LATEST)
    assert "Differs from the run that wrote checkpoint-2" in caplog.text and "training pictures was '5 (" in caplog.text


def test_pictures_of_other_prompts_are_not_shown_under_the_new_ones(script: ModuleType, run: Run) -> None:
    flags = ("--validation_steps=1", EVERY)
    output = run(script, *flags, "--validation_prompt=a dog", "--num_validation_images=2", EXTRA[script.__name__])
    run(script, *flags, "--validation_prompt=a cat", "--validation_prompt=a dog", LATEST, "--max_train_steps=3")
    assert names(output / "earlier-1") >= {"validation", "contact_sheet.jpg", "image_0.png", "image_1.png"}
    assert names(output / "validation") == {"step_000003_0.png", "step_000003_1.png"}
    with Image.open(output / "contact_sheet.jpg") as sheet:
        assert sheet.size == (64 + 2 * 256, 48 + 256)
    assert not (output / script.ON_REQUEST[1]).exists()


def test_a_checkpoint_past_the_end_is_an_error(script: ModuleType, run: Run) -> None:
    output = run(script, "--max_train_steps=3", EVERY)
    with pytest.raises(script.UsageError, match="is at step 3, past the end of this run at 2: raise --max_train_steps"):
        run(script, "--max_train_steps=2", LATEST)
    assert list(script.list_checkpoints(output)) == [1, 2, 3]


@pytest.mark.parametrize("flags", [(), ("--lr_scheduler=linear", "--lr_warmup_steps=0")], ids=["constant", "linear"])
@both_scripts
def test_settings_of_the_optimizer_follow_the_flags_after_a_resume(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], flags: tuple[str, ...]
) -> None:
    before = ("--max_train_steps=4", EVERY, *flags, "--learning_rate=1e-2")
    after = (*before, "--learning_rate=1e-4", "--adam_weight_decay=0.5", "--adam_beta1=0.5")
    run(script, *before)
    rates = {step: values["lr"] for step, values in logged.items()}
    logged.clear()
    output = run(script, *after, "--resume_from_checkpoint=checkpoint-1")
    for step in (2, 3, 4):
        assert logged[step]["lr"] == pytest.approx(rates[step] / 100)
    group = torch.load(output / "checkpoint-4" / "optimizer.bin")["param_groups"][0]
    assert (group["initial_lr"], group["weight_decay"], group["betas"]) == (1e-4, 0.5, (0.5, 0.999))


def test_so_do_those_of_an_optimizer_for_each_weight(run: Run) -> None:
    import train_dreambooth_flux as script

    flags = ("--mixed_precision=bf16", "--full_bf16", "--fused_backward_pass", EVERY)
    flags += ("--lr_scheduler=polynomial", "--lr_power=0.0", "--lr_warmup_steps=0")  # reads the optimizer's default
    run(script, *flags)
    again = ("--max_train_steps=3", "--learning_rate=1e-6", "--adam_weight_decay=0.5")
    output = run(script, *flags, *again, LATEST)
    state = torch.load(output / "checkpoint-3" / "optimizer.bin")
    [group] = state["state"][0]["param_groups"]
    assert (group["lr"], group["weight_decay"]) == (1e-6, 0.5)


def test_prodigy_keeps_what_it_has_learned(script: ModuleType, run: Run, logged: dict[int, dict[str, float]]) -> None:
    flags = ("--optimizer=prodigy", "--learning_rate=1", EVERY)
    output = run(script, *flags)
    run(script, *flags, "--max_train_steps=3", "--adam_weight_decay=0.5", LATEST)
    before, after = (torch.load(output / f"checkpoint-{step}" / "optimizer.bin")["param_groups"][0] for step in (2, 3))
    assert (before["k"], after["k"]) == (2, 3) and (before["weight_decay"], after["weight_decay"]) == (1e-4, 0.5)
    assert after["d_numerator"] != before["d_numerator"] and after["d_max"] == logged[3]["prodigy_d"]


@both_scripts
def test_a_finished_run_with_other_wishes_fulfils_them(script: ModuleType, run: Run) -> None:
    output = run(script, EVERY)
    wanted = [output / name for name in ("image_0.png", *script.ON_REQUEST[1:])]
    assert not any(path.exists() for path in wanted)
    run(script, EVERY, LATEST, EXTRA[script.__name__], "--validation_prompt=a dog")
    assert all(path.is_file() for path in wanted)


def test_a_finished_run_without_checkpoints_is_not_trained_again(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(script)
    before = names(output)
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    run(script, LATEST)
    assert names(output) == before


def test_a_finished_run_goes_on_from_a_checkpoint_that_is_named(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]]
) -> None:
    run(script, EVERY)
    logged.clear()
    run(script, EVERY, "--resume_from_checkpoint=checkpoint-1")
    assert list(logged) == [2]


def test_a_damaged_mark_is_none(script: ModuleType, run: Run, logged: dict[int, dict[str, float]]) -> None:
    output = run(script, "--max_train_steps=3", "--checkpointing_steps=2")
    (output / script.RESULT_FILE).write_text("")
    logged.clear()
    run(script, "--max_train_steps=3", "--checkpointing_steps=2", LATEST)
    assert list(logged) == [3]


def test_a_push_that_was_cut_off_is_done_by_latest(
    script: ModuleType, run: Run, hub: HubState, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--push_to_hub", "--hub_token=hf_secret", "--hub_model_id=sks-dog", EVERY)

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "push_to_hub", end)
        run(script, *flags)
    monkeypatch.setattr(script, "encode_prompts", lambda *_: pytest.fail("a model was loaded"))
    output = run(script, *flags, LATEST)
    assert hub.repositories["tester/sks-dog"]["README.md"] == (output / "README.md").read_bytes()


def test_two_runs_do_not_write_to_one_folder(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(script, "LOCK_SECONDS", 0.1)
    output = tmp_path / "out"
    (output / ".checkpoint-1.flux-partial").mkdir(parents=True)  # which the other one is writing
    script.unlock_folders()
    script.lock_folder("--output_dir", output, 0)
    other = FileLock(script.HELD[0].lock_file)
    script.unlock_folders()
    other.acquire()
    with pytest.raises(script.UsageError, match="which another run is using"):
        run(script)
    assert "Another run is using" in caplog.text
    assert names(output) == {".checkpoint-1.flux-partial"}
    script.unlock_folders()  # as at the end of the process that was refused
    assert Path(other.lock_file).exists(), "the other run's lock was removed"
    other.release()
    run(script)


def test_a_folder_that_a_run_has_made_is_locked_too(script: ModuleType, run: Run) -> None:
    run(script)
    path = Path(script.HELD[0].lock_file)
    with pytest.raises(Timeout):
        FileLock(path).acquire(timeout=0)
    script.unlock_folders()
    assert not path.exists()


def test_a_folder_that_is_there_is_locked_for_other_machines(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which have temporary folders of their own."""
    monkeypatch.setattr(script, "LOCK_SECONDS", 0.1)
    output = run(script)
    script.unlock_folders()
    assert not (output / ".flux.lock").exists()
    with FileLock(output / ".flux.lock"), pytest.raises(script.UsageError, match="which another run is using"):
        run(script)


# What the training can do without


def test_what_lies_in_the_way_of_pictures_does_not_end_the_training(
    script: ModuleType, run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "set_aside", lambda *_, **__: None)
    output, flags = tmp_path / "out", ("--validation_prompt=a dog", "--validation_steps=1", "--train_batch_size=5")
    output.mkdir()
    (output / "validation").write_text("a file")
    run(script, *flags)
    assert caplog.text.count("The validation pictures could not be written") == 3
    assert (output / script.RESULT_FILE).is_file()


def test_copies_that_a_file_manager_made_are_not_on_the_sheet(script: ModuleType, run: Run) -> None:
    flags = ("--validation_prompt=a dog", "--validation_steps=1", EVERY)
    output = run(script, *flags)
    picture = output / "validation" / "step_000001_0.png"
    picture.rename(output / "validation" / "step_000001_0 (copy).png")
    run(script, *flags, LATEST, "--max_train_steps=3")
    with Image.open(output / "contact_sheet.jpg") as sheet:
        assert sheet.size == (64 + 256, 48 + 3 * 256)  # of steps 0, 2 and 3


def test_a_full_disk_at_the_pictures_and_the_card_keeps_the_result(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_picture", fail)
        output = run(script, "--validation_prompt=a dog")
    assert (output / WEIGHTS[script.__name__]).is_file() and not (output / script.RESULT_FILE).exists()
    assert "The final pictures could not be written: [Errno 28]" in caplog.text
    write = script.write_file
    monkeypatch.setattr(script, "write_file", lambda path, text: fail() if path.suffix == ".md" else write(path, text))
    output = run(script, f"--output_dir={output}-2")
    assert (output / WEIGHTS[script.__name__]).is_file() and (output / script.RESULT_FILE).is_file()
    assert "The model card could not be written: [Errno 28]" in caplog.text


def test_an_output_folder_that_was_removed_is_made_again(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = script.train

    def train(*given: Any) -> None:
        shutil.rmtree(tmp_path / "out")
        plain(*given)

    monkeypatch.setattr(script, "train", train)
    output = run(script, EVERY)
    assert {"checkpoint-1", "checkpoint-2", "README.md", script.RESULT_FILE} <= names(output)


def test_a_result_that_was_not_written_names_the_checkpoints_there_are(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script, "save_results", fail)
    with pytest.raises(script.RunError, match="There is no checkpoint yet: make room"):
        run(script)
    with pytest.raises(script.RunError, match="There is checkpoint-1, checkpoint-2: make room"):
        run(script, EVERY)


def test_a_run_whose_final_pictures_failed_is_not_finished(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = script.save_picture

    def save(picture: Image.Image, path: Path) -> None:
        if path.name.startswith("image_"):
            raise OSError(28, "No space left on device")
        plain(picture, path)

    with monkeypatch.context() as patch:
        patch.setattr(script, "save_picture", save)
        output = run(script, "--validation_prompt=a dog", EVERY)
    assert (output / "README.md").is_file() and not (output / script.RESULT_FILE).exists()
    run(script, "--validation_prompt=a dog", EVERY, LATEST)
    assert (output / "image_0.png").is_file() and (output / script.RESULT_FILE).is_file()


# Stops


def test_a_signal_during_the_saving_leaves_the_whole_result(
    script: ModuleType,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = script.save_results

    def save(*given: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        plain(*given)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(script, "save_results", save)
        run(script, "--validation_prompt=a dog")
    assert stop.value.code == 128 + signal.SIGTERM
    assert "\nSIGTERM: stopping once this step is saved\n" in capfd.readouterr().err
    assert (
        "Stopped by SIGTERM at step 2; the result and checkpoint-2 is saved. To go on: the same command" in caplog.text
    )
    assert (tmp_path / "out" / WEIGHTS[script.__name__]).is_file() and not (tmp_path / "out" / "image_0.png").exists()


def test_a_validation_that_a_stop_left_out_is_made_on_resume(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--validation_loss", "--validation_steps=2", "--max_train_steps=5")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(script, "log_step", stopping_at(script, 1))  # seen in the second step
        run(script, *flags)
    assert "validation_loss" not in logged[2]
    run(script, *flags, LATEST)
    assert [step for step, values in logged.items() if "validation_loss" in values] == [0, 2, 4, 5]


def test_a_validation_that_was_made_is_not_repeated_on_resume(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]]
) -> None:
    flags = ("--validation_loss", "--validation_steps=2", "--checkpointing_steps=2")
    run(script, *flags)
    logged.clear()
    run(script, *flags, LATEST, "--max_train_steps=3")
    assert "validation_loss" not in logged.get(2, {})


# The validation loss of other pictures than before the first step


@pytest.mark.parametrize("other", [False, True], ids=["first computed then", "of other pictures"])
def test_a_loss_that_was_not_computed_before_the_first_step_is_not_called_relative(
    script: ModuleType, run: Run, logged: dict[int, dict[str, float]], tmp_path: Path, other: bool
) -> None:
    (tmp_path / "held").mkdir()
    Image.new("RGB", (32, 32), "navy").save(tmp_path / "held" / "navy.png")
    run(script, EVERY, *(["--validation_loss"] if other else []))
    held_out = f"--validation_data_dir={tmp_path / 'held'}"
    flags = (EVERY, LATEST, "--max_train_steps=3", "--validation_loss", "--validation_steps=3", held_out)
    run(script, *flags)
    assert "validation_loss" in logged[3] and "validation_loss_relative" not in logged[3]


# Trackers and the summary


@pytest.mark.parametrize("folder", ["{}/curves", "", "."])
def test_curves_may_be_anywhere(script: ModuleType, run: Run, tmp_path: Path, folder: str) -> None:
    run(script, "--report_to=tensorboard", f"--logging_dir={folder.format(tmp_path)}")


def test_a_tracker_that_does_not_let_the_run_in_is_one_message(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("No API key configured")

    monkeypatch.setattr(Accelerator, "init_trackers", refuse)
    with pytest.raises(script.UsageError, match=r"--report_to=none.*No API key configured.*wandb login"):
        run(script)


def test_the_code_names_variant_and_revision_and_takes_any_folder(base_flags: list[str]) -> None:
    import train_dreambooth_lora_flux as script

    flags = ("--variant=fp16", "--revision=main", '--output_dir=a "dog"', "--pretrained_model_name_or_path=some/base")
    args = script.parse_args([*base_flags, *flags])
    code = script.loading_code(args, args.output_dir, args.pretrained_model_name_or_path)
    compile(code, "code", "exec")
    assert 'FluxPipeline.from_pretrained("some/base", revision="main", variant="fp16", torch_dtype' in code
    assert r'load_lora_weights("a \"dog\"", weight_name' in code


def test_the_card_keeps_prompts_as_they_are_and_names_no_folder(
    script: ModuleType, run: Run, tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    output = run(script, "--instance_prompt=/imagine a `sks` dog|cat", "--output_dir=out")
    card = (output / "README.md").read_text()
    assert "    /imagine a `sks` dog|cat\n" in card and "--instance_prompt='/imagine a `sks` dog|cat'" in card
    assert str(tiny_flux.parent) not in card
