"""The random checkpoint: it loads and draws, has FLUX.1's shapes, and is the same wherever it is written."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import random_flux

PROMPTS = ["a photo of sks dog", "a photo of sks dogs", "a photo of dog sks", "a photo of sks cat", "sks", "sks!", ""]


def draw(pipeline: FluxPipeline, prompt: str = "a photo of sks dog", guidance: float = 3.5) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt, guidance_scale=guidance, generator=torch.Generator().manual_seed(0), height=32, width=48,
        num_inference_steps=2, max_sequence_length=16,
    ).images[0]  # fmt: skip
    return np.asarray(image).astype(int)


@pytest.fixture(scope="module")
def pipeline(tiny_flux: Path) -> FluxPipeline:
    return FluxPipeline.from_pretrained(tiny_flux)


def test_the_picture_depends_on_the_prompt_and_on_the_guidance_of_a_guided_model(
    pipeline: FluxPipeline, tiny_schnell: Path
) -> None:
    picture, schnell = draw(pipeline), FluxPipeline.from_pretrained(tiny_schnell)
    assert picture.shape == (32, 48, 3) and picture.std() > 5
    assert np.abs(picture - draw(pipeline, "a cat")).max() > 0
    assert np.abs(picture - draw(pipeline, guidance=30.0)).max() > 0
    assert draw(schnell).std() > 5 and np.array_equal(draw(schnell), draw(schnell, guidance=30.0))


def test_the_dev_size_has_the_parameters_and_blocks_of_flux_1_dev(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As counted in the published checkpoint."""
    models: dict[str, Any] = {}

    def keep(model: Any, folder: Path, stem: str, dtype: torch.dtype, seed: int, **_: Any) -> None:
        models[folder.name] = model
        assert dtype == torch.bfloat16 and {parameter.device.type for parameter in model.parameters()} == {"meta"}

    monkeypatch.setattr(random_flux, "write_model", keep)
    random_flux.write_checkpoint(tmp_path, size="dev")
    counts = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    assert counts == {
        "transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder": 123_060_480, "text_encoder_2": 4_762_310_656,
    }  # fmt: skip
    transformer = models["transformer"]
    for blocks, count, parameters in (
        (transformer.transformer_blocks, 19, 339_831_296),
        (transformer.single_transformer_blocks, 38, 141_591_808),
    ):
        assert [sum(weight.numel() for weight in block.parameters()) for block in blocks] == [parameters] * count
    shapes = {name: tuple(weight.shape) for name, weight in transformer.named_parameters()}
    assert shapes["x_embedder.weight"] == (3072, 64) and shapes["context_embedder.weight"] == (3072, 4096)
    assert tuple(transformer.config.axes_dims_rope) == (16, 56, 56)


