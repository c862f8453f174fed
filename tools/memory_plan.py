"""How much device memory a training command will take, stage by stage: no GPU, no weights, no download.

    python tools/memory_plan.py train_dreambooth_lora_flux.py --pretrained_model_name_or_path=... FLAGS...

The flags are read by the script's own parser. Shapes come from the checkpoint's configs if it is a local folder, else
they are FLUX.1 [dev]'s. Weights, gradients and optimizer states are counted; activations are those of the script's own
`training_loss`, run on tensors without memory. They are affine in the numbers of blocks of both kinds, so three small
models tell those of the whole. benchmarks/simulate.py, which runs the whole command on a simulated GPU, takes the same
to within 2 %.
"""

import argparse
import copy
import functools
import importlib.util
import math
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

import random_flux

GIB = 1024**3
CONTEXT = 0.8  # GiB that the driver, the libraries' workspaces and fragmentation take of a card: reported, not measured
CARDS = {  # GiB that torch finds on one, as messages show; cards that check their memory (A10G, L4, T4) have 6 % less
    "12 GB": 11.6, "16 GB": 15.5, "24 GB": 23.5, "32 GB": 31.3, "48 GB": 47.4, "80 GB": 79.1, "141 GB": 139.8,
}  # fmt: skip
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)  # packed weights, 8-bit scales of blocks of 64, their scales of 256 of those
BLOCK_KINDS = ("transformer_blocks", "single_transformer_blocks")
COMMON_REMEDIES: list[dict[str, Any]] = [
    {"gradient_checkpointing": True}, {"mixed_precision": "bf16"}, {"cache_latents": True},
    {"gradient_checkpointing_blocks": None},
    {"train_batch_size": 1},
]  # fmt: skip
REMEDIES: dict[str, list[dict[str, Any]]] = {  # what to change, in the order of what it costs
    "lora": [
        *COMMON_REMEDIES, {"base_quantization": "int8"}, {"base_quantization": "nf4"}, {"blocks_to_swap": 20},
        {"blocks_to_swap": 40}, {"resolution": 512},
    ],
    "full": [
        *COMMON_REMEDIES, {"use_8bit_adam": True}, {"full_bf16": True, "mixed_precision": "bf16"},
        {"fused_backward_pass": True, "gradient_accumulation_steps": 1},
        {"optimizer": "adafactor", "use_8bit_adam": False}, {"resolution": 512},
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
                self.add(tensor)
        return result

    def add(self, tensor: Tensor, counted: bool = True) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            return
        self.live.add(storage._cdata)
        size = storage.nbytes() if counted else 0
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self.remove, storage._cdata, size)

    def remove(self, number: int, size: int) -> None:
        self.live.discard(number)
        self.now -= size


@torch.library.custom_op("flux_planned::rms_norm", mutates_args=())
def rms_norm_kernel(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only its shapes are known")


@torch.library.custom_op("flux_planned::rms_norm_backward", mutates_args=())
def rms_norm_backward_kernel(gradient: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("only its shapes are known")


rms_norm_kernel.register_fake(lambda x, _: (torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.float32)))
rms_norm_backward_kernel.register_fake(lambda _, x, weight, __: (torch.empty_like(x), torch.empty_like(weight)))
rms_norm_kernel.register_autograd(
    lambda ctx, gradient, _: rms_norm_backward_kernel(gradient, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, output[1]),
)


def rms_norm(x: Tensor, shape: Any, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """One kernel that keeps its input and a number a row, as CUDA has it; in bf16 the CPU keeps float32 copies."""
    if weight is None or x.dtype != weight.dtype:
        return RMS_NORM(x, shape, weight, eps)
    return rms_norm_kernel(x, weight)[0]


RMS_NORM = nn.functional.rms_norm


def peak_of(models: list[nn.Module], run: Callable[[], Any]) -> int:
    """Bytes at the most that `run` needs beside the weights of `models`, which come on the meta device."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        memory = PeakMemory()
        for module in (module for model in models for module in model.modules()):
            for name, value in module._parameters.items():
                if value is not None:
                    fake = torch.empty(value.shape, dtype=value.dtype)
                    module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
                    memory.add(fake, counted=False)
            for name, value in module._buffers.items():
                if value is not None:
                    module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
                    memory.add(module._buffers[name], counted=False)
        with memory, mock.patch.object(nn.functional, "rms_norm", rms_norm):
            run()
    return memory.peak


@dataclass
class Plan:
    """A command: its script, flags, and models without weights, by component."""

    script: ModuleType
    args: Namespace
    models: dict[str, Any]

    @property
    def lora(self) -> bool:
        return hasattr(self.script, "add_adapter")

    @property
    def dtype(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.args.mixed_precision, torch.float32)


@dataclass
class Stage:
    """What a stage keeps on the device, in bytes."""

    name: str
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
    with torch.device("meta"):
        models: dict[str, Any] = {
            kind: loader.from_config(loader.load_config(name, subfolder=kind))  # type: ignore[attr-defined]
            for kind, loader in (("transformer", FluxTransformer2DModel), ("vae", AutoencoderKL))
        }
        models["text_encoder"] = CLIPTextModel(CLIPTextConfig.from_pretrained(name, subfolder="text_encoder"))
        models["text_encoder_2"] = T5EncoderModel(T5Config.from_pretrained(name, subfolder="text_encoder_2"))
    return models, f"the configs in {name}"


def count_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def resized(transformer: Any, double: int, single: int) -> FluxTransformer2DModel:
    """The transformer on the meta device with other numbers of blocks."""
    config = dict(transformer.config) | {"num_layers": double, "num_single_layers": single}
    with torch.device("meta"):
        return FluxTransformer2DModel.from_config(config)


def make_trained(plan: Plan, double: int, single: int) -> FluxTransformer2DModel:
    """The transformer as the script trains it, on the meta device."""
    args, transformer = plan.args, resized(plan.models["transformer"], double, single)
    if plan.lora:
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(plan.dtype)
        transformer.requires_grad_(False)
        if args.base_quantization != "none":  # of NF4 too: what is kept and made in a step has int8's shapes
            plan.script.quantize_base(transformer, "int8", torch.device("meta"), [])
        plan.script.add_adapter(args, transformer, plan.script.transformer_targets(args), 0)
    elif args.full_bf16:
        for parameter in transformer.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    plan.script.set_up_blocks(args, transformer)
    return transformer.train()


def rows_of_a_micro_batch(args: Namespace) -> int:
    """Pictures that go through the transformer at a time: with either kind of prior twice `--train_batch_size`."""
    prior = args.with_prior_preservation or getattr(args, "prior_from_base_model", False)
    return args.train_batch_size * (2 if prior else 1)


def drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def model_inputs(args: Namespace, config: Any, batch: int, dtype: torch.dtype) -> tuple:
    """Latents, sigmas, both embeddings in `dtype`, and guidance, as `predict_velocity` takes them."""
    side = args.resolution // 8
    return (
        torch.randn(batch, config.in_channels // 4, side, side),
        torch.rand(batch),
        torch.randn(batch, args.max_sequence_length, config.joint_attention_dim, dtype=dtype),
        torch.randn(batch, config.pooled_projection_dim, dtype=dtype),
        torch.ones(batch) if config.guidance_embeds else None,
    )


def run_step(plan: Plan, transformer: Any) -> None:
    """Forward and backward pass of a micro-batch with the script's own loss; gradients of weights are not kept."""
    args, config = plan.args, transformer.config
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    batch = rows_of_a_micro_batch(args)
    latents, sigmas, embeds, pooled, guidance = model_inputs(args, config, batch, plan.dtype)
    noise, loss_weights = torch.randn_like(latents), torch.ones(batch)
    inputs = plan.script.StepInputs(latents, noise, sigmas, embeds, pooled, guidance, loss_weights, args)
    if getattr(args, "prior_from_base_model", False):
        inputs.base_pooled = pooled[args.train_batch_size :]
    with torch.autocast("cpu", plan.dtype, enabled=plan.dtype != torch.float32, cache_enabled=False):
        loss = plan.script.training_loss(transformer, inputs)
    loss.backward()


def activations(plan: Plan, known: dict[tuple, tuple[float, float]]) -> tuple[float, float]:
    """Bytes of a step at its peak, beside weights and their gradients: in all, and without what is kept for later."""
    args, config = plan.args, plan.models["transformer"].config
    if args.gradient_checkpointing_blocks is not None:
        # What is kept grows with the share of blocks that are not recomputed; all else is as if all were.
        share = args.gradient_checkpointing_blocks / (config.num_layers + config.num_single_layers)
        changes = {"gradient_checkpointing_blocks": None}
        every, none = (
            activations(
                Plan(plan.script, Namespace(**vars(args) | changes | {"gradient_checkpointing": on}), plan.models),
                known,
            )
            for on in (True, False)
        )
        return share * every[0] + (1 - share) * (none[0] - none[1] + every[1]), every[1]
    names = ["mixed_precision", "train_batch_size", "resolution", "gradient_checkpointing", "max_sequence_length"]
    names += ["with_prior_preservation", "prior_from_base_model", "base_quantization", "full_bf16", "rank"]
    key = tuple(getattr(args, name, None) for name in names)
    if key not in known:
        # With few single blocks the peak is not where the backward pass begins, and does not grow with their number.
        batch = rows_of_a_micro_batch(args)
        tokens = (args.resolution // 16) ** 2 + args.max_sequence_length
        hidden = batch * tokens * config.num_attention_heads * config.attention_head_dim * plan.dtype.itemsize
        for singles in (6, 12, 24, config.num_single_layers):
            models = [make_trained(plan, *size) for size in ((1, singles), (2, singles), (1, singles + 1))]
            small, double, single = (peak_of([model], functools.partial(run_step, plan, model)) for model in models)
            if single - small >= hidden:
                break
        internal = small - (double - small) - singles * (single - small)
        kept = config.num_layers * (double - small) + config.num_single_layers * (single - small)
        known[key] = internal + kept, internal
    return known[key]


def frozen_bytes(plan: Plan, transformer: nn.Module) -> float:
    """Bytes of the transformer's weights on the device, adapters included, as quantized and swapped."""
    args, total, swappable = plan.args, 0.0, []
    blocks = [*getattr(transformer, BLOCK_KINDS[0]), *getattr(transformer, BLOCK_KINDS[1])]
    quantized = {
        id(module.weight)
        for name, module in transformer.named_modules()
        if plan.lora and args.base_quantization == "nf4" and ".norm" not in name
        if isinstance(module, plan.script.QuantizedLinear)
    } if plan.lora else set()  # fmt: skip
    for parameter in transformer.parameters():
        total += parameter.numel() * (NF4_BYTES if id(parameter) in quantized else parameter.itemsize)
    if plan.lora and args.blocks_to_swap:
        for block in blocks:
            frozen = (parameter for parameter in block.parameters() if not parameter.requires_grad)
            swappable.append(sum(p.numel() * (NF4_BYTES if id(p) in quantized else p.itemsize) for p in frozen))
        count = min(args.blocks_to_swap, len(blocks))
        out = [swappable[number * len(blocks) // count] for number in range(count)]
        total -= max(0.0, sum(out) - 3 * max(out))  # the one that ran, the one that runs and the one on its way stay
    return total


def state_bytes(plan: Plan, parameters: list[nn.Parameter]) -> float:
    """Bytes of the optimizer's state."""
    args, count = plan.args, sum(parameter.numel() for parameter in parameters)
    if args.optimizer.lower() == "prodigy":
        total = 16.0 * count
    elif args.optimizer.lower() == "adafactor":  # a row and a column of each matrix; vectors whole
        total = 4.0 * sum(sum(p.shape[-2:]) if p.ndim > 1 else p.numel() for p in parameters)
    elif args.use_8bit_adam:  # two bytes and the scales of blocks of 256; small tensors stay in float32
        total = sum(p.numel() * (2 + 8 / 256) if p.numel() >= 4096 else 8.0 * p.numel() for p in parameters)
    else:
        total = 8.0 * count
    return total


def update_bytes(plan: Plan, parameters: list[nn.Parameter]) -> float:
    """Bytes that the update of the largest weight takes by itself: float32 copies of it, its gradient, random bits."""
    largest = max(parameter.numel() for parameter in parameters)
    adafactor = plan.args.optimizer.lower() == "adafactor"  # which makes its step from the gradient
    return (12.0 if getattr(plan.args, "full_bf16", False) or adafactor else 0.0) * largest


@torch.no_grad()
def run_vae(run: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    run(torch.randn(shape, dtype=dtype))


def vae_bytes(plan: Plan, size: tuple[int, int], decodes: bool) -> int:
    """Bytes that the VAE needs beside its weights to draw a picture of `size`, or to encode one."""
    vae, (width, height) = copy.deepcopy(plan.models["vae"]), size
    dtype = torch.bfloat16 if plan.dtype == torch.bfloat16 else torch.float32
    for parameter in vae.parameters():
        parameter.data = parameter.data.to(dtype)
    latents, pixels = (1, vae.config.latent_channels, height // 8, width // 8), (1, 3, height, width)
    run, shape = (vae.decode, latents) if decodes else (vae.encode, pixels)
    return peak_of([vae], functools.partial(run_vae, run, shape, dtype))


@torch.no_grad()
def run_sampling(plan: Plan, transformer: Any) -> None:
    """A sampling step for `--sample_batch_size` class pictures, in bf16."""
    inputs = model_inputs(plan.args, transformer.config, plan.args.sample_batch_size, torch.bfloat16)
    plan.script.predict_velocity(transformer, inputs[0].bfloat16(), *inputs[1:])


def sampling_bytes(plan: Plan) -> int:
    """Bytes that a sampling step needs beside the weights."""
    transformer = resized(plan.models["transformer"], 2, 2).to(torch.bfloat16)
    return peak_of([transformer], functools.partial(run_sampling, plan, transformer))


def plan_stages(plan: Plan, known: dict[tuple, tuple[float, float]]) -> list[Stage]:
    """What each stage of the command keeps on the device."""
    args, models, config = plan.args, plan.models, plan.models["transformer"].config
    trained = make_trained(plan, config.num_layers, config.num_single_layers)
    parameters = [parameter for parameter in trained.parameters() if parameter.requires_grad]
    base = frozen_bytes(plan, trained)
    vae = count_bytes(models["vae"], torch.bfloat16 if plan.dtype == torch.bfloat16 else torch.float32)
    clip = count_bytes(models["text_encoder"], plan.dtype)
    stages, square = [], (args.resolution, args.resolution)
    if args.with_prior_preservation:
        wanted = args.prior_generation_precision
        precision = torch.bfloat16 if wanted in (None, "no") else plan.script.PRECISIONS[wanted]  # as on a GPU
        whole = not plan.lora or (args.base_quantization == "none" and not args.blocks_to_swap)
        drawn = count_bytes(models["transformer"], precision) if whole else base
        needed = max(vae_bytes(plan, square, decodes=True), sampling_bytes(plan))
        stages.append(Stage("class pictures", drawn + vae, activations=needed))
    encoders = clip + count_bytes(models["text_encoder_2"], plan.dtype)
    if plan.dtype == torch.float16:  # transformers keeps these in float32
        wide = [weight for name, weight in models["text_encoder_2"].named_parameters() if ".wo." in name]
        encoders += 2 * sum(weight.numel() for weight in wide)
    stages.append(Stage("text encoders", encoders, activations=0.02 * encoders))
    stages.append(Stage("pictures", vae, activations=float(vae_bytes(plan, square, decodes=False))))
    whole, internal = activations(plan, known)
    update, fused = update_bytes(plan, parameters), getattr(args, "fused_backward_pass", False)
    gradients = float(sum(parameter.numel() * parameter.itemsize for parameter in parameters))
    states = state_bytes(plan, parameters)
    if args.use_ema:
        states += 4.0 * sum(parameter.numel() for parameter in parameters)  # a float32 copy, whatever is trained
    block = (parameter for parameter in trained.transformer_blocks[0].parameters() if parameter.requires_grad)
    last = float(sum(parameter.numel() * parameter.itemsize for parameter in block))  # that gets its gradient
    if fused:
        gradients, last = float(max(parameter.numel() * parameter.itemsize for parameter in parameters)), 0.0
    # Kept activations go while gradients come, so the peak is at one end of the backward pass, before the last block
    # has its gradients; only a second micro-batch finds them already there.
    ends = max(whole, gradients + max(0.0, internal - last))
    peak = gradients + whole if args.gradient_accumulation_steps > 1 else ends
    peak = peak + update if fused else max(peak, gradients + update)
    resident = 0.0 if args.cache_latents else vae
    if args.train_text_encoder:
        resident += clip + (0.0 if plan.lora else 3.0 * clip)
    stages.append(Stage("training", base + resident, gradients, states, max(0.0, peak - gradients)))
    if args.validation_prompt:
        decoded = float(vae_bytes(plan, plan.script.validation_size(args), decodes=True))
        stages.append(Stage("validation", base + vae, 0, states, decoded))
        final = base if plan.lora else count_bytes(models["transformer"], plan.dtype)
        stages.append(Stage("final pictures", final + vae + clip, activations=decoded))
    return stages


def peak_bytes(stages: list[Stage]) -> float:
    return max(stage.total for stage in stages)


def fits(stages: list[Stage], card: float) -> bool:
    """Whether a card of `card` GiB holds every stage."""
    return peak_bytes(stages) / GIB + CONTEXT <= card


def find_remedy(plan: Plan, card: float, known: dict[tuple, tuple[float, float]]) -> list[str] | None:
    """The flags to change, in order, until a card is enough; None if all of them are not."""
    best, best_peak = plan, peak_bytes(plan_stages(plan, known))
    for remedy in REMEDIES["lora" if plan.lora else "full"]:
        changed = {name: value for name, value in remedy.items() if getattr(best.args, name) != value}
        if "resolution" in changed and best.args.resolution < remedy["resolution"]:
            continue
        candidate = Plan(plan.script, Namespace(**vars(best.args) | changed), plan.models)
        if any(plan.script.problems(candidate.args)):  # does not go together with another flag
            continue
        stages = plan_stages(candidate, known)
        if changed and peak_bytes(stages) < best_peak:
            best, best_peak = candidate, peak_bytes(stages)
        if fits(stages, card):
            break
    else:
        return None
    flags = {name: value for name, value in vars(best.args).items() if value != getattr(plan.args, name)}
    without = [f"without --{name}" for name, value in flags.items() if value is None]
    given = {name: value for name, value in flags.items() if value not in (None, False)}
    return without + [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def training_bytes(stages: list[Stage]) -> float:
    return next(stage.total for stage in stages if stage.name == "training")


def load_script(path: str) -> ModuleType:
    """The script as a module of its own: one that is imported already stays what its name stands for."""
    spec = importlib.util.spec_from_file_location(f"planned_{Path(path).stem}", path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise SystemExit(f"{path} is no script; give train_dreambooth_flux.py or train_dreambooth_lora_flux.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    return script


def print_table(stages: list[Stage]) -> None:
    print(f"{'GiB':16s}{'weights':>10s}{'gradients':>11s}{'states':>9s}{'activations':>13s}{'sum':>8s}")
    for stage in stages:
        parts = (stage.weights, stage.gradients, stage.states, stage.activations, stage.total)
        weights, gradients, states, kept, total = (part / GIB for part in parts)
        print(f"{stage.name:16s}{weights:10.2f}{gradients:11.2f}{states:9.2f}{kept:13.2f}{total:8.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", help="train_dreambooth_flux.py or train_dreambooth_lora_flux.py")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="the flags of the training command")
    options = parser.parse_args(argv)
    script = load_script(options.script)
    try:
        args = script.parse_args(options.flags)
        args.resolution = max(script.resolutions(args))
        models, source = load_models(args.pretrained_model_name_or_path)
        plan, known = Plan(script, args, models), {}  # type: Plan, dict[tuple, tuple[float, float]]
        stages = plan_stages(plan, known)
    except script.UsageError as error:
        raise SystemExit(f"{Path(options.script).name}: error: {error}") from None
    print(f"Device memory of one process, by {source}; {CONTEXT} GiB more go to the driver and to fragmentation.")
    print_table(stages)
    print(f"\nNeeds {math.ceil(10 * (peak_bytes(stages) / GIB + CONTEXT)) / 10} GiB.")
    every = none = training_bytes(stages)
    partial = Namespace(**vars(args) | {"gradient_checkpointing_blocks": 0})
    if args.gradient_checkpointing_blocks is None and not any(script.problems(partial)):
        none = training_bytes(plan_stages(Plan(script, partial, models), known))
    blocks = sum(models["transformer"].config[kind] for kind in ("num_layers", "num_single_layers"))
    blocks = blocks if none > every else 0
    for name, card in tqdm(CARDS.items(), desc="Cards", leave=False, delay=2, disable=not sys.stderr.isatty()):
        if fits(stages, card):
            share = (none - card * GIB + CONTEXT * GIB) / max(1.0, none - every)  # what is kept grows with the rest
            count = max(0, math.ceil(share * blocks))
            print(
                f"  {name:8s} fits" + (f"; faster: --gradient_checkpointing_blocks={count}" if count < blocks else "")
            )
            continue
        remedy = find_remedy(plan, card, known)
        print(f"  {name:8s} " + (f"would fit with {' '.join(remedy)}" if remedy else "does not fit on one card"))


if __name__ == "__main__":
    main()
