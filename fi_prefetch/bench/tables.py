"""The tables that a result file gives: `fi-prefetch report` prints them, and the documents hold the same.

A view takes a result file's content and gives a Table. Every number in one is in the file, or a speed-up computed from
two that are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fi_prefetch.evidence import MINIMUM, SANITIZER_TOOLS, SEVERAL_GPUS

from . import report
from .report import Row, bytes_label, microseconds
from .shapes import Shape, lens_label

SIZE_CLASSES = ("up to 64 MB", "64 to 512 MB", "512 MB to 1 GB", "above 1 GB", "skewed", "mixed")
LEVER_COLUMNS = {
    "off": "off",
    "auto": "auto",
    "prologue": "prologue",
    "early_load": "early load",
    "paper": "paper",
    "run_ahead": "run-ahead 4",
}
LAYER_COLUMNS = {
    "auto": "ours",
    "auto_ready": "with promises",
    "auto_plan": "planned once",
    "flashinfer_fa2": "FlashInfer fa2",
    "fa3": "FlashAttention-3",
}


@dataclass(frozen=True)
class Table:
    """Cells under column names. The first `words` columns are text, the rest are numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1

    def markdown(self) -> str:
        """The table as Markdown, without its title."""
        header, *rows = ("| " + " | ".join(line) + " |\n" for line in (self.columns, *self.rows))
        return header + "|---" * len(self.columns) + "|\n" + "".join(rows)


def kind_of(result: dict[str, Any]) -> str:
    """Which kind of `fi-prefetch bench` a file is of, "tuning", "sglang" or "sglang_correctness"; ValueError for none.

    Files do not say it; the columns of their rows do, or that they have checks.
    """
    if "checks" in result:
        return "sglang_correctness"
    rows = result.get("rows") or [{}]
    for kind, column in (
        ("grid", "baselines_us"),
        ("layer", "attention_us"),
        ("window", "window_us"),
        ("map", "part"),
        ("profile", "counters"),
        ("first_hour", "step"),
        ("prefetch", "levers"),
        ("sglang", "ms_per_step"),
        ("tuning", report.GRID_COLUMNS[0]),
        ("plan_time", "us"),
    ):
        if column in rows[0]:
            return kind
    raise ValueError("not a result file of `fi-prefetch bench`: it has no rows of a known kind")


def heads(row: Row) -> str:
    """For example `32/8`, `32/8 d64`, `32/8 fp8`."""
    dim = "" if row["head_dim"] == 128 else f" d{row['head_dim']}"
    return f"{row['heads_q']}/{row['heads_kv']}{dim}" + ("" if row["kv_dtype"] == row["q_dtype"] else " fp8")


def batch(row: Row) -> str:
    """For example `1 x 64K + 31 x 4K`."""
    return lens_label(row["kv_lens"]).replace("x", " x ").replace("+", " + ")


def cache_name(kv_dtype: str) -> str:
    """What tables call SGLang's `--kv-cache-dtype`; "auto" is the model's own."""
    return "fp8" if kv_dtype.startswith("fp8") else "bf16"


def of_dtype(rows: Sequence[Row], fp8: bool) -> list[Row]:
    """The rows with fp8 KV, or those without."""
    return [row for row in rows if (row["kv_dtype"] != row["q_dtype"]) == fp8]


# ---- views ---------------------------------------------------------------------------------------------------------


def classes(result: dict[str, Any], fp8: bool) -> Table:
    """Geometric mean and least speed-up by size class, over FlashInfer's best and with FlashAttention-3 included."""
    rows = of_dtype(result["rows"], fp8)
    # FlashAttention-3 reads no fp8 KV with bf16 queries: there would be nothing more in its columns.
    with_others = any(not name.startswith(report.FLASHINFER_PREFIX) for row in rows for name in measured(row))
    lines = []
    for size in SIZE_CLASSES:
        members = [row for row in rows if Shape.from_row(row).size_class == size]
        cells = []
        for only_flashinfer in (True, False)[: 1 + with_others]:
            found = report.speedups(members, only_flashinfer)
            shapes = len(found)
            if found:
                summary = report.summarise(size, found)
                cells += [f"{summary.geometric_mean:.2f}", f"{summary.minimum:.2f}"]
            else:
                cells += ["-", "-"]
        if shapes:
            lines.append((size, str(shapes), *cells))
    title = "Speed-up over the best baseline at each shape: geometric mean, and the least"
    columns = [f"{'fp8 ' if fp8 else ''}KV a call", "shapes", "against the best of FlashInfer", "at least"]
    if with_others:
        columns += ["FlashAttention-3 included", "at least"]
    return Table(title, columns, lines)


