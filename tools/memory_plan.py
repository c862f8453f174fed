"""How much device memory a training command will take, stage by stage: no GPU, no weights, no download.

    python tools/memory_plan.py train_dreambooth_lora_flux.py --pretrained_model_name_or_path=... FLAGS...

The flags are read by the script's own parser. Shapes come from the checkpoint's configs if it is a local folder, else
they are FLUX.1 [dev]'s. The script's own functions load and train the transformer, on tensors without memory and with
few blocks: what it takes is affine in the numbers of blocks of both kinds, so three small models tell that of the
whole. States of optimizers are counted. benchmarks/simulate.py, which runs the whole command on a simulated GPU, takes
the same to within 3 %.
"""

import argparse
import contextlib
import copy
import functools
import importlib.util
import math
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import random_flux

GIB = 1024**3
CONTEXT = 0.8  # GiB that the driver, the libraries' workspaces and fragmentation take of a card: reported, not measured
CARDS = {  # GiB that torch finds on one, as messages show; cards that check their memory (A10G, L4, T4) have 6 % less
    "12 GB": 11.6, "16 GB": 15.5, "24 GB": 23.5, "32 GB": 31.3, "48 GB": 47.4, "80 GB": 79.1, "141 GB": 139.8,
}  # fmt: skip
STATES: dict[str, Callable[[Any], float]] = {  # of each optimizer: bytes of a weight's state
    "adamw": lambda weight: 8 * weight.numel(),
    "adamw8bit": lambda weight: weight.numel() * (2 + 8 / 256 if weight.numel() >= 4096 else 8),  # and scales of 256
    "adafactor": lambda weight: 4 * (sum(weight.shape[-2:]) if weight.ndim > 1 else weight.numel()),
    "prodigy": lambda weight: 16 * weight.numel(),
}
BLOCKS = ("num_layers", "num_single_layers")  # of either kind, in the transformer's config
COMMON_REMEDIES: list[dict[str, Any]] = [
    {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"cache_latents": True}, {"train_batch_size": 1},
]  # fmt: skip
REMEDIES: dict[bool, list[dict[str, Any]]] = {  # by whether it is LoRA: what to change, in the order of what it costs
    True: [
        *COMMON_REMEDIES, {"base_quantization": "int8"}, {"base_quantization": "nf4"}, {"blocks_to_swap": 20},
        {"blocks_to_swap": 40}, {"resolution": [512]},
    ],
    False: [
        *COMMON_REMEDIES, {"optimizer": "adamw8bit"}, {"full_bf16": True, "mixed_precision": "bf16"},
        {"fused_backward_pass": True, "gradient_accumulation_steps": 1}, {"optimizer": "adafactor"},
        {"resolution": [512]},
    ],
}  # fmt: skip


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that operations make while it is active, now and at the most."""

    def __init__(self) -> None:
        super().__init__()
        self.live: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return result

    def add(self, storage: Any) -> None:
        if storage._cdata not in self.live:
            self.live.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, number: int, size: int) -> None:
        self.live.discard(number)
        self.now -= size


class FusedRMSNorm(torch.autograd.Function):
    """Shapes of an RMSNorm as CUDA has it, one kernel that keeps its input and a number a row; the CPU keeps copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return gradient * x, torch.empty_like(weight)


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """In place of torch's, which decomposes it where there is no CUDA; autocast runs it in float32."""
    if weight is not None and torch.is_autocast_enabled(x.device.type):
        x, weight = x.float(), weight.float()
    if weight is None or x.dtype != weight.dtype:
        return RMS_NORM(x, shape, weight, eps)
    return FusedRMSNorm.apply(x, weight)


RMS_NORM = nn.functional.rms_norm


