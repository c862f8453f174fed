"""What saves memory changes nothing else: stages, quantized and swapped bases, bf16 weights, fused steps."""

import functools
import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import SCRIPTS, Run, one_script
from tests.test_precision import spy

CPU = torch.device("cpu")


def saved(folder: Path) -> dict[str, Tensor]:
    """All the weights that a run saved, by file and name."""
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and len(one) > 0 and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def counted_garbage() -> Iterator[None]:
    """Only what the scripts collect on purpose is collected, so that what dies does not die by chance."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("counted_garbage")
def test_what_a_stage_loads_is_gone_before_the_next_one_loads(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, found = list[weakref.ref](), list[tuple[str, set[str]]]()

    def look(name: str, *_: Any) -> None:
        found.append((name, {type(thing()).__name__ for thing in made if thing() is not None}))

    for kind in (T5EncoderModel, CLIPTextModel, AutoencoderKL, FluxTransformer2DModel):
        spy(monkeypatch, kind, "__init__", lambda self, *_, **__: made.append(weakref.ref(self)))
    for name in ("encode_prompts", "load_base", "load_vae", "train"):
        spy(monkeypatch, script, name, functools.partial(look, name))
    prior = ["--with_prior_preservation", "--class_prompt=a dog", f"--class_data_dir={tmp_path}"]
    run(script, *prior, "--num_class_images=1", "--cache_latents", "--train_text_encoder")
    class_pictures = [("encode_prompts", set()), ("load_base", set()), ("load_vae", {"FluxTransformer2DModel"})]
    vae = {"AutoencoderKL"}  # on the CPU: `test_simulate` holds that nothing of it is left on the device
    training = [("load_base", vae), ("train", vae | {"FluxTransformer2DModel", "CLIPTextModel"})]
    assert found == [*class_pictures, ("encode_prompts", set()), ("load_vae", set()), *training]


@pytest.mark.usefixtures("counted_garbage")
@pytest.mark.parametrize(
    ("kind", "flags"), [("lora", []), ("full", []), ("full", ["--full_bf16"]), ("full", ["--fused_backward_pass"])]
)
def test_the_training_is_gone_before_the_final_pictures_are_drawn(
    kind: str, flags: list[str], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, references, found = SCRIPTS[kind], dict[str, weakref.ref](), list[list[str]]()

    def watch(training: Any) -> None:
        optimizer, weight = training.optimizer.optimizer, training.parameters[0]
        things = {"CLIP": training.text_encoder, "optimizer": optimizer, "transformer": training.transformer}
        states = optimizer.parts[0][2].state if flags else optimizer.state
        things |= {"a weight": weight, "its state": next(iter(states.values()))["exp_avg"]}
        references.update({name: weakref.ref(thing) for name, thing in things.items()})

    spy(monkeypatch, script, "save_result", watch)
    look = lambda *_: found.append([name for name, thing in references.items() if thing() is not None])  # noqa: E731
    spy(monkeypatch, script, "draw_final_pictures", look)
    run(script, "--mixed_precision=bf16", "--train_text_encoder", "--validation_prompt=a dog", *flags)
    assert len(references) == 5 and found == [[]]


@pytest.mark.parametrize(("kind", "error", "per_weight"), [("int8", 0.012, 1.01), ("nf4", 0.1, 0.52)])
def test_a_quantized_layer_is_as_exact_and_as_small_as_it_says(kind: str, error: float, per_weight: float) -> None:
    """Each row in int8 has a scale of its own: here they differ by a factor of a million."""
    torch.manual_seed(0)
    layer = nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16)
    layer.weight.data *= torch.logspace(-6 if kind == "int8" else 0, 0, 512)[:, None].bfloat16()
    quantized = lora.QuantizedLinear(layer, kind, CPU)
    exact, found = layer.weight.float(), quantized(torch.eye(1024)).T
    assert ((found - exact).norm(dim=1) / exact.norm(dim=1)).max() < error and not torch.equal(found, exact)
    packed = [quantized.weight, quantized.state.bfloat16() if kind == "int8" else quantized.state.absmax]
    assert sum(part.nbytes for part in packed) / layer.weight.numel() <= per_weight


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_layer_has_the_gradient_of_the_weights_it_stands_for(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(128, 64)
    quantized = lora.QuantizedLinear(layer, kind, CPU)
    dense = (quantized(torch.eye(128)) - layer.bias).T.detach()  # what it multiplies with
    x, upstream = torch.randn(2, 3, 128, requires_grad=True), torch.randn(2, 3, 64)
    output = quantized(x)
    output.backward(upstream)
    assert x.grad is not None and quantized.weight.grad is None
    torch.testing.assert_close(output, x @ dense.T + layer.bias, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x.grad, torch.einsum("bso,oi->bsi", upstream, dense), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("kind", "others"), [("int8", "int8"), ("nf4", "uint8")])
def test_the_modulation_stays_at_8_bits_and_the_embedders_are_left_alone(
    kind: str, others: str, base_flags: list[str]
) -> None:
    transformer = lora.load_base(lora.parse_args([*base_flags, f"--base_quantization={kind}"]), torch.float32, CPU)
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            block = name.startswith(("transformer_blocks", "single_transformer_blocks"))
            wanted = "float32" if not block else "int8" if "norm" in name else others
            assert str(module.weight.dtype) == f"torch.{wanted}", name


@pytest.mark.parametrize(("quantization", "count"), [("none", 3), ("int8", 4), ("nf4", 1)])
def test_swapped_blocks_train_the_same_weights_and_leave_nothing_on_the_device_between_blocks(
    count: int, quantization: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In forward and backward passes and in validation: what was brought is gone when the next block comes."""
    flags = [f"--base_quantization={quantization}", "--gradient_checkpointing", "--learning_rate=0.01"]
    flags += ["--max_train_steps=3", "--validation_prompt=a dog", "--validation_steps=3"]
    whole = run(lora, *flags, f"--output_dir={tmp_path / 'whole'}")
    bring, copies, left = lora.SwappedWeights.bring, list[weakref.ref](), list[int]()

    def count_and_bring(self: Any, *given: Any) -> None:
        left.append(sum(copy() is not None for copy in copies))
        left.append(sum(getattr(module, name).numel() for module, name, _ in self.host))
        bring(self, *given)
        copies[:] = [weakref.ref(getattr(module, name)) for module, name, _ in self.host]

    monkeypatch.setattr(lora.SwappedWeights, "bring", count_and_bring)
    swapped = run(lora, *flags, f"--blocks_to_swap={count}")
    assert same(saved(whole), saved(swapped))
    for name in ("validation/step_000003_0.png", "image_0.png"):
        assert (whole / name).read_bytes() == (swapped / name).read_bytes()
    drawing = 3 * 3  # pictures before, after and at the end, of three sampling steps
    assert len(left) == 2 * count * (3 * 2 + drawing) and set(left) == {0}


