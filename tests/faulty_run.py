"""A process that has imported everything and forks one for each run of a script: no start takes the seconds of imports.

A run is the script's own `__main__` block, and the process ends as the script's would. With a fault it kills itself, as
by a power cut, at a call that changes files, or after some time. `Forker` is the other end, in the tests.
"""

import ast
import contextlib
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.processes import PATIENCE, ROOT, default_signals

SCRIPTS = ("train_dreambooth_flux", "train_dreambooth_lora_flux")


class Forker:
    """Starts runs in processes of their own, each the leader of a session, and says how they ended."""

    def __init__(self, folder: Path) -> None:
        self.pids = set[int]()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        command = [sys.executable, str(Path(__file__))]
        self.folder, self.runs = folder, 0
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment, cwd=folder)

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, script: str, argv: list[str], fault: dict[str, Any] | None = None, ignored: tuple[int, ...] = (),
        output: str | None = None,
    ) -> tuple[int, Path]:  # fmt: skip
        """Start a run that ignores some signals; returns the number of its process, and the file of what it prints.

        With `output`, a terminal or a pipe, it prints there.
        """
        self.runs += 1
        log = self.folder / f"run-{self.runs}.txt"
        log.touch()
        pid: int = self.ask(start=script, argv=argv, output=output or str(log), fault=fault, ignored=ignored)
        self.pids.add(pid)
        return pid, log

    def poll(self, pid: int) -> int | None:
        """The exit code, negative for a signal, or None while the run goes on."""
        return self.ask(poll=pid)

    def wait(self, pid: int, seconds: float = PATIENCE) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll(pid)) is None:
            if time.monotonic() > end:
                os.kill(pid, signal.SIGKILL)
                raise TimeoutError(f"the run did not end in {seconds} s")
            time.sleep(0.02)
        return code

    def close(self) -> None:
        for pid in self.pids:  # what a test that failed left; each leads a group
            if self.poll(pid) is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
        self.process.communicate(timeout=PATIENCE)


class Faults:
    """Counts the calls that change files in `output`, and ends this process at one: before, after, or halfway."""

    def __init__(self, fault: dict[str, Any], output: str) -> None:
        self.fault, self.output, self.calls = fault, output, list[tuple[str, str]]()

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str, halfway: Callable[..., None] | None = None) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*given: Any, **more: Any) -> Any:
            text = " ".join(str(value) for value in given if isinstance(value, str | os.PathLike))
            if self.output not in text or threading.current_thread() is not threading.main_thread():
                return original(*given, **more)
            self.calls.append((name, text))
            wanted = self.fault.get("call") == len(self.calls) or (
                self.fault.get("name") == name and self.fault.get("in", "") in text
            )
            how = self.fault.get("how", "before") if wanted else ""
            if how == "halfway" and halfway is not None:
                halfway(original, *given, **more)
            elif how != "before":
                result = original(*given, **more)
            if how:
                self.die()
            return result

        setattr(owner, name, call)

    def install(self) -> None:
        import safetensors.torch
        import torch
        from accelerate import Accelerator

        def half_a_file(original: Callable[..., Any], *given: Any, **more: Any) -> None:
            original(*given, **more)
            for value in given:
                if isinstance(value, str | os.PathLike) and Path(value).is_file():
                    os.truncate(value, Path(value).stat().st_size // 2)

        def half_a_text(original: Callable[..., Any], path: Path, text: str, *given: Any, **more: Any) -> None:
            original(path, text[: len(text) // 2], *given, **more)

        def half_a_tree(original: Callable[..., Any], path: str | Path, *given: Any, **more: Any) -> None:
            for file in sorted(file for file in Path(path).rglob("*") if file.is_file())[::2]:
                file.unlink()

        for name in ("rename", "replace", "rmdir"):  # pathlib calls these
            self.watch(os, name)
        self.watch(shutil, "rmtree", half_a_tree)
        self.watch(Path, "write_text", half_a_text)
        self.watch(safetensors.torch, "save_file", half_a_file)
        self.watch(torch, "save", half_a_file)
        self.watch(Accelerator, "save_state")
        if seconds := self.fault.get("seconds"):
            timer = threading.Timer(seconds, self.die)
            timer.daemon = True
            timer.start()


def main_block(script: ModuleType) -> Any:
    """What the script does when it is started."""
    path = Path(script.__file__ or "")
    tree = ast.parse(path.read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)]
    return compile(ast.Module(block.body, []), str(path), "exec")


def run(
    script: ModuleType, argv: list[str], output: str, fault: dict[str, Any] | None, ignored: tuple[int, ...]
) -> None:
    """In the new process: print to `output`, and run the script until it ends or is ended."""
    os.setsid()
    default_signals(ignored)
    is_terminal = Path(output).is_char_device()  # opened for both ways, it becomes the one of this session
    file = os.open(output, os.O_RDWR if is_terminal else os.O_WRONLY)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    sys.argv = [str(script.__file__), *argv]
    faults = Faults(fault or {}, script.parse_args(argv).output_dir)
    if fault is not None:
        faults.install()
    start = time.monotonic()
    exec(main_block(script), script.__dict__)
    if fault and "count" in fault:
        counted = {"calls": faults.calls, "seconds": time.monotonic() - start}
        Path(fault["count"]).write_text(json.dumps(counted))


def serve() -> None:
    """Answer the lines of `Forker`."""
    import torch

    torch.set_num_threads(1)
    scripts = {name: importlib.import_module(name) for name in SCRIPTS}
    codes: dict[int, int] = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "start" in question:
            pid = os.fork()
            if pid == 0:
                return run(scripts[question.pop("start")], **question)
            answer: int | None = pid
        else:
            pid = question["poll"]
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            answer = codes.get(pid)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
