"""The small world is read as it was drawn, and in it the LoRA script teaches a subject and keeps the rest."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.small_world import compare, draw, measure, pretrain, read, table


def test_pictures_are_read_as_they_were_drawn() -> None:
    assert read.accuracy(noise=10, count=60) == (1.0, 1.0)


def test_a_picture_is_a_function_of_its_seed() -> None:
    things = [(draw.subject_looks(number), draw.subject_scenes(number, 3)[2]) for number in range(6)]
    one, two = ([draw.draw(*thing, np.random.default_rng(7)) for thing in things] for _ in range(2))
    assert np.array_equal(one, two)
    assert [looks.kind for looks, _ in things] == draw.CLASSES


def test_a_subject_is_never_seen_in_the_places_of_the_measure() -> None:
    for number in range(10):
        seen, unseen = draw.subject_places(number)
        assert {scene.place for scene in draw.subject_scenes(number, 20)} == set(seen)
        assert len(unseen) == 3 and not {*seen} & {*unseen}


def test_the_base_draws_what_captions_ask_for() -> None:
    figures = measure.base_figures(measure.load(), count=50)
    assert figures["class, colour and place"] >= 0.8 and figures["clear"] >= 0.85, figures


def test_the_checkpoint_is_made_by_one_command_or_after_a_cut_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few steps of each stage; what the whole command reaches stands in benchmarks/results.md."""
    monkeypatch.setattr(pretrain, "SEEN", 64)
    monkeypatch.setattr(pretrain, "MEASURED", 2)
    monkeypatch.setattr("torch.compile", lambda model: model)
    monkeypatch.setattr(pretrain, "base_figures", lambda pipeline, *_: measure.base_figures(pipeline, 3))
    monkeypatch.setattr(pretrain, "truth_figures", lambda pipeline: measure.truth_figures(pipeline, 3))
    tables, sample_sigmas = set[int](), pretrain.sample_sigmas

    def record(generators: Any, sigma_table: Any, *given: Any) -> Any:
        tables.add(len(sigma_table))
        return sample_sigmas(generators, sigma_table, *given)

    monkeypatch.setattr(pretrain, "sample_sigmas", record)

    def run(folder: Path, *flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["pretrain", str(folder), "--vae_steps=3", "--steps", "2", "2", *flags])
        pretrain.main()

    def train_the_first(*given: Any, colourful: bool, **options: Any) -> None:
        if colourful:
            raise KeyboardInterrupt
        train_transformer(*given, colourful=colourful, **options)

    one, two, train_transformer = tmp_path / "one", tmp_path / "two", pretrain.train_transformer
    run(one)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pretrain, "train_transformer", train_the_first)
        run(two)
    run(two, f"--vae={two / 'vae'}", f"--transformer={two / 'transformer'}")
    weights = []
    for folder in (one, two):
        weights.append(sorted((path.relative_to(folder), path.read_bytes()) for path in folder.rglob("*.safetensors")))
        assert set(json.loads((folder / "figures.json").read_text())) >= {"held-out captions", "training"}
    assert weights[0] == weights[1] and len(weights[0]) == 4
    assert tables == {1000}, "a measurement on the way left the few noise levels of sampling"
    committed = {path.relative_to(measure.CHECKPOINT): path for path in measure.CHECKPOINT.rglob("*.safetensors")}
    sizes = {name: len(content) for name, content in weights[0]}
    assert sizes == {name: path.stat().st_size for name, path in committed.items()}