def test_swapped_blocks_are_spread_evenly_and_no_more_than_there_are(base_flags: list[str], run: Run) -> None:
    args = lora.parse_args([*base_flags, "--gradient_checkpointing", "--blocks_to_swap=2"])
    transformer = lora.load_base(args, torch.float32, CPU)
    first_of_each = [transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]]
    assert lora.swapped_blocks(args, transformer) == first_of_each
    with pytest.raises(lora.UsageError, match=r"--blocks_to_swap=5 .* has 4 blocks"):
        run(lora, "--blocks_to_swap=5", "--gradient_checkpointing")


# ---- bf16 weights, and steps inside the backward pass ----------------------------------------------------------------

OPTIMIZERS = {"AdamW": [], "8-bit AdamW": ["--use_8bit_adam"], "Adafactor": ["--optimizer=adafactor"]}


def test_stochastic_rounding_is_unbiased() -> None:
    draws, source = 4000, torch.tensor([1.0, 1.001, -0.02001, 3e-9, 123.456, -1.0039]).repeat(4000, 1)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    full.round_stochastically_(target, source, torch.Generator().manual_seed(0))
    assert (target[:, 0] == 1).all()  # what bfloat16 can hold stays
    assert all(len(column.unique()) == 2 for column in target[:, 1:].T)
    error = target.float().mean(dim=0) - source[0]
    standard_error = target.float().std(dim=0) / math.sqrt(draws)
    assert (error.abs() <= 3 * standard_error + 1e-12).all(), error / standard_error
    assert ((target.float() / source - 1).abs() < 2**-7).all()  # the nearest two


