"""Both scripts on a simulated GPU: they wait for it once a step, leave nothing on it, and take what was planned."""

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.processes import PATIENCE, ROOT

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None or torch.version.cuda is not None or not torch.__version__.startswith("2.13."),
    reason="the simulated device needs g++ and the CPU build of torch 2.13",
)
COMMON = ["--mixed_precision=bf16", "--train_batch_size=1", "--resolution=256", "--max_sequence_length=128"]
LEAN = [*COMMON, "--gradient_checkpointing", "--cache_latents"]
PRIOR = ["--train_text_encoder", "--prior_from_base_model", "--class_prompt=dog"]
TABLES = 1e-5  # GiB that bitsandbytes keeps for good: its levels of 4 and 8 bits
CASES = {
    "lora, nothing saved": ("lora", [*COMMON, "--rank=64", "--train_batch_size=2"]),
    "lora, nf4": ("lora", [*LEAN, "--base_quantization=nf4"]),
    "lora, int8, swapped, prior": ("lora", [*LEAN, *PRIOR, "--base_quantization=int8", "--blocks_to_swap=3"]),
    "full": ("full", LEAN),
    "full, fused": ("full", [*LEAN, "--use_8bit_adam", "--full_bf16", "--fused_backward_pass"]),
    "full, Adafactor": ("full", [*LEAN, "--optimizer=adafactor", "--fused_backward_pass"]),
}  # fmt: skip

DRIVER = """
import contextlib, gc, importlib, io, json, sys
from dataclasses import asdict
from benchmarks import simulate as device
from tools import memory_plan

device.random_flux.SIZES["medium"]["transformer"] |= {"num_layers": 2, "num_single_layers": 3}
names, cases = {"lora": "train_dreambooth_lora_flux", "full": "train_dreambooth_flux"}, json.load(sys.stdin)
gc.freeze()  # else each collection looks at the libraries' objects
models, found = device.random_flux.make_meta_models("medium"), {}
for name, (kind, flags) in cases.items():
    script = importlib.import_module(names[kind])
    needed = ["--pretrained_model_name_or_path=x", "--instance_data_dir=y", "--instance_prompt=z"]
    stages = memory_plan.plan_stages(memory_plan.Plan(script, script.parse_args([*needed, *flags]), models))
    found[name] = {"planned": stages["training"].total / device.GIB}
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    sys.argv = ["simulate", "--model=tiny", f"{sys.argv[1]}/train_dreambooth_lora_flux.py", *cases["lora, nf4"][1]]
    device.main()
for name, (kind, flags) in cases.items():
    run = device.simulate(importlib.import_module(names[kind]), flags, "medium")
    run |= {"stages": {title: asdict(stage) for title, stage in run["stages"].items()}, "step": vars(run["step"])}
    found[name] |= run
print(json.dumps(found | {"printed": printed.getvalue()}))
"""


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `simulate` and `memory_plan` say of each case, from a process whose torch believes in the device."""
    home = tmp_path_factory.mktemp("simulated")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home), "ACCELERATE_USE_CPU": "false"}
    environment.pop("CUDA_VISIBLE_DEVICES")
    options: dict[str, Any] = {"cwd": home, "capture_output": True, "text": True, "timeout": PATIENCE}
    command = [sys.executable, "-c", DRIVER, str(ROOT)]
    done = subprocess.run(command, input=json.dumps(CASES), env=environment, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_once_and_multiplies_in_bf16(case: str, simulated: dict[str, Any]) -> None:
    """It waits when its loss is read; a backward pass that updates weights needs to know before that it is a number.

    Without cached latents the step begins with the VAE, whose result noise is copied to.
    """
    step, flags = simulated[case]["step"], CASES[case][1]
    more = "--fused_backward_pass" in flags or "--cache_latents" not in flags
    assert sum(step["waits"].values()) == 1 + more, step["waits"]
    assert step["float32_products"] == {} and step["operations"].keys() == {"half"}


@pytest.mark.parametrize("case", CASES)
def test_what_a_stage_loads_is_gone_when_it_ends(case: str, simulated: dict[str, Any]) -> None:
    stages, cached = simulated[case]["stages"], "--cache_latents" in CASES[case][1]
    encoding = next(stage for name, stage in stages.items() if "prompt" in name)
    assert encoding["peak"] > 0.02 and encoding["left"] < TABLES
    assert (stages["Encoding the pictures"]["left"] < TABLES) is cached
    assert stages["Training"]["peak"] > 0.05 and simulated[case]["left"] < TABLES


@pytest.mark.parametrize("case", CASES)
def test_the_training_takes_what_was_planned_and_little_more_is_reserved(case: str, simulated: dict[str, Any]) -> None:
    """The allocator's segments grow in steps of 2 MiB and leave gaps."""
    stage = simulated[case]["stages"]["Training"]
    assert simulated[case]["planned"] == pytest.approx(stage["peak"], rel=0.03)
    assert stage["peak"] <= stage["reserved"] < 1.05 * stage["peak"] + 0.02


def test_the_case_of_the_command_line_is_printed_as_simulated(simulated: dict[str, Any]) -> None:
    for words in ("Simulated: no kernel ran", "Training", "waits: 1", "products in float32: 0", "h100"):
        assert words in simulated["printed"]
