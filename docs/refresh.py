"""Makes what the documents show from what it shows: `make refresh`.

- In README.md and docs/*.md, the table after every `<!-- measured: FILE VIEW -->`, from that result file
  (the views are those of fi_prefetch/bench/tables.py), and all between `<!-- on every GPU: STEM -->` and
  `<!-- end -->`, from every result file of that name, or that there is none.
- docs/performance.md, whole: a section for every GPU under benchmarks/results/, with plots in docs/pictures/.
- docs/pictures/screens/: what commands print, as pictures.
- docs/pictures/*.svg: how the kernel works, drawn from the schedule's own arithmetic where there is one.

tests/cpu/test_docs.py fails where tables, plots or screens are older than what they are made from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fi_prefetch.bench import paper, report, tables
from fi_prefetch.cli import DRAWN_KINDS
from fi_prefetch.schedule import Schedule

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PICTURES = DOCS / "pictures"
SCREENS = PICTURES / "screens"
RESULTS = ROOT / "benchmarks" / "results"
PERFORMANCE = DOCS / "performance.md"

MARKED_STRETCH = re.compile(r"^<!-- on every GPU: (\w+) -->\n.*?^<!-- end -->\n", re.MULTILINE | re.DOTALL)
MARKED_TABLE = re.compile(r"^<!-- measured: (\S+) (\S+) -->\n\n(?:\|.*\n)*", re.MULTILINE)


# ---- tables --------------------------------------------------------------------------------------------------------


def documents() -> list[Path]:
    """What may hold marked tables; the performance page is made whole."""
    return [ROOT / "README.md", *sorted(path for path in DOCS.glob("*.md") if path != PERFORMANCE)]


def load(path: Path) -> dict[str, Any]:
    """A result file's content."""
    return json.loads(path.read_text())


def marked(path: str, view: str) -> str:
    """A table with its mark."""
    return f"<!-- measured: {path} {view} -->\n\n{tables.VIEWS[view](load(ROOT / path)).markdown()}"


def with_tables(text: str) -> str:
    """A document with what its marks ask for as the result files have it now."""
    text = MARKED_TABLE.sub(lambda match: marked(match[1], match[2]), text)
    return MARKED_STRETCH.sub(lambda match: f"<!-- on every GPU: {match[1]} -->\n\n{on_every_gpu(match[1])}", text)


def on_every_gpu(stem: str) -> str:
    """What the result files of one name say, GPU by GPU."""
    command, show = STRETCHES[stem]
    parts = []
    for folder in gpu_folders():
        path = folder / f"{stem}.json"
        if path.exists():
            result = load(path)
            origin = f"{path.relative_to(ROOT).as_posix()}`, {commits(result)}"
            stopped = "" if result["complete"] else ", stopped before its end"
            parts.append(f"On an {result['gpu']} (`{origin}{stopped}):\n\n{show(folder, result)}\n")
    return ("".join(parts) or f"This has not been measured yet (`{command}`).\n\n") + "<!-- end -->\n"


def commits(result: dict[str, Any]) -> str:
    """The commits that a result file was measured at: its rows' where they name their own, else the file's."""
    of_rows = dict.fromkeys(row["commit"] for row in result.get("rows", []) if row.get("commit"))
    names = [f"`{commit[:12]}`" for commit in of_rows or [result["commit"] or "unknown"]]
    return f"commit {names[0]}" if len(names) == 1 else f"rows of the commits {', '.join(names)}"


def shown_map(folder: Path, result: dict[str, Any]) -> str:
    """A map's plot, and what it says in words."""
    plot = PICTURES / folder.name / "map" / "gain_over_bytes_in_flight.png"
    sentences = (f"- {sentence[0].upper()}{sentence[1:]}.\n" for sentence in paper.reading(result))
    return f"![gain over bytes in flight]({plot.relative_to(DOCS).as_posix()})\n\n{''.join(sentences)}"


def shown_table(view: str) -> Callable[[Path, dict[str, Any]], str]:
    """A view's table."""
    return lambda folder, result: tables.VIEWS[view](result).markdown()


# By the result files' name: the command that measures it, and what is shown of one.
STRETCHES: dict[str, tuple[str, Callable[[Path, dict[str, Any]], str]]] = {
    "map": ("fi-prefetch bench map", shown_map),
    "profile": ("fi-prefetch profile --output FILE", shown_table("profile")),
    "first_hour": ("python benchmarks/first_hour.py WHEEL OUTPUT", shown_table("first-hour")),
}


def gpu_folders() -> list[Path]:
    """The GPUs that were measured."""
    return sorted(path for path in RESULTS.iterdir() if path.is_dir())


