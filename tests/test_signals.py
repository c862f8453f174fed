"""Signals: the step ends, a checkpoint is written, and one line says how to go on; no process trains on alone."""

import contextlib
import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from conftest import SCRIPTS, Run, both_scripts, one_script
from tests.faulty_run import Forker
from tests.processes import PATIENCE, STOPPING, default_signals
from tests.test_checkpoints import LATEST, WEIGHTS, assert_same_weights, load_anew, names

pytestmark = one_script

FULL, LORA = SCRIPTS["full"], SCRIPTS["lora"]


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    forker = Forker(tmp_path_factory.mktemp("forker"))
    yield forker
    forker.close()


@pytest.fixture
def endless(base_flags: list[str], tmp_path: Path) -> Iterator[list[str]]:
    """Flags of a run that does not end by itself; what is left of it at the end of the test is ended."""
    yield [*base_flags, "--max_train_steps=1000000", "--checkpointing_steps=2", "--checkpoints_total_limit=1"]
    for pid in processes_of(tmp_path):
        os.kill(pid, signal.SIGKILL)


def processes_of(folder: Path) -> set[int]:
    """The processes that train into `folder` or below it, by their command lines; `Forker.close` ends forked ones."""
    found = [process for process in psutil.process_iter(["cmdline"]) if str(folder / "out") in str(process.info)]
    return {process.pid for process in found} - {os.getpid()}


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.02)


def newest(output: Path) -> int:
    return max(LORA.list_checkpoints(output), default=0)


def assert_stopped(script: ModuleType, number: int, output: Path, printed: str | None = None) -> None:
    """A whole checkpoint of the last step, and of what was printed one line that names it and says how to go on."""
    [(step, checkpoint)] = script.list_checkpoints(output).items()
    assert script.read_checkpoint(checkpoint)["state"]["step"] == step
    assert not names(output, f"{script.PARTIAL}*") and not (output / WEIGHTS[script.__name__]).exists()
    if printed is not None:
        [line] = re.findall(r"Stopped by signal .*", printed)
        assert line == f"Stopped by signal {number}; checkpoint-{step} is saved: go on with {LATEST}"
        assert "Traceback" not in printed and "error:" not in printed


@pytest.mark.parametrize(("script", "number"), zip([FULL, LORA, FULL, LORA], STOPPING, strict=True))
def test_a_signal_ends_the_run_after_a_checkpoint_with_the_code_of_the_signal(
    forker: Forker, endless: list[str], tmp_path: Path, script: ModuleType, number: int
) -> None:
    pid, log = forker.start(script.__name__, endless)
    wait_until(lambda: newest(tmp_path / "out"), "a checkpoint")
    os.kill(pid, number)
    assert forker.wait(pid) == 128 + number
    assert_stopped(script, number, tmp_path / "out", log.read_text())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_of_a_run_with_loader_workers_ends_it_after_a_checkpoint(
    forker: Forker, endless: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """As a terminal, a cluster or a launcher sends it: the processes that load pictures get it too."""
    script = FULL if number == signal.SIGINT else LORA
    pid, log = forker.start(script.__name__, [*endless, "--dataloader_num_workers=2"])
    wait_until(lambda: newest(tmp_path / "out"), "a checkpoint")
    os.killpg(pid, number)  # a run of `Forker` leads a group of its own
    assert forker.wait(pid) == 128 + number, log.read_text()[-3000:]
    assert_stopped(script, number, tmp_path / "out", log.read_text())

    def group_is_gone() -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, 0)
            return False
        return True

    wait_until(group_is_gone, "the end of the loader workers")


def test_a_second_sigint_ends_at_once(forker: Forker, endless: list[str], tmp_path: Path) -> None:
    """In a step that would take minutes."""
    long = ["--gradient_accumulation_steps=5000", "--repeats=1000", "--resolution=64"]
    pid, log = forker.start(LORA.__name__, [*endless, *long])
    wait_until(lambda: "INFO Training\n" in log.read_text(), "the training")
    os.kill(pid, signal.SIGINT)
    wait_until(lambda: "a second ^C does not wait" in log.read_text(), "the answer to the first")
    assert forker.poll(pid) is None, "the first SIGINT did not wait for the step"
    os.kill(pid, signal.SIGINT)
    assert forker.wait(pid) == 128 + signal.SIGINT
    assert not newest(tmp_path / "out"), "the second SIGINT waited for the step"


