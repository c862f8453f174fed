"""Signals: the step ends, a checkpoint is written, and one line says how to go on; no process trains on alone."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file

from conftest import SCRIPTS, Run, both_scripts, one_script
from tests.faulty_run import Forker
from tests.processes import PATIENCE, default_signals
from tests.test_checkpoints import WEIGHTS

pytestmark = one_script

ROOT = Path(__file__).parent.parent
FULL, LORA = SCRIPTS["full"], SCRIPTS["lora"]


@pytest.fixture(scope="module")
def forker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    forker = Forker(tmp_path_factory.mktemp("forker"))
    yield forker
    forker.close()


@pytest.fixture
def endless(tiny_flux: Path, pictures: Path, tmp_path: Path) -> Iterator[list[str]]:
    """Flags of a run that does not end by itself; what is left of it at the end of the test is ended."""
    yield [
        f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}", "--resolution=32",
        "--instance_prompt=a photo of sks dog", f"--output_dir={tmp_path / 'out'}", "--train_batch_size=1",
        "--max_train_steps=1000000", "--checkpointing_steps=2", "--checkpoints_total_limit=1", "--seed=0",
        "--max_sequence_length=16", "--report_to=none",
    ]  # fmt: skip
    for pid in processes_of(tmp_path):
        os.kill(pid, signal.SIGKILL)


def processes_of(folder: Path) -> set[int]:
    """The processes that train into `folder` or below it, by their command lines; `Forker.close` ends forked ones."""
    found = set()
    for process in Path("/proc").iterdir():
        if not process.name.isdigit() or int(process.name) == os.getpid():
            continue
        try:
            command = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:  # it has just ended
            continue
        if str(folder / "out") in command:
            found.add(int(process.name))
    return found


def wait_until(condition: Callable[[], object], what: str, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not in {seconds} s"
        time.sleep(0.02)


def training(output: Path) -> bool:
    return any((path / "training_state.json").exists() for path in output.glob("checkpoint-*"))


def assert_stopped(script: ModuleType, number: signal.Signals, printed: str, output: Path) -> int:
    """One line that names the signal and says how to go on, a whole checkpoint of its step; returns the step."""
    lines = re.findall(r"Stopped by (\w+) at step (\d+); checkpoint-(\d+) is saved\. To go on: .*", printed)
    assert len(lines) == 1, printed[-3000:]
    [(name, step, saved)] = lines
    assert name == number.name and step == saved
    assert "--resume_from_checkpoint=latest" in printed
    found = script.list_checkpoints(output)
    assert list(found) == [int(step)]
    assert script.read_checkpoint(found[int(step)])["state"]["step"] == int(step)
    return int(step)


@pytest.mark.parametrize(
    ("script", "number"),
    [
        (FULL, signal.SIGTERM),
        (LORA, signal.SIGTERM),
        (LORA, signal.SIGINT),
        (FULL, signal.SIGUSR1),
        (LORA, signal.SIGHUP),
    ],
    ids=["full-SIGTERM", "lora-SIGTERM", "lora-SIGINT", "full-SIGUSR1", "lora-SIGHUP"],
)
def test_a_signal_ends_the_run_after_a_checkpoint_with_the_code_of_the_signal(
    forker: Forker, endless: list[str], tmp_path: Path, script: ModuleType, number: signal.Signals
) -> None:
    pid, log = forker.start(script.__name__, endless)
    wait_until(lambda: training(tmp_path / "out"), "a checkpoint")
    os.kill(pid, number)
    assert forker.wait(pid) == 128 + number
    printed = log.read_text()
    assert_stopped(script, number, printed, tmp_path / "out")
    assert "Traceback" not in printed and "error:" not in printed


@both_scripts
def test_a_run_that_a_signal_stopped_and_that_is_resumed_ends_with_the_weights_of_the_run_never_stopped(
    script: ModuleType, forker: Forker, endless: list[str], run: Run, tmp_path: Path
) -> None:
    pid, log = forker.start(script.__name__, endless)
    wait_until(lambda: training(tmp_path / "out"), "a checkpoint")
    os.kill(pid, signal.SIGTERM)
    assert forker.wait(pid) == 128 + signal.SIGTERM
    step = assert_stopped(script, signal.SIGTERM, log.read_text(), tmp_path / "out")
    ends = f"--max_train_steps={step + 2}"
    pid, log = forker.start(script.__name__, [*endless, ends, "--resume_from_checkpoint=latest"])
    assert forker.wait(pid) == 0, log.read_text()[-3000:]
    whole = tmp_path / "whole"
    pid, log = forker.start(script.__name__, [*endless, ends, f"--output_dir={whole}"])
    assert forker.wait(pid) == 0, log.read_text()[-3000:]
    got, expected = (load_file(folder / WEIGHTS[script.__name__]) for folder in (tmp_path / "out", whole))
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


def test_a_second_sigint_ends_at_once(forker: Forker, endless: list[str], tmp_path: Path) -> None:
    """In a step that would take minutes."""
    pid, log = forker.start(
        LORA.__name__, [*endless, "--gradient_accumulation_steps=5000", "--repeats=1000", "--resolution=64"]
    )
    wait_until(lambda: "INFO Training\n" in log.read_text(), "the training")
    os.kill(pid, signal.SIGINT)
    wait_until(lambda: "SIGINT: stopping once this step is saved" in log.read_text(), "the answer to the first")
    assert forker.poll(pid) is None, "the first SIGINT did not wait for the step"
    os.kill(pid, signal.SIGINT)
    assert forker.wait(pid) == 128 + signal.SIGINT
    assert not training(tmp_path / "out"), "the second SIGINT waited for the step"


def newest(output: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


def test_a_run_that_nohup_started_goes_on_when_the_terminal_closes(
    forker: Forker, endless: list[str], tmp_path: Path
) -> None:
    """`nohup` starts a program with SIGHUP ignored; the other signals still stop it."""
    pid, log = forker.start(FULL.__name__, endless, ignored=(signal.SIGHUP,))
    wait_until(lambda: training(tmp_path / "out"), "a checkpoint")
    os.kill(pid, signal.SIGHUP)
    step = newest(tmp_path / "out")
    wait_until(lambda: newest(tmp_path / "out") > step + 3 or forker.poll(pid) is not None, "the next checkpoints")
    assert forker.poll(pid) is None, log.read_text()[-3000:]
    os.kill(pid, signal.SIGTERM)
    assert forker.wait(pid) == 128 + signal.SIGTERM
    assert_stopped(FULL, signal.SIGTERM, log.read_text(), tmp_path / "out")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_to_all_processes_of_a_run_with_loader_workers_ends_it_after_a_checkpoint(
    forker: Forker, endless: list[str], tmp_path: Path, number: signal.Signals
) -> None:
    """As a terminal, a cluster or a launcher sends it: the processes that load pictures get it too."""
    script = FULL if number == signal.SIGINT else LORA
    pid, log = forker.start(script.__name__, [*endless, "--dataloader_num_workers=2"])
    wait_until(lambda: training(tmp_path / "out"), "a checkpoint")
    os.killpg(pid, number)  # a run of `Forker` leads a group of its own
    assert forker.wait(pid) == 128 + number, log.read_text()[-3000:]
    assert_stopped(script, number, log.read_text(), tmp_path / "out")

    def group_is_gone() -> bool:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        return False

    wait_until(group_is_gone, "the end of the loader workers")


# Under a launcher


@dataclass
class Launched:
    launcher: subprocess.Popen
    log: Path
    output: Path

    @property
    def trainers(self) -> set[int]:
        return processes_of(self.output.parent) - {self.launcher.pid}

    @property
    def printed(self) -> str:
        return self.log.read_text()


@pytest.fixture
def launch(endless: list[str], tmp_path: Path) -> Iterator[Callable[[ModuleType, int], Launched]]:
    launched: list[Launched] = []

    def start(script: ModuleType, processes: int) -> Launched:
        distributed = ["--multi_gpu"] if processes > 1 else []
        command = [
            sys.executable, "-m", "accelerate.commands.launch", *distributed, f"--num_processes={processes}",
            "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
            str(script.__file__), *endless,
        ]  # fmt: skip
        environment = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
        log = tmp_path / "printed.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env=environment, cwd=tmp_path, stdout=file, stderr=file, preexec_fn=default_signals
            )
        launched.append(Launched(process, log, tmp_path / "out"))
        return launched[-1]

    yield start
    for run in launched:
        run.launcher.kill()
        run.launcher.wait(PATIENCE)


@pytest.mark.parametrize(
    ("script", "processes", "number"),
    [
        (FULL, 1, signal.SIGKILL),
        (LORA, 2, signal.SIGTERM),
        (FULL, 2, signal.SIGKILL),
    ],
    ids=["one-SIGKILL", "two-SIGTERM", "two-SIGKILL"],
)
def test_when_only_the_launcher_gets_the_signal_all_processes_end_after_a_checkpoint(
    launch: Callable[[ModuleType, int], Launched], script: ModuleType, processes: int, number: signal.Signals
) -> None:
    """A launcher that was killed counts as SIGTERM."""
    run = launch(script, processes)
    wait_until(lambda: training(run.output), "a checkpoint")
    assert len(run.trainers) == processes
    run.launcher.send_signal(number)
    wait_until(lambda: run.launcher.poll() is not None and not run.trainers, "the end of all processes")
    assert run.launcher.returncode != 0
    assert "Unable to shutdown" not in run.printed, "a process had to be killed"
    told = signal.SIGTERM if number == signal.SIGKILL else number
    assert_stopped(script, told, run.printed, run.output)
    [checkpoint] = script.list_checkpoints(run.output).values()
    assert len(list(checkpoint.glob("random_states_*.pkl"))) == processes


def test_a_launcher_that_goes_away_before_the_training_begins_leaves_no_process_that_trains(
    launch: Callable[[ModuleType, int], Launched],
) -> None:
    run = launch(LORA, 1)
    wait_until(lambda: "Encoding 1 prompts" in run.printed, "the first model")
    assert len(run.trainers) == 1
    run.launcher.terminate()
    run.launcher.wait(PATIENCE)
    wait_until(lambda: not run.trainers, "the end of the process")
    assert "Saving the result" not in run.printed
