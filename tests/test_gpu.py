"""What only a GPU can show, on the tiny model; skipped without one. `make gpu` runs these, then the table of speeds.

FLUX_GPU=cpu runs them on the CPU instead, to try the tests themselves.
"""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.run import read_events
from conftest import SCRIPTS, VISIBLE
from tests.processes import PATIENCE

ON_CPU = os.environ.get("FLUX_GPU") == "cpu"
pytestmark = pytest.mark.skipif(
    not ON_CPU and (shutil.which("nvidia-smi") is None or torch.version.cuda is None), reason="there is no GPU"
)
LEAN = ["--gradient_checkpointing", "--cache_latents"]
CASES = {
    "lora": ("lora", []),
    "lora, int8": ("lora", [*LEAN, "--base_quantization=int8"]),
    "lora, nf4": ("lora", [*LEAN, "--base_quantization=nf4"]),
    "lora, swapped, CLIP": ("lora", [*LEAN, "--blocks_to_swap=2", "--train_text_encoder"]),
    "lora, base as the prior": ("lora", ["--prior_from_base_model", "--class_prompt=a dog", "--prior_share=0.5"]),
    "full": ("full", LEAN),
    "full, 8-bit AdamW, fused": ("full", [*LEAN, "--use_8bit_adam", "--full_bf16", "--fused_backward_pass"]),
    "full, Adafactor": ("full", ["--optimizer=adafactor", "--full_bf16", "--fused_backward_pass"]),
}  # fmt: skip


def train(
    kind: str, checkpoint: Path, pictures: Path, output: Path, *flags: str, precision: str = "bf16",
    dynamo: str = "no", cpu: bool = False,
) -> tuple[list[float], str]:  # fmt: skip
    """Losses and log of three steps under `accelerate launch`."""
    environment = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    environment |= {"CUDA_VISIBLE_DEVICES": VISIBLE} if VISIBLE else {}
    environment["ACCELERATE_USE_CPU"] = str(cpu or ON_CPU).lower()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launcher += [f"--mixed_precision={precision}", f"--dynamo_backend={dynamo}", "--num_cpu_threads_per_process=1"]
    command = [
        *launcher, str(SCRIPTS[kind].__file__), f"--pretrained_model_name_or_path={checkpoint}",
        f"--instance_data_dir={pictures}", "--instance_prompt=a photo of sks dog", "--resolution=64", "--seed=0",
        "--train_batch_size=2", "--max_sequence_length=16", "--max_train_steps=3", "--checkpointing_steps=2",
        "--num_validation_images=1", "--validation_num_inference_steps=2", f"--output_dir={output}", *flags,
    ]  # fmt: skip
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return [event.value for event in read_events(output / "logs")["loss"]], done.stderr


@pytest.mark.parametrize("case", CASES)
def test_it_trains_draws_and_starts_from_the_loss_of_the_cpu(
    case: str, tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    kind, flags = CASES[case]
    losses, log = train(kind, tiny_flux, pictures, tmp_path / "gpu", *flags, "--validation_prompt=a dog")
    cached = [flag for flag in flags if flag == "--cache_latents"]  # which decides how pictures are cropped
    expected, _ = train(kind, tiny_flux, pictures, tmp_path / "cpu", *cached, precision="no", cpu=True)
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and (tmp_path / "gpu" / "image_0.png").is_file()
    assert losses[0] == pytest.approx(expected[0], rel=0.1 if "nf4" in case else 0.06) and (ON_CPU or "GiB at" in log)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_in_float32_its_losses_are_the_cpus_and_it_goes_on_from_its_checkpoint(
    kind: str, tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    resume = f"--resume_from_checkpoint={tmp_path / 'whole' / 'checkpoint-2'}"
    cpu, whole, resumed = (
        train(kind, tiny_flux, pictures, tmp_path / name, *flags, precision="no", cpu=name == "cpu")[0]
        for name, flags in {"cpu": [], "whole": [], "resumed": [resume]}.items()
    )
    assert whole == pytest.approx(cpu, rel=1e-3) and resumed == pytest.approx(whole[2:], rel=1e-3)


def test_swapped_blocks_change_nothing(tiny_flux: Path, pictures: Path, tmp_path: Path) -> None:
    for name, flags in (("plain", []), ("swapped", ["--blocks_to_swap=3"])):
        train("lora", tiny_flux, pictures, tmp_path / name, *LEAN, *flags, "--upcast_before_saving")
    plain, swapped = (load_file(tmp_path / name / "pytorch_lora_weights.safetensors") for name in ("plain", "swapped"))
    for name, weight in plain.items():
        torch.testing.assert_close(swapped[name], weight, rtol=0.02, atol=2e-5)


@pytest.mark.parametrize("case", ["lora, int8", "lora, nf4", "lora, base as the prior", "full"])
def test_compiled_blocks_have_the_same_losses_and_draw(
    case: str, tiny_flux: Path, pictures: Path, tmp_path: Path
) -> None:
    kind, flags = CASES[case]
    more = [*flags, "--validation_prompt=a dog", "--validation_steps=2", "--validation_resolution=48"]
    eager, _ = train(kind, tiny_flux, pictures, tmp_path / "no", *more)
    compiled, log = train(kind, tiny_flux, pictures, tmp_path / "inductor", *more, dynamo="inductor")
    assert compiled == pytest.approx(eager, rel=0.02) and "uncompiled" not in log
