"""`fi-prefetch`: is it right here, what would it choose, how fast is it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console
from rich.table import Table

from . import __version__, evidence
from .bench.shapes import MODELS
from .prefetch import READY_CODES

# What a pipe or a log has no width for is not cut to a terminal's eighty columns.
LOG_WIDTH = 200
# Square brackets in a path, a reason or a compiler's words are no markup.
console = Console(
    markup=False, emoji=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else LOG_WIDTH
)

BENCH_KINDS = ("grid", "prefetch", "layer", "window", "map", "plan_time")
DRAWN_KINDS = ("grid", "map", "sglang")
# The baselines of bench/baselines.py; named here so that `--help` need not import FlashInfer.
BASELINE_NAMES = ("flashinfer_cuda_core", "flashinfer_fa2", "flashinfer_fa3", "flashinfer_xqa", "fa3")
# Those of bench/profile.py, which needs FlashInfer as well.
PROFILED_KERNELS = ("fi_prefetch", "paper", "fa3")
# Those that are worth a place in a layer: the others are slower everywhere.
LAYER_BASELINES = ("flashinfer_fa2", "fa3")


def table_of(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Table:
    """A table whose first `words` columns are text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number >= words else "left")
    for row in rows:
        table.add_row(*row)
    return table


def short(path: str) -> str:
    """A path as one would type it."""
    return path.replace(f"{Path.home()}/", "~/", 1) if path.startswith(f"{Path.home()}/") else path


def checkout() -> Path:
    """The root of the checkout that this package lies in; the GPU suite and the evidence are nowhere else."""
    root = Path(__file__).resolve().parents[1]
    if not (root / evidence.GPU_SUITE).is_dir():
        raise click.ClickException(f"{root} has no {evidence.GPU_SUITE}: this needs a checkout of the repository")
    return root


def has_gpu() -> bool:
    """Whether PyTorch sees a CUDA GPU."""
    import torch

    return torch.cuda.is_available()


def require_gpu() -> None:
    """Stops with a message where there is no GPU."""
    if not has_gpu():
        raise click.ClickException("this needs a CUDA GPU, and PyTorch sees none")


@contextlib.contextmanager
def one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Ends the command with what these errors say, instead of a traceback."""
    try:
        yield
    except kinds as error:
        raise click.ClickException(str(error)) from error


def was_given(name: str) -> bool:
    """Whether an option stands on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def refuse(names: Collection[str], why: str) -> None:
    """A usage error for the first of these options that was given: it would change nothing."""
    for option in click.get_current_context().command.params:
        if option.name in names and was_given(option.name):
            raise click.UsageError(f"{option.opts[0]}: {why}")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, package_name="fi-prefetch")
def main() -> None:
    """Batch decode with KV-cache prefetching, as a drop-in for FlashInfer's wrapper."""


def levers_on(plan: Any) -> list[str]:
    """The levers that a PrefetchPlan turns on, in a word or two each."""
    distances = {"prologue": plan.prologue, "run-ahead": plan.run_ahead}
    switches = {"early load": plan.early_load, "streaming hint": plan.streaming_hint}
    return [
        *(f"{name} {tiles}" for name, tiles in distances.items() if tiles),
        *(n for n, on in switches.items() if on),
    ]


# ---- info ----------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info(as_json: bool) -> None:
    """GPU, versions, toolchain, cache, and what would be chosen for a few decodes."""
    import torch
    from flashinfer.jit import env

    from .bench import environment
    from .bench.explain import explain, named_gpu
    from .bench.shapes import small_grid
    from .device import facts
    from .jit import csrc_dir, sources_hash
    from .prefetch import PrefetchPolicy

    found = facts(torch.device("cuda")) if has_gpu() else None
    facts_used = found or named_gpu("h200")
    choices: list[dict[str, Any]] = []
    for shape in small_grid():
        with one_line(ValueError):  # the environment's policy, or a file of tuned grids
            explained = explain(shape, facts_used, PrefetchPolicy.of(None), "nothing")
        levers = explained.levers
        choices.append(
            {
                "shape": shape.label,
                "kernel": explained.choice.kernel,
                "reason": explained.choice.reason,
                "levers": "" if levers is None else levers.reason,
                "levers_on": [] if levers is None else levers_on(levers),
            }
        )
    current = f"fi_prefetch_batch_decode_*_{sources_hash()}*/*.so"
    compiled = sorted(path.stem for path in env.FLASHINFER_JIT_DIR.glob(current))
    report: dict[str, Any] = {
        "gpu": None if found is None else found.__dict__,
        "driver": environment.driver_version(),
        "versions": environment.versions(),
        "sources": f"{csrc_dir()} ({sources_hash()})",
        "cache": str(env.FLASHINFER_JIT_DIR),
        "compiled": compiled,
        "compiled_ahead_in": os.environ.get("FI_PREFETCH_AOT_DIR"),
        "choices_for": facts_used.name,
        "choices": choices,
    }
    if as_json:
        click.echo(json.dumps(report, indent=2))
        return
    lines = [("GPU", "none: decodes run on the reference" if found is None else found.name)]
    if found is not None:
        ceiling = "unknown" if found.read_ceiling_gbs is None else f"{found.read_ceiling_gbs:.0f} GB/s"
        lines.append(("", f"{found.sm_count} SMs, {found.l2_bytes >> 20} MiB of L2, read ceiling {ceiling}"))
    lines.append(("driver", report["driver"] or "none"))
    lines += [(name, value or "none") for name, value in report["versions"].items()]
    lines += [("sources", short(report["sources"])), ("cache", short(report["cache"]))]
    lines += [
        ("compiled variants", str(len(compiled))),
        ("compiled ahead in", report["compiled_ahead_in"] or "nowhere"),
    ]
    console.print(table_of("fi_prefetch", ("", "value"), lines))
    suffix = "" if found is not None else " (no GPU here: as on this one)"
    rows = [(c["shape"], c["kernel"], ", ".join(c["levers_on"]) if c["levers"] else c["reason"]) for c in choices]
    title = f"What would be chosen on {facts_used.name}{suffix}"
    console.print(table_of(title, ("shape", "kernel", "levers that are on"), rows, words=3))
    console.print("Why: `fi-prefetch explain MODEL`, or --json.")


