"""Holds the memory plan to real runs on the CPU; prints each as a ratio. A few minutes on two cores.

    python -m benchmarks.plan_check

Each command trains two steps on the `medium` checkpoint. What its process holds at the most in the stages of the
transformer, above what it held before, is compared with the plan's weights, gradients, states and activations.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import random_flux
from tools.memory_plan import GIB, Plan, load_models, load_script, plan_stages

ROOT = Path(__file__).parent.parent
COMMON = [
    "--instance_prompt=a photo of sks dog", "--resolution=256", "--train_batch_size=2", "--max_train_steps=2",
    "--cache_latents", "--report_to=none", "--seed=0", "--max_sequence_length=128",
]  # fmt: skip
LORA, FULL = "train_dreambooth_lora_flux.py", "train_dreambooth_flux.py"
COMMANDS = {
    "LoRA, float32": (LORA, ["--mixed_precision=no"]),
    "LoRA, float32, checkpointing": (LORA, ["--mixed_precision=no", "--gradient_checkpointing"]),
    "LoRA, bf16": (LORA, ["--mixed_precision=bf16"]),
    "LoRA, bf16, checkpointing": (LORA, ["--mixed_precision=bf16", "--gradient_checkpointing"]),
    "full, float32": (FULL, ["--mixed_precision=no"]),
    "full, bf16 weights, 8-bit AdamW, fused": (
        FULL, ["--mixed_precision=bf16", "--full_bf16", "--use_8bit_adam", "--fused_backward_pass"],
    ),
}  # fmt: skip


def resident(pid: int, kind: str) -> int:
    """Bytes of a process: "VmRSS" now, "VmHWM" at the most."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(status.split(f"{kind}:")[1].split()[0])


def measure(script: str, flags: list[str]) -> int:
    """Bytes at the most from loading the transformer to the end of the training, above those before."""
    command = [sys.executable, str(ROOT / script), *flags]
    # Large tensors go straight back to the system when they are freed, so that what is resident is what is in use.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    before = peak = 0
    for line in process.stderr:
        if line.endswith("Loading the transformer\n"):
            before = resident(process.pid, "VmRSS")
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")  # VmHWM starts anew
        elif line.endswith("Saving the result\n"):
            peak = resident(process.pid, "VmHWM")
    if process.wait() != 0 or not peak:
        raise SystemExit(f"{script} {' '.join(flags)} failed")
    return peak - before


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = {}
        for precision, dtype in {
            "no": torch.float32,
            "bf16": torch.bfloat16,
        }.items():  # else a larger file's pages count
            random_flux.SIZES["medium"]["dtype"] = dtype
            checkpoints[precision] = random_flux.write_checkpoint(Path(folder) / precision, "medium")
        random_flux.write_pictures(Path(folder) / "pictures", scale=4)
        print(f"{'command':42s}{'planned GiB':>12s}{'measured GiB':>14s}{'ratio':>7s}")
        for name, (script, flags) in COMMANDS.items():
            checkpoint = checkpoints[flags[0].split("=")[1]]
            files = [f"--pretrained_model_name_or_path={checkpoint}", f"--instance_data_dir={folder}/pictures"]
            flags = [*files, *COMMON, f"--output_dir={folder}/out-{len(name)}", *flags]
            module = load_script(str(ROOT / script))
            plan = Plan(module, module.parse_args(flags), load_models(str(checkpoint))[0])
            training = plan_stages(plan)["training"]
            measured = measure(script, flags)
            row = f"{training.total / GIB:12.2f}{measured / GIB:14.2f}{training.total / measured:7.2f}"
            print(f"{name:42s}{row}", flush=True)


if __name__ == "__main__":
    main()