def test_small_updates_arrive_in_bf16_weights(run: Run, tiny_flux: Path, tmp_path: Path) -> None:
    """With 60 steps at 1e-5, as in float32: projected on the float32 movement, 1 is all of it."""
    flags = ["--mixed_precision=bf16", "--learning_rate=1e-5", "--max_train_steps=60", "--upcast_before_saving"]
    flags += ["--cache_latents", "--adam_weight_decay=0"]
    folders = tiny_flux, run(full, *flags, f"--output_dir={tmp_path / 'exact'}"), run(full, *flags, "--full_bf16")
    states = [saved(folder) for folder in folders]
    names = [name for name in states[0] if states[0][name].ndim == 2]
    start, exact, rounded = (torch.cat([state[name].flatten() for name in names]) for state in states)
    moved, found = exact - start, rounded - start.bfloat16().float()
    assert 0.9 < (found @ moved) / (moved @ moved) < 1.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_backward_pass_trains_the_same_weights_and_holds_one_gradient(
    optimizer: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*OPTIMIZERS[optimizer], "--max_train_steps=3", "--max_grad_norm=0", "--train_text_encoder"]
    plain = saved(run(full, *flags, f"--output_dir={tmp_path / 'plain'}"))
    gradients: dict[str, set[int]] = {"update_in_backward": set(), "step": set()}

    def count(name: str, optimizer: Any, *_: Any) -> None:
        gradients[name].add(sum(parameter.grad is not None for parameter, _, _ in optimizer.parts))

    for name in gradients:
        spy(monkeypatch, full.PerParameterOptimizer, name, functools.partial(count, name))
    assert same(plain, saved(run(full, *flags, "--fused_backward_pass")))
    assert gradients == {"update_in_backward": {1}, "step": {0}}


@pytest.mark.parametrize(
    ("optimizer", "fused"), [("AdamW", []), ("8-bit AdamW", ["--fused_backward_pass"]), ("Adafactor", [])]
)
def test_bf16_weights_resume_exactly(optimizer: str, fused: list[str], run: Run, tmp_path: Path) -> None:
    flags = [*OPTIMIZERS[optimizer], *fused, "--full_bf16", "--mixed_precision=bf16", "--learning_rate=1e-3"]
    flags += ["--checkpointing_steps=2", "--max_train_steps=4", "--lr_scheduler=linear", "--lr_warmup_steps=2"]
    whole = run(full, *flags, f"--output_dir={tmp_path / 'whole'}")
    assert {value.dtype for value in saved(whole).values()} == {torch.bfloat16}
    resumed = run(full, *flags, f"--resume_from_checkpoint={whole / 'checkpoint-2'}")
    assert same(saved(whole), saved(resumed)) and not same(saved(whole), saved(whole / "checkpoint-2"))


def test_a_fused_backward_pass_logs_the_norm_of_the_whole_gradient_and_clips_each_tensor(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: logged.append(values))
    for fused in ([], ["--fused_backward_pass"]):
        run(full, *fused, "--max_train_steps=1")
    assert logged[1]["grad_norm"] == pytest.approx(logged[0]["grad_norm"], rel=1e-5)

    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))]
    PartialState(cpu=True)
    optimizer = full.PerParameterOptimizer([{"params": weights, "lr": 1.0}], torch.optim.SGD, 0)
    optimizer.fuse(1.0)
    (weights[0].sum() * 10 + weights[1].sum() * 0.1).backward()
    assert weights[0].norm().item() == pytest.approx(1.0, abs=1e-5)  # clipped to the norm of 1
    assert torch.allclose(weights[1], torch.full((3,), -0.1))  # not clipped
    assert optimizer.take_norm().item() == pytest.approx(math.sqrt(3 * 10**2 + 3 * 0.1**2)) and not weights[0].grad