def measured(row: Row) -> dict[str, float]:
    """The baselines that were measured on a row, with their times."""
    return {name: time for name, time in row["baselines_us"].items() if time is not None}


def losses(result: dict[str, Any]) -> Table:
    """Every shape on which a baseline is faster than we are by more than noise, worst first."""
    lines = []
    for loss in report.losses(report.speedups(result["rows"])):
        row = loss.row
        times = (microseconds(row["fi_prefetch_us"]), microseconds(row["baselines_us"][loss.baseline]))
        shape = (heads(row), str(row["page_size"]), batch(row), bytes_label(row["kv_bytes"]), loss.baseline)
        lines.append((*shape, *times, f"{loss.factor:.2f}"))
    title = f"Slower than the best baseline by more than {report.NOISE:.0%}"
    columns = ("heads", "page", "batch", "KV", "fastest", "ours, us", "fastest, us", "speed-up")
    return Table(title, columns, lines, words=5)


def times(result: dict[str, Any]) -> Table:
    """Every shape on every kernel."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["baselines_us"]))
    lines = []
    for row in result["rows"]:
        best = report.best_baseline(row, only_flashinfer=False)
        ours = row["fi_prefetch_us"]
        factor = "-" if best is None or ours is None else f"{best[1] / ours:.2f}"
        shape = (heads(row), str(row["page_size"]), batch(row), bytes_label(row["kv_bytes"]))
        baselines = (microseconds(row["baselines_us"].get(name)) for name in names)
        lines.append((*shape, microseconds(row["floor_us"]), *baselines, microseconds(ours), factor))
    columns = ("heads", "page", "batch", "KV", "floor", *names, "fi_prefetch", "speed-up")
    return Table("us a call", columns, lines, words=4)


def layer(result: dict[str, Any]) -> Table:
    """What attention costs in a decoder layer. Older files have not got all columns."""
    columns = [name for name in LAYER_COLUMNS if any(name in row["attention_us"] for row in result["rows"])]
    lines = []
    for row in result["rows"]:
        ranks = row["tensor_parallel"]
        name = row["model"].replace("llama", "Llama").replace("b", "B") + ("" if ranks == 1 else f" TP-{ranks}")
        lines.append((name, batch(row), *(microseconds(row["attention_us"].get(column)) for column in columns)))
    names = (LAYER_COLUMNS[column] for column in columns)
    return Table("Attention in a decoder layer, us", ("model", "batch", *names), lines, words=2)


def levers(result: dict[str, Any]) -> Table:
    """Each lever alone."""
    lines = [
        (
            heads(row),
            str(row["page_size"]),
            batch(row),
            *(microseconds(row["us"].get(column)) for column in LEVER_COLUMNS),
        )
        for row in result["rows"]
    ]
    return Table("Each lever alone, us a call", ("heads", "page", "batch", *LEVER_COLUMNS.values()), lines, words=3)


def window(result: dict[str, Any]) -> Table:
    """`prefetch_kv` beside an idle stretch, at the stretches that tell the most."""
    lines = [
        (
            heads(row),
            batch(row),
            str(row["window_us"]),
            *(microseconds(row[f"{on}_us"]) for on in ("off", "on", "warm")),
        )
        for row in result["rows"]
        if row["window_us"] in (0, 4, 16)
    ]
    title = "Attention after an idle stretch, us (the idle time taken off)"
    return Table(title, ("heads", "batch", "idle us", "off", "on", "warm"), lines, words=2)


def plan_time(result: dict[str, Any]) -> Table:
    """Host time of `plan()`."""
    names = list(dict.fromkeys(name for row in result["rows"] for name in row["us"]))
    lines = [
        (heads(row), str(row["page_size"]), batch(row), *(microseconds(row["us"][name]) for name in names))
        for row in result["rows"]
    ]
    return Table("Host time of plan(), us", ("heads", "page", "batch", *names), lines, words=3)


def tuning(result: dict[str, Any]) -> Table:
    """Every grid that `fi-prefetch tune` measured."""
    lines = [
        (
            heads(row),
            batch(row),
            bytes_label(row["kv_bytes"]),
            *(str(row[column]) for column in report.GRID_COLUMNS),
            microseconds(row["us"]),
        )
        for row in result["rows"]
    ]
    columns = ("heads", "batch", "KV", "warps", "blocks an SM", "least tiles a warp", "us a call")
    return Table("Grids", columns, lines, words=3)


def served_model(row: Row) -> str:
    """For example `llama-3-8b` or `llama-3-8b TP-2`."""
    return row["model"] + ("" if row["tp"] == 1 else f" TP-{row['tp']}")


def fastest_other(row: Row) -> str | None:
    """The backend without our kernel that takes least for a decode step of a row; None where none was measured."""
    others = {name: time for name, time in row["ms_per_step"].items() if not report.serves_with_ours(name)}
    return min(others, key=others.__getitem__) if others else None


def tokens_factor(row: Row) -> str:
    """Output tokens a second, prefill included, with our kernel over the most without it; "-" where one is missing."""
    tokens = row["tokens_per_s"]
    others = [value for name, value in tokens.items() if not report.serves_with_ours(name)]
    return f"{tokens['fi_prefetch'] / max(others):.3f}" if others and "fi_prefetch" in tokens else "-"


def arrived(row: Row) -> float | None:
    """What a decode step gained over the fastest other's, as a share of what attention gained.

    None where attention was not profiled, or gained too little to be a measure: 1 % of a step is what steps vary by.
    """
    steps, attention, other = row["ms_per_step"], row["attention_ms"], fastest_other(row)
    if other is None or attention.get(other) is None or attention.get("fi_prefetch") is None:
        return None
    gain = attention[other] - attention["fi_prefetch"]
    return (steps[other] - steps["fi_prefetch"]) / gain if gain > 0.01 * steps[other] else None


def sglang(result: dict[str, Any]) -> Table:
    """A decode step of SGLang's engine, by attention backend."""
    rows = [row for row in result["rows"] if not report.is_generation(row)]
    names = list(dict.fromkeys(name for row in rows for name in row["ms_per_step"]))
    lines = []
    for row in rows:
        steps, other, share = row["ms_per_step"], fastest_other(row), arrived(row)
        times = (f"{steps[name]:.2f}" if name in steps else "-" for name in names)
        lines.append(
            (
                served_model(row),
                cache_name(row["kv_dtype"]),
                batch({"kv_lens": report.step_lens(row)}),
                *times,
                f"{steps[other] / steps['fi_prefetch']:.3f}" if other and "fi_prefetch" in steps else "-",
                tokens_factor(row),
                "-" if row["attention_share"] is None else f"{row['attention_share']:.0%}",
                "-" if share is None else f"{share:.0%}",
            )
        )
    columns = ("model", "KV", "batch", *names, "speed-up", "with prefill", "attention's share", "arrived")
    return Table("A decode step in SGLang, ms", columns, lines, words=3)