# Where it prints has gone


def start_and_close_terminal(
    forker: Forker, script: ModuleType, flags: list[str], output: Path, ignored: tuple[int, ...] = ()
) -> int:
    """Start a run on a terminal, which closes after a checkpoint; returns the number of the run's process."""
    master, slave = os.openpty()
    os.set_blocking(master, False)
    pid, _ = forker.start(script.__name__, flags, ignored=ignored, output=os.ttyname(slave))

    def has_checkpoint() -> bool:
        with contextlib.suppress(BlockingIOError):  # a terminal that nobody reads is full some time
            os.read(master, 10_000)
        return newest(output) > 0 or forker.poll(pid) is not None

    wait_until(has_checkpoint, "a checkpoint")
    os.close(slave)
    os.close(master)  # the system sends SIGHUP, and every write fails
    return pid


def test_a_closed_terminal_ends_the_run_after_a_checkpoint(forker: Forker, endless: list[str], tmp_path: Path) -> None:
    flags = [*endless, "--validation_prompt=a dog", "--validation_steps=1", "--num_validation_images=9"]
    assert forker.wait(start_and_close_terminal(forker, LORA, flags, tmp_path / "out")) == 128 + signal.SIGHUP
    assert_stopped(LORA, signal.SIGHUP, tmp_path / "out")


def assert_goes_on_until(forker: Forker, pid: int, number: int, output: Path) -> None:
    """The run takes some more steps, and a signal stops it as ever."""
    step = newest(output)
    wait_until(lambda: newest(output) > step + 3 or forker.poll(pid) is not None, "the next checkpoints")
    os.kill(pid, number)
    assert forker.wait(pid) == 128 + number
    assert_stopped(FULL, number, output)


def test_a_run_that_nohup_started_goes_on_when_its_terminal_closes(
    forker: Forker, endless: list[str], tmp_path: Path
) -> None:
    """`nohup` starts a program with SIGHUP ignored; the progress has nowhere to be shown."""
    pid = start_and_close_terminal(forker, FULL, endless, tmp_path / "out", ignored=(signal.SIGHUP,))
    assert_goes_on_until(forker, pid, signal.SIGTERM, tmp_path / "out")


def test_so_does_a_run_whose_pipe_is_broken(forker: Forker, endless: list[str], tmp_path: Path) -> None:
    """As ^C in `... 2>&1 | tee log` does it: the reader ends first."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    pid, _ = forker.start(FULL.__name__, endless, output=str(pipe))
    wait_until(lambda: newest(tmp_path / "out"), "a checkpoint")
    os.close(reader)
    assert_goes_on_until(forker, pid, signal.SIGINT, tmp_path / "out")


# At a moment that is chosen, in this process


@pytest.fixture
def stop_in(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """`stop_in(script, owner, function, call, *flags)`: a script gets SIGUSR1 in that call of `owner.function`, and
    stops; returns the number of calls."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    default_signals()  # whatever started the tests may ignore signals, and a run leaves those ignored

    def run_and_stop(script: ModuleType, owner: Any, function: str, call: int, *flags: str) -> int:
        original, calls = getattr(owner, function), list[None]()

        def called(*given: Any, **options: Any) -> Any:
            calls.append(None)
            if len(calls) == call:
                os.kill(os.getpid(), signal.SIGUSR1)
            return original(*given, **options)

        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
            patch.setattr(owner, function, called)
            run(script, *flags)
        assert stop.value.code == 128 + signal.SIGUSR1
        del stop
        gc.collect()  # its traceback holds the run, and that the lock of the folder
        return len(calls)

    yield run_and_stop
    for number, handler in before.items():
        signal.signal(number, handler)


