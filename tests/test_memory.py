"""What saves memory changes nothing that it should not: quantized bases, swapped blocks, bf16 weights, fused steps."""

import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.models.transformers import transformer_flux
from safetensors.torch import load_file
from torch import Tensor, nn

import train_dreambooth_flux as full
import train_dreambooth_lora_flux as lora
from conftest import Run, both_scripts, one_script

pytestmark = one_script

CPU = torch.device("cpu")


def saved(folder: Path) -> dict[str, Tensor]:
    """All the weights that a run saved, by file and name."""
    files = [*folder.glob("*.safetensors"), *folder.glob("transformer/*.safetensors")]
    return {f"{file.name} {name}": value for file in files for name, value in load_file(file).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def losses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A list that fills with the losses that are logged from now on."""
    found: list[float] = []

    def keep(self: Any, values: dict[str, float], *_: Any, **__: Any) -> None:
        if "loss" in values:
            found.append(values["loss"])

    monkeypatch.setattr(Accelerator, "log", keep)
    return found


# ---- quantized bases -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error", "per_weight"), [("int8", 0.012, 1.01), ("nf4", 0.1, 0.52)])
def test_a_quantized_layer_is_as_exact_and_as_small_as_it_says(kind: str, error: float, per_weight: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(1024, 512, dtype=torch.bfloat16)
    quantized = lora.QuantizedLinear(layer, kind, CPU)
    x = torch.randn(64, 1024)
    exact, found = x @ layer.weight.T.float() + layer.bias.float(), quantized(x)
    assert 0 < (found - exact).norm() / exact.norm() < error
    packed = [quantized.weight, *(quantized.buffers() if kind == "int8" else [quantized.state.absmax])]
    assert sum(part.nbytes for part in packed) / layer.weight.numel() <= per_weight


def test_a_row_of_small_weights_in_int8_is_as_exact_as_a_row_of_large_ones() -> None:
    """Each row has a scale of its own: rows here differ by a factor of a million."""
    torch.manual_seed(0)
    layer = nn.Linear(256, 64, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.logspace(-6, 0, 64)[:, None])
    weight = lora.QuantizedLinear(layer, "int8", CPU)(torch.eye(256)).T
    errors = (weight - layer.weight).norm(dim=1) / layer.weight.norm(dim=1)
    assert errors.max() < 0.02


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantized_layer_has_the_gradient_of_the_weights_it_stands_for(kind: str) -> None:
    torch.manual_seed(0)
    quantized = lora.QuantizedLinear(nn.Linear(128, 64, bias=False), kind, CPU)
    weight = quantized(torch.eye(128)).T.detach()  # what it multiplies with
    x, upstream = torch.randn(2, 3, 128, requires_grad=True), torch.randn(2, 3, 64)
    quantized(x).backward(upstream)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.einsum("bso,oi->bsi", upstream, weight), rtol=1e-5, atol=1e-5)
    assert quantized.weight.grad is None


@pytest.mark.parametrize(("kind", "modulation", "others"), [("int8", "int8", "int8"), ("nf4", "int8", "uint8")])
def test_the_modulation_stays_at_8_bits_and_the_embedders_are_left_alone(
    kind: str, modulation: str, others: str, tiny_flux: Path
) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer")
    lora.quantize_base(transformer, kind, CPU, [])
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            block = name.startswith(("transformer_blocks", "single_transformer_blocks"))
            wanted = "float32" if not block else modulation if "norm" in name else others
            assert str(module.weight.dtype) == f"torch.{wanted}", name


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_lora_trains_on_a_quantized_base_draws_on_it_and_resumes(
    kind: str, precision: str, run: Run, tmp_path: Path, tiny_flux: Path
) -> None:
    flags = [
        f"--base_quantization={kind}",
        f"--mixed_precision={precision}",
        "--max_train_steps=3",
        "--learning_rate=0.01",
    ]
    flags += ["--checkpointing_steps=2", "--gradient_checkpointing", "--validation_prompt=a dog"]
    whole = saved(run(lora, *flags))
    assert all(value.isfinite().all() for value in whole.values())
    first, second = tmp_path / "resumed", ["--resume_from_checkpoint=latest"]
    run(lora, *flags, f"--output_dir={first}", "--max_train_steps=2")
    assert same(saved(run(lora, *flags, f"--output_dir={first}", *second)), whole)
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    pipeline.load_lora_weights(first, weight_name=lora.LORA_FILE)  # on a base in full precision
    assert (first / "image_0.png").is_file()
    assert f"--base_quantization={kind}\n" in (first / "README.md").read_text()


def test_a_quantized_base_is_another_base_and_the_checkpoint_knows(
    run: Run, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run(lora, "--base_quantization=int8", "--checkpointing_steps=1", "--max_train_steps=1")
    run(lora, "--resume_from_checkpoint=latest")
    assert "--base_quantization was 'int8' and is 'none'" in caplog.text


# ---- swapped blocks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("quantization", "count"), [("none", 1), ("none", 3), ("none", 4), ("int8", 3), ("nf4", 4)])
def test_swapped_blocks_train_the_same_weights_and_nothing_reads_them_when_they_are_out(
    count: int, quantization: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [f"--base_quantization={quantization}", "--gradient_checkpointing", "--learning_rate=0.01"]
    flags += ["--max_train_steps=3", "--validation_prompt=a dog", "--validation_epochs=1", "--validation_loss"]
    whole = saved(run(lora, *flags, f"--output_dir={tmp_path / 'whole'}"))
    touched = []

    def poison(self: Any, number: int, *_: Any) -> None:
        for module, name, weight in self.host[number]:
            broken = torch.full_like(weight, math.nan if weight.is_floating_point() else 77)
            module._parameters[name] = nn.Parameter(broken, requires_grad=False)
        touched.append(number)

    monkeypatch.setattr(lora.BlockSwap, "drop", poison)
    swapped = saved(run(lora, *flags, f"--blocks_to_swap={count}"))
    assert same(whole, swapped)
    assert set(touched) == set(range(count))


def test_swapped_blocks_are_spread_evenly(tiny_flux: Path, base_flags: list[str]) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(tiny_flux, subfolder="transformer")
    args = lora.parse_args([*base_flags, "--blocks_to_swap=2", "--gradient_checkpointing"])
    chosen = lora.choose_blocks(transformer, "--blocks_to_swap", args.blocks_to_swap)
    assert chosen == [transformer.transformer_blocks[0], transformer.single_transformer_blocks[0]]


def test_swapped_blocks_are_fetched_ahead_in_the_direction_of_travel() -> None:
    blocks: list[nn.Module] = [nn.Linear(2, 2).requires_grad_(False) for _ in range(3)]
    weights = [block.weight.data.clone() for block in blocks]  # type: ignore[operator, union-attr]
    swap = lora.BlockSwap(blocks, CPU)
    assert sum(parameter.numel() for block in blocks for parameter in block.parameters()) == 0  # nothing is left there
    swap.load(0)
    assert torch.equal(blocks[0].weight, weights[0])  # type: ignore[arg-type]
    assert list(swap.copies) == [1]  # on the way
    on_their_way = []
    for number in (1, 2, 2, 1, 0, 0, 1):  # forward, backward, and the next forward pass
        swap.load(number)
        on_their_way += [list(swap.copies)]
    assert on_their_way == [[2], [2], [1], [0], [0], [1], [2]]
    with torch.no_grad():  # sampling goes forward only
        for number in (2, 0):
            swap.load(number)
            on_their_way += [list(swap.copies)]
    assert on_their_way[-2:] == [[0], [1]]


def test_of_two_swapped_blocks_the_first_is_no_step_back_in_sampling() -> None:
    swap = lora.BlockSwap([nn.Linear(2, 2).requires_grad_(False) for _ in range(2)], CPU)
    with torch.no_grad():
        for number, on_its_way in ((0, [1]), (1, [0]), (0, [1]), (1, [0])):
            swap.load(number)
            assert list(swap.copies) == on_its_way


def test_swapped_blocks_wait_in_one_piece_of_host_memory() -> None:
    """What is pinned is rounded up to a power of two: a GiB for many weights, not two of 90 MiB each."""
    blocks: list[nn.Module] = [
        nn.Linear(3, 5, dtype=dtype).requires_grad_(False) for dtype in (torch.half, torch.float)
    ]
    weights = [parameter.data.clone() for block in blocks for parameter in block.parameters()]
    swap = lora.BlockSwap(blocks, CPU)
    held = [weight for block in swap.host for _, _, weight in block]
    assert all(torch.equal(one, other) for one, other in zip(held, weights, strict=True))
    assert len({weight.untyped_storage().data_ptr() for weight in held}) == 1
    assert held[0].untyped_storage().nbytes() == lora.GIB


@pytest.mark.parametrize("backend", ["sage", "_sage_qk_int8_pv_fp16_cuda", "_flash_3"])
def test_attention_without_a_backward_pass_is_refused(
    script: ModuleType, base_flags: list[str], capsys: pytest.CaptureFixture[str], backend: str
) -> None:
    with pytest.raises(SystemExit):
        script.parse_args([*base_flags, f"--attention_backend={backend}"])
    assert f"invalid choice: '{backend}'" in capsys.readouterr().err


def test_more_blocks_than_there_are_is_a_clear_error(run: Run) -> None:
    with pytest.raises(lora.UsageError, match=r"--blocks_to_swap is 5; this transformer has 4 blocks"):
        run(lora, "--blocks_to_swap=5", "--gradient_checkpointing")


# ---- bf16 weights, and steps inside the backward pass ----------------------------------------------------------------

OPTIMIZERS = {"AdamW": [], "8-bit AdamW": ["--use_8bit_adam"], "Adafactor": ["--optimizer=adafactor"]}


def test_stochastic_rounding_is_unbiased() -> None:
    draws, source = 4000, torch.tensor([1.0, 1.001, -0.02001, 3e-9, 123.456, -1.0039]).repeat(4000, 1)
    target = torch.empty_like(source, dtype=torch.bfloat16)
    full.round_stochastically_(target, source, torch.Generator().manual_seed(0))
    below = source[0].clone().view(torch.int32).bitwise_and(-65536).view(torch.float32)  # the neighbour towards zero
    assert (target[:, 0] == 1).all()  # what bfloat16 can hold stays
    assert all(len(column.unique()) == 2 for column in target[:, 1:].T)
    error = target.float().mean(dim=0) - source[0]
    standard_error = target.float().std(dim=0) / math.sqrt(draws)
    assert (error.abs() <= 3 * standard_error + 1e-12).all(), error / standard_error
    assert (target.float().abs() >= below.abs() - 1e-12).all()


def test_small_updates_arrive_in_bf16_weights(run: Run, tiny_flux: Path, tmp_path: Path) -> None:
    """With 60 steps at 1e-5, as in float32: projected on the float32 movement, 1 is all of it."""
    flags = ["--mixed_precision=bf16", "--learning_rate=1e-5", "--max_train_steps=60", "--upcast_before_saving"]
    flags += ["--cache_latents", "--adam_weight_decay=0"]
    before = saved(tiny_flux)
    exact = saved(run(full, *flags, f"--output_dir={tmp_path / 'exact'}"))
    rounded = saved(run(full, *flags, "--full_bf16"))
    names = [name for name in exact if exact[name].ndim == 2]
    start = torch.cat([before[name].flatten() for name in names])
    moved = torch.cat([exact[name].flatten() for name in names]) - start
    found = torch.cat([rounded[name].flatten() for name in names]) - start.bfloat16().float()
    assert 0.9 < (found @ moved) / (moved @ moved) < 1.1


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_fused_backward_pass_trains_the_same_weights(
    optimizer: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [*OPTIMIZERS[optimizer], "--max_train_steps=3", "--max_grad_norm=0", "--train_text_encoder"]
    plain = saved(run(full, *flags, f"--output_dir={tmp_path / 'plain'}"))
    gradients: list[int] = []
    update = full.PerParameterOptimizer.update

    def count(self: Any, number: int) -> None:
        gradients.append(sum(parameter.grad is not None for parameter, _, _ in self.optimizers))
        update(self, number)

    monkeypatch.setattr(full.PerParameterOptimizer, "update", count)
    fused = saved(run(full, *flags, "--fused_backward_pass"))
    assert same(plain, fused)
    assert max(gradients) == 1


@pytest.mark.parametrize("fused", [[], ["--fused_backward_pass"]], ids=["plain", "fused"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bf16_weights_resume_exactly(optimizer: str, fused: list[str], run: Run, tmp_path: Path) -> None:
    flags = [*OPTIMIZERS[optimizer], *fused, "--full_bf16", "--mixed_precision=bf16", "--learning_rate=1e-3"]
    flags += ["--checkpointing_steps=2", "--max_train_steps=4", "--lr_scheduler=linear", "--lr_warmup_steps=2"]
    flags += ["--train_text_encoder"]
    whole = saved(run(full, *flags, f"--output_dir={tmp_path / 'whole'}"))
    assert {value.dtype for value in whole.values()} == {torch.bfloat16}
    interrupted = tmp_path / "whole" / "checkpoint-2"
    again = saved(run(full, *flags, f"--resume_from_checkpoint={interrupted}"))
    assert same(whole, again)


def test_states_come_back_in_their_own_dtypes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[set[torch.dtype]] = []
    save_results = full.save_results

    def keep(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        states = torch.utils._pytree.tree_leaves(trained.optimizer.optimizer.state_dict())
        found.append({state.dtype for state in states if isinstance(state, Tensor)})
        save_results(args, accelerator, trained, dtype)

    monkeypatch.setattr(full, "save_results", keep)
    flags = ["--full_bf16", "--mixed_precision=bf16", "--use_8bit_adam", "--checkpointing_steps=1"]
    run(full, *flags, "--max_train_steps=1")
    run(full, *flags, "--max_train_steps=2", "--resume_from_checkpoint=latest")
    assert found == [{torch.uint8, torch.float32}] * 2


def test_a_fused_backward_pass_logs_the_norm_of_the_whole_gradient_and_clips_each_tensor(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    logged: list[dict[str, float]] = []
    monkeypatch.setattr(Accelerator, "log", lambda self, values, *_, **__: logged.append(values))
    for number, fused in enumerate([[], ["--fused_backward_pass"]]):
        run(full, *fused, "--max_train_steps=1", f"--output_dir={tmp_path / str(number)}")
    plain, in_backward = (values["grad_norm"] for values in logged)
    assert in_backward == pytest.approx(plain, rel=1e-5)

    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))]
    PartialState(cpu=True)
    groups = [{"params": weights, "lr": 1.0}]
    optimizer = full.PerParameterOptimizer(groups, lambda group: torch.optim.SGD(group), [], 0)
    optimizer.fuse(1.0)
    (weights[0].sum() * 10 + weights[1].sum() * 0.1).backward()
    assert weights[0].norm().item() == pytest.approx(1.0, abs=1e-5)  # clipped to the norm of 1
    assert torch.allclose(weights[1], torch.full((3,), -0.1))  # not clipped


def test_a_broken_loss_reaches_no_weight_of_a_fused_backward_pass(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    updates: list[int] = []
    flow_matching_loss = full.flow_matching_loss
    monkeypatch.setattr(full, "flow_matching_loss", lambda *args: flow_matching_loss(*args) * math.nan)
    monkeypatch.setattr(full.PerParameterOptimizer, "update", lambda self, number: updates.append(number))
    with pytest.raises(full.RunError, match="the loss is nan"):
        run(full, "--fused_backward_pass")
    assert not updates


def test_rounding_draws_from_generators_of_its_own() -> None:
    found = []
    for seed in (0, 0, 1):
        PartialState(cpu=True)
        weight = nn.Parameter(torch.linspace(-1, 1, 1000, dtype=torch.bfloat16))
        weight.grad = torch.ones_like(weight)
        optimizer = full.PerParameterOptimizer([{"params": [weight], "lr": 1e-3}], torch.optim.SGD, [], seed)
        torch.manual_seed(5)
        optimizer.step()
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))
        found.append(weight.data)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--full_bf16", "--mixed_precision=no"], "--full_bf16 needs --mixed_precision=bf16"),
        (["--fused_backward_pass", "--gradient_accumulation_steps=2"], "give --gradient_accumulation_steps=1"),
        (["--full_bf16", "--optimizer=prodigy"], "give AdamW or adafactor"),
    ],
)
def test_contradictions_of_full_fine_tuning_are_refused(
    flags: list[str], message: str, base_flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        full.parse_args([*base_flags, *flags])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flag", "precision"), [("--full_bf16", "no"), ("--fused_backward_pass", "fp16")])
def test_the_precision_of_the_configuration_counts_too(
    base_flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flag: str,
    precision: str,
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    with pytest.raises(SystemExit):
        full.parse_args([*base_flags, flag])
    assert flag in capsys.readouterr().err


def test_swapping_needs_checkpointing(base_flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        lora.parse_args([*base_flags, "--blocks_to_swap=2"])
    assert "--blocks_to_swap needs --gradient_checkpointing" in capsys.readouterr().err


# ---- compiling, attention, and the loop ------------------------------------------------------------------------------

COMPILED = {
    "full with checkpointing": (full, ["--gradient_checkpointing"]),
    "full in bf16 with updates in the backward pass": (
        full, ["--mixed_precision=bf16", "--full_bf16", "--fused_backward_pass"],
    ),
    "LoRA with checkpointing and swapped blocks on int8": (
        lora, ["--gradient_checkpointing", "--base_quantization=int8", "--blocks_to_swap=2"],
    ),
    "LoRA with buckets": (lora, ["--aspect_ratio_buckets=32,48;48,32", "--train_batch_size=1"]),
    "LoRA with the base as the prior": (
        lora, ["--prior_from_base_model", "--class_prompt=a pet", "--gradient_checkpointing", "--resolution=32,48"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPILED)
def test_compiled_blocks_train_as_uncompiled_ones(
    case: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two cases with autograd's graph traced too, as inductor does, and two with dynamo's alone, in half the time."""
    script, flags = COMPILED[case]
    backend = "AOT_EAGER" if "checkpointing" in case else "EAGER"
    flags = [
        *flags,
        "--max_train_steps=3",
        "--learning_rate=1e-3",
        "--validation_prompt=a dog",
        "--checkpointing_steps=3",
    ]
    found = losses(monkeypatch)
    eager = run(script, *flags, f"--output_dir={tmp_path / 'eager'}")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = run(script, *flags)
    assert 2 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= (16 if "prior" in case else 8)
    assert found[:3] == pytest.approx(found[3:], rel=1e-2 if "bf16" in case else 1e-5)  # bf16 has 8 bits
    for name in ("", "checkpoint-3"):
        one, other = saved(eager / name), saved(compiled / name)
        assert one.keys() == other.keys()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_graph_serves_all_blocks_of_a_kind(
    script: ModuleType, base_flags: list[str], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    """With a graph each, FLUX.1 [dev]'s 57 blocks would run into dynamo's limit of 8 and go on uncompiled."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    args = script.parse_args([*base_flags, *["--gradient_checkpointing"] * checkpointing])
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=10, num_single_layers=10, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    for name, weight in transformer.named_parameters():  # the first block's inputs need no gradient then
        weight.requires_grad_("to_q" in name and not name.startswith("transformer_blocks.0."))
    seen: list[bool] = []
    transformer.transformer_blocks[0].register_forward_hook(lambda _, inputs, out: seen.append(out[1].requires_grad))
    script.set_up_blocks(args, transformer)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    script.compile_blocks(Accelerator(), transformer)
    for _ in range(2):
        inputs = (torch.randn(1, 4, 8, 8), torch.rand(1), torch.randn(1, 5, 16), torch.randn(1, 16), torch.ones(1))
        script.predict_velocity(transformer.train(), *inputs).sum().backward()
    # What comes before the first adapter has a graph of its own, and keeps nothing for a backward pass.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3
    assert set(seen) == {False}
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_compiler_that_fails_is_said_and_the_run_goes_on(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    found = losses(monkeypatch)
    run(script, f"--output_dir={tmp_path / 'eager'}")

    def fail(graph: Any, inputs: Any) -> None:
        raise RuntimeError("no compiler here")

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **_: compile_(function, backend=fail))
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    torch._dynamo.reset()
    run(script)
    assert caplog.text.count("so the blocks run uncompiled: backend='fail' raised:") == 1
    assert found[:2] == found[2:]


@both_scripts
def test_the_attention_backend_is_the_one_asked_for(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = losses(monkeypatch)
    backends: list[set[Any]] = []
    save_results = script.save_results

    def keep(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        processors = script.unwrap(trained.transformer).attn_processors.values()
        backends.append({str(processor._attention_backend.value) for processor in processors})
        save_results(args, accelerator, trained, dtype)

    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(script, "save_results", keep)
    run(script, "--attention_backend=_native_math")
    assert backends == [{"_native_math"}] and not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    monkeypatch.setattr(script, "save_results", save_results)
    run(script, f"--output_dir={tmp_path / 'plain'}")
    assert not torch.backends.cuda.cudnn_sdp_enabled()  # its backward pass is not to be trusted
    assert found[:2] == pytest.approx(found[2:], rel=1e-4)


def test_the_next_inputs_are_made_before_the_loss_is_read(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    for name in ("prepare_inputs", "training_loss", "log_step"):
        function = getattr(script, name)

        def note(*args: Any, _name: str = name, _function: Any = function, **kwargs: Any) -> Any:
            order.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(script, name, note)
    run(script, "--max_train_steps=3")
    assert order == ["prepare_inputs"] + ["training_loss", "prepare_inputs", "log_step"] * 2 + [
        "training_loss",
        "log_step",
    ]


def test_queries_and_keys_keep_the_precision_of_a_norms_input(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA's autocast of torch 2.13, which makes an RMSNorm float32: flash attention would refuse that."""
    monkeypatch.setattr(nn.RMSNorm, "forward", lambda self, x: nn.functional.rms_norm(x.float(), x.shape[-1:]))
    dispatch, seen = transformer_flux.dispatch_attention_fn, set()

    def watch(*tensors: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.add(tuple(tensor.dtype for tensor in tensors[:3]))
        return dispatch(*tensors, **options)

    monkeypatch.setattr(transformer_flux, "dispatch_attention_fn", watch)
    run(script, "--mixed_precision=bf16")
    assert seen == {(torch.bfloat16,) * 3}


def test_a_device_tells_the_memory_that_is_in_use_and_not_only_what_is_named(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"active_bytes.all.peak": 3 * script.GIB, "allocated_bytes.all.peak": script.GIB}
    monkeypatch.setattr(torch, "get_device_module", lambda _: SimpleNamespace(memory_stats=lambda _: figures))
    assert script.peak_memory(torch.device("cuda"))["peak_device_memory"] == 3