def generation(result: dict[str, Any]) -> Table:
    """Output tokens a second of SGLang's engine for long answers, by attention backend."""
    rows = [row for row in result["rows"] if report.is_generation(row)]
    names = list(dict.fromkeys(name for row in rows for name in row["tokens_per_s"]))
    lines = []
    for row in rows:
        tokens = row["tokens_per_s"]
        values = (f"{tokens[name]:.0f}" if name in tokens else "-" for name in names)
        case = (served_model(row), cache_name(row["kv_dtype"]), batch({"kv_lens": report.step_lens(row)}))
        lines.append((*case, str(row["output"]), *values, tokens_factor(row)))
    columns = ("model", "KV", "prompts", "answers of", *names, "speed-up")
    return Table("Long answers in SGLang, output tokens a second", columns, lines, words=3)


def answers(result: dict[str, Any]) -> Table:
    """How far SGLang's answers with two attention backends lie apart: requests that are equal to the end, tokens up to
    where answers part, the mean and the 99.9 % quantile of what their log-probabilities differ by, how many differ by
    more than the KV dtype's noise."""
    lines = []
    for check, found in result["checks"].items():
        for name, pair in found.items():
            kv_dtype, _, backends = name.partition(": ")
            if "mean_logprob_difference" not in pair:
                continue
            counts = (pair["requests"], pair["equal_to_the_end"], pair["tokens_compared"])
            differences = (pair["mean_logprob_difference"], pair["quantiles"]["0.999"])
            cells = (*map(str, counts), *(f"{x:.4f}" for x in differences), str(pair["tokens_beyond_noise"]))
            between = backends.replace(" against", ",")
            lines.append((check, cache_name(kv_dtype), between, *cells, str(len(pair["faults"]))))
    columns = ("check", "KV", "between", "requests", "equal", "tokens", "mean", "99.9 %", "beyond", "faults")
    return Table("SGLang's answers, differences of log-probabilities", columns, lines, words=3)


def paper(result: dict[str, Any]) -> Table:
    """The paper's kernel, with its prefetch and without."""
    from .paper import TABLE_COLUMNS, table_rows

    return Table("The paper's kernel", TABLE_COLUMNS, table_rows(result), words=2)