@both_scripts
def test_a_run_that_a_signal_stopped_ends_when_resumed_as_the_run_never_stopped(
    script: ModuleType, run: Run, tmp_path: Path, stop_in: Callable[..., int]
) -> None:
    stop_in(script, script, "training_loss", 2, "--max_train_steps=4")
    assert_stopped(script, signal.SIGUSR1, tmp_path / "out")
    output = run(script, "--max_train_steps=4", LATEST)
    assert_same_weights(script, output, run(script, "--max_train_steps=4", f"--output_dir={tmp_path / 'whole'}"))


def test_a_signal_while_validation_pictures_are_drawn_keeps_those_that_are_drawn(
    script: ModuleType, tmp_path: Path, stop_in: Callable[..., int]
) -> None:
    flags = ("--max_train_steps=9", "--validation_prompt=a dog", "--validation_steps=2", "--num_validation_images=3")
    # The second picture of step 2 is the fifth: three are of step 0.
    assert stop_in(script, script.FluxPipeline, "__call__", 5, *flags) == 5
    assert_stopped(script, signal.SIGUSR1, tmp_path / "out")
    assert newest(tmp_path / "out") == 3
    drawn = {"step_000000_0.png", "step_000000_1.png", "step_000000_2.png", "step_000002_0.png", "step_000002_1.png"}
    assert names(tmp_path / "out" / "validation") == drawn


@both_scripts
def test_a_signal_while_the_result_is_saved_leaves_the_whole_result(
    script: ModuleType, run: Run, tmp_path: Path, stop_in: Callable[..., int], caplog: pytest.LogCaptureFixture
) -> None:
    stop_in(script, script, "put_in_place", 1, "--validation_prompt=a dog")
    output = tmp_path / "out"
    assert f"Stopped by signal 10; the result is in {output}; only its pictures and model card" in caplog.text
    assert not (output / "image_0.png").exists() and not names(output, f"{script.PARTIAL}*")
    assert_same_weights(script, output, run(script, f"--output_dir={tmp_path / 'whole'}"))


# Under a launcher


def test_only_accelerate_launch_counts_as_a_launcher(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its precision alone, which people set in their shell, does not."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    alone = load_anew(script, monkeypatch)
    assert alone.LAUNCHER is None and not alone.StopSignals.launcher_is_gone()
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    launched = load_anew(script, monkeypatch)
    assert os.getppid() == launched.LAUNCHER and not launched.StopSignals.launcher_is_gone()


def test_a_run_whose_launcher_is_gone_ends_after_a_checkpoint(
    script: ModuleType, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LAUNCHER", 2**22 + 1)  # the number of no process
    with pytest.raises(SystemExit) as stop:
        run(script)
    assert stop.value.code == 128 + signal.SIGTERM and newest(tmp_path / "out") == 1
    assert_stopped(script, signal.SIGTERM, tmp_path / "out")


@pytest.mark.parametrize(("script", "number"), [(LORA, signal.SIGTERM), (FULL, signal.SIGKILL)], ids=["TERM", "KILL"])
def test_when_only_the_launcher_gets_the_signal_both_processes_end_after_a_checkpoint(
    endless: list[str], tmp_path: Path, script: ModuleType, number: signal.Signals
) -> None:
    """A launcher that was killed counts as SIGTERM."""
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
        "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0", str(script.__file__), *endless,
    ]  # fmt: skip
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "TMPDIR": str(tmp_path)}
    log, output = tmp_path / "printed.txt", tmp_path / "out"
    with log.open("w") as file:
        launcher = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=file, stderr=file, preexec_fn=default_signals
        )
    wait_until(lambda: newest(output), "a checkpoint")
    assert len(processes_of(tmp_path) - {launcher.pid}) == 2
    launcher.send_signal(number)
    wait_until(lambda: launcher.poll() is not None and not processes_of(tmp_path), "the end of all processes")
    printed = log.read_text()
    assert launcher.returncode != 0 and "Unable to shutdown" not in printed, "a process had to be killed"
    [checkpoint] = script.list_checkpoints(output).values()
    assert f"Stopped by signal 15; {checkpoint.name} is saved" in printed
    assert script.read_checkpoint(checkpoint)["processes"] == len(list(checkpoint.glob("random_*"))) == 2
