"""The small world is read as it was drawn, and in it the LoRA script teaches a subject and keeps the rest."""

import argparse
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.small_world import compare, draw, measure, pretrain, read, table


def test_pictures_are_read_as_they_were_drawn() -> None:
    assert read.accuracy(noise=10, count=60) == (1.0, 1.0)


def test_a_subject_is_never_seen_in_the_places_of_the_measure() -> None:
    for number in range(10):
        seen, unseen = draw.subject_places(number)
        assert {scene.place for scene in draw.subject_scenes(number, 20)} == set(seen)
        assert len(unseen) == 3 and not {*seen} & {*unseen}


def test_the_base_draws_what_captions_ask_for() -> None:
    figures = measure.base_figures(measure.load(), count=50)
    assert figures["class, colour and place"] >= 0.8 and figures["clear"] >= 0.85, figures


def test_the_checkpoint_is_made_by_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.setattr("sys.argv", ["pretrain", str(tmp_path), "--vae_steps=3", "--steps", "2", "2"])
    pretrain.main()
    assert tables == {1000}, "a measurement on the way left the few noise levels of sampling"
    assert set(json.loads((tmp_path / "figures.json").read_text())) >= {"held-out captions", "training"}
    sizes = []
    for folder in (tmp_path, measure.CHECKPOINT):
        files = folder.rglob("*.safetensors")
        sizes.append({path.relative_to(folder): path.stat().st_size for path in files})
    assert sizes[0] == sizes[1] and len(sizes[0]) == 4


def test_lora_teaches_a_subject_and_keeps_the_rest(tmp_path: Path) -> None:
    untrained = measure.score(1, *(table.read_base(1, seed) for seed in (1001, 1000, 1001)))
    assert max(untrained["seen_fidelity"], untrained["fidelity"]) < 0.15, untrained
    trained = table.run_row("LoRA", tmp_path, number=1, seed=0, steps=150)
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


def test_two_scripts_get_the_same_command_which_both_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(compare, "train", lambda script, flags, _: calls.append((script.name, flags)) or 1.0)
    monkeypatch.setattr(compare, "measure", lambda *_: scores_of(0.5))
    monkeypatch.setattr("sys.argv", ["compare", "theirs.py", f"--folder={tmp_path}", "--subjects=2", "--seeds=1"])
    compare.main()
    known = json.loads((Path(__file__).parent / "flags.json").read_text())["train_dreambooth_lora_flux.py"]
    assert [name for name, _ in calls] == ["train_dreambooth_lora_flux.py", "theirs.py"] * 2
    assert calls[0][1] == calls[1][1] != calls[2][1] == calls[3][1]
    assert {flag.split("=")[0] for _, flags in calls for flag in flags} <= {flag["flag"] for flag in known}


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


def true_readings(number: int, scenes: list[draw.Scene]) -> list[read.Reading]:
    return [read.Reading(draw.subject_looks(number), scene, 0.0) for scene in scenes]


def test_the_subject_in_another_place_than_asked_for_is_not_right() -> None:
    scenes = draw.subject_scenes(0, 24)
    places = measure.asked_places(0)["unseen"]
    asked = [scene._replace(place=place) for scene, place in zip(scenes, places, strict=True)]
    assert measure.fidelity(0, "unseen", true_readings(0, asked)) == 1.0
    assert measure.fidelity(0, "unseen", true_readings(0, scenes)) == 0.0
    posed = [draw.Scene(*pose, position="middle") for pose in measure.asked_poses(0)]
    assert measure.prompt_score(0, true_readings(0, posed)) == 1.0
    assert measure.prompt_score(0, true_readings(0, posed[::-1])) < 0.6