def test_shards_are_no_larger_than_asked_and_load_as_the_model_that_one_file_holds(tmp_path: Path) -> None:
    sizes: dict[str, Any] = random_flux.TRANSFORMER | random_flux.SIZES["tiny"]["transformer"]
    for name, limit in (("whole", "4GB"), ("sharded", "300KB")):
        with torch.device("meta"):
            model = FluxTransformer2DModel(**sizes, guidance_embeds=True)
        random_flux.write_model(model, tmp_path / name, "diffusion_pytorch_model", torch.float32, 0, limit)
    files = {path.name: load_file(path) for path in (tmp_path / "sharded").glob("*.safetensors")}
    lengths = [sum(tensor.numel() * 4 for tensor in tensors.values()) for tensors in files.values()]
    assert len(files) > 3 and max(lengths) <= 300_000
    (index,) = (json.loads(path.read_text()) for path in (tmp_path / "sharded").glob("*.index.json"))
    assert index["weight_map"] == {name: file for file, tensors in files.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(lengths)
    first, second = (FluxTransformer2DModel.from_pretrained(tmp_path / name) for name in ("whole", "sharded"))
    other = second.state_dict()
    assert [name for name, tensor in first.state_dict().items() if not torch.equal(tensor, other[name])] == []


def test_weights_keep_the_size_of_what_passes_through(pipeline: FluxPipeline) -> None:
    matrices = [weight for weight in pipeline.transformer.parameters() if weight.ndim == 2 and weight.numel() > 4000]
    deviations = [float(weight.detach().std()) * math.sqrt(weight.shape[1]) for weight in matrices]
    assert len(matrices) > 30 and deviations == pytest.approx([1.0] * len(matrices), abs=0.1)


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_same_seed_writes_the_same_bytes_and_the_command_what_its_flags_say(
    tiny_flux: Path, tiny_schnell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.rand(3)  # what was drawn before does not matter
    assert digests(random_flux.write_checkpoint(tmp_path / "same")) == digests(tiny_flux)
    flags = ["--no_guidance_embeds", "--seed", "5", "--pictures", str(tmp_path / "pictures")]
    monkeypatch.setattr("sys.argv", ["random_flux.py", str(tmp_path / "other"), *flags])
    random_flux.main()
    first, other = digests(tiny_schnell), digests(tmp_path / "other")
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")} and len(changed) == 4
    assert len(list((tmp_path / "pictures").iterdir())) == 5


@pytest.mark.parametrize(("which", "length"), [("tokenizer", 77), ("tokenizer_2", 512)], ids=["CLIP", "T5"])
def test_distinct_prompts_have_distinct_ids_in_the_models_vocabulary_and_long_ones_are_cut(
    pipeline: FluxPipeline, which: str, length: int
) -> None:
    tokenizer, model = getattr(pipeline, which), getattr(pipeline, which.replace("tokenizer", "text_encoder"))
    ids = [tokenizer(prompt, padding="max_length", truncation=True).input_ids for prompt in PROMPTS]
    assert [pair for pair in itertools.combinations(ids, 2) if pair[0] == pair[1]] == []
    ids += tokenizer(["".join(map(chr, range(32, 127))), "é ü 漢 🐕"], padding=True).input_ids
    assert min(map(min, ids)) >= 0 and max(map(max, ids)) < model.config.vocab_size
    long = tokenizer("sks dog " * 200, padding="max_length", truncation=True).input_ids
    assert tokenizer.model_max_length == len(long) == length and long[-1] == tokenizer.eos_token_id


def test_t5_pads_ends_and_fails_with_its_published_ids_and_its_ids_tell_the_prompt(pipeline: FluxPipeline) -> None:
    tokenizer, prompt = pipeline.tokenizer_2, "A photo of sks dog, 3 times!"
    assert tokenizer("a 漢", padding="max_length", max_length=8).input_ids[-5:] == [2, 1, 0, 0, 0]
    assert tokenizer.decode(tokenizer(prompt).input_ids, skip_special_tokens=True) == prompt


def test_clip_starts_and_ends_a_prompt_with_its_highest_ids_and_pools_where_it_ends(pipeline: FluxPipeline) -> None:
    ids = pipeline.tokenizer("sks", padding="max_length", return_tensors="pt").input_ids
    letters = pipeline.tokenizer.convert_tokens_to_ids(["s", "k", "s</w>"])
    assert ids[0].tolist() == [512, *letters, *[513] * 73] and max(letters) < 512
    with torch.no_grad():
        out = pipeline.text_encoder(ids)
    assert torch.equal(out.pooler_output[0], out.last_hidden_state[0, 4])


def test_sample_pictures_show_one_dog_in_different_scenes_lying_standing_and_square(tmp_path: Path) -> None:
    images = [Image.open(path).convert("RGB") for path in random_flux.write_pictures(tmp_path / "small")]
    large = [Image.open(path) for path in random_flux.write_pictures(tmp_path / "large", scale=3)]
    assert [image.size for image in large] == [(3 * image.width, 3 * image.height) for image in images]
    assert {int(np.sign(image.width - image.height)) for image in images} == {-1, 0, 1}
    assert len({image.size for image in images}) == len({image.getpixel((0, 0)) for image in images}) == 5
    for image in images:
        pixels = np.asarray(image).reshape(-1, 3)
        dog = [(pixels == colour).all(1).mean() for colour in ((139, 69, 19), (210, 105, 30))]  # body and head
        assert min(dog) > 0.01
