"""Result files read: speed-ups, their geometric means and minima, where we lose, two runs against each other, plots."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .shapes import Shape, lens_label, tokens_label

Row = dict[str, Any]
FLASHINFER_PREFIX = "flashinfer"
NOISE = 0.02
# What tells a row of `fi-prefetch tune` from others, and from its neighbours: the fields of tune.Grid.
GRID_COLUMNS = ("warps", "blocks_per_sm", "min_tiles_per_warp")
# What tells rows of one shape apart in other kinds of files.
ROW_COLUMNS = ("tensor_parallel", "window_us", "part", "sms", "most_resident", "warps_per_block", "pad")


@dataclass(frozen=True)
class Speedup:
    """How much faster than the fastest of some baselines we are on one row: `factor` above 1 is faster."""

    row: Row
    factor: float
    baseline: str

    @property
    def label(self) -> str:
        """The row's shape in short."""
        return Shape.from_row(self.row).label


@dataclass(frozen=True)
class Summary:
    """Speed-ups of one class of rows."""

    name: str
    rows: int
    geometric_mean: float
    minimum: float
    slowest: str


def load(path: Path) -> dict[str, Any]:
    """A result file's content; ValueError, with the file's name, where it is none."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{path}: not a result file of `fi-prefetch bench`: {error}") from error
    if isinstance(content, dict) and isinstance(content.get("checks"), dict):  # what SGLang answered
        return content
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path}: not a result file of `fi-prefetch bench`: it has no rows")
    return content


def best_baseline(row: Row, only_flashinfer: bool) -> tuple[str, float] | None:
    """Name and time of the fastest baseline that was measured on a row, or None."""
    times = {
        name: time
        for name, time in row["baselines_us"].items()
        if time is not None and (not only_flashinfer or name.startswith(FLASHINFER_PREFIX))
    }
    return min(times.items(), key=lambda item: item[1]) if times else None


def speedups(rows: Iterable[Row], only_flashinfer: bool = False) -> list[Speedup]:
    """The speed-up of every row on which both we and a baseline were measured."""
    found = []
    for row in rows:
        best = best_baseline(row, only_flashinfer)
        if best is not None and row["fi_prefetch_us"] is not None:
            found.append(Speedup(row, best[1] / row["fi_prefetch_us"], best[0]))
    return found


def geometric_mean(factors: Sequence[float]) -> float:
    """Raises ValueError for no factors, or one that is not positive."""
    if not factors or min(factors) <= 0:
        raise ValueError(f"a geometric mean needs positive factors, got {list(factors)}")
    return math.exp(sum(map(math.log, factors)) / len(factors))


def summarise(name: str, members: Sequence[Speedup]) -> Summary:
    """The summary of one class, which has a member at least."""
    slowest = min(members, key=lambda speedup: speedup.factor)
    mean = geometric_mean([speedup.factor for speedup in members])
    return Summary(name, len(members), mean, slowest.factor, slowest.label)


def summaries(found: Sequence[Speedup]) -> list[Summary]:
    """By KV dtype and size class, and over all."""
    classes: dict[str, list[Speedup]] = {}
    for speedup in found:
        shape = Shape.from_row(speedup.row)
        classes.setdefault(f"{shape.kv_dtype}, {shape.size_class}", []).append(speedup)
    result = [summarise(name, members) for name, members in sorted(classes.items())]
    return [*result, summarise("all", found)] if found else []


def losses(found: Sequence[Speedup], below: float = 1.0 - NOISE) -> list[Speedup]:
    """Where we are slower than the best baseline by more than noise, worst first."""
    return sorted((speedup for speedup in found if speedup.factor < below), key=lambda speedup: speedup.factor)


# ---- two runs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One time in two runs: `factor` is the first over the second, `band` what repeats of one run differ by."""

    label: str
    before_us: float
    after_us: float
    factor: float
    band: float

    @property
    def verdict(self) -> str:
        """`faster`, `slower`, or `same` where the difference is within the band."""
        if abs(self.factor - 1.0) <= self.band:
            return "same"
        return "faster" if self.factor > 1.0 else "slower"