# ---- build ---------------------------------------------------------------------------------------------------------


def check_architectures(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> list[str]:
    """The architectures, each as FlashInfer's JIT writes them."""
    for value in values:
        if not re.fullmatch(r"\d+\.\d[af]?", value):
            raise click.BadParameter(f"expected a compute capability as 9.0a or 8.0, got {value!r}")
    return list(values)


@main.command()
@click.option(
    "--arch",
    multiple=True,
    callback=check_architectures,
    help='Compile for this architecture ("9.0a") instead of the GPUs here; repeatable.',
)
@click.option("--only", default="", help="Compile the variant of this name, or those with this text in theirs.")
@click.option(
    "--fixed-split",
    is_flag=True,
    help="Compile the batch-invariant kernels (fixed_split_size, disable_split_kv) as well.",
)
@click.option("--jobs", "-j", type=click.IntRange(1), default=4, show_default=True, help="Compilations at a time.")
@click.option(
    "--aot",
    type=click.Path(file_okay=False, path_type=Path),
    help="Copy the libraries into this folder too, and the kernels that demo, bench and tune measure with; with "
    "FI_PREFETCH_AOT_DIR they serve where there is no nvcc.",
)
def build(arch: list[str], only: str, fixed_split: bool, jobs: int, aot: Path | None) -> None:
    """Compile the kernel variants now rather than at first use."""
    from rich.progress import track

    from . import jit
    from .bench import kernels

    usual, invariant = jit.all_variants(), jit.all_variants(fixed_split=True)
    named = [variant for variant in usual + invariant if variant.name == only]
    variants = named or [variant for variant in usual + invariant * fixed_split if only in variant.name]
    if not variants:
        hint = "; with --fixed-split some have" if any(only in variant.name for variant in invariant) else ""
        raise click.ClickException(f"no variant has {only!r} in its name{hint}")
    failed: list[str] = []
    start = time.monotonic()
    try:
        # A library that leaves this machine says in its name what it is for; what stays is found without that.
        architectures = arch or (jit.architectures_here() if aot is not None else [])
        within = jit.target_architectures(architectures) if architectures else contextlib.nullcontext()
        with within, ThreadPoolExecutor(jobs) as pool:
            specs = [jit.jit_spec(variant, architectures or None) for variant in variants]
            if aot is not None:  # where there is no compiler, `demo`, `bench` and `tune` are to run too
                specs.append(kernels.jit_spec(architectures))
            pending = {pool.submit(spec.build, verbose=False, need_lock=True): spec for spec in specs}
            try:
                for done in track(as_completed(pending), description="compiling", total=len(pending), console=console):
                    spec, problem = pending[done], done.exception()
                    if problem is not None:
                        failed.append(spec.name)
                        console.print(f"{spec.name}: {problem}", style="red")
                    elif aot is not None:
                        aot.mkdir(parents=True, exist_ok=True)
                        shutil.copy(spec.get_library_path(), aot)
            except BaseException:  # interrupted, or there is no writing: leaving would wait for all the others
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    except (jit.KernelUnavailableError, OSError) as error:
        raise click.ClickException(str(error)) from error
    console.print(f"{len(specs) - len(failed)} of {len(specs)} libraries compiled in {time.monotonic() - start:.0f} s")
    if failed:
        raise click.ClickException(f"{len(failed)} libraries could not be compiled")
    if aot is not None:
        size = sum((aot / f"{spec.name}.so").stat().st_size for spec in specs) / 1e6
        console.print(f"{aot}: {len(specs)} libraries, {size:.1f} MB, for {', '.join(architectures)}")
        console.print(f"where they are to serve: FI_PREFETCH_AOT_DIR={aot}")


# ---- demo ----------------------------------------------------------------------------------------------------------


@main.command()
@click.option(
    "--compile/--no-compile", "compile_kernels", default=True, help="Without a GPU: compile the kernels as well."
)
@click.option("--baseline", "baselines", multiple=True, type=click.Choice(BASELINE_NAMES), help="On a GPU; repeatable.")
def demo(compile_kernels: bool, baselines: tuple[str, ...]) -> None:
    """A first look: against FlashInfer on a GPU, on the reference without one."""
    if has_gpu():
        _demo_on_gpu(baselines or ("flashinfer_cuda_core", "flashinfer_fa2"))
    else:
        _demo_on_cpu(compile_kernels)


def _demo_on_gpu(baselines: Sequence[str]) -> None:
    from .bench import grid, runner
    from .bench.shapes import small_grid

    with tempfile.TemporaryDirectory() as folder:
        options = {"baselines": list(baselines), "policy": "auto", "page_order": "shuffled"}
        job = runner.Job("grid", grid.specs(small_grid()), options)
        content = _run_job(job, Path(folder, "demo.json"), resume=False)
    _print_grid(content)
    wrong = len(content["failed"]) + sum(row["fi_prefetch_us"] is None for row in content["rows"])
    if wrong:
        raise click.ClickException(f"no right answer of our kernel on {wrong} of {len(job.specs)} shapes")


def _demo_on_cpu(compile_kernels: bool) -> None:
    from .bench import demo as cpu

    console.print("No GPU: the same calls run on the reference, held against PyTorch's attention.")
    results = [cpu.decode_on_cpu(shape) for shape in cpu.CPU_SHAPES]
    rows = [(r.shape.label, f"{r.error:.1e}", f"{r.milliseconds:.1f}") for r in results]
    console.print(table_of("Decode on the CPU", ("shape", "relative error", "ms"), rows))
    if not compile_kernels:
        return
    if not cpu.has_nvcc():
        console.print("No nvcc: the kernels are not compiled here.")
        return
    resources = []
    for variant in cpu.VARIANTS:
        with console.status(f"compiling {variant.name} for {cpu.ARCHITECTURE}"):
            for found in cpu.compile_variant(variant):
                label = variant.name.removeprefix("fi_prefetch_batch_decode_")
                resources.append((label, found.kernel, str(found.registers), str(found.spill_bytes)))
    title = f"What the compiler reports for {cpu.ARCHITECTURE}, a decode kernel by its most rows and requests"
    console.print(table_of(title, ("variant", "kernel", "registers", "spilled bytes"), resources))


# ---- check ---------------------------------------------------------------------------------------------------------


SEVERAL_GPUS = "several_gpus"
CHECK_PARTS = ("suite", SEVERAL_GPUS, "random", "soak", *evidence.SANITIZER_TOOLS)
# What each part that is no sanitizer, and needs one GPU, is called in a record.
_SUITES = {"suite": evidence.GPU_SUITE, "random": evidence.RANDOM_CASES, "soak": evidence.SOAK_CALLS}


@main.command()
@click.option("--record", is_flag=True, help=f"Write what ran to {evidence.EVIDENCE_FILE}.")
@click.option(
    "--only",
    multiple=True,
    type=click.Choice(CHECK_PARTS),
    help="Run this part alone; repeatable. A record of the same tree, GPU and versions keeps its other parts; "
    "several_gpus, which needs two GPUs, may be of another machine than they are.",
)
@click.option("--random-cases", default=evidence.MINIMUM[evidence.RANDOM_CASES], show_default=True, help="How many.")
@click.option("--seed", type=int, help="Draw the random cases with this seed. [default: a new one]")
@click.option("--soak-calls", default=evidence.MINIMUM[evidence.SOAK_CALLS], show_default=True, help="How many.")
@click.option(
    "--declare-not-run",
    is_flag=True,
    help="Record that no GPU has run this tree, or not the parts that the record lacks. Needs no GPU.",
)
@click.argument("pytest_arguments", nargs=-1)
def check(
    record: bool, only: tuple[str, ...], random_cases: int, seed: int | None, soak_calls: int, declare_not_run: bool,
    pytest_arguments: tuple[str, ...],
) -> None:  # fmt: skip
    """Run the GPU suite, what needs several GPUs where there are two, random sessions, a soak of a million calls, and
    compute-sanitizer over the kernels.

    PYTEST_ARGUMENTS, after `--`, go to pytest, which runs the first two.
    """
    from .bench import environment
    from .gpu_check import CheckError, run_random, run_sanitizer, run_several_gpus, run_soak, run_suite

    root = checkout()
    path = root / evidence.EVIDENCE_FILE
    if declare_not_run:
        earlier = None
        with contextlib.suppress(ValueError, FileNotFoundError):  # nothing that could be lost
            earlier = evidence.load(path)
        current = evidence.tree_hash(root)
        if earlier is not None and evidence.judge(earlier, current).state == evidence.PASSED:
            raise click.ClickException(f"{path} says that {earlier.gpu} has run this tree, and all of it passed")
        ran = earlier if earlier is not None and earlier.hash == current else None
        if ran is not None and ran.gpu is None and ran.several_gpus is None:
            ran = None  # an earlier declaration
        with one_line(ValueError):
            declared = evidence.not_run(root, environment.commit(), ran)
        path.write_text(declared.to_json())
        console.print(f"{path}: {declared.reason}")
        return
    require_gpu()
    gpu = environment.require_gpu().name
    if record and pytest_arguments:
        raise click.UsageError("--record wants the whole suite: no pytest arguments")
    commit, driver, versions = environment.commit(), environment.driver_version(), environment.versions()
    gpus = environment.gpus()
    parts = only or CHECK_PARTS
    if SEVERAL_GPUS in parts and sum(gpus.values()) < 2:
        one = f"{SEVERAL_GPUS} needs two GPUs, and PyTorch sees one"
        if only:
            raise click.ClickException(one)
        parts = tuple(part for part in parts if part != SEVERAL_GPUS)
        console.print(f"{one}: left out", style="yellow")
    kept = evidence.Evidence(evidence.NOT_RUN, evidence.tree_hash(root), commit, None, gpu, driver, versions)
    if record:
        kept = _kept(path, kept, parts, bool(only))
    suites, sanitizers, several = dict(kept.suites), dict(kept.sanitizers), kept.several_gpus
    problems = []
    for part in parts:
        console.rule(part)
        try:
            if part == "suite":
                suites[_SUITES[part]] = run_suite(root, click.echo, pytest_arguments)
            elif part == SEVERAL_GPUS:
                several = None
                counts = run_several_gpus(root, click.echo, pytest_arguments)
                several = evidence.SeveralGpus(gpus, commit, driver, versions, counts)
            elif part == "random":
                suites[_SUITES[part]] = run_random(root, click.echo, random_cases, seed)
            elif part == "soak":
                suites[_SUITES[part]] = run_soak(root, click.echo, soak_calls)
            else:
                sanitizers[part] = run_sanitizer(root, part, click.echo)
        except CheckError as error:
            # What an earlier call recorded of this part no longer stands.
            (suites if part in _SUITES else sanitizers).pop(_SUITES.get(part, part), None)
            problems.append(f"{part}: {error}")
            console.print(str(error), style="red")
        if record:  # after every part: what ran is kept whatever comes next
            found = evidence.from_run(
                root, kept.commit, kept.gpu, kept.driver, kept.versions, suites, sanitizers, several
            )
            path.write_text(found.to_json())
    ended = {**suites, **sanitizers} | ({} if several is None else {evidence.SEVERAL_GPUS: several.counts})
    rows = [(name, str(c.passed), str(c.failed), str(c.skipped)) for name, c in ended.items()]
    console.print(table_of("GPU check", ("part", "passed", "failed", "skipped"), rows))
    if problems or not all(c.clean for c in ended.values()):
        raise click.ClickException("; ".join(problems) or "not everything passed")


def _kept(path: Path, here: evidence.Evidence, parts: Sequence[str], some: bool) -> evidence.Evidence:
    """What a run of these parts starts from: `here`, and what stands of the record at `path`.

    A record names one GPU, driver and set of versions for all its parts but what needs several GPUs, which has its own.
    """
    alone = set(parts) == {SEVERAL_GPUS}
    nothing = evidence.Evidence(evidence.NOT_RUN, here.hash, None) if alone else here
    if not path.exists():
        return nothing
    try:
        earlier = evidence.load(path)
    except ValueError as error:
        if some:
            raise click.ClickException(str(error)) from error
        return nothing
    if earlier.hash != here.hash:
        return nothing
    if alone:
        return earlier
    about_here = (here.gpu, here.driver, here.versions)
    if some and (earlier.gpu, earlier.driver, earlier.versions) == about_here:
        here = replace(here, suites=earlier.suites, sanitizers=earlier.sanitizers)
    return replace(here, several_gpus=earlier.several_gpus)


# ---- bench ---------------------------------------------------------------------------------------------------------


def results_folder(gpu_key: str) -> Path:
    """Where result files go: the checkout's benchmarks/results/<gpu>, or the same under the current folder."""
    root = Path(__file__).resolve().parents[1]
    return (root if (root / "benchmarks").is_dir() else Path.cwd()) / "benchmarks" / "results" / gpu_key


class TokensType(click.ParamType):
    """Numbers of tokens as 512,2K,128K."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        from .bench.shapes import parse_tokens

        if isinstance(value, tuple):
            return value
        try:
            return tuple(parse_tokens(part) for part in value.split(","))
        except ValueError as error:
            self.fail(str(error), param, ctx)


TOKENS = TokensType()
POSITIVE = click.FloatRange(min=0, min_open=True)


def shape_options(command: Any) -> Any:
    """The options that say which shapes: a grid, a model with batches and contexts, or heads and lengths."""
    for option in reversed(
        (
            click.option(
                "--grid", type=click.Choice(("basic", "full", "mixed", "small")), default="basic", show_default=True
            ),
            click.option("--model", help="A model's decode calls (see `explain`), over --batch and --context."),
            click.option(
                "--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks that share the model."
            ),
            click.option("--batch", type=TOKENS, default="1,8,64", show_default=True, help="Requests."),
            click.option("--context", type=TOKENS, default="2K,8K", show_default=True, help="KV tokens a request."),
            click.option("--heads", help="Query and kv heads, as 32/8."),
            click.option("--lens", help="Requests by length, as 8x1K, 1x64K+31x4K or 256x64..2K; with --heads."),
            click.option("--page", type=click.IntRange(1), default=1, show_default=True, help="Tokens a page."),
            click.option("--head-dim", type=click.IntRange(1), default=128, show_default=True),
            click.option(
                "--kv-dtype",
                type=click.Choice(("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")),
                default="bfloat16",
                show_default=True,
                help="With a grid: of all its shapes.",
            ),
        )
    ):
        command = option(command)
    return command


MODEL_OPTIONS = ("model", "tp", "batch", "context")
HEADS_OPTIONS = ("heads", "lens", "head_dim")
SHAPE_OPTIONS = ("grid", *MODEL_OPTIONS, *HEADS_OPTIONS, "page", "kv_dtype")


def shapes_from(options: dict[str, Any]) -> tuple[list[Any], bool]:
    """The shapes that the options name, and whether they are a whole grid."""
    shapes, whole_grid = _named_shapes(options)
    for shape in shapes:
        if not shape.kv_bytes:
            raise click.ClickException(f"{shape.label} has no KV to read")
    return shapes, whole_grid


def _named_shapes(options: dict[str, Any]) -> tuple[list[Any], bool]:
    from .bench.shapes import GRIDS, Shape, model_grid, parse_lens, query_dtype

    if options["model"]:
        refuse(("grid", *HEADS_OPTIONS), "--model excludes it")
        model = find_model(options["model"], options["tp"])
        with one_line(ValueError):
            shapes = model_grid(model, options["batch"], options["context"], options["page"], options["kv_dtype"])
            return list(shapes), False
    refuse(MODEL_OPTIONS, "it needs --model")
    if not options["heads"]:
        refuse(HEADS_OPTIONS, "it needs --heads")
        refuse(("page",), "it needs --model or --heads")
        of_grid = GRIDS[options["grid"]]()
        if was_given("kv_dtype"):
            kv_dtype = options["kv_dtype"]
            q_dtype = query_dtype(kv_dtype)
            of_grid = list(dict.fromkeys(replace(shape, q_dtype=q_dtype, kv_dtype=kv_dtype) for shape in of_grid))
        return of_grid, True
    refuse(("grid",), "--heads excludes it")
    if not options["lens"]:
        raise click.UsageError("--heads needs --lens")
    heads_q, separator, heads_kv = options["heads"].partition("/")
    if not (separator and heads_q.isdigit() and heads_kv.isdigit()):
        raise click.BadParameter(f"expected query/kv heads as 32/8, got {options['heads']!r}", param_hint="--heads")
    dim, kv_dtype = options["head_dim"], options["kv_dtype"]
    with one_line(ValueError):
        lens = parse_lens(options["lens"])
        shape = Shape(int(heads_q), int(heads_kv), options["page"], lens, dim, query_dtype(kv_dtype), kv_dtype)
    return [shape], False


def find_model(name: str, ranks: int) -> Any:
    """A model's slice, or an error that names the models there are."""
    if name not in MODELS:
        raise click.ClickException(f"no model {name!r}; there are {', '.join(MODELS)}")
    with one_line(ValueError):
        return MODELS[name].slice(ranks)


# What of `bench` applies to some kinds alone.
_OF_KINDS = {
    **dict.fromkeys((*SHAPE_OPTIONS, "page_order"), ("grid", "prefetch")),
    **dict.fromkeys(("policy", "warm"), ("grid",)),
    "baselines": ("grid", "layer"),
}
_MEASURING = (
    "baselines", "policy", "page_order", "output", "warm", "resume", "budget_seconds", "stall_seconds", "plots",
)  # fmt: skip


@main.command()
@click.argument("kind", type=click.Choice(BENCH_KINDS), default="grid")
@shape_options
@click.option(
    "--baseline", "baselines", multiple=True, type=click.Choice(BASELINE_NAMES), help="Repeatable; default: all."
)
@click.option(
    "--policy", default="auto", show_default=True, help="Prefetch policy of the grid: a name or key=value pairs."
)
@click.option("--page-order", type=click.Choice(("shuffled", "sequential")), default="shuffled", show_default=True)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Result file. [default: benchmarks/results/<gpu>/KIND.json]"
)
@click.option("--warm", is_flag=True, help="Of the grid: also with the KV in L2, as far as L2 holds it.")
@click.option(
    "--resume", is_flag=True, help="Keep the rows that the file has, from the same GPU, versions, commit and options."
)
@click.option("--budget-seconds", type=POSITIVE, help="Stop in time; the file keeps what was measured.")
@click.option(
    "--stall-seconds", type=POSITIVE, default=900.0, show_default=True, help="Give a silent kernel up after this."
)
@click.option(
    "--plots/--no-plots", default=True, help="Draw the plots of a grid or a map beside the file (needs matplotlib)."
)
@click.option(
    "--estimate", type=click.Choice(("h100", "h200", "h20")), help="Predict for this GPU; nothing is measured."
)
def bench(kind: str, **options: Any) -> None:
    """Measure, and write a result file.

    KIND is grid (every shape on every kernel), prefetch (every lever), layer (attention in a model's layer), window
    (the prefetch beside an all-reduce), map (run-ahead over bytes in flight, in the paper's kernel, FlashInfer's and
    ours) or plan_time (host time of planning).
    """
    from .bench import report
    from .prefetch import PrefetchPolicy

    refuse([name for name, kinds in _OF_KINDS.items() if kind not in kinds], f"{kind} does not take it")
    shapes, whole_grid = shapes_from(options)
    if options["estimate"]:
        if kind != "grid":
            raise click.UsageError(f"--estimate predicts the grid; {kind} has to be measured")
        refuse(_MEASURING, "--estimate measures nothing")
        _print_estimate(shapes, options["estimate"])
        return
    if kind == "layer" and not set(options["baselines"]) <= set(LAYER_BASELINES):
        raise click.UsageError(f"--baseline: layer measures {' and '.join(LAYER_BASELINES)}")
    with one_line(ValueError):
        PrefetchPolicy.of(options["policy"])
    require_gpu()
    from .bench.environment import require_gpu as gpu_facts

    job = _job(kind, shapes, options)
    standard = whole_grid and options["grid"] != "small" and not was_given("kv_dtype")
    if standard or kind not in ("grid", "prefetch"):
        stem = "mixed" if kind == "grid" and options["grid"] == "mixed" else kind
        output = options["output"] or results_folder(gpu_facts().key) / f"{stem}.json"
    else:
        output = options["output"] or Path(f"fi_prefetch_{kind}.json")
    content = _run_job(job, output, options["resume"])
    if content["rows"]:
        _print_result(content)
    if kind in DRAWN_KINDS and options["plots"]:
        _draw(content, output.parent / "plots")
    console.print(f"{output}: {len(content['rows'])} rows, {len(content['failed'])} failed")
    if not content["complete"]:
        raise click.ClickException("not complete: run it again with --resume")
    if not any(report.times_of(row) for row in content["rows"]):
        raise click.ClickException("our kernel was measured on no row")


