"""What a run says: one line that is redrawn on a terminal, lines in a log file, and a summary at the end."""

import io
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import Run, both_scripts, one_script

pytestmark = one_script

LINE = re.compile(
    r"step (\d+)/(\d+), (\d\d:\d\d) left, epoch (\d+), loss (\d+\.\d{4}), lr ([\de.-]+), "
    r"(\d+\.\d\d) s/step, (\d+\.\d) GiB"
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(printed: str) -> list[str]:
    """The lines that a terminal shows after `printed`: carriage returns write over, `ESC [ A` goes up."""
    lines, row, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[\d*[A-Za-z])", printed):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif part.startswith("\x1b["):
            row -= int(part[2:-1] or 1) if part.endswith("A") else 0
        else:
            lines[row] = lines[row].ljust(column)[:column] + part + lines[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in lines]


def printed_by(script: ModuleType, run: Run, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch, *flags: str) -> str:
    """What a run writes to `stream` in place of the error stream, its log included."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        patch.setattr(logging.getLogger(), "handlers", [handler])
        run(script, *flags)
    return stream.getvalue()


def test_a_terminal_shows_one_line_that_is_redrawn_under_what_is_logged(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max_train_steps=4", "--checkpointing_steps=2", "--validation_prompt=a dog", "--validation_steps=2"]
    lines = screen(printed_by(script, run, Terminal(), monkeypatch, *flags))
    bars = [line for line in lines if "%|" in line]
    assert len(bars) == 1 and bars[0].startswith("100%|")
    assert LINE.search(bars[0]) and "step 4/4" in bars[0]
    assert "INFO Saved checkpoint-2" in lines and "INFO Saved checkpoint-4" in lines


@pytest.mark.parametrize("flags", [(), ("--cache_latents", "--validation_prompt=a dog", "--validation_steps=1")])
def test_a_log_file_gets_lines_and_no_carriage_returns(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], tmp_path: Path
) -> None:
    flags += ("--with_prior_preservation", f"--class_data_dir={tmp_path / 'class'}", "--class_prompt=a dog")
    printed = printed_by(script, run, io.StringIO(), monkeypatch, *flags, "--num_class_images=1")
    assert "\r" not in printed and "%|" not in printed
    assert len(LINE.findall(printed)) == 2  # the first step and the last


def test_a_log_file_gets_a_line_now_and_then(script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "LOG_SECONDS", 0)
    assert len(LINE.findall(printed_by(script, run, io.StringIO(), monkeypatch, "--max_train_steps=4"))) == 4
    monkeypatch.setattr(script, "LOG_SECONDS", 1000)
    steps = [found[0] for found in LINE.findall(printed_by(script, run, io.StringIO(), monkeypatch))]
    assert steps == ["1", "2"]


def shown(script: ModuleType, caplog: pytest.LogCaptureFixture, step: int, values: list[dict[str, float]]) -> Any:
    """What the progress line says after a run of 100 steps, 7 an epoch, went from `step` on by `values`."""
    schedule = script.MicroBatches(7, 1, 1, 0, 1, 0, step, 100)
    run = script.Run(
        None, type("Alone", (), {"is_local_main_process": True}), None, None, script.RunState(step, 0), None
    )
    progress = script.Progress(run, schedule)
    with caplog.at_level(logging.INFO):
        for value in values:
            run.state.step += 1
            progress.update(value)
    return LINE.search(caplog.messages[-1])


def test_the_line_has_step_time_left_epoch_mean_loss_rate_seconds_and_memory(
    script: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LOG_SECONDS", 0)
    values = [
        {"loss": loss, "step_time": seconds, "lr": 2e-5, "peak_host_memory": 3.0, "peak_device_memory": 21.26}
        for loss, seconds in ((1.0, 2.0), (0.5, 4.0), (0.3, 6.0))
    ]
    found = shown(script, caplog, 5, values)
    assert found is not None
    assert found.groups() == ("8", "100", "06:08", "2", "0.6000", "2e-05", "4.00", "21.3")


def test_the_loss_is_smoothed_over_the_last_fifty_steps(
    script: ModuleType, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "LOG_SECONDS", 0)
    values = [{"loss": loss, "step_time": 1.0, "lr": 1.0, "peak_host_memory": 1.0} for loss in [9.0] * 9 + [1.0] * 50]
    assert shown(script, caplog, 0, values).group(5) == "1.0000"


@both_scripts
def test_the_summary_names_files_that_exist_and_code_that_runs(
    script: ModuleType, run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with caplog.at_level(logging.INFO):
        output = run(script, "--validation_prompt=a sks dog", "--validation_epochs=1", "--checkpointing_steps=1")
    told, code = caplog.messages[-1].split("  To use the result:\n")
    assert re.match(rf"Done: 2 steps in \d\d:\d\d\. In {output}: ", told)
    named = told.splitlines()[0].split(f"{output}: ")[1].split(", ")
    assert {"README.md", "image_*.png", "checkpoint-*"} < set(named)
    assert all(list(output.glob(name)) for name in named)
    monkeypatch.chdir(tmp_path)
    code = code.replace('"cuda"', '"cpu"').replace("height=", "num_inference_steps=1, max_sequence_length=16, height=")
    exec("\n".join(line.removeprefix("    ") for line in code.splitlines()), {})
    assert (tmp_path / "image.png").is_file()
