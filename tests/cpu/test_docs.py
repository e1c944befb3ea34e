"""What `make refresh` makes is as new as what it is made from, and the site has every page."""

from __future__ import annotations

import io
import json
import re
from html import unescape
from pathlib import Path

import pytest
import scripts
from click.testing import CliRunner
from rich.console import Console

from fi_prefetch import cli
from fi_prefetch.bench import report
from fi_prefetch.bench.profile import COLUMNS
from fi_prefetch.bench.shapes import Shape

ROOT = Path(__file__).resolve().parents[2]
AGAIN = "run `make refresh`"

refresh = scripts.load("docs/refresh.py")


@pytest.mark.parametrize("document", refresh.documents(), ids=lambda path: path.name)
def test_tables_are_those_of_the_result_files(document: Path) -> None:
    text = document.read_text()
    assert refresh.with_tables(text) == text, AGAIN
    # A mark that is written otherwise would be passed over.
    assert len(refresh.MARKED_TABLE.findall(text)) == f"\n{text}".count("\n<!-- measured:")
    assert len(refresh.MARKED_STRETCH.findall(text)) == f"\n{text}".count("\n<!-- on every GPU:")


def test_a_table_is_replaced_and_its_surroundings_stay() -> None:
    text = (
        "Before.\n\n<!-- measured: benchmarks/results/h100/layer.json layer -->\n\n"
        "| model | us |\n|---|---|\n| x | 1.0 |\n\nAfter.\n"
    )
    made = refresh.with_tables(text)
    assert made.startswith("Before.\n\n<!-- measured: ") and made.endswith("|\n\nAfter.\n")
    assert "Llama-3-8B" in made and "| x |" not in made
    assert refresh.with_tables(made) == made


@pytest.mark.parametrize("stem", refresh.STRETCHES)
def test_a_stretch_shows_what_was_measured_on_every_gpu_or_that_nothing_was(
    stem: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = f"Before.\n\n<!-- on every GPU: {stem} -->\n\nold\n\n<!-- end -->\n\nAfter.\n"
    monkeypatch.setattr(refresh, "ROOT", tmp_path)
    monkeypatch.setattr(refresh, "RESULTS", tmp_path)
    nothing = refresh.with_tables(text)
    assert "not been measured yet" in nothing and "old" not in nothing
    shape = Shape(32, 8, 16, ((2048, 16),)).to_row()
    place = {"sms_used": 80, "resident": 1, "bytes_in_flight": 16384, "blocks_per_sm": None}
    row = {
        "map": {**shape, **place, "part": "residency", "us": {"off": 20.0, "bulk_1": 16.0}},
        "profile": {**shape, "counters": {"paper on": {column.name: 16384.0 for column in COLUMNS}}},
        "first_hour": {"step": "fi-prefetch info", "seconds": {"nvcc": 1.25, "aot": None}},
    }[stem]
    for gpu in ("h100", "h200"):
        (tmp_path / gpu).mkdir()
        content = {
            "gpu": f"NVIDIA {gpu.upper()}",
            "commit": "0123456789abcdef",
            "complete": gpu == "h100",
            "rows": [row],
        }
        (tmp_path / gpu / f"{stem}.json").write_text(json.dumps(content))
    made = refresh.with_tables(text)
    assert made.startswith("Before.\n\n<!-- on every GPU: ") and made.endswith("\n<!-- end -->\n\nAfter.\n")
    assert "On an NVIDIA H100 (`h100/" in made and "commit `0123456789ab`):" in made
    assert "On an NVIDIA H200 (`h200/" in made and "commit `0123456789ab`, stopped before its end):" in made
    assert {"map": "up to 1.25x", "profile": "16,384.0", "first_hour": "| fi-prefetch info | 1.2 | - |"}[stem] in made
    assert refresh.with_tables(made) == made


@pytest.mark.parametrize(
    ("of_file", "of_rows", "said"),
    [
        ("a" * 40, [None, None], f"commit `{'a' * 12}`"),
        ("a" * 40, ["b" * 40, "b" * 40], f"commit `{'b' * 12}`"),
        ("a" * 40, ["b" * 40, "a" * 40, "b" * 40], f"rows of the commits `{'b' * 12}`, `{'a' * 12}`"),
        (None, [], "commit `unknown`"),
    ],
)
def test_a_result_file_is_of_the_commits_of_its_rows(of_file: str | None, of_rows: list[str | None], said: str) -> None:
    rows = [{"commit": commit} if commit else {} for commit in of_rows]
    assert refresh.commits({"commit": of_file, "rows": rows}) == said


def test_the_performance_page_is_that_of_the_result_files() -> None:
    text = refresh.PERFORMANCE.read_text()
    assert refresh.performance() == text, AGAIN
    for path in refresh.RESULTS.glob("*/*.json"):
        assert path.relative_to(ROOT).as_posix() in text


def test_plots_show_the_numbers_of_the_result_files() -> None:
    pictures = set()
    for path in refresh.drawn():
        digest = report.digest(refresh.load(path)).encode()
        found = list(refresh.plot_folder(path).glob("*.png"))
        assert found, AGAIN
        assert [picture for picture in found if digest not in picture.read_bytes()] == [], AGAIN
        pictures.update(found)
    assert pictures == set(refresh.PICTURES.rglob("*.png")), "a picture of a result file that is gone"


# ---- screens -------------------------------------------------------------------------------------------------------


def text_in(picture: Path) -> str:
    """The characters of a screen, line by line from the top, without spaces."""
    found = re.findall(r'clip-path="url\(#screen-line-\d+\)">(.*?)</text>', picture.read_text())
    return "".join("".join(map(unescape, found)).split())


@pytest.mark.parametrize("name", refresh.STEADY_SCREENS)
def test_screens_show_what_the_commands_print(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(record=True, width=refresh.WIDTH, file=io.StringIO())
    monkeypatch.setattr(cli, "console", console)
    monkeypatch.setattr(cli, "has_gpu", lambda: False)
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(cli.main, refresh.STEADY_SCREENS[name].split())
    assert result.exit_code == 0, result.output
    assert text_in(refresh.SCREENS / f"{name}.svg") == "".join(console.export_text().split()), AGAIN


def test_every_screen_is_there_and_shows_no_folder_of_the_machine_it_was_taken_on() -> None:
    names = {*refresh.STEADY_SCREENS, *refresh.OTHER_SCREENS}
    assert {path.stem for path in refresh.SCREENS.iterdir()} == names
    for name in names:
        text = text_in(refresh.SCREENS / f"{name}.svg")
        assert len(text) > 100
        assert not re.search(r"/(tmp|home|root|work|Users)/", text), name


# ---- pages ---------------------------------------------------------------------------------------------------------


def test_every_page_is_in_the_menu() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {line for block in re.findall(r"```{toctree}(.*?)```", index, re.DOTALL) for line in block.split()}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} <= listed


def test_every_picture_is_shown_somewhere() -> None:
    shown = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
    for path in refresh.PICTURES.rglob("*"):
        if path.is_file():
            assert f"{path.relative_to(ROOT / 'docs').as_posix()})" in shown, path
