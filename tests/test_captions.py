"""Prompts: each picture owns its own, from a file beside it or a column; the trigger word; dropout; none is cut."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from torch import Tensor
from transformers import T5EncoderModel, T5TokenizerFast

from conftest import Run, both_scripts, one_script

pytestmark = one_script


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five pictures, of which three have captions, and other text files."""
    folder = tmp_path / "dogs"
    folder.mkdir()
    captions = {"0": " zero\n", "1": '\ufeffone "dog"', "3": "three, a dög", "4": "  \n", "notes": "no caption"}
    for number in range(5):
        Image.new("RGB", (40, 40), (50 * number, 0, 0)).save(folder / f"{number}.png")
    for name, caption in captions.items():
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")
    return folder


def parse(script: ModuleType, *flags: str) -> Any:
    return script.parse_args(["--pretrained_model_name_or_path=flux", "--resolution=32", *flags])


def prompts_of(script: ModuleType, folder: Path, *flags: str, source: str = "instance") -> list[tuple[str, ...]]:
    found = script.list_pictures(parse(script, f"--instance_data_dir={folder}", *flags))[source]
    return [picture.prompts for picture in found]


@pytest.mark.parametrize("extension", [".txt", "txt"])
def test_each_picture_has_its_caption_and_the_others_the_instance_prompt(
    script: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture, extension: str
) -> None:
    held = folder.rename(folder.with_name("held"))
    flags = [f"--caption_extension={extension}", "--instance_prompt=a dog"]
    wanted = [("zero",), ('one "dog"',), ("a dog",), ("three, a dög",), ("a dog",)]
    assert prompts_of(script, held, *flags) == wanted
    (warning,) = caplog.messages
    assert warning.endswith(": notes.txt")
    (folder.parent / "plain").mkdir()
    Image.new("RGB", (40, 40)).save(folder.parent / "plain" / "a.png")
    flags += ["--validation_loss", f"--validation_data_dir={held}"]
    assert prompts_of(script, folder.parent / "plain", *flags, source="validation") == wanted
    with pytest.raises(script.UsageError, match=r"--instance_prompt for them: 2\.png, 4\.png$"):
        prompts_of(script, held, f"--caption_extension={extension}")