def _job(kind: str, shapes: Sequence[Any], options: dict[str, Any]) -> Any:
    """The job for a kind of result file."""
    from importlib import import_module

    from .bench import runner, worker

    module = import_module(worker.KINDS[kind])
    specs = module.specs(shapes) if kind in ("grid", "prefetch") else module.specs()
    baselines = list(options["baselines"] or BASELINE_NAMES)
    job_options: dict[str, Any] = {
        "baselines": [name for name in baselines if kind != "layer" or name in LAYER_BASELINES],
        "policy": options["policy"],
        "page_order": options["page_order"],
        "warm": options["warm"],
    }
    if kind == "layer":
        job_options["fewest_copies"] = module.LAYERS
    return runner.Job(kind, specs, job_options, options["stall_seconds"], options["budget_seconds"])


def _run_job(job: Any, output: Path, resume: bool) -> dict[str, Any]:
    """Runs a job with a progress bar; on a terminal that is none, with a line a row."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .bench import runner
    from .bench.report import row_label

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(job.kind, total=len(job.specs))

        def progress(event: dict[str, Any]) -> None:
            label = row_label(job.specs[event["row"]]) if isinstance(event.get("row"), int) else ""
            if event["event"] == "kernel_started" and event["name"]:
                bar.update(task, description=f"{label}: {event['name']}")
            elif event["event"] in ("row", "row_failed"):
                bar.advance(task)
                if event["event"] == "row_failed":
                    console.print(f"{label}: {event['reason']}", style="red")
                elif not console.is_terminal:
                    console.print(label)
            elif event["event"] == "worker_lost":
                console.print(f"{label} {event['name']}: {event['reason']}; going on without it", style="red")

        with one_line(runner.JobError, OSError):
            return runner.run(job, output, resume, progress)


def _print_result(content: dict[str, Any]) -> None:
    """The tables of a result file of any kind; ValueError where it is none."""
    from .bench.tables import kind_of, tables

    if kind_of(content) == "grid":
        _print_grid(content)
        return
    for table in tables(content):
        console.print(table_of(f"{table.title} ({content['gpu']})", table.columns, table.rows, table.words))
    if kind_of(content) == "map":
        from .bench.paper import reading

        for sentence in reading(content):
            console.print(f"- {sentence}")
    _print_missing(content)


def _print_missing(content: dict[str, Any]) -> None:
    """Why there is a dash in a table: a line a kernel, with the first of its reasons."""
    reasons: dict[str, list[str]] = {}
    for row in content.get("rows", []):
        for name, reason in row.get("missing", {}).items():
            reasons.setdefault(name, []).append(reason)
    for name, found in reasons.items():
        others = "" if len(set(found)) == 1 else ", and other reasons"
        console.print(f"{name}: not measured on {len(found)} of {len(content['rows'])} rows: {found[0]}{others}")


def _print_grid(content: dict[str, Any]) -> None:
    from .bench import report

    names = list(dict.fromkeys(name for row in content["rows"] for name in row["baselines_us"]))
    columns = (
        "heads",
        "page",
        "batch x KV",
        "KV",
        "floor",
        *names,
        "fi_prefetch",
        "best / ours",
        "error",
        "FlashInfer's",
    )
    title = f"{content['gpu']}, us a call, KV cold in L2; read ceiling {content['read_ceiling_gbs']:.0f} GB/s"
    console.print(table_of(title, columns, report.table_rows(content["rows"], names)))
    for label, only_flashinfer in (("the best baseline", False), ("the best of FlashInfer's", True)):
        found = report.speedups(content["rows"], only_flashinfer)
        rows = [
            (
                summary.name,
                str(summary.rows),
                f"{summary.geometric_mean:.2f}",
                f"{summary.minimum:.2f}",
                summary.slowest,
            )
            for summary in report.summaries(found)
        ]
        if rows:
            columns = ("class", "rows", "geometric mean", "least", "where")
            console.print(table_of(f"Speed-up over {label}", columns, rows))
    for loss in report.losses(report.speedups(content["rows"])):
        console.print(f"slower than {loss.baseline}: {loss.label} ({loss.factor:.2f})")
    _print_missing(content)


def _draw(content: dict[str, Any], folder: Path) -> None:
    from .bench import report

    try:
        for path in report.plot(content, folder):
            console.print(f"drew {path}")
    except (ImportError, OSError, ValueError) as error:
        console.print(f"no plots: {error}")


def _print_estimate(shapes: Sequence[Any], gpu: str) -> None:
    from .bench.estimate import estimate, read_ceiling_gbs
    from .bench.explain import kernel_choice, named_gpu
    from .bench.report import bytes_label, microseconds

    ceiling, nominal = read_ceiling_gbs(gpu)
    rows = []
    unserved: dict[str, str] = {}
    for shape in shapes:
        found, choice = estimate(shape, gpu), kernel_choice(shape, named_gpu(gpu))
        ours: float | None = found.fi_prefetch_us
        if choice.kernel != "fi_prefetch":
            ours, unserved[shape.label] = None, f"goes to {choice.kernel}: {choice.reason}"
        times = (found.floor_us, found.flashinfer_us, ours)
        rows.append((shape.label, bytes_label(shape.kv_bytes), *map(microseconds, times)))
    kind = "data sheet" if nominal else "measured"
    title = f"PREDICTION for {gpu.upper()}, us a call ({kind} read ceiling {ceiling:.0f} GB/s); nothing was measured"
    console.print(table_of(title, ("shape", "KV", "floor", "FlashInfer", "fi_prefetch"), rows))
    for label, reason in unserved.items():
        console.print(f"{label} {reason}")
    console.print("Fitted to uniform batches on an H100: single shapes are off by up to a third, skewed ones by more.")


@main.command()
@click.option("--resume", is_flag=True, help="Go on where an earlier run on this GPU, versions and commit stopped.")
@click.option("--budget-seconds", type=POSITIVE, help="Stop in time; --resume goes on.")
def tune(resume: bool, budget_seconds: float | None) -> None:
    """Find the grids that suit this GPU, and use them from now on."""
    require_gpu()
    from . import tune as grids
    from .bench import runner, tuning
    from .bench.environment import require_gpu as gpu_facts

    facts = gpu_facts()
    path = grids.tuned_file(facts.key)
    job = runner.Job("tuning", tuning.specs(), budget_seconds=budget_seconds)
    content = _run_job(job, path.with_suffix(".measured.json"), resume)
    if not content["complete"]:
        raise click.ClickException("not complete: run it again with --resume")
    try:
        rules = tuning.rules(content["rows"])
    except ValueError as error:
        raise click.ClickException(f"nothing could be measured: {error}") from error
    with one_line(OSError):
        grids.write_rules(path, rules, gpu=facts.name, version=__version__)
    rows = [
        (
            "any" if rule.kv_bytes is None else f"up to {rule.kv_bytes >> 20} MB",
            str(rule.grid.warps),
            str(rule.grid.blocks_per_sm),
            str(rule.grid.min_tiles_per_warp),
        )
        for rule in rules
    ]
    console.print(table_of(str(path), ("KV a call", "warps", "blocks an SM", "least tiles a warp"), rows))


def _load_result(path: Path) -> tuple[dict[str, Any], str]:
    """A result file's content and kind, or an error that names the file."""
    from .bench import report
    from .bench.tables import kind_of

    with one_line(ValueError, OSError):
        content = report.load(path)
    with _reading(path):
        kind = kind_of(content)
        for row in content.get("rows", []):
            report.times_of(row)
    return content, kind


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Ends the command, naming the file, where its content is not what the code in here expects."""
    try:
        yield
    except ValueError as error:
        raise click.ClickException(f"{path}: {error}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path}: not a whole result file: {error!r}") from error


@main.command()
@click.argument("before", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("after", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def compare(before: Path, after: Path) -> None:
    """Two result files of one kind against each other, row by row, with noise bands from each run's repeats."""
    from .bench import report

    (first, kind), (second, other_kind) = map(_load_result, (before, after))
    if kind != other_kind:
        raise click.ClickException(f"cannot compare a {kind} with a {other_kind} result")
    if "rows" not in first or "rows" not in second:
        raise click.ClickException(f"a {kind} result has no times to compare")
    changes = report.compare(first, second)
    if not changes:
        raise click.ClickException("the two files have nothing measured in common")
    gpus = [content.get("gpu") or "a GPU that it does not name" for content in (first, second)]
    if gpus[0] != gpus[1]:
        console.print(f"different GPUs: {before} is of {gpus[0]}, {after} of {gpus[1]}", style="yellow", markup=False)
    rows = [
        (c.label, f"{c.before_us:.1f}", f"{c.after_us:.1f}", f"{c.factor:.3f}", f"{c.band:.3f}", c.verdict)
        for c in changes
    ]
    console.print(table_of(f"{before} -> {after}", ("shape", "before, us", "after, us", "factor", "band", ""), rows))
    mean = report.geometric_mean([change.factor for change in changes])
    verdicts = [change.verdict for change in changes]
    console.print(
        f"geometric mean {mean:.3f} over {len(changes)} times: "
        + ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("faster", "same", "slower"))
    )


