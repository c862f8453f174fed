"""Captions beside the pictures: off unless asked for, each with its own picture, and dropped as often as asked."""

import logging
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from PIL import Image

from conftest import Run, one_script

pytestmark = one_script

FILES = [("dog_03.png", "three, a dog"), ("dog_01.png", 'one "dog"'), ("dog_00.png", " zero\n")]  # 02 and 04 have none


@pytest.fixture
def folder(pictures: Path, tmp_path: Path) -> Path:
    """The five pictures without captions."""
    return Path(shutil.copytree(pictures, tmp_path / "dogs"))


def write_files(folder: Path) -> list[str]:
    for name, caption in FILES:
        (folder / name).with_suffix(".txt").write_text(caption)
    (folder / "dog_04.txt").write_text("  \n")
    (folder / "notes.txt").write_text("no caption")
    return ["--caption_extension=.txt"]


WANTED = ["zero", 'one "dog"', None, "three, a dog", None]


def parse(script: ModuleType, folder: Path, *flags: str) -> Any:
    base = ["--pretrained_model_name_or_path=flux", f"--instance_data_dir={folder}", "--resolution=32"]
    return script.parse_args([*base, *flags])


def test_each_picture_has_its_caption_and_the_others_the_instance_prompt(
    script: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    args = parse(script, folder, *write_files(folder), "--instance_prompt=a sks dog")
    with caplog.at_level(logging.WARNING):
        found = script.list_pictures(args)["instance"]
    assert [picture.prompt for picture in found] == [caption or "a sks dog" for caption in WANTED]
    assert [picture.name for picture in found] == [f"dogs/dog_{number:02d}.png" for number in range(5)]
    (warning,) = caplog.messages
    assert "2 pictures" in warning and "dog_02.png, dog_04.png" in warning


def test_pictures_with_neither_caption_nor_prompt_are_named_in_one_error(script: ModuleType, folder: Path) -> None:
    with pytest.raises(script.UsageError, match=r"--instance_prompt for these: dog_02\.png, dog_04\.png$"):
        script.list_pictures(parse(script, folder, *write_files(folder)))


def test_captions_that_nobody_asked_for_are_noted_and_not_used(script: ModuleType, folder: Path) -> None:
    write_files(folder)
    (folder / "metadata.jsonl").write_text("")
    args = parse(script, folder, "--instance_prompt=a sks dog")
    assert [picture.prompt for picture in script.list_pictures(args)["instance"]] == ["a sks dog"] * 5
    (note,) = script.notes_on_args(args)
    assert "--caption_extension" in note and "--dataset_name" in note
    assert "metadata.jsonl, dog_00.txt, dog_01.txt, dog_03.txt, dog_04.txt" in note and "notes.txt" not in note


def test_captions_in_use_are_not_noted(script: ModuleType, folder: Path) -> None:
    assert list(script.notes_on_args(parse(script, folder, *write_files(folder)))) == []


def test_a_caption_that_is_not_utf_8_is_told_by_flag_and_file(script: ModuleType, folder: Path) -> None:
    (folder / "dog_00.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(script.UsageError) as error:
        script.list_pictures(parse(script, folder, "--caption_extension=.txt", "--instance_prompt=a sks dog"))
    for words in ("--caption_extension=.txt", "dog_00.txt", "UTF-8"):
        assert words in str(error.value)


def test_what_is_ignored_in_a_folder_is_named(
    script: ModuleType, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("phone.heic", "unnamed", "notes.txt", ".DS_Store", "dog_00.tags"):
        (folder / name).write_bytes(b"")
    (folder / "more").mkdir()
    (folder / "gone.png").symlink_to("nowhere.png")
    flags = ("--instance_prompt=a sks dog", "--caption_extension=.tags")
    assert len(script.list_pictures(parse(script, folder, *flags))["instance"]) == 5
    assert "ignored: gone.png, more, phone.heic, unnamed" in caplog.text
    assert "notes.txt" not in caplog.text and ".DS_Store" not in caplog.text


def test_held_out_pictures_have_captions_too(script: ModuleType, folder: Path, pictures: Path) -> None:
    flags = [
        *write_files(folder),
        "--instance_prompt=a sks dog",
        "--validation_loss",
        f"--validation_data_dir={folder}",
    ]
    found = script.list_pictures(parse(script, folder, *flags))["validation"]
    assert [picture.prompt for picture in found] == [caption or "a sks dog" for caption in WANTED]


def test_held_out_pictures_of_a_dataset_keep_the_instance_prompt(script: ModuleType, folder: Path) -> None:
    (folder / "metadata.csv").write_text("file_name,words\n" + "".join(f"dog_{n:02d}.png,dog {n}\n" for n in range(5)))
    flags = [
        "--instance_data_dir=",
        f"--dataset_name={folder}",
        "--caption_column=words",
        "--instance_prompt=a sks dog",
    ]
    found = script.list_pictures(parse(script, folder, *flags, "--validation_loss", f"--validation_data_dir={folder}"))
    assert {picture.prompt for picture in found["validation"]} == {"a sks dog"}
    assert sorted(picture.prompt for picture in found["instance"]) == [f"dog {number}" for number in range(5)]


def dataset_of(script: ModuleType, folder: Path, dropout: float, seed: int = 0) -> Any:
    args = parse(script, folder, "--instance_prompt=a sks dog", f"--caption_dropout={dropout}")
    with_class = [script.Picture("class", lambda: Image.new("RGB", (32, 32)), "a dog")]
    return script.DreamBoothDataset(script.list_pictures(args)["instance"], with_class, args, seed)


def drawn_prompts(script: ModuleType, dataset: Any, half: str = "instance") -> list[str]:
    """Prompts of 40 epochs of ten places."""
    dataset.cached = defaultdict(dict)  # instead of latents: no picture need be opened
    keys = [script.ExampleKey(epoch, place, place % 5, 1.0, True) for epoch in range(40) for place in range(10)]
    return [dataset[key][half]["prompt"] for key in keys]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.9])
def test_as_many_captions_are_left_out_as_asked_and_none_of_the_class(
    script: ModuleType, folder: Path, share: float
) -> None:
    dataset = dataset_of(script, folder, share)
    counts = Counter(drawn_prompts(script, dataset))
    assert (
        counts.keys() <= {"", "a sks dog"} and abs(counts[""] - 400 * share) <= 5 * (400 * share * (1 - share)) ** 0.5
    )
    assert set(drawn_prompts(script, dataset, "class")) == {"a dog"}
    assert ("" in dataset.prompts) == (share > 0)


def test_which_captions_are_left_out_is_the_seeds_and_the_places(script: ModuleType, folder: Path) -> None:
    one, again, other = (drawn_prompts(script, dataset_of(script, folder, 0.5, seed)) for seed in (1, 1, 2))
    assert one == again
    assert 150 < sum(a == b for a, b in zip(one, other, strict=True)) < 250
    assert len({tuple(one[start : start + 10]) for start in range(0, 400, 10)}) > 35  # each epoch draws anew


@pytest.mark.parametrize("cached", [[], ["--cache_latents"]], ids=["pixels", "cached"])
def test_a_run_on_captions_alone_trains_each_picture_with_its_own_embedding_or_the_empty_one(
    script: ModuleType, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, cached: list[str]
) -> None:
    seen: set[tuple[int, str]] = set()
    prepare_inputs = script.prepare_inputs

    def record(run: Any, batch: dict[str, Any], *more: Any) -> Any:
        inputs = prepare_inputs(run, batch, *more)
        for key, prompt, embeds in zip(batch["keys"], batch["prompts"], inputs.prompt_embeds, strict=True):
            seen.add((key.example, prompt))
            assert bool((embeds == run.data.prompts[prompt].prompt_embeds).all())
        return inputs

    monkeypatch.setattr(script, "prepare_inputs", record)
    for number in range(5):
        (folder / f"dog_{number:02d}.txt").write_text(f"dog {number}")
    flags = ["--instance_prompt=", f"--instance_data_dir={folder}", "--caption_extension=.txt", *cached]
    output = run(script, *flags, "--caption_dropout=0.5", "--train_batch_size=5", "--max_train_steps=6")
    assert seen == {(number, prompt) for number in range(5) for prompt in (f"dog {number}", "")}
    assert "None" not in (output / "README.md").read_text()


def test_prompts_that_an_encoder_cuts_are_counted_before_training(
    script: ModuleType, run: Run, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, letters in enumerate((3, 13, 20, 75, 80)):  # the tiny tokenizers read letters and add two marks
        (folder / f"dog_{number:02d}.txt").write_text("s" * letters)
    flags = ["--instance_prompt=", f"--instance_data_dir={folder}", "--caption_extension=.txt"]
    with caplog.at_level(logging.INFO):
        run(script, *flags, "--max_sequence_length=15", "--max_train_steps=1")
    told = [message for message in caplog.messages if "prompts are cut" in message]
    assert [message.split(" of ")[0] for message in told] == [
        "1 prompts are cut: CLIP reads 77 tokens",
        "3 prompts are cut: T5 (--max_sequence_length) reads 15 tokens",
    ]


def test_a_caption_with_the_trigger_needs_a_word_for_it(script: ModuleType, folder: Path) -> None:
    (folder / "dog_00.txt").write_text("a photo of {trigger} in snow")
    args = parse(script, folder, "--caption_extension=.txt", "--instance_prompt=a dog")
    with pytest.raises(script.UsageError, match=r"the caption of .* has \{trigger\}, which stands for --trigger_word"):
        script.list_pictures(args)


def test_pictures_of_a_folder_that_the_datasets_library_leaves_out_are_counted(
    script: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "dogs"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (40, 40), "navy").save(folder / f"{name}.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a dog"}\n')
    flags = [
        f"--dataset_name={folder}",
        "--instance_data_dir=",
        "--caption_column=text",
        f"--cache_dir={tmp_path / 'cache'}",
    ]
    assert len(script.list_pictures(parse(script, folder, *flags, "--instance_prompt=a dog"))["instance"]) == 1
    assert "of whose 3 picture files 1 are used" in caplog.text