def row_label(row: Row) -> str:
    """What a row of any kind of file was measured on."""
    if "step" in row:
        return str(row["step"])
    if "ms_per_step" in row:
        answers = f" answers of {row['output']}" if is_generation(row) else ""
        return f"{row['model']} TP-{row['tp']} {lens_label(step_lens(row))} KV {row['kv_dtype']}{answers}"
    shape = Shape.from_row(row)
    parts = [row.get("model", ""), shape.label, "" if shape.q_dtype == "bfloat16" else f"q {shape.q_dtype}"]
    parts += [f"{name} {row[name]}" for name in (*ROW_COLUMNS, *GRID_COLUMNS) if row.get(name) is not None]
    return " ".join(part for part in parts if part)


def step_lens(row: Row) -> list[list[int]]:
    """The `kv_lens` of a row of SGLang's steps."""
    context = row["context"]
    return context if isinstance(context, list) else [[context, row["batch"]]]


def is_generation(row: Row) -> bool:
    """Whether SGLang answered at more length than it was asked, as in the paper: tokens a second are what it shows.
    Answers are short where it shows the time of a step at some context."""
    return row["output"] > max(length for length, _ in step_lens(row))


def serves_with_ours(name: str) -> bool:
    """Whether an SGLang backend in a row decodes with the kernel in this repository, whatever stands beside it."""
    return "fi_prefetch" in name


def is_ours(name: str) -> bool:
    """Whether a time in a row is of a kernel in this repository, rather than of what it is held against."""
    return not name.startswith(FLASHINFER_PREFIX) and name != "fa3"


def times_of(row: Row) -> dict[str, tuple[float, float]]:
    """What a row of any kind of file says that we took: by label, microseconds and how far repeats lie apart."""
    spread, label = row.get("spread", {}), row_label(row)
    found: dict[str, tuple[float | None, float]]
    if "baselines_us" in row:
        found = {label: (row["fi_prefetch_us"], spread.get("fi_prefetch", 0.0))}
    elif "ms_per_step" in row:
        step = row["ms_per_step"].get("fi_prefetch")
        found = {label: (None if step is None else step * 1e3, 0.0)}
    elif "step" in row:
        seconds = row["seconds"].items()
        found = {f"{label}: {name}": (None if s is None else s * 1e6, 0.0) for name, s in seconds}
    elif "counters" in row:
        durations = {name: found["duration"] for name, found in row["counters"].items() if is_ours(name)}
        found = {f"{label}: {name}": (time, 0.0) for name, time in durations.items()}
    elif GRID_COLUMNS[0] in row:
        found = {label: (row["us"], row.get("spread", 0.0))}
    elif "attention_us" in row:
        # The repeats are of a whole layer; what attention costs is a difference, so its band is wider.
        found = {
            f"{label}: {name}": (time, spread.get(name, 0.0) * row["us"][name] / time if time else 0.0)
            for name, time in row["attention_us"].items()
            if is_ours(name)
        }
    elif "us" in row:
        found = {f"{label}: {name}": (time, spread.get(name, 0.0)) for name, time in row["us"].items() if is_ours(name)}
    else:
        # What repeats of one row differ by is in the row: "off" was measured once more after the others.
        off, again = row["off_us"], row.get("off_again_us")
        apart = abs((off - again) / off) if off and again is not None else 0.0
        found = {f"{label}: {name}": (row.get(name), apart) for name in ("off_us", "on_us", "warm_us")}
    return {name: (time, band) for name, (time, band) in found.items() if time is not None and time > 0}


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """The times that both results have, in the first one's order. The band is at least NOISE."""
    later = {name: value for row in after["rows"] for name, value in times_of(row).items()}
    changes = []
    for row in before["rows"]:
        for name, (first, first_spread) in times_of(row).items():
            if name in later:
                second, second_spread = later[name]
                band = max(NOISE, first_spread, second_spread)
                changes.append(Change(name, first, second, first / second, band))
    return changes


# ---- plots ---------------------------------------------------------------------------------------------------------


