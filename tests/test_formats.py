"""Files that load elsewhere: what the loaders make of them is the model that was trained."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth_flux as full_script
import train_dreambooth_lora_flux as script
from conftest import Run

PLAIN = ("--learning_rate=1e-2", "--rank=4", "--lora_alpha=16")
TRAINED = (*PLAIN, "--train_text_encoder", "--text_encoder_lr=1e-2")


def draw(pipeline: FluxPipeline) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    options = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 16, "output_type": "np"}
    return pipeline("a photo of sks dog", generator=torch.Generator().manual_seed(0), **options).images


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch, tiny_flux: Path) -> list[np.ndarray]:
    """What the live models draw when the result is saved."""
    drawn: list[np.ndarray] = []
    save = script.save_results

    def record(args: Any, accelerator: Any, trained: Any, dtype: Any) -> None:
        names = {"transformer": trained.transformer, "text_encoder": trained.text_encoder}
        models = {name: model.eval() for name, model in names.items() if model is not None}
        drawn.append(draw(FluxPipeline.from_pretrained(tiny_flux, **models)))
        save(args, accelerator, trained, dtype)

    monkeypatch.setattr(script, "save_results", record)
    return drawn


@pytest.mark.parametrize("flags", [(), ("--use_rslora",), ("--use_dora",), ("--use_rslora", "--use_dora")])
def test_diffusers_draws_with_the_file_what_the_live_model_draws(
    run: Run, live: list[np.ndarray], tiny_flux: Path, flags: tuple[str, ...]
) -> None:
    output = run(script, *(PLAIN if "--use_dora" in flags else TRAINED), *flags, "--max_train_steps=4")
    pipeline = FluxPipeline.from_pretrained(tiny_flux)
    before = draw(pipeline)
    pipeline.load_lora_weights(output, weight_name="pytorch_lora_weights.safetensors")
    after = draw(pipeline)
    assert np.abs(after - before).max() > 0.05
    assert np.abs(after - live[0]).max() < 1e-4


@pytest.mark.parametrize("flags", [("--use_rslora",), ("--use_dora",)])
def test_they_are_other_adapters(run: Run, live: list[np.ndarray], flags: tuple[str, ...], tmp_path: Path) -> None:
    run(script, *PLAIN)
    run(script, *PLAIN, *flags, f"--output_dir={tmp_path / 'other'}")
    assert np.abs(live[0] - live[1]).max() > 1e-3


def test_dora_resumes_exactly(run: Run, tmp_path: Path) -> None:
    flags = (*PLAIN, "--use_dora", "--max_train_steps=3", "--checkpointing_steps=2")
    whole = run(script, *flags)
    resumed = run(
        script, *flags, f"--output_dir={tmp_path / 'resumed'}", f"--resume_from_checkpoint={whole / 'checkpoint-2'}"
    )
    one, other = (load_file(output / script.LORA_FILE) for output in (whole, resumed))
    assert any("magnitude" in name for name in one) and all(torch.equal(one[name], other[name]) for name in one)


def deltas(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Layer to what its adapter adds to its weight, of a file in diffusers' format."""
    names = [name.removesuffix(".lora_A.weight") for name in state if name.endswith(".lora_A.weight")]
    return {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] * scale for name in names}


FUSED = {  # layer here: layer of ComfyUI and kohya, and which part of its rows
    "attn.to_q": ("img_attn_qkv", 0), "attn.to_k": ("img_attn_qkv", 1), "attn.to_v": ("img_attn_qkv", 2),
    "attn.add_q_proj": ("txt_attn_qkv", 0), "attn.add_k_proj": ("txt_attn_qkv", 1),
    "attn.add_v_proj": ("txt_attn_qkv", 2), "attn.to_out.0": ("img_attn_proj", 0),
    "attn.to_add_out": ("txt_attn_proj", 0), "ff.net.0.proj": ("img_mlp_0", 0), "ff.net.2": ("img_mlp_2", 0),
    "ff_context.net.0.proj": ("txt_mlp_0", 0), "ff_context.net.2": ("txt_mlp_2", 0),
}  # fmt: skip