def profile(result: dict[str, Any]) -> Table:
    """Hardware counters, a line a call."""
    from .profile import COLUMNS

    lines = [
        (heads(row), batch(row), name, *("-" if (x := found[c.name]) is None else f"{x:,.1f}" for c in COLUMNS))
        for row in result["rows"]
        for name, found in row["counters"].items()
    ]
    columns = ("heads", "batch", "kernel", *(column.label for column in COLUMNS))
    return Table("Hardware counters of one call, KV cold in L2", columns, lines, words=3)


def first_hour(result: dict[str, Any]) -> Table:
    """What a new machine takes: with nvcc and an empty cache, and on what was compiled ahead."""
    lines = [
        (row["step"], *("-" if (x := row["seconds"][column]) is None else f"{x:.1f}" for column in ("nvcc", "aot")))
        for row in result["rows"]
    ]
    return Table(
        "The first hour, seconds", ("step", "with nvcc, nothing compiled", "without nvcc, compiled ahead"), lines
    )


def gains(result: dict[str, Any], part: str) -> Table:
    """The map in numbers, of one kernel: what each prefetch gains."""
    from .paper import GAIN_COLUMNS, KERNEL_NAMES, distances, gain_rows

    title = f"Gain of prefetching over bytes in flight: {KERNEL_NAMES[part]}"
    return Table(title, (*GAIN_COLUMNS, *distances(part)), gain_rows(result, part), words=2)


def evidence(record: dict[str, Any]) -> Table:
    """What a GPU has run of the tests and sanitizers; `record` is that of tests/gpu_evidence.json."""
    where = (record["gpu"] or "-", (record["commit"] or "-")[:12])
    parts = {**record["suites"], **record["sanitizers"]}
    lines = []
    for name, counts in parts.items():
        seed = "-" if counts["seed"] is None else str(counts["seed"])
        lines.append((name, *where, *(str(counts[end]) for end in ("passed", "failed", "skipped")), seed))
    lines += [_did_not_run(name) for name in (*MINIMUM, *SANITIZER_TOOLS) if name not in parts]
    lines.append(_several_gpus(record.get("several_gpus")))
    columns = ("what ran", "on", "commit", "passed", "failed", "left out", "seed")
    return Table("Tests and sanitizers on a GPU", columns, lines, words=3)


def _did_not_run(name: str) -> tuple[str, ...]:
    return (name, "not run", *("-",) * 5)


def _several_gpus(run: dict[str, Any] | None) -> tuple[str, ...]:
    """The row of what needs several GPUs, and may have run on another machine; there also where it has not run."""
    if run is None:
        return _did_not_run(SEVERAL_GPUS)
    on = ", ".join(f"{count} x {name}" for name, count in run["gpus"].items())
    counts = (str(run["counts"][end]) for end in ("passed", "failed", "skipped"))
    return (SEVERAL_GPUS, on, (run["commit"] or "-")[:12], *counts, "-")


VIEWS: dict[str, Callable[[dict[str, Any]], Table]] = {
    "classes-bf16": functools.partial(classes, fp8=False),
    "classes-fp8": functools.partial(classes, fp8=True),
    "losses": losses,
    "times": times,
    "layer": layer,
    "levers": levers,
    "window": window,
    "plan-time": plan_time,
    "tuning": tuning,
    "sglang": sglang,
    "generation": generation,
    "answers": answers,
    "gains-paper": functools.partial(gains, part="residency"),
    "gains-ours": functools.partial(gains, part="ours"),
    "gains-flashinfer": functools.partial(gains, part="flashinfer"),
    "paper": paper,
    "profile": profile,
    "first-hour": first_hour,
    "evidence": evidence,
}
OF_KIND = {
    "grid": ("times", "classes-bf16", "classes-fp8", "losses"),
    "layer": ("layer",),
    "prefetch": ("levers",),
    "window": ("window",),
    "plan_time": ("plan-time",),
    "tuning": ("tuning",),
    "sglang": ("sglang", "generation"),
    "sglang_correctness": ("answers",),
    "map": ("gains-paper", "gains-ours", "gains-flashinfer", "paper"),
    "profile": ("profile",),
    "first_hour": ("first-hour",),
}


def tables(result: dict[str, Any]) -> list[Table]:
    """The tables of a result file that have a row at least; ValueError where it is no result file."""
    found = (VIEWS[view](result) for view in OF_KIND[kind_of(result)])
    return [table for table in found if table.rows]