def plot(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws a grid's times over KV bytes and its speed-ups over batch and length, a map's gain over bytes in flight, or
    SGLang's decode steps and long answers.

    Returns the PNG files written to `folder`; none for other kinds of files. Raises ImportError, saying what to
    install, where matplotlib is not there, and ValueError where there is nothing to draw.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'fi-prefetch[plots]'") from error
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    if any("part" in row for row in result["rows"]):
        return [_plot_map(result, folder / "gain_over_bytes_in_flight.png")]
    if any("ms_per_step" in row for row in result["rows"]):
        return _plot_serving(result, folder)
    rows = [row for row in result["rows"] if row.get("fi_prefetch_us") is not None]
    written = [_plot_times(rows, result, folder / "time_over_kv_bytes.png")] if rows else []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if len(row["kv_lens"]) == 1:
            key = (row["heads_q"], row["heads_kv"], row["head_dim"], row["page_size"], row["kv_dtype"])
            groups.setdefault(key, []).append(row)
    for (heads_q, heads_kv, dim, page, dtype), members in groups.items():
        name = f"speedup_{heads_q}_{heads_kv}_dim{dim}_page{page}_{dtype}.png"
        title = f"speed-up, {heads_q}/{heads_kv} heads, page {page}, {dtype}\n{result['gpu']}"
        if len(members) > 1 and speedups(members):
            written.append(_plot_heat_map(speedups(members), result, title, folder / name))
    return written


def _plot_serving(result: dict[str, Any], folder: Path) -> list[Path]:
    """Decode steps in one plot; long answers in others, over backends as over batch and answer."""
    compared = [row for row in result["rows"] if "fi_prefetch" in row["ms_per_step"] and len(row["ms_per_step"]) > 1]
    if not compared:
        raise ValueError("there is no other backend's step to draw ours against")
    steps = [row for row in compared if not is_generation(row)]
    generations = [row for row in compared if is_generation(row)]
    written = []
    if steps:
        written.append(_plot_steps(steps, result, folder / "step_against_the_others.png"))
    if generations:
        written.append(_plot_tokens(generations, result, folder / "tokens_a_second.png"))
    if any(len(rows) > 1 for rows in _sweeps(generations).values()):
        written.append(_plot_sweeps(generations, result, folder / "speedup_over_batch_and_answer.png"))
    return written


def _served_bars(
    cases: Sequence[tuple[str, dict[str, float]]], names: Sequence[str], result: dict[str, Any], xlabel: str
) -> tuple[Any, Any]:
    """A figure and its axes, with a bar for each backend of each case."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 1 + (0.3 + 0.1 * len(names)) * len(cases)))
    for i, name in enumerate(names):
        bars = [
            (place + 0.8 * i / len(names), values[name]) for place, (_, values) in enumerate(cases) if name in values
        ]
        axes.barh([place for place, _ in bars], [value for _, value in bars], height=0.7 / len(names), label=name)
    axes.set_yticks([place + 0.4 * (len(names) - 1) / len(names) for place in range(len(cases))], [x for x, _ in cases])
    axes.invert_yaxis()
    axes.set(xlabel=xlabel, title=f"SGLang {result.get('sglang')}, {result['gpu']}")
    return figure, axes


def _plot_steps(rows: Sequence[Row], result: dict[str, Any], path: Path) -> Path:
    """How long a decode step takes with each of the other backends, against ours."""
    cases = [
        (
            _served_label(row),
            {name: time / row["ms_per_step"]["fi_prefetch"] for name, time in row["ms_per_step"].items()},
        )
        for row in rows
    ]
    names = sorted({name for _, ratios in cases for name in ratios} - {"fi_prefetch"})
    figure, axes = _served_bars(cases, names, result, "a decode step's time, against fi_prefetch's")
    axes.axvline(1.0, color="k", linewidth=0.8)
    axes.legend()
    _save(figure, path, result)
    return path


def _plot_tokens(rows: Sequence[Row], result: dict[str, Any], path: Path) -> Path:
    """Tokens a second by backend, of long answers."""
    cases = [(f"{_served_label(row)}, answers of {row['output']}", row["tokens_per_s"]) for row in rows]
    names = sorted({name for _, values in cases for name in values}, key=lambda name: (name != "fi_prefetch", name))
    figure, axes = _served_bars(cases, names, result, "output tokens a second")
    axes.legend()
    _save(figure, path, result)
    return path


def _sweeps(rows: Sequence[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Rows that differ in the batch alone, and rows that differ in the answer alone, each in order."""
    from .tables import served_model

    found: dict[tuple[Any, ...], list[Row]] = {}
    for what, other in (("batch", "output"), ("output", "batch")):
        for row in sorted(rows, key=lambda row: row[what]):
            found.setdefault((what, served_model(row), row["kv_dtype"], row[other]), []).append(row)
    return found


def _plot_sweeps(rows: Sequence[Row], result: dict[str, Any], path: Path) -> Path:
    """The speed-up in tokens a second over each of the other backends: over the batch, and over the answer's length."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axes, what, other, label in zip(
        panels, ("batch", "output"), ("answers of {} tokens", "batch {}"), ("batch", "tokens an answer"), strict=True
    ):
        for (over, model, kv_dtype, fixed), members in _sweeps(rows).items():
            if over != what or len(members) < 2:
                continue
            for name in sorted({name for row in members for name in row["tokens_per_s"] if not serves_with_ours(name)}):
                points = [
                    (row[what], row["tokens_per_s"]["fi_prefetch"] / row["tokens_per_s"][name])
                    for row in members
                    if name in row["tokens_per_s"]
                ]
                kv = "" if kv_dtype == "auto" else f", KV {kv_dtype}"
                text = f"{model}{kv}, {other.format(fixed)}, over {name}"
                axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=text)
        axes.axhline(1.0, color="k", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.set(xlabel=label)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=7)
    panels[0].set_ylabel("speed-up in output tokens a second")
    figure.suptitle(f"SGLang {result.get('sglang')}, {result['gpu']}")
    _save(figure, path, result)
    return path


def _served_label(row: Row) -> str:
    from .tables import batch, cache_name, served_model

    return f"{served_model(row)} {cache_name(row['kv_dtype'])} {batch({'kv_lens': step_lens(row)})}"


def _plot_map(result: dict[str, Any], path: Path) -> Path:
    """What the paper's prefetch gains each of three kernels, over the bytes that an SM waits for without it."""
    from matplotlib import pyplot, ticker

    from .paper import gain

    figure, panels = pyplot.subplots(1, 3, figsize=(16, 5), sharey=True)
    titles = {
        ("residency", "table"): "the paper's kernel and prefetch",
        ("ours",): "ours, run-ahead by one tile",
        ("flashinfer",): "FlashInfer's CUDA-core kernel, by one iteration",
    }
    for axes, (parts, title) in zip(panels, titles.items(), strict=True):
        for sms, marker in zip(sorted({row["sms_used"] for row in result["rows"]} - {None}), "ox", strict=False):
            rows = [row for row in result["rows"] if row["sms_used"] == sms and row["part"] in parts]
            for grouped, colour in ((False, "tab:blue"), (True, "tab:orange")):
                points = [
                    (row["bytes_in_flight"] / 1024, value)
                    for row in rows
                    if (row["heads_q"] > row["heads_kv"]) == grouped and (value := gain(row)) is not None
                ]
                label = f"{sms} SMs, {'GQA' if grouped else 'MHA'}"
                xs, ys = [x for x, _ in points], [y for _, y in points]
                axes.scatter(xs, ys, s=25, c=colour, marker=marker, label=label)
        axes.axhline(1.0, color="k", linewidth=0.8)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ticker.ScalarFormatter())
        axes.set(xlabel="KV in flight an SM without prefetch, KiB", title=f"{title}\n{result['gpu']}")
    panels[0].set(ylabel="speed-up by prefetching")
    panels[0].legend()
    _save(figure, path, result)
    return path