def performance() -> str:
    """The performance page."""
    parts = [
        "# Performance\n",
        "This page is made by `make refresh` from the result files in `benchmarks/results/`, which were measured as "
        "`benchmarks/README.md` says: KV cold in L2, CUDA graphs of back-to-back calls, all kernels of a row in one "
        "process. Times are in microseconds a call; a speed-up below 1 is a shape on which we are slower.\n",
    ]
    for folder in gpu_folders():
        results = {path.stem: load(path) for path in sorted(folder.glob("*.json"))}
        parts.append(f"## {next(iter(results.values()))['gpu']}\n")
        for stem in sorted(results, key=lambda stem: (stem != "grid", stem)):
            parts += section(folder, stem, results[stem])
    return "\n".join(parts)


def section(folder: Path, stem: str, result: dict[str, Any]) -> list[str]:
    """What the performance page says of one result file."""
    path = (folder / f"{stem}.json").relative_to(ROOT).as_posix()
    facts = [commits(result), f"PyTorch {result['torch']}"]
    facts += [f"FlashInfer {result['flashinfer']}", f"driver {result['driver']}"]
    if "sglang" in result:
        facts.append(f"SGLang {result['sglang']}")
    if "read_ceiling_gbs" in result:
        facts.append(f"read ceiling {result['read_ceiling_gbs']:.0f} GB/s")
    if "complete" in result:
        facts.append("complete" if result["complete"] else "stopped before its end")
    parts = [f"### {stem}\n", f"`{path}`: {', '.join(facts)}.\n"]
    kind = tables.kind_of(result)
    if kind in DRAWN_KINDS:
        for picture in sorted((PICTURES / folder.name / stem).glob("*.png"), key=lambda p: (p.stem[0] != "t", p.stem)):
            parts.append(f"![{picture.stem.replace('_', ' ')}]({picture.relative_to(DOCS).as_posix()})\n")
    # The long table of every shape comes last.
    for view in sorted(tables.OF_KIND[kind], key=lambda view: view == "times"):
        table = tables.VIEWS[view](result)
        if table.rows:
            parts += [f"**{table.title}**\n", marked(path, view)]
    return parts


# ---- plots ---------------------------------------------------------------------------------------------------------


def drawn() -> list[Path]:
    """The result files that have plots."""
    files = [path for folder in gpu_folders() for path in sorted(folder.glob("*.json"))]
    return [path for path in files if tables.kind_of(load(path)) in DRAWN_KINDS]


def plot_folder(result: Path) -> Path:
    """Where a result file's plots are."""
    return PICTURES / result.parent.name / result.stem


def draw_plots() -> None:
    """The plots of every grid and map, in place of those that were there."""
    for path in drawn():
        shutil.rmtree(plot_folder(path), ignore_errors=True)
        report.plot(load(path), plot_folder(path))


# ---- screens -------------------------------------------------------------------------------------------------------

WIDTH = 110
# By picture: a command whose output depends on nothing but this repository, or on the machine too.
STEADY_SCREENS = {
    "explain": "explain llama-3-70b --tp 8 --context 1x64K+31x4K --gpu h100",
    "estimate": "bench --estimate h200 --model llama-3-8b --batch 1,8,64 --context 2K,8K",
    "report": "report benchmarks/results/h100/layer.json",
    "compare": "compare benchmarks/results/h100/sglang.json benchmarks/results/h200/sglang.json",
}
OTHER_SCREENS = {
    "info": "info",
    "demo": "demo",
    "build": "build --arch 9.0a --only q_bf16_kv_bf16_o_bf16_hd128_swa0_cap0 --aot kernels",
}
TAKE = f"""
import io, sys
from rich.console import Console
from fi_prefetch import cli
path, *arguments = sys.argv[1:]
cli.console = Console(record=True, width={WIDTH}, file=io.StringIO(), color_system="truecolor")
cli.main(arguments, standalone_mode=False)
cli.console.save_svg(path, title="fi-prefetch " + " ".join(arguments), unique_id="screen")
"""


def take_screens() -> None:
    """Runs the commands where nothing of this machine's folders shows: in a home folder that holds the checkout."""
    with tempfile.TemporaryDirectory() as home:
        checkout = Path(home, "fi_prefetch")
        for name in ("fi_prefetch", "csrc", "benchmarks"):
            shutil.copytree(ROOT / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        environment = {name: value for name, value in os.environ.items() if not name.startswith("FI_PREFETCH_")}
        environment |= {"HOME": home, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("FLASHINFER_WORKSPACE_BASE", None)
        environment.pop("XDG_CACHE_HOME", None)
        SCREENS.mkdir(parents=True, exist_ok=True)
        for name, command in {**STEADY_SCREENS, **OTHER_SCREENS}.items():
            line = [sys.executable, "-W", "ignore", "-c", TAKE, str(SCREENS / f"{name}.svg"), *command.split()]
            subprocess.run(line, cwd=checkout, env=environment, check=True)
            picture = SCREENS / f"{name}.svg"
            # Rich's fonts are on a server of somebody else's; without them the reader's own monospace one serves.
            picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture.read_text(), flags=re.DOTALL))


# ---- pictures of how it works --------------------------------------------------------------------------------------