def make_fake(model: nn.Module, dtype: torch.dtype, device: Any = "cpu") -> Any:
    """Give a model on the meta device fake tensors of `dtype` on `device`, under a FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}  # T5's embedding has two names
    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None and id(value) not in made:
                fake = nn.Parameter(torch.empty(value.shape, dtype=dtype, device=device))
                made[id(value)] = made[id(fake)] = fake
            module._parameters[name] = None if value is None else made[id(value)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kind, device=device)
    return model.eval()


def peak_of(load: Callable[[], Any], run: Callable[[Any], Any]) -> tuple[Any, int, int]:
    """What `load` makes of fake tensors, its bytes, and those at the most that `run`, given it, needs beside it."""
    memory, patch = PeakMemory(), mock.patch.object(nn.functional, "rms_norm", rms_norm)
    with FakeTensorMode(allow_non_fake_inputs=True), memory, patch:
        model = load()
        held = memory.peak = memory.now
        run(model)
    return model, held, memory.peak - held


@dataclass
class Plan:
    """A command: its script, flags, and models without weights, by component."""

    script: ModuleType
    args: Namespace
    models: dict[str, Any]
    known: dict = field(default_factory=dict)  # what was found before, of other flags too

    def __post_init__(self) -> None:
        self.lora = hasattr(self.script, "add_adapter")
        self.dtype: torch.dtype = self.script.PRECISIONS[self.args.mixed_precision or "no"]
        self.side = max(self.args.resolution)
        # What an update takes beside each number: Adafactor's step; float32 copies of it and its gradient, random bits.
        self.update = 8 if self.args.optimizer == "adafactor" else 0
        if self.flag("full_bf16"):
            self.update = max(12, 8 + self.update)
        self.counts = {name: sum(p.numel() for p in model.parameters()) for name, model in self.models.items()}

    def flag(self, name: str) -> Any:
        """The value of a flag that one of the scripts may lack."""
        return getattr(self.args, name, None)

    def once(self, key: tuple, find: Callable[[], Any]) -> Any:
        if key not in self.known:
            self.known[key] = find()
        return self.known[key]


@dataclass
class Stage:
    """What a stage keeps on the device, in bytes."""

    weights: float
    gradients: float = 0
    states: float = 0
    activations: float = 0

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.states + self.activations


def load_models(name: str) -> tuple[dict[str, Any], str]:
    """The models of a checkpoint folder on the meta device, or FLUX.1 [dev]'s; and where the shapes are from."""
    if not Path(name).is_dir():
        return random_flux.make_meta_models("dev"), "FLUX.1 [dev]'s shapes"
    models: dict[str, Any] = {}
    with torch.device("meta"):
        for kind, loader in (("transformer", FluxTransformer2DModel), ("vae", AutoencoderKL)):
            models[kind] = loader.from_config(loader.load_config(name, subfolder=kind))  # type: ignore[attr-defined]
        models["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(name, subfolder="text_encoder"))
        models["text_encoder_2"] = T5EncoderModel(T5Config.from_pretrained(name, subfolder="text_encoder_2"))
    return models, f"the configs in {name}"


def resized(plan: Plan, double: int, single: int, dtype: torch.dtype) -> FluxTransformer2DModel:
    """The transformer with other numbers of blocks, in fake tensors."""
    config = dict(plan.models["transformer"].config) | dict(zip(BLOCKS, (double, single), strict=True))
    with torch.device("meta"):
        return make_fake(FluxTransformer2DModel.from_config(config), dtype)


def load_trained(plan: Plan, double: int, single: int) -> Any:
    """The transformer as the script loads it to train it, with so many blocks, all of them on the device."""
    args, device = Namespace(**vars(plan.args)), torch.device("cpu")
    args.blocks_to_swap, args.init_lora = 0, None
    accelerator = SimpleNamespace(device=device, mixed_precision=args.mixed_precision or "no", distributed_type="NO")
    seed = [0] if plan.lora else []
    with contextlib.ExitStack() as stack:
        patch = lambda *names: stack.enter_context(mock.patch.object(*names))  # noqa: E731
        patch(plan.script, "from_base", lambda *_, dtype, **__: resized(plan, double, single, dtype))
        patch(nn.Module, "to", lambda self, *_, **__: self)  # torch's cannot move fake tensors
        if plan.flag("base_quantization") == "nf4":
            library = importlib.import_module("bitsandbytes")
            patch(library.nn, "Params4bit", lambda packed, requires_grad, **_: nn.Parameter(packed, requires_grad))
            with unset_fake_temporarily():  # its numbers are read
                library.functional.name2qmap["dynamic"] = library.functional.create_dynamic_map()
        return plan.script.load_transformer(args, accelerator, *seed)


def make_inputs(plan: Plan, rows: int, dtype: torch.dtype) -> Any:
    """The inputs of a step of so many pictures."""
    config, ones = plan.models["transformer"].config, torch.ones(rows)
    latents = torch.randn(rows, config.in_channels // 4, plan.side // 8, plan.side // 8)
    return plan.script.StepInputs(
        latents=latents, noise=torch.randn_like(latents), sigmas=ones, loss_weights=ones, options=plan.args,
        prompt_embeds=torch.randn(rows, plan.args.max_sequence_length, config.joint_attention_dim, dtype=dtype),
        pooled_prompt_embeds=torch.randn(rows, config.pooled_projection_dim, dtype=dtype),
        clip_ids=torch.ones(rows, 77, dtype=torch.long),
    )  # fmt: skip


def run_step(plan: Plan, transformer: Any) -> None:
    """Forward and backward pass of a micro-batch with the script's own loss; gradients of weights are not kept."""
    update = plan.update if plan.flag("fused_backward_pass") else 0

    def use(parameter: Tensor) -> None:
        torch.empty(update * parameter.numel(), dtype=torch.uint8)
        parameter.grad = None

    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(use)
    inputs = make_inputs(plan, plan.args.train_batch_size * (2 if plan.args.with_prior_preservation else 1), plan.dtype)
    if plan.flag("prior_from_base_model"):
        text = plan.script.PromptEmbeds(inputs.prompt_embeds, inputs.pooled_prompt_embeds, inputs.clip_ids)
        inputs = plan.script.add_base_prior(inputs, text)
    plan.script.training_loss(transformer, inputs)["loss"].backward()


class Part(NamedTuple):
    """Something that is affine in the numbers of blocks."""

    total: float
    double: float  # of one block
    single: float
    rest: float


def measure(plan: Plan, double: int, single: int) -> dict[str, float]:
    """What a transformer of few blocks takes, in bytes: activations are all that a step takes beside the weights."""
    load, run = functools.partial(load_trained, plan, double, single), functools.partial(run_step, plan)
    model, weights, activations = peak_of(load, run)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    found = {name: sum(map(states, trained)) for name, states in STATES.items()}
    found["gradients"] = sum(weight.nbytes for weight in trained)
    found["largest"] = max(weight.numel() for weight in trained)
    return found | {"weights": weights, "activations": activations}


def measure_whole(plan: Plan) -> dict[str, Part]:
    """What the whole transformer takes, by three small ones."""
    args, config = plan.args, plan.models["transformer"].config
    counts = [config[name] for name in BLOCKS]
    tokens = (plan.side // 16) ** 2 + args.max_sequence_length
    kept = args.train_batch_size * tokens * config.num_attention_heads * config.attention_head_dim * plan.dtype.itemsize
    # With few single blocks the peak may not be where the backward pass begins, and not grow with their number.
    for singles in (2, counts[1]):
        small, double, single = (measure(plan, *size) for size in ((1, singles), (2, singles), (1, singles + 1)))
        if single["activations"] - small["activations"] >= kept:
            break
    parts = {}
    for name, value in small.items():
        one, other = double[name] - value, single[name] - value
        rest = value - one - singles * other
        parts[name] = Part(counts[0] * one + counts[1] * other + rest, one, other, rest)
    return parts


def find_whole(plan: Plan) -> dict[str, Part]:
    names = ["mixed_precision", "train_batch_size", "resolution", "gradient_checkpointing", "max_sequence_length"]
    names += ["with_prior_preservation", "prior_from_base_model", "base_quantization", "full_bf16"]
    names += ["fused_backward_pass", "rank", "lora_layers"]
    return plan.once((plan.update, *(str(plan.flag(name)) for name in names)), lambda: measure_whole(plan))


def vae_bytes(plan: Plan, size: tuple[int, int], decodes: bool) -> float:
    """Bytes that the VAE needs beside its weights to draw a picture, or to encode one."""
    (width, height), dtype = size, torch.bfloat16 if plan.dtype == torch.bfloat16 else torch.float32
    channels = plan.models["vae"].config.latent_channels
    shape = (1, channels, height // 8, width // 8) if decodes else (1, 3, height, width)

    @torch.no_grad()
    def run(vae: Any) -> None:
        (vae.decode if decodes else vae.encode)(torch.randn(shape, dtype=dtype))

    return plan.once(
        (shape, dtype), lambda: peak_of(lambda: make_fake(copy.deepcopy(plan.models["vae"]), dtype), run)[2]
    )


def sampling_bytes(plan: Plan) -> float:
    """Bytes that a sampling step for `--sample_batch_size` class pictures needs beside the weights, in bf16."""

    @torch.no_grad()
    def run(transformer: Any) -> None:
        plan.script.predict_velocity(transformer, make_inputs(plan, plan.args.sample_batch_size, torch.bfloat16))

    return plan.once(("sampling", plan.side), lambda: peak_of(lambda: resized(plan, 2, 2, torch.bfloat16), run)[2])


def plan_stages(plan: Plan) -> dict[str, Stage]:
    """What each stage of the command keeps on the device, by name."""
    args, whole, counts, itemsize = plan.args, find_whole(plan), plan.counts, plan.dtype.itemsize
    vae = counts["vae"] * (2 if plan.dtype == torch.bfloat16 else 4)
    base, swapped = whole["weights"].total, plan.flag("blocks_to_swap")
    if (
        swapped
    ):  # evenly spread; one is on the device, at either end of the backward pass, when single blocks keep nothing
        doubles, singles = (plan.models["transformer"].config[name] for name in BLOCKS)
        double, single = (
            whole["weights"].double - whole["gradients"].double,
            whole["weights"].single - whole["gradients"].single,
        )
        blocks = [double] * doubles + [single] * singles
        out = [blocks[number * len(blocks) // swapped] for number in range(swapped)]
        base += max(out[-1], double - singles * whole["activations"].single) - sum(out)
    stages, square = {}, (plan.side, plan.side)
    if args.with_prior_preservation:
        wanted = args.prior_generation_precision
        precision = torch.bfloat16 if wanted in (None, "no") else plan.script.PRECISIONS[wanted]  # as on a GPU
        drawn = counts["transformer"] * precision.itemsize
        if swapped or plan.flag("base_quantization") not in (None, "none"):
            drawn = base
        needed = max(vae_bytes(plan, square, decodes=True), sampling_bytes(plan))
        stages["class pictures"] = Stage(drawn + vae, activations=needed)
    encoders = (counts["text_encoder"] + counts["text_encoder_2"]) * itemsize
    if plan.dtype == torch.float16:  # transformers keeps these in float32
        wide = [weight for name, weight in plan.models["text_encoder_2"].named_parameters() if ".wo." in name]
        encoders += 2 * sum(weight.numel() for weight in wide)
    stages["text encoders"] = Stage(encoders, activations=0.02 * encoders)
    stages["pictures"] = Stage(vae, activations=vae_bytes(plan, square, decodes=False))
    stages["training"] = plan_training(plan, whole, base if args.cache_latents else base + vae)
    if args.validation_prompt:
        decoded = vae_bytes(plan, args.validation_resolution, decodes=True)
        final = (base if plan.lora else counts["transformer"] * itemsize) + counts["text_encoder"] * itemsize
        stages["validation"] = Stage(base + vae, states=stages["training"].states, activations=decoded)
        stages["final pictures"] = Stage(final + vae, activations=decoded)
    return stages


def plan_training(plan: Plan, whole: dict[str, Part], weights: float) -> Stage:
    """The training, beside `weights` that are on the device."""
    args, activations = plan.args, whole["activations"]
    states, gradients, largest = whole[args.optimizer].total, whole["gradients"].total, whole["largest"].total
    # Kept activations go while gradients come, so the peak is at one end of the backward pass, before the last block
    # has its gradients; only a second micro-batch finds them already there.
    peak = max(activations.total, gradients + max(0.0, activations.rest - whole["gradients"].double))
    if args.gradient_accumulation_steps > 1:
        peak = gradients + activations.total
    peak = max(peak, gradients + plan.update * largest)
    if plan.flag("fused_backward_pass"):  # `run_step` has the updates
        gradients, peak = largest * (2 if plan.flag("full_bf16") else 4), activations.total
    if args.train_text_encoder:
        clip = list(plan.models["text_encoder"].parameters())
        weights += plan.counts["text_encoder"] * (plan.dtype.itemsize if plan.lora else 4)
        if not plan.lora:
            gradients, peak = (value + 4 * plan.counts["text_encoder"] for value in (gradients, peak))
            states += sum(map(STATES[args.optimizer], clip))
    return Stage(weights, gradients, states, max(0.0, peak - gradients))


def peak_bytes(stages: dict[str, Stage]) -> float:
    return max(stage.total for stage in stages.values())


def fits(stages: dict[str, Stage], card: float) -> bool:
    """Whether a card of `card` GiB holds every stage."""
    return peak_bytes(stages) / GIB + CONTEXT <= card


def find_remedy(plan: Plan, card: float) -> list[str] | None:
    """The flags to change, in order, until a card is enough; None if all of them are not."""
    best, least = plan.args, peak_bytes(plan_stages(plan))
    for remedy in REMEDIES[plan.lora]:
        candidate = Namespace(**vars(best) | remedy)
        if max(candidate.resolution) > plan.side or any(plan.script.problems(candidate)):
            continue
        stages = plan_stages(replace(plan, args=candidate))
        if peak_bytes(stages) < least:
            best, least = candidate, peak_bytes(stages)
        if fits(stages, card):
            break
    else:
        return None
    changed = {name: value for name, value in vars(best).items() if value != getattr(plan.args, name)}
    changed = {name: value[0] if isinstance(value, list) else value for name, value in changed.items()}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in changed.items()]


def load_script(path: str) -> ModuleType:
    """The script as a module of its own: one that is imported already stays what its name stands for."""
    spec = importlib.util.spec_from_file_location(f"planned_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise SystemExit(f"{path} is no script; give train_dreambooth_flux.py or train_dreambooth_lora_flux.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="train_dreambooth_flux.py or train_dreambooth_lora_flux.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the flags of the training command")
    options = parser.parse_args(argv)
    script = load_script(options.script)
    args = script.parse_args(options.flags)
    models, source = load_models(args.pretrained_model_name_or_path)
    plan = Plan(script, args, models)
    stages = plan_stages(plan)
    print(f"Device memory of one process, by {source}; {CONTEXT} GiB more go to the driver and to fragmentation.")
    print(f"{'GiB':16s}{'weights':>10s}{'gradients':>11s}{'states':>9s}{'activations':>13s}{'sum':>8s}")
    for name, stage in stages.items():
        parts = (stage.weights, stage.gradients, stage.states, stage.activations, stage.total)
        weights, gradients, states, activations, total = (part / GIB for part in parts)
        print(f"{name:16s}{weights:10.2f}{gradients:11.2f}{states:9.2f}{activations:13.2f}{total:8.2f}")
    print(f"\nNeeds {math.ceil(10 * (peak_bytes(stages) / GIB + CONTEXT)) / 10} GiB.")
    for name, card in CARDS.items():
        remedy = None if fits(stages, card) else find_remedy(plan, card)
        verdict = "fits" if fits(stages, card) else "does not fit on one card"
        print(f"  {name:8s} " + (f"would fit with {' '.join(remedy)}" if remedy else verdict))


if __name__ == "__main__":
    main()
