"""What a run says: one line that is redrawn on a terminal, few lines in a log file, and what to do without memory."""

import io
import logging
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

from conftest import Run, both_scripts, one_script

pytestmark = one_script


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
    lines = screen(printed_by(script, run, Terminal(), monkeypatch, *flags).partition("INFO Training\n")[2])
    [bar] = [line for line in lines if "%|" in line]
    assert re.match(r"100%\|.*\| 4/4 \[.*, loss=\d+\.\d{4}, lr=0\.0001\]", bar)
    assert "INFO Saved checkpoint-2" in lines and "INFO Saved checkpoint-4" in lines


def test_a_log_file_gets_a_line_of_progress_at_the_start_and_the_end_of_a_short_run(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--max_train_steps=9", "--cache_latents", "--validation_prompt=a dog", "--validation_steps=3"]
    training = printed_by(script, run, io.StringIO(), monkeypatch, *flags).partition("INFO Training\n")[2]
    assert re.findall(r"(\d+)%\|", training) == ["0", "100"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of tqdm, as it is deleted
def test_a_pipe_that_breaks_does_not_end_the_training(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Pipe(io.StringIO):
        def write(self, text: str) -> int:
            if "| 0/2 [" in self.getvalue():
                raise BrokenPipeError
            return super().write(text)

    show = script.tqdm
    monkeypatch.setattr(script, "tqdm", lambda *given, **options: show(*given, **options | {"mininterval": 0}))
    printed_by(script, run, Pipe(), monkeypatch, "--checkpointing_steps=1")
    assert list(script.list_checkpoints(tmp_path / "out")) == [1, 2]


STAGES = {"encode_prompts": "Encoding 2 prompts", "training_loss": "Training", "save_result": "Saving the result"}


@pytest.mark.parametrize("function", STAGES)
@both_scripts
def test_out_of_memory_says_in_which_stage_and_names_flags_and_the_tool_that_are_there(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of")

    monkeypatch.setattr(script, function, fail)
    with pytest.raises(SystemExit, match=rf"^out of memory while: {STAGES[function]} \(CUDA out of") as stop:
        run(script, "--validation_prompt=a dog")
    advice = re.findall(r"--(\w+)", str(stop.value))
    assert len(advice) > 5 and set(advice) <= {action.dest for action in script.make_parser()._actions}
    [tool] = re.findall(r"tools/\w+\.py", str(stop.value))
    assert (Path(__file__).parent.parent / tool).is_file()