COPY, WAIT, COMPUTE, PREFETCH, OTHER = "#7aa6d8", "#dddddd", "#e9a23b", "#7fbf7f", "#b9b9b9"


def bars(axes: Any, y: float, pieces: list[tuple[float, float, str, str]]) -> None:
    """Bars in one line: start, length, colour, label."""
    for start, length, colour, label in pieces:
        axes.barh(y, length, left=start, height=0.7, color=colour, edgecolor="white")
        axes.text(start + length / 2, y, label, ha="center", va="center", fontsize=8)


def draw_schedule(axes: Any) -> None:
    """Blocks over the line of tiles of a skewed batch, by the schedule's own arithmetic."""
    lengths = [640, 160, 64, 224]
    schedule = Schedule(lengths, num_kv_heads=1, blocks=4, warps=4)
    starts = [sum(schedule.tiles[:request]) for request in range(len(lengths) + 1)]
    colours = [COPY, COMPUTE, PREFETCH, OTHER]
    for segment in schedule.segments:
        start = starts[segment.request] + segment.first_tile
        width = segment.end_tile - segment.first_tile
        axes.barh(segment.block, width, left=start, height=0.7, color=colours[segment.request], edgecolor="white")
        if width > 1:
            axes.text(start + width / 2, segment.block, f"w{segment.warp}", ha="center", va="center", fontsize=8)
    for request, length in enumerate(lengths):
        axes.axvline(starts[request + 1], color="k", linewidth=0.6, linestyle=":")
        axes.barh(-9, 0, color=colours[request], label=f"request {request}: {length} tokens")
    names = [f"block {block}" for block in range(4)]
    axes.set(yticks=range(4), yticklabels=names, ylim=(-0.5, 3.5), xlabel="tiles of 16 tokens, in line")
    axes.legend(fontsize=8, loc="upper right")
    axes.invert_yaxis()


def draw_pipeline(axes: Any) -> None:
    """One warp with two stages: while it computes on one, the copy into the other is under way."""
    flight, work = 3.0, 1.2
    ends: list[float] = []
    for tile in range(6):
        issued = 0.0 if tile < 2 else ends[tile - 2]
        arrives = issued + flight + 0.3 * tile * (tile < 2)
        begins = max([arrives, *ends[-1:]])
        ends.append(begins + work)
        copied = [(issued, arrives - issued, COPY, f"copy {tile}"), (begins, work, COMPUTE, f"tile {tile}")]
        bars(axes, tile % 2, copied)
    bars(axes, 2, [(ends[tile], 1.15, PREFETCH, f"ask for {tile + 3}") for tile in (0, 1, 2, 3)])
    axes.set(yticks=range(3), yticklabels=["stage 0", "stage 1", "run-ahead\n(into L2 only)"], xlabel="time")
    axes.set_xticks([])
    axes.invert_yaxis()


def draw_levers(axes: Any) -> None:
    """When the first KV is there, by lever."""
    table, pages, main = (1.8, 0.9, WAIT, "table"), (2.7, 0.9, WAIT, "pages"), (4.0, COMPUTE, "main loop")
    launch = [(5.0, 1.2, WAIT, "launch"), (6.2, 0.9, WAIT, "table"), (7.1, 0.9, WAIT, "pages")]
    lines = [
        ("", [(0.0, 5.0, OTHER, "kernel before")]),
        ("ordinary launch", [*launch, (8.0, 2.0, COPY, "first KV")]),
        ("dependent launch", [table, pages, (3.6, 1.4, WAIT, "wait"), (5.0, 2.0, COPY, "first KV\nand check")]),
        ("+ prologue", [table, pages, (3.6, 1.4, PREFETCH, "to L2"), (5.0, 1.3, COPY, "from L2\nand check")]),
        ("+ early load", [table, pages, (3.6, 1.4, COPY, "first KV")]),
    ]
    for _, pieces in lines[1:]:
        last = pieces[-1]
        pieces.append((last[0] + last[1], *main))
    for y, (_, pieces) in enumerate(lines):
        bars(axes, y, pieces)
    axes.axvline(5.0, color="k", linewidth=0.8, linestyle=":")
    axes.set(yticks=range(5), yticklabels=[name for name, _ in lines], xlabel="time (not to scale)")
    axes.set_xticks([])
    axes.invert_yaxis()


def draw_pictures() -> None:
    """The pictures of docs/how-it-works.md."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fi_prefetch"  # the same drawing, the same file
    for name, draw in (("schedule", draw_schedule), ("pipeline", draw_pipeline), ("levers", draw_levers)):
        figure, axes = pyplot.subplots(figsize=(9, 2.6))
        draw(axes)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        figure.tight_layout()
        figure.savefig(PICTURES / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def main() -> None:
    draw_plots()
    PERFORMANCE.write_text(performance())
    for path in documents():
        path.write_text(with_tables(path.read_text()))
    draw_pictures()
    take_screens()


if __name__ == "__main__":
    main()