def test_a_broken_loss_reaches_no_weight_of_a_fused_backward_pass(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    updates, flow_matching_loss = list[int](), full.flow_matching_loss
    monkeypatch.setattr(full, "flow_matching_loss", lambda *args: flow_matching_loss(*args) * math.nan)
    monkeypatch.setattr(full.PerParameterOptimizer, "update", lambda self, number: updates.append(number))
    with pytest.raises(SystemExit, match="the loss is nan"):
        run(full, "--fused_backward_pass")
    assert not updates


# ---- compiling and attention -----------------------------------------------------------------------------------------

SWAPPED = ["--gradient_checkpointing", "--base_quantization=int8", "--blocks_to_swap=2"]
COMPILED = {
    "full, checkpointing": (full, ["--gradient_checkpointing"]),
    "full, bf16, fused": (full, ["--mixed_precision=bf16", "--full_bf16", "--fused_backward_pass"]),
    "LoRA, checkpointing, swapped blocks on int8": (lora, SWAPPED),
}


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_blocks_train_as_uncompiled_ones_and_keep_the_names_of_the_weights(
    case: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With autograd's graph traced, as inductor does, where blocks are checkpointed; else without, in half the time."""
    losses, (script, flags) = list[float](), COMPILED[case]
    monkeypatch.setattr(Accelerator, "log", lambda _, values, **__: losses.append(values["loss"]))
    flags = [*flags, "--max_train_steps=3", "--learning_rate=1e-3", "--checkpointing_steps=3"]
    flags += ["--validation_prompt=a dog"]
    eager = run(script, *flags, f"--output_dir={tmp_path / 'eager'}")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER" if "checkpointing" in case else "EAGER")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = run(script, *flags)
    # Two kinds of blocks, in training and in drawing: one graph serves all blocks of a kind.
    assert 2 <= counters["stats"]["unique_graphs"] <= 4 and not counters["graph_break"]
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-2 if "bf16" in case else 1e-5)  # bf16 has 8 bits
    for name in ("", "checkpoint-3"):
        assert saved(eager / name).keys() == saved(compiled / name).keys() != set()


@pytest.mark.parametrize("base", ["none", "nf4"])  # nf4 keeps some layers in int8
def test_graphs_are_compiled_when_a_size_is_first_seen_in_drawing_in_training_and_with_the_prior_and_never_again(
    base: str, run: Run, logged: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    counters, seen = torch._dynamo.utils.counters, list[tuple[str, int]]()
    training_loss, draw_pictures = lora.training_loss, lora.draw_validation_pictures

    def record_loss(transformer: Any, inputs: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = training_loss(transformer, inputs)
        seen.append((f"prior: {inputs.base_inputs is not None}", counters["stats"]["unique_graphs"]))
        return losses

    def record_drawing(training: Any) -> None:
        draw_pictures(training)
        seen.append(("drawing", counters["stats"]["unique_graphs"]))

    monkeypatch.setattr(lora, "training_loss", record_loss)
    monkeypatch.setattr(lora, "draw_validation_pictures", record_drawing)
    flags = ["--prior_from_base_model", "--class_prompt=a pet", "--prior_share=0.5", f"--base_quantization={base}"]
    flags += ["--gradient_checkpointing", "--max_train_steps=8", "--learning_rate=1e-3", "--lora_layers=attn.to_q"]
    flags += ["--validation_prompt=a dog", "--validation_resolution=48", "--validation_steps=4"]
    run(lora, *flags, f"--output_dir={tmp_path / 'eager'}")
    seen.clear()
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "AOT_EAGER")
    monkeypatch.setenv("ACCELERATE_DYNAMO_USE_DYNAMIC", "False")  # as `accelerate launch` sets it
    torch._dynamo.reset()
    counters.clear()
    output = run(lora, *flags)
    kinds, count = set[str](), 0
    for kind, compiled in seen:
        assert kind not in kinds or compiled == count
        kinds, count = kinds | {kind}, compiled
    # Two kinds of blocks, and the first of each may be given what needs no gradient where the others' input does.
    assert len(kinds) == 3 and 8 <= count <= 14 and not counters["graph_break"] and (output / "image_0.png").is_file()
    losses = [values["loss"] for values in logged if "loss" in values]
    assert losses[8:] == pytest.approx(losses[:8], rel=1e-4)


@one_script
def test_where_a_graph_does_not_compile_the_run_goes_on_without_and_says_so_once(
    script: ModuleType, run: Run, logged: list[dict[str, float]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    graphs = list[Any]()

    def compile_one(graph: Any, _: list) -> Any:
        graphs.append(graph)
        if len(graphs) > 1:  # the first block has run compiled by then
            raise RuntimeError("no C compiler")
        return graph.forward

    run(script, f"--output_dir={tmp_path / 'eager'}")
    torch._dynamo.list_backends()  # fills the registry
    monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "eager", compile_one)
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    torch._dynamo.reset()
    try:
        output = run(script, "--validation_prompt=a dog", "--gradient_checkpointing")
    finally:
        torch.compiler.set_stance("default")
    warnings = [record.message for record in caplog.records if "uncompiled" in record.message]
    assert len(graphs) == 2 and len(warnings) == 1 and "no C compiler" in warnings[0]
    losses = [values["loss"] for values in logged]
    assert losses[2:] == pytest.approx(losses[:2], rel=1e-6) and (output / "image_0.png").is_file()


@one_script
def test_the_attention_backend_is_the_one_asked_for(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    spy(
        monkeypatch, script, "save_result", lambda training: found.extend(training.transformer.attn_processors.values())
    )
    torch.backends.cuda.enable_cudnn_sdp(True)
    run(script, "--attention_backend=_native_math")
    assert {processor._attention_backend.value for processor in found} == {"_native_math"}
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # its backward pass is not to be trusted