def test_lora_teaches_a_subject_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # other tests run beside it
    untrained = measure.score(1, *(table.read_base(1, seed) for seed in (1001, 1000, 1001)))
    assert max(untrained["seen_fidelity"], untrained["fidelity"]) < 0.15, untrained
    trained = table.run_row("LoRA", tmp_path, number=1, seed=0, steps=table.TRAINING_STEPS // 2)
    assert trained["seen_fidelity"] > 0.4 and trained["fidelity"] > 0.4, trained
    assert trained["preservation"] > 0.6 and trained["prompt"] > 0.7, trained


def scores_of(value: float) -> dict[str, float]:
    return dict.fromkeys([*table.SCORES, "seconds"], value)


def test_the_table_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    def run_until(most: int) -> list[tuple[str, int, int]]:
        calls: list[tuple[str, int, int]] = []

        def run_one(name: str, folder: Path, number: int, seed: int, steps: int) -> dict[str, float]:
            if len(calls) == most:
                raise KeyboardInterrupt
            calls.append((name, number, seed))
            return scores_of(0.5 + seed / 10 + (0.1 if name == "b" else 0))

        args = argparse.Namespace(folder=tmp_path, subjects=2, seeds=2, steps=10)
        with pytest.raises(KeyboardInterrupt) if most < 8 else contextlib.nullcontext():
            table.make_rows(args, ["a", "b"], run_one)
        return calls

    assert run_until(3) == [("a", 0, 0), ("b", 0, 0), ("a", 1, 0)]
    assert run_until(3) == [("b", 1, 0), ("a", 0, 1), ("b", 0, 1)]
    assert run_until(8) == [("a", 1, 1), ("b", 1, 1)] and run_until(8) == []
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 8
    rows = (tmp_path / "table-10.md").read_text().splitlines()[2:]
    assert [row[:23] for row in rows] == ["| a | 4 | 0.55 ± 0.06 |", "| b | 4 | 0.65 ± 0.06 |"]
    assert rows[1].endswith("| +0.10 ± 0.00 | +0.10 ± 0.00 | 1 |")


def test_two_scripts_get_the_same_command_which_both_know(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    calls: list[tuple[str, list[str]]] = []

    def train(script: Path, flags: list[str], folder: Path) -> float:
        [pictures] = [flag.split("=", 1)[1] for flag in flags if flag.startswith("--instance_data_dir=")]
        assert len(list(Path(pictures).iterdir())) == len(list(Path(pictures).glob("*.png"))) == table.PICTURES
        calls.append((script.name, flags))
        return 1.0

    monkeypatch.setattr(compare, "train", train)
    monkeypatch.setattr(compare, "measure", lambda *_: scores_of(len(calls) / 10))
    arguments = ["compare", "theirs.py", f"--folder={tmp_path}", "--subjects=2", "--seeds=1", "--flags", "--rank=4"]
    monkeypatch.setattr("sys.argv", arguments)
    compare.main()
    known = json.loads((Path(__file__).parent / "flags.json").read_text())["train_dreambooth_lora_flux.py"]
    assert [name for name, _ in calls] == ["train_dreambooth_lora_flux.py", "theirs.py"] * 2
    assert calls[0][1] == calls[1][1] != calls[2][1] == calls[3][1]
    assert {flag.split("=")[0] for _, flags in calls for flag in flags} <= {flag["flag"] for flag in known}
    assert calls[0][1][-1] == "--rank=4"
    assert "| other | 2 | 0.30 ± 0.14 |" in capsys.readouterr().out


def test_a_row_is_compared_run_by_run() -> None:
    """By subject: the two seeds of subject 0 are one difference of 0.2, subject 1's is 0.4."""
    first = {key: scores_of(0.2) for key in ((0, 0), (0, 1), (1, 0), (2, 0))}
    second = {key: scores_of(value) for key, value in (((0, 0), 0.3), ((0, 1), 0.5), ((1, 0), 0.6))}
    cells = [cell.strip() for cell in table.row_of("x", second, first).split("|")[2:-1]]
    assert cells == ["3", *["0.47 ± 0.15"] * 5, *["+0.30 ± 0.10"] * 2, "0"]
    assert table.row_of("x", second, {}).count("|") == table.header().splitlines()[0].count("|")


def test_the_tables_are_those_of_the_runs() -> None:
    """runs.jsonl is what `table` wrote: to go on from it, copy it into a folder and name that."""
    runs = table.read_runs(Path(table.__file__).with_name("runs.jsonl"), table.TRAINING_STEPS)
    rows = {table.row_of(name, of, runs["LoRA"]).rpartition("| ")[0] + "|" for name, of in runs.items()}  # no seconds
    columns = table.header().splitlines()[0].count("|") - 1
    shown = {}
    for name in ("README.md", "benchmarks/results.md"):
        lines = (table.ROOT / name).read_text().splitlines()
        shown[name] = {line for line in lines if line.startswith(("| LoRA", "| full")) and line.count("|") == columns}
    assert len(shown["README.md"]) > 5 and shown["README.md"] <= rows and shown["benchmarks/results.md"] == rows


def test_a_mirrored_picture_is_read_too() -> None:
    """`--random_flip` teaches mirrored places."""
    looks, generator = draw.subject_looks(0), np.random.default_rng(8)
    for scene in (draw.any_scene(generator)._replace(place=place) for place in draw.PLACES):
        mirrored = read.read(np.ascontiguousarray(draw.draw(looks, scene, generator)[:, ::-1]))
        assert mirrored.is_clear and mirrored.scene.place == scene.place and mirrored.scene.facing != scene.facing


def true_readings(number: int, scenes: list[draw.Scene]) -> list[read.Reading]:
    return [read.Reading(draw.subject_looks(number), scene, 0.0) for scene in scenes]


def test_the_subject_in_another_place_than_asked_for_is_not_right() -> None:
    scenes = draw.subject_scenes(0, 24)
    asked = [
        scene._replace(place=place) for scene, place in zip(scenes, measure.asked_places(0)["unseen"], strict=True)
    ]
    assert measure.fidelity(0, "unseen", true_readings(0, asked)) == 1.0
    assert measure.fidelity(0, "unseen", true_readings(0, scenes)) == 0.0
    posed = [draw.Scene(*pose, position="middle") for pose in measure.asked_poses(0)]
    assert measure.prompt_score(0, true_readings(0, posed)) == 1.0
    assert measure.prompt_score(0, true_readings(0, posed[::-1])) < 0.6


def test_blurred_pictures_are_not_diverse() -> None:
    scenes = [draw.any_scene(np.random.default_rng(seed)) for seed in range(32)]
    diverse = true_readings(0, scenes)
    blurred = [reading._replace(error=1.0) if index < 16 else reading for index, reading in enumerate(diverse)]
    assert measure.entropy(blurred) < 0.6 * measure.entropy(diverse) and measure.entropy(diverse[:1] * 32) == 0
