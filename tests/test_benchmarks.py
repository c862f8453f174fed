"""What the benchmarks read and compute is true; one real run on the tiny checkpoint."""

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

import random_flux
import train_dreambooth_lora_flux
from benchmarks import run


def write_events(folder: Path, tag: str, points: list[tuple[float, float]]) -> None:
    """An event file with one scalar a step: (wall time, value)."""
    writer = EventFileWriter(str(folder), filename_suffix=f".{tag}")
    for step, (moment, value) in enumerate(points):
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
        writer.add_event(Event(wall_time=moment, step=step, summary=summary))
    writer.close()


def test_a_step_is_the_median_between_losses_after_the_warm_up(tmp_path: Path) -> None:
    times = [100.0, 150.0, 153.0, 156.0, 160.0, 179.0, 181.0]  # the first difference is the warm-up's
    write_events(tmp_path, "loss", [(moment, 0.5) for moment in times])
    measured = run.read_run(tmp_path, "", started=90.0, usage=SimpleNamespace(ru_maxrss=3 * 1024**2), warm_up=1)
    assert measured == run.Measured(step=3.0, start_up=10.0, host=3.0)


def test_the_peaks_are_those_that_the_script_logs(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_events(tmp_path, "loss", [(1.0, 0.5), (2.0, 0.5)])
    device = SimpleNamespace(device=SimpleNamespace(type="cuda"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *_: None)
    with caplog.at_level("INFO"):
        for name, peak in (("Encoding 1 prompts", 9.51), ("Training", 8.0), ("Saving the result", 7.5)):
            monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda *_, peak=peak: peak * 2**30)
            with train_dreambooth_lora_flux.stage(device, name):
                pass
    log = "".join(f"12:00:00 INFO {record.message}\n" for record in caplog.records)
    measured = run.read_run(tmp_path, log, started=0.0, usage=SimpleNamespace(ru_maxrss=0), warm_up=0)
    assert (measured.device, measured.whole_run) == (8.0, 9.51)


def forward_flops(size: str, tokens: int) -> tuple[float, float, float]:
    """Forward FLOPs of a transformer: of its linear layers, of the AdaLN's, and of attention's two products.

    Each block has q, k, v and output projections and a feed-forward of four times the width, that is 12 width^2 weights
    a token; a double block has them for either kind of token. AdaLN acts once a picture.
    """
    shapes = random_flux.TRANSFORMER | random_flux.SIZES[size]["transformer"]
    text, double, single = run.TEXT_LENGTHS[size], shapes["num_layers"], shapes["num_single_layers"]
    width = shapes["num_attention_heads"] * shapes["attention_head_dim"]
    blocks = (double + single) * 12 * width**2 * (tokens + text)
    embedders = 2 * tokens * 64 * width + text * shapes["joint_attention_dim"] * width
    vectors = 2 * 256 * width + shapes["pooled_projection_dim"] * width + 3 * width**2  # sigma, guidance, CLIP
    modulation = (double * 2 * 6 + single * 3 + 2) * width**2
    attention = (double + single) * 2 * (tokens + text) ** 2 * width
    return 2.0 * (blocks + embedders + vectors), 2.0 * modulation, 2.0 * attention


def test_the_flops_of_full_training_are_three_times_the_forward_pass() -> None:
    """Every weight and, but in the embedders, every input gets a gradient; FLUX.1 [dev] at 512 px."""
    assert run.model_flops("dev", 512, None) == pytest.approx(3 * sum(forward_flops("dev", 1024)), rel=1e-3)


def test_the_flops_of_lora_leave_out_the_gradients_of_frozen_weights() -> None:
    """The modulation is computed forward only; attention's backward costs twice its forward, as in full training."""
    linear, modulation, attention = forward_flops("medium", 1024)
    counted = run.model_flops("medium", 512, train_dreambooth_lora_flux.TRANSFORMER_TARGETS, rank=1)
    assert counted == pytest.approx(2 * linear + modulation + 3 * attention, rel=1e-2)


def test_the_gpu_table_has_twenty_rows_whose_flags_the_scripts_take() -> None:
    plans = list(run.make_plans(SimpleNamespace(gpu_table=True, only="")))
    [pattern] = re.findall(r'^GPU_ROWS := "(.*?)"', (run.ROOT / "Makefile").read_text(), re.MULTILINE)
    chosen = list(run.make_plans(SimpleNamespace(gpu_table=True, only=pattern)))
    assert {plan.resolution for plan in chosen} == {512} and [plan.script for plan in chosen] == ["lora"] * 4 + ["full"]
    assert len({(plan.name, plan.resolution) for plan in plans}) == 20
    required = ["--pretrained_model_name_or_path=x", "--instance_prompt=x", "--instance_data_dir=y"]
    for plan in plans:
        script = import_module(run.SCRIPTS[plan.script].stem)
        args = script.parse_args([*required, f"--mixed_precision={plan.precision}", *plan.flags])
        assert args.cache_latents and args.gradient_checkpointing is ("nothing recomputed" not in plan.name)


def test_the_gpu_table_is_refused_without_a_gpu_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = run.RESULTS.read_text()
    with pytest.raises(SystemExit, match="2"):
        run.main(["--gpu_table", "--record", f"--work={tmp_path}"])
    assert "needs a GPU" in capsys.readouterr().err
    assert run.RESULTS.read_text() == before and list(tmp_path.iterdir()) == []


def test_a_real_run_is_measured_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.md")
    flags = ["--size=tiny", "--scripts", "lora", "--steps=4", "--warm_up=1", "--threads=1", "--record"]
    assert run.main([*flags, f"--work={tmp_path}", "--", "--rank=2"]) == 0
    row = run.RESULTS.read_text().splitlines()[-1]
    assert row in capsys.readouterr().out
    name, side, precision, step, start_up, *_ = (cell.strip() for cell in row.split("|")[1:])
    assert (name, side, precision) == ("lora", "32", "no")
    assert 0 < float(step) < float(start_up)
    assert not (tmp_path / "output").exists()