@main.command()
@click.argument("result", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Draw the plots into this folder.")
def report(result: Path, plots: Path | None) -> None:
    """The tables of a result file, and a grid's or a map's plots."""
    content, kind = _load_result(result)
    if plots is not None and kind not in DRAWN_KINDS:
        raise click.UsageError(f"--plots draws {' or '.join(DRAWN_KINDS)}, and {result} is {kind}")
    with _reading(result):
        _print_result(content)
    if plots is not None:
        _draw(content, plots)


# ---- profile and explain -------------------------------------------------------------------------------------------


@main.command()
@shape_options
@click.option(
    "--policy",
    "policies",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="Our policy beside `off`. Repeatable.",
)
@click.option(
    "--kernel",
    "kernels",
    multiple=True,
    type=click.Choice(PROFILED_KERNELS),
    default=PROFILED_KERNELS[:1],
    show_default=True,
    help="Repeatable. The paper's wants --page 16.",
)
@click.option("--budget-seconds", type=POSITIVE, help="Start on no further shape after this.")
@click.option("--output", type=click.Path(path_type=Path), help="Write a result file too.")
def profile(
    policies: tuple[str, ...],
    kernels: tuple[str, ...],
    budget_seconds: float | None,
    output: Path | None,
    **options: Any,
) -> None:
    """Hardware counters of a call, with prefetch off and on, read by Nsight Compute (ncu)."""
    from .bench import environment
    from .bench.profile import ProfileError, profiler_path
    from .bench.profile import profile as profile_calls
    from .prefetch import PrefetchPolicy

    with one_line(ValueError):
        for policy in policies:
            PrefetchPolicy.of(policy)
    shapes, whole_grid = shapes_from(options)
    if whole_grid:
        raise click.UsageError("name shapes, with --heads and --lens, or --model, --batch and --context")
    with one_line(ProfileError):
        profiler_path()
        require_gpu()
        with console.status(f"profiling {len(shapes)} shapes"):
            rows, complete = profile_calls(shapes, kernels, policies, budget_seconds)
    content = {**environment.header(), "complete": complete, "rows": rows}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(content, indent=1) + "\n")
        console.print(f"{output}: {len(rows)} of {len(shapes)} shapes")
    _print_result(content)
    if not any(row["counters"] for row in rows):
        raise click.ClickException("no call was profiled")


