"""Fixtures that the tests share: a tiny checkpoint, pictures, and both scripts run in this process."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

HOME = tempfile.mkdtemp(prefix="flux-tests-")  # before anything of Hugging Face is imported: no user's cache is touched
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")  # as the user chose, for the tests that use a GPU
OURS = ("ACCELERATE_", "FSDP_", "HF_", "HUGGINGFACE_", "PYTORCH_", "TORCHELASTIC_", "WANDB_")
JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
for name in [name for name in os.environ if name.startswith(OURS) or name in JOB]:  # however the tests were started
    del os.environ[name]
os.environ.update(
    HF_HOME=HOME, XDG_CACHE_HOME=HOME, WANDB_CACHE_DIR=HOME, WANDB_DIR=HOME, WANDB_MODE="offline", WANDB_SILENT="true",
    HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false",
    ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="",
    OMP_NUM_THREADS="1",  # the tiny model gains nothing from more, and threads that wait for each other burn the cores
)  # fmt: skip

import pytest  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from huggingface_hub import constants, hf_api  # noqa: E402

import random_flux  # noqa: E402
import train_dreambooth_flux  # noqa: E402
import train_dreambooth_lora_flux  # noqa: E402
from tests.local_hub import HubState, serve  # noqa: E402

os.fsync = lambda fd: None  # nothing here outlives the machine, and a disk takes milliseconds for each

SCRIPTS = {"full": train_dreambooth_flux, "lora": train_dreambooth_lora_flux}
Run = Callable[..., Path]

one_script = pytest.mark.scripts(1)  # what is tested is the same text in both scripts
both_scripts = pytest.mark.scripts(2)  # what is trained, saved, loaded, held in memory, or in which precision


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a test that takes `script` one script or both, as its closest mark says; without a mark both.

    Which one is drawn from the test's name, so that either script runs about half of what they share.
    """
    given = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "script" not in metafunc.fixturenames or any("script" in names or names == "script" for names in given):
        return
    mark = metafunc.definition.get_closest_marker("scripts", both_scripts.mark)
    kinds = list(SCRIPTS)
    if mark.args == (1,):
        kinds = [kinds[zlib.crc32(metafunc.function.__name__.encode()) % 2]]
    metafunc.parametrize("script", [SCRIPTS[kind] for kind in kinds], ids=kinds)


LONGEST = ("simulate", "engines", "signals", "small_world", "memory", "faults", "resume", "processes", "learning")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: none of them is still running when the other workers have nothing left to do."""
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))
    gc.collect()
    gc.freeze()  # as `fresh_start`, for the fixtures of whole modules, which run before it


def pytest_unconfigure() -> None:
    shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def tiny_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint like FLUX.1 [dev]. Read only."""
    return random_flux.write_checkpoint(tmp_path_factory.mktemp("checkpoints") / "tiny-flux")


@pytest.fixture(scope="session")
def tiny_schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random checkpoint like FLUX.1 [schnell], without guidance embeddings. Read only."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-schnell"
    return random_flux.write_checkpoint(folder, guidance_embeds=False)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five pictures of different sizes and orientations. Read only."""
    folder = tmp_path_factory.mktemp("pictures")
    random_flux.write_pictures(folder)
    return folder


@pytest.fixture(autouse=True)
def fresh_start() -> Iterator[None]:
    """accelerate keeps its state in singletons; each test starts without, and with nothing for the garbage collector.

    What is there by then is frozen: else each `gc.collect` of the scripts takes 0.2 s on objects of libraries.
    """
    gc.collect()
    gc.freeze()
    yield
    reset_accelerate()


def reset_accelerate() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def launch(script: ModuleType, flags: list[str], folder: Path) -> None:
    """Run a script in `folder` under `accelerate launch`, as users do, in one process and bf16."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launcher += ["--mixed_precision=bf16", "--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    done = subprocess.run([*launcher, str(script.__file__), *flags], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def base_flags(tiny_flux: Path, pictures: Path, tmp_path: Path) -> list[str]:
    """Flags of a short run on the tiny checkpoint: 32 px, batch size 1, no tracker. Later flags win over these."""
    return [
        f"--pretrained_model_name_or_path={tiny_flux}", f"--instance_data_dir={pictures}",
        "--instance_prompt=a photo of sks dog", f"--output_dir={tmp_path / 'out'}", "--resolution=32",
        "--train_batch_size=1", "--max_train_steps=2", "--max_sequence_length=16", "--num_validation_images=1",
        "--validation_num_inference_steps=3", "--report_to=none", "--seed=0",
    ]  # fmt: skip


@pytest.fixture
def run(base_flags: list[str]) -> Run:
    """`run(script, *flags)` runs a script's main with `base_flags` and `flags`, and returns its output folder."""

    def run_main(script: ModuleType, *flags: str) -> Path:
        reset_accelerate()
        args = script.parse_args([*base_flags, *flags])
        script.main(args)
        return Path(args.output_dir)

    return run_main


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """What a run gives its trackers, in order; "step" is the step."""
    values: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, numbers, step: values.append({**numbers, "step": step}))
    return values


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubState]:
    """A stand-in of the Hub, which this process takes for the real one."""
    state = HubState()
    server = serve(state)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(hf_api, "ENDPOINT", address, raising=False)
    yield state
    server.shutdown()
    server.server_close()
