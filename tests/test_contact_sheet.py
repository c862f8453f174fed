"""The contact sheet shows each validation picture in its place: steps down, pictures across."""

from pathlib import Path

import pytest
from PIL import Image

from tools.contact_sheet import GAP, LINE_HEIGHT, STEP_WIDTH, choose_steps, main


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a run that drew four pictures, each twice as wide as high, at six steps; one was lost."""
    (tmp_path / "validation").mkdir()
    for step in (0, 20, 40, 60, 80, 100):
        for number in range(4):
            path = tmp_path / "validation" / f"step_{step:06d}_{number}.png"
            Image.new("RGB", (64, 32), (step, 60 * number, 200)).save(path)
    (tmp_path / "validation" / "step_000020_1.png").unlink()
    return tmp_path


def test_each_picture_is_where_its_step_and_number_say(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(trained), "--cell=64", "--prompts", "a dog", "a cat"])
    assert capsys.readouterr().out == f"Wrote {trained / 'contact_sheet.jpg'}: 320 x {LINE_HEIGHT + 6 * 64} pixels\n"
    with Image.open(trained / "contact_sheet.jpg") as sheet:
        for row, step in enumerate((0, 20, 40, 60, 80, 100)):
            for number in range(4):
                found = sheet.getpixel((STEP_WIDTH + 64 * number + GAP + 20, LINE_HEIGHT + 64 * row + GAP + 15))
                expected = (255, 255, 255) if (step, number) == (20, 1) else (step, 60 * number, 200)
                assert found == pytest.approx(expected, abs=6)
        for left in (STEP_WIDTH, STEP_WIDTH + 128):  # where a prompt begins there are letters
            assert sheet.crop((left, 0, left + 60, LINE_HEIGHT)).convert("L").getextrema()[0] < 100


def test_of_many_steps_evenly_spread_ones_are_shown() -> None:
    files = {(step, 0): Path() for step in range(0, 1001, 10)}
    assert choose_steps(files, 5) == [0, 250, 500, 750, 1000] and len(choose_steps(files, 200)) == 101


@pytest.mark.parametrize("flags", [["--prompts", "a", "b", "c"], ["--rows=1"], ["--cell=0"], ["damaged"], ["none"]])
def test_what_cannot_be_drawn_is_said_in_one_line(
    trained: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    if flags == ["damaged"]:
        (trained / "validation" / "step_000060_2.png").write_bytes(b"\x89PNG")
    folder = trained / "missing" if flags == ["none"] else trained
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), *[flag for flag in flags if flag not in ("damaged", "none")]])
    assert capsys.readouterr().err.startswith("error: there is no contact sheet of ")