@main.command(epilog=f"MODEL is one of {', '.join(MODELS)}.")
@click.argument("model")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True)
@click.option(
    "--context", default="2K", show_default=True, help="KV tokens: 2K, or requests by length, as 1x64K+31x4K."
)
@click.option("--tp", type=click.IntRange(1), default=1, show_default=True, help="Ranks that share the model.")
@click.option("--page", type=click.IntRange(1), default=1, show_default=True, help="Tokens a page.")
@click.option("--policy", default=None, help="Prefetch policy. [default: FI_PREFETCH_POLICY, else auto]")
@click.option("--ready", type=click.Choice(tuple(READY_CODES)), default="nothing", show_default=True)
@click.option(
    "--gpu", type=click.Choice(("h100", "h200", "h20")), help="As on this GPU. [default: the one here, else h200]"
)
def explain(
    model: str, batch: int, context: str, tp: int, page: int, policy: str | None, ready: str, gpu: str | None
) -> None:
    """What would be chosen for MODEL's decode, and why: kernel, schedule, levers, budget."""
    from .bench import explain as explanations
    from .bench.report import bytes_label
    from .bench.shapes import parse_lens, parse_tokens
    from .prefetch import PrefetchPolicy

    if "x" in context:
        refuse(("batch",), "--context says how many requests there are")
    with one_line(ValueError):
        lens = parse_lens(context) if "x" in context else ((parse_tokens(context), batch),)
        chosen_policy = PrefetchPolicy.of(policy)
    shape = find_model(model, tp).shape(lens, page)
    with one_line(ValueError):  # a file of tuned grids
        if gpu is None and has_gpu():
            found, where = explanations.explain_here(shape, chosen_policy, ready), "the GPU here"
        else:
            facts = explanations.named_gpu(gpu or "h200")
            found, where = explanations.explain(shape, facts, chosen_policy, ready), facts.name
    console.print(f"{shape.label} on {where}: {bytes_label(shape.kv_bytes)} of KV a call")
    console.print(f"kernel: {found.choice.kernel} ({found.choice.reason})")
    if found.levers is None:
        return
    schedule, levers = found.schedule, found.levers
    assumed = " (assumed: what the kernel plans on Hopper)" if found.assumed else ""
    console.print(
        f"launch: {schedule.blocks} blocks of {schedule.warps} warps{assumed}; {schedule.working_blocks} work, "
        f"at most {schedule.longest_piece} tiles of 16 tokens a warp"
    )
    console.print(f"bytes in flight: {levers.bytes_in_flight_per_sm >> 10} KiB an SM without prefetch")
    budget, held = bytes_label(levers.budget_bytes), bytes_label(levers.demand_bytes)
    console.print(f"L2 budget: {budget}, of which the levers hold {held}")
    for lever in re.split(r"; (?=run-ahead|early load|streaming hint)", levers.reason):
        console.print(f"  {lever}")
    console.print("blocks over requests (a request's first kv head; a mark is its block's last digit):")
    for line in explanations.picture(schedule):
        console.print(line, highlight=False)


if __name__ == "__main__":
    main()