def test_captions_that_nobody_asked_for_are_named_and_not_used(
    script: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert prompts_of(script, folder, "--instance_prompt=a dog") == [("a dog",)] * 5
    (warning,) = caplog.messages
    assert "--caption_extension" in warning and "0.txt, 1.txt, 3.txt, 4.txt, notes.txt" in warning


def test_the_trigger_word_stands_in_prompts_and_in_front_of_captions(script: ModuleType, folder: Path) -> None:
    for name, caption in {"0": "a dog who asks", "1": "a {trigger} dog", "3": "my sks dog"}.items():
        (folder / f"{name}.txt").write_text(caption)
    flags = ["--caption_extension=.txt", "--instance_prompt=a photo of {trigger}"]
    found = prompts_of(script, folder, *flags, "--trigger_word=sks")
    assert [prompt for (prompt,) in found] == [
        "sks a dog who asks", "a sks dog", "a photo of sks", "my sks dog", "a photo of sks",
    ]  # fmt: skip
    with pytest.raises(script.UsageError, match=r"1\.png: its caption has \{trigger\}, which needs --trigger_word"):
        prompts_of(script, folder, "--caption_extension=.txt", "--instance_prompt=a dog")


def drawn_prompts(script: ModuleType, folder: Path, dropout: float, seed: int, source: str = "instance") -> list[str]:
    """Prompts of 40 epochs of ten places."""
    flags = ["--instance_prompt=a dog", f"--caption_dropout={dropout}", f"--instance_data_dir={folder}"]
    args = parse(script, *flags)
    classes = [script.Picture("class", lambda: Image.new("RGB", (32, 32)), ("a cat",))]
    dataset = script.DreamBoothDataset(script.list_pictures(args)["instance"], classes, args, seed)
    assert ("" in dataset.prompts) == (dropout > 0)
    keys = [script.ExampleKey(epoch, place, place % 5, 1.0, True) for epoch in range(40) for place in range(10)]
    return [dataset[key][source]["prompt"] for key in keys]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_as_many_captions_are_left_out_as_asked_anew_in_each_epoch_and_none_of_the_class(
    script: ModuleType, folder: Path, share: float
) -> None:
    one, again, other = (drawn_prompts(script, folder, share, seed) for seed in (1, 1, 2))
    assert set(one) <= {"", "a dog"} and one == again
    assert abs(one.count("") - 400 * share) <= 5 * (400 * share * (1 - share)) ** 0.5
    assert set(drawn_prompts(script, folder, share, 0, "class")) == {"a cat"}
    if share == 0.25:
        assert 150 < sum(a == b for a, b in zip(one, other, strict=True)) < 350
        assert len({tuple(one[start : start + 10]) for start in range(0, 400, 10)}) > 30


@pytest.mark.parametrize("cached", [[], ["--cache_latents"]], ids=["pixels", "cached"])
def test_a_run_on_captions_alone_trains_each_picture_with_its_own_embedding_or_the_empty_one(
    script: ModuleType, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, cached: list[str], tiny_flux: Path
) -> None:
    seen: dict[tuple[int, str], Tensor] = {}
    prepare_inputs = script.prepare_inputs

    def record(run: Any, batch: dict[str, Any]) -> Any:
        inputs = prepare_inputs(run, batch)
        examples = (key.example for key in batch["keys"])
        seen.update(zip(zip(examples, batch["prompts"], strict=True), inputs.prompt_embeds, strict=True))
        return inputs

    monkeypatch.setattr(script, "prepare_inputs", record)
    for number in range(5):
        (folder / f"{number}.txt").write_text(f"dog {number}")
    flags = ["--instance_prompt=", f"--instance_data_dir={folder}", "--caption_extension=.txt", *cached]
    run(script, *flags, "--caption_dropout=0.5", "--train_batch_size=5", "--max_train_steps=6")
    assert seen.keys() == {(number, prompt) for number in range(5) for prompt in (f"dog {number}", "")}
    pipeline = FluxPipeline.from_pretrained(tiny_flux, transformer=None, vae=None)
    for (_, prompt), embeds in seen.items():
        torch.testing.assert_close(embeds, pipeline.encode_prompt(prompt, max_sequence_length=16)[0][0])


def test_every_prompt_that_a_picture_owns_is_encoded(
    script: ModuleType, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever lets `choose_prompt` choose among several changes nothing else."""
    trained: set[str] = set()
    found, prepare = script.pictures_in_folder, script.prepare_inputs
    two = lambda *given: [replace(one, prompts=(*one.prompts, f"another of {one.name}")) for one in found(*given)]  # noqa: E731
    monkeypatch.setattr(script, "pictures_in_folder", two)
    monkeypatch.setattr(script, "prepare_inputs", lambda *given: trained.update(given[1]["prompts"]) or prepare(*given))
    monkeypatch.setattr(script.Picture, "choose_prompt", lambda picture, *_: picture.prompts[1])
    run(script, "--trigger_word=sks", "--train_batch_size=5", "--max_train_steps=1")
    assert trained == {f"sks another of dog_{number:02d}.png" for number in range(5)}


@both_scripts
def test_prompts_of_100_and_512_tokens_are_encoded_and_trained_whole(
    script: ModuleType, run: Run, base_flags: list[str], folder: Path, tiny_flux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    forward = FluxTransformer2DModel.forward

    def record(model: Any, **given: Any) -> Any:
        seen.extend(given["encoder_hidden_states"])
        assert given["txt_ids"].shape == (512, 3)
        return forward(model, **given)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", record)
    prompts = ["s" * 97 + "z", "s" * 509 + "z"]  # a letter is a token, and so are the start and the end
    for number, prompt in enumerate(prompts):
        (folder / f"{number}.txt").write_text(prompt)
    base_flags.remove("--max_sequence_length=16")
    length = [] if "lora" in script.__name__ else ["--max_sequence_length=512"]  # the default of LoRA alone
    flags = [f"--instance_data_dir={folder}", "--caption_extension=.txt", "--train_batch_size=5"]
    run(script, *flags, *length, "--max_train_steps=1")

    tokenizer = T5TokenizerFast.from_pretrained(tiny_flux, subfolder="tokenizer_2")
    encoder = T5EncoderModel.from_pretrained(tiny_flux, subfolder="text_encoder_2")
    for prompt in prompts:
        ids = tokenizer(prompt).input_ids
        assert len(ids) in (100, 512)
        with torch.no_grad():
            expected = encoder(torch.tensor([ids + [0] * (512 - len(ids))]))[0][0]
        assert min(float((embeds - expected).abs().max()) for embeds in seen) < 1e-4
    assert len(seen) == 5


def test_prompts_that_t5_does_not_read_to_their_end_are_counted_before_training(
    script: ModuleType, run: Run, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, letters in enumerate((3, 13, 14, 20, 80)):
        (folder / f"{number}.txt").write_text("s" * letters)
    flags = [f"--instance_data_dir={folder}", "--caption_extension=.txt", "--max_train_steps=1"]
    run(script, *flags, "--max_sequence_length=15")
    (told,) = [message for message in caplog.messages if "--max_sequence_length" in message]
    assert "--max_sequence_length=15 cuts 3 prompts: " in told