def _plot_times(rows: Sequence[Row], result: dict[str, Any], path: Path) -> Path:
    """Two panels over the bytes of KV: the time with its floor, and the rate of reading with its ceiling."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5))
    ceiling = result["read_ceiling_gbs"]
    best = [(row["kv_bytes"], found[1]) for row in rows if (found := best_baseline(row, False)) is not None]
    ours = [(row["kv_bytes"], row["fi_prefetch_us"]) for row in rows]
    for points, label, marker in ((best, "best baseline", "x"), (ours, "fi_prefetch", ".")):
        sizes = [size for size, _ in points]
        left.scatter(sizes, [time for _, time in points], s=30, marker=marker, label=label)
        right.scatter(sizes, [size / time / 1e6 for size, time in points], s=30, marker=marker, label=label)
    ends = [min(size for size, _ in ours), max(size for size, _ in ours)]
    left.plot(ends, [size / ceiling / 1e3 for size in ends], "k--", label="floor: KV bytes / read ceiling")
    left.set(xscale="log", yscale="log", xlabel="KV a call, bytes", ylabel="time, us", title=result["gpu"])
    right.axhline(ceiling / 1e3, color="k", linestyle="--", label=f"read ceiling, measured: {ceiling / 1e3:.2f} TB/s")
    right.set(xscale="log", ylim=(0, None), xlabel="KV a call, bytes", ylabel="KV read, TB/s", title=result["gpu"])
    left.legend()
    right.legend()
    _save(figure, path, result)
    return path


def _plot_heat_map(found: Sequence[Speedup], result: dict[str, Any], title: str, path: Path) -> Path:
    from matplotlib import pyplot

    cells = {tuple(speedup.row["kv_lens"][0]): speedup.factor for speedup in found}
    lengths = sorted({length for length, _ in cells})
    batches = sorted({batch for _, batch in cells})
    values = [[cells.get((length, batch), math.nan) for length in lengths] for batch in batches]
    figure, axes = pyplot.subplots(figsize=(1.6 + 0.8 * len(lengths), 1.6 + 0.5 * len(batches)))
    axes.imshow(values, cmap="RdYlGn", vmin=0.5, vmax=1.5, aspect="auto")
    axes.set_xticks(range(len(lengths)), [tokens_label(length) for length in lengths])
    axes.set_yticks(range(len(batches)), [str(batch) for batch in batches])
    axes.set(xlabel="KV tokens a request", ylabel="requests", title=title)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if not math.isnan(value):
                axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    _save(figure, path, result)
    return path


def digest(result: dict[str, Any]) -> str:
    """Tells one result from another; a plot carries it, so that a plot of older numbers is found."""
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def _save(figure: Any, path: Path, result: dict[str, Any]) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Source": digest(result), "Software": None})
    pyplot.close(figure)


# ---- rows in words -------------------------------------------------------------------------------------------------


def table_rows(rows: Iterable[Row], baselines: Sequence[str]) -> list[list[str]]:
    """Cells of a table: shape, KV, floor, each baseline, ours, speed-up over the best, error and FlashInfer's."""
    cells = []
    for row in rows:
        best = best_baseline(row, only_flashinfer=False)
        ours = row["fi_prefetch_us"]
        factor = f"{best[1] / ours:.2f}x" if best is not None and ours is not None else "-"
        heads = f"{row['heads_q']}/{row['heads_kv']}"
        cells.append(
            [
                heads if row["head_dim"] == 128 else f"{heads} d{row['head_dim']}",
                str(row["page_size"]),
                lens_label(row["kv_lens"]) + ("" if row["kv_dtype"] == row["q_dtype"] else " fp8"),
                bytes_label(row["kv_bytes"]),
                microseconds(row["floor_us"]),
                *(microseconds(row["baselines_us"].get(name)) for name in baselines),
                microseconds(ours),
                factor,
                "-" if row["error"] is None else f"{row['error']:.1e}",
                "-" if row["error_flashinfer"] is None else f"{row['error_flashinfer']:.1e}",
            ]
        )
    return cells


def microseconds(time: float | None) -> str:
    """For example `12.3`, or `-` where there is none."""
    return "-" if time is None else f"{time:.1f}"


def bytes_label(count: int) -> str:
    """For example `32 MB` for 2^25."""
    unit, size = next(
        ((unit, 1 << bits) for unit, bits in (("GB", 30), ("MB", 20)) if count >= 1 << bits), ("KB", 1 << 10)
    )
    # Three digits; of 1000 to 1023 of a unit there are four, which `.3g` would write as a power.
    return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
