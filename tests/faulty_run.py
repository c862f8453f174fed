"""A process that has imported everything and forks one for each run of a script: no start takes the seconds of imports.

A run is the script's own `__main__` block. With a fault it kills itself, as by a power cut, at a call that changes
files, or after some time. `Forker` is the other end, in the tests.
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
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.processes import PATIENCE, default_signals

ROOT = Path(__file__).parent.parent
SCRIPTS = ("train_dreambooth_flux", "train_dreambooth_lora_flux")


class Forker:
    """Starts runs in processes of their own, and says how they ended."""

    def __init__(self, folder: Path) -> None:
        self.pids = set[int]()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
        command = [sys.executable, str(Path(__file__))]
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder
        )

    def ask(self, **question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(
        self, script: str, argv: list[str], fault: dict[str, Any] | None = None, ignored: tuple[int, ...] = ()
    ) -> tuple[int, Path]:
        """Start a run that ignores some signals; returns the number of its process, and the file of what it prints."""
        self.runs += 1
        log = self.folder / f"run-{self.runs}.txt"
        log.touch()
        pid: int = self.ask(start=script, argv=argv, log=str(log), fault=fault, ignored=ignored)
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
        if self.process.stdin:
            self.process.stdin.close()
        self.process.wait(PATIENCE)


class Faults:
    """Counts the calls that change files, and ends this process at one of them: before, after, or halfway."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self.fault, self.calls, self.depth = fault, [], 0

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str, halfway: Callable[..., None] | None = None) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def call(*given: Any, **more: Any) -> Any:
            if threading.current_thread() is not threading.main_thread():
                return original(*given, **more)
            text = " ".join(str(value) for value in given if isinstance(value, str | os.PathLike))
            self.calls.append([name, text])
            wanted = self.fault.get("call") == len(self.calls) or (
                self.fault.get("name") == name and self.fault.get("in", "") in text
            )
            how = self.fault.get("how", "before")
            if wanted and how == "before":
                self.die()
            if wanted and how == "halfway" and halfway is not None:
                halfway(original, *given, **more)
                self.die()
            result = original(*given, **more)
            if wanted:
                self.die()
            return result

        setattr(owner, name, call)

    def install(self) -> None:
        import safetensors.torch
        import torch
        from accelerate import Accelerator

        def half_a_file(original: Callable[..., Any], *given: Any, **more: Any) -> None:
            original(*given, **more)
            for value in (*given, *more.values()):
                if isinstance(value, str | os.PathLike) and Path(value).is_file():
                    os.truncate(value, Path(value).stat().st_size // 2)

        def half_a_text(original: Callable[..., Any], path: Path, text: str, *given: Any, **more: Any) -> None:
            original(path, text[: len(text) // 2], *given, **more)

        def half_a_tree(original: Callable[..., Any], path: str | Path, *given: Any, **more: Any) -> None:
            files = sorted(file for file in Path(path).rglob("*") if file.is_file())
            for file in files[::2]:
                file.unlink()

        for name in ("rename", "replace", "fsync"):  # pathlib calls these
            self.watch(os, name)
        self.watch(shutil, "rmtree", half_a_tree)
        self.watch(Path, "write_text", half_a_text)
        self.watch(Path, "mkdir")
        self.watch(Path, "rmdir")
        self.watch(Path, "unlink")
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


def run(script: ModuleType, argv: list[str], log: str, fault: dict[str, Any] | None, ignored: tuple[int, ...]) -> int:
    """In the new process: print to `log`, and run the script until it ends or is ended."""
    os.setsid()
    default_signals(ignored)
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (file, 1), (file, 2)):
        os.dup2(source, target)
    sys.argv = [str(script.__file__), *argv]
    faults = Faults(fault or {})
    if fault is not None:
        faults.install()
    code: Any = 0
    try:
        exec(main_block(script), script.__dict__)
    except SystemExit as exit_info:
        code = exit_info.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    if fault and "count" in fault:
        Path(fault["count"]).write_text(json.dumps(faults.calls))
    sys.stderr.flush()
    return int(code)


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
                script = scripts[question.pop("start")]
                os._exit(run(script, **question))
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