def kohya_delta(state: dict[str, Tensor], name: str) -> Tensor:
    """What ComfyUI and kohya's scripts add to a weight: alpha / rank times up times down."""
    up, down = (state[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
    return state[f"{name}.alpha"] / down.shape[0] * (up @ down)


@pytest.mark.parametrize(
    ("flags", "scale"), [((), 4.0), (("--use_rslora",), 8.0), (("--lora_layers=attn.to_v,ff.net.2",), 4.0)]
)
def test_kohyas_file_adds_the_same_to_the_weights(run: Run, flags: tuple[str, ...], scale: float) -> None:
    output = run(script, *TRAINED, *flags, "--save_kohya_format")
    wanted = deltas(load_file(output / "pytorch_lora_weights.safetensors"), scale)
    state = load_file(output / "pytorch_lora_weights_kohya.safetensors")
    used = set()
    for name, delta in wanted.items():
        part, kind, *rest = name.split(".")
        if part == "text_encoder":
            kohya, rows = "lora_te1_text_model_" + "_".join(name.split(".")[1:]).removeprefix("text_model_"), (0, 1)
        elif kind == "transformer_blocks":
            layer, at = FUSED[".".join(rest[1:])]
            kohya, rows = f"lora_unet_double_blocks_{rest[0]}_{layer}", (at, 3 if layer.endswith("qkv") else 1)
        else:
            at = ["attn.to_q", "attn.to_k", "attn.to_v"].index(".".join(rest[1:]))
            kohya, rows = f"lora_unet_single_blocks_{rest[0]}_linear1", (at, None)
        used.add(kohya)
        whole = kohya_delta(state, kohya)
        size = len(delta)
        assert rows[1] is None or len(whole) == rows[1] * size
        torch.testing.assert_close(whole[rows[0] * size : (rows[0] + 1) * size], delta, rtol=1e-4, atol=1e-6)
        if rows[1] is None:  # the rows of the MLP's input, which has no adapter
            assert whole[3 * size :].abs().max() == 0 and len(whole) == 3 * size + 4 * size
    assert {name.split(".")[0] for name in state} == used and len(state) == 3 * len(used)


def test_diffusers_own_reader_of_kohyas_format_gives_the_adapters_back() -> None:
    """At FLUX.1 [dev]'s sizes, which that reader takes for granted."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
    generator, layers = torch.Generator().manual_seed(0), {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "_blocks." in path:
            layers[f"{path}.lora_A.weight"] = torch.randn(2, module.in_features, generator=generator)
            layers[f"{path}.lora_B.weight"] = torch.randn(module.out_features, 2, generator=generator)
    assert len(layers) == 2 * (14 + 6)
    back = _convert_kohya_flux_lora_to_diffusers(script.to_kohya(model, layers, 0.5))
    back = {name.removeprefix("transformer."): value for name, value in back.items()}
    assert back.keys() == layers.keys()
    for name in (name for name in layers if "lora_A" in name):  # a product with a vector, which is cheap
        x, up = torch.randn(layers[name].shape[1], generator=generator), name.replace("lora_A", "lora_B")
        torch.testing.assert_close(
            back[up] @ (back[name] @ x), layers[up] @ (layers[name] @ x) / 2, rtol=1e-3, atol=1e-3
        )


def test_a_layer_that_kohya_has_no_name_for_is_left_out_with_a_warning(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    output = run(script, "--lora_layers=x_embedder,attn.to_q", "--save_kohya_format")
    assert "leaves out x_embedder" in caplog.text
    assert not [name for name in load_file(output / script.KOHYA_FILE) if "embedder" in name]


def test_the_single_file_is_the_transformer_in_bfloat16(run: Run) -> None:
    output = run(full_script, "--save_single_file", "--learning_rate=1e-2")
    expected = FluxTransformer2DModel.from_pretrained(output / "transformer", dtype=torch.bfloat16)
    got = FluxTransformer2DModel.from_single_file(
        output / "transformer_bf16.safetensors", config=str(output / "transformer"), dtype=torch.bfloat16
    )
    for (name, one), (_, other) in zip(got.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(one, other) and one.dtype == torch.bfloat16, name


def test_extra_files_are_written_on_request_only(run: Run, tmp_path: Path) -> None:
    assert not (run(script) / script.KOHYA_FILE).exists()
    assert not (run(full_script, f"--output_dir={tmp_path / 'full'}") / full_script.SINGLE_FILE).exists()
