"""What is measured: decode shapes, the grids that the result files cover, and the models people serve."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

KvLens = tuple[tuple[int, int], ...]

DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
MiB = 1 << 20


@dataclass(frozen=True)
class Shape:
    """One decode call: heads, page size, dtypes, and how many requests there are of which KV length.

    `kv_lens` holds `(tokens, requests)` pairs: longest first, or those of `spread_lens`.
    """

    heads_q: int
    heads_kv: int
    page_size: int
    kv_lens: KvLens
    head_dim: int = 128
    q_dtype: str = "bfloat16"
    kv_dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.heads_q <= 0 or self.heads_kv <= 0 or self.heads_q % self.heads_kv:
            raise ValueError(f"heads_q must be a multiple of heads_kv, got {self.heads_q} and {self.heads_kv}")
        for name in ("q_dtype", "kv_dtype"):
            if getattr(self, name) not in DTYPE_BYTES:
                raise ValueError(f"{name} must be one of {sorted(DTYPE_BYTES)}, got {getattr(self, name)!r}")
        if self.page_size < 1:
            raise ValueError(f"page_size must be at least 1, got {self.page_size}")
        if not self.kv_lens or any(length < 0 or count < 1 for length, count in self.kv_lens):
            raise ValueError(f"kv_lens must hold (tokens >= 0, requests >= 1) pairs, got {self.kv_lens}")

    @property
    def group(self) -> int:
        """Query heads per kv head."""
        return self.heads_q // self.heads_kv

    @property
    def batch(self) -> int:
        """Requests."""
        return sum(count for _, count in self.kv_lens)

    @property
    def lengths(self) -> list[int]:
        """KV tokens of each request, in the order of `kv_lens`."""
        return [length for length, count in self.kv_lens for _ in range(count)]

    @property
    def skewed(self) -> bool:
        """Whether the requests differ in length."""
        return len({length for length, _ in self.kv_lens}) > 1

    @property
    def token_bytes(self) -> int:
        """Bytes of K and V of one token, all kv heads."""
        return 2 * self.heads_kv * self.head_dim * DTYPE_BYTES[self.kv_dtype]

    @property
    def kv_bytes(self) -> int:
        """Bytes of KV that one call has to read: every token's K and V once."""
        return self.token_bytes * sum(length * count for length, count in self.kv_lens)

    @property
    def pages(self) -> int:
        """Pages that the requests hold."""
        return sum(-(-length // self.page_size) * count for length, count in self.kv_lens)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of the pages that the requests hold, the unused end of the last ones included."""
        return self.pages * self.page_size * self.token_bytes

    @property
    def label(self) -> str:
        """For example `32/8 page 16 8x1K` or `8/1 page 1 1x64K+31x4K fp8`."""
        kind = {"bfloat16": "", "float16": " fp16", "float8_e4m3fn": " fp8", "float8_e5m2": " fp8 e5m2"}[self.kv_dtype]
        dim = "" if self.head_dim == 128 else f" dim {self.head_dim}"
        return f"{self.heads_q}/{self.heads_kv}{dim} page {self.page_size} {lens_label(self.kv_lens)}{kind}"

    @property
    def size_class(self) -> str:
        """What the targets are stated for: `skewed`, or `mixed` with many lengths; else by the bytes of KV a call."""
        if self.skewed:
            return "skewed" if len(self.kv_lens) <= 8 else "mixed"
        if self.kv_bytes <= 64 * MiB:
            return "up to 64 MB"
        if self.kv_bytes <= 512 * MiB:
            return "64 to 512 MB"
        return "512 MB to 1 GB" if self.kv_bytes <= 1024 * MiB else "above 1 GB"

    def to_row(self) -> dict[str, Any]:
        """The columns of a result row that name the shape."""
        return {
            "heads_q": self.heads_q,
            "heads_kv": self.heads_kv,
            "head_dim": self.head_dim,
            "page_size": self.page_size,
            "kv_lens": [list(pair) for pair in self.kv_lens],
            "q_dtype": self.q_dtype,
            "kv_dtype": self.kv_dtype,
            "kv_bytes": self.kv_bytes,
        }

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Shape:
        """The shape that a result row is of."""
        return cls(
            heads_q=row["heads_q"],
            heads_kv=row["heads_kv"],
            page_size=row["page_size"],
            kv_lens=tuple((length, count) for length, count in row["kv_lens"]),
            head_dim=row["head_dim"],
            q_dtype=row["q_dtype"],
            kv_dtype=row["kv_dtype"],
        )


def query_dtype(kv_dtype: str) -> str:
    """The dtype of queries for a cache of `kv_dtype`: its own, bfloat16 for an fp8 cache."""
    return kv_dtype if DTYPE_BYTES[kv_dtype] == 2 else "bfloat16"


def spread_lens(requests: int, shortest: int, longest: int) -> KvLens:
    """Requests from `shortest` to `longest` tokens, evenly on a logarithmic scale, in no order of length.

    As a server has them, long and short ones side by side. Nothing in it is random.
    """
    lengths = [round(shortest * (longest / shortest) ** (i / (requests - 1))) for i in range(requests)]
    step = round(requests * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, requests) != 1:
        step += 1
    return tuple((lengths[i * step % requests], 1) for i in range(requests))


def lens_label(kv_lens: Sequence[Sequence[int]]) -> str:
    """For example `1x64K+31x4K`, or `256x64..2K` for those of `spread_lens`."""
    lengths, requests = [length for length, _ in kv_lens], len(kv_lens)
    if requests > 2 and tuple(map(tuple, kv_lens)) == spread_lens(requests, max(min(lengths), 1), max(lengths)):
        return f"{requests}x{tokens_label(min(lengths))}..{tokens_label(max(lengths))}"
    return "+".join(f"{count}x{tokens_label(length)}" for length, count in kv_lens)


def tokens_label(tokens: int) -> str:
    """For example `4K` for 4096 and `500` for 500."""
    return f"{tokens >> 10}K" if tokens and tokens % 1024 == 0 else str(tokens)


def parse_tokens(text: str) -> int:
    """The inverse of `tokens_label`; raises ValueError where `text` is no number of tokens."""
    body, factor = (text[:-1], 1024) if text[-1:] in ("k", "K") else (text, 1)
    if not body.isdigit():
        raise ValueError(f"expected tokens as 500 or 4K, got {text!r}")
    return int(body) * factor


def parse_lens(text: str) -> KvLens:
    """Parses `1x64K+31x4K` into `((65536, 1), (4096, 31))`, and `256x64..2K` as `spread_lens`.

    Raises ValueError where it cannot.
    """
    spread = re.fullmatch(r"(\d+)x(\w+)\.\.(\w+)", text)
    if spread:
        requests, shortest, longest = int(spread[1]), parse_tokens(spread[2]), parse_tokens(spread[3])
        if requests < 3 or not 0 < shortest < longest:
            raise ValueError(f"expected three requests at least and lengths that grow, as 256x64..2K, got {text!r}")
        return spread_lens(requests, shortest, longest)
    pairs = []
    for part in text.split("+"):
        count, separator, length = part.strip().partition("x")
        if not separator or not count.isdigit() or int(count) < 1:
            raise ValueError(f"expected lengths as 8x1K or 1x64K+31x4K, got {text!r}")
        pairs.append((parse_tokens(length), int(count)))
    return tuple(sorted(pairs, reverse=True))


UNIFORM = tuple(
    parse_lens(text)
    for text in ("1x2K", "1x8K", "1x32K", "8x1K", "16x4K", "64x512", "64x2K", "128x1K", "128x4K", "256x512")
)
SKEWED = tuple(
    parse_lens(text) for text in ("1x64K+31x4K", "1x128K+31x4K", "2x32K+30x4K", "1x16K+15x64", "32x128+32x4K")
)
MIXED = tuple(parse_lens(text) for text in ("64x128..8K", "256x64..2K", "512x16..512"))
LONG = tuple(parse_lens(text) for text in ("1x128K", "8x128K", "32x128K"))

# What fits beside the other buffers of a run on an 80 GB GPU; a longer shape is left out of the grid, not shrunk.
LARGEST_KV_BYTES = 36 << 30


def basic_grid() -> list[Shape]:
    """Four head layouts, pages of 1 and 16, ten uniform batches, and five skewed ones at two layouts; bf16."""
    shapes = [
        Shape(heads_q, heads_kv, page, lens)
        for heads_q, heads_kv in ((32, 8), (32, 32), (28, 4), (8, 1))
        for page in (1, 16)
        for lens in UNIFORM
    ]
    shapes += [
        Shape(heads_q, heads_kv, page, lens)
        for heads_q, heads_kv in ((32, 8), (8, 1))
        for page in (1, 16)
        for lens in SKEWED
    ]
    return shapes


def full_grid() -> list[Shape]:
    """Six head layouts, pages of 1, 16 and 64, uniform, skewed and long batches; bf16 and fp8 KV."""
    shapes = [
        Shape(heads_q, heads_kv, page, lens, kv_dtype=kv_dtype)
        for kv_dtype in ("bfloat16", "float8_e4m3fn")
        for heads_q, heads_kv in ((32, 8), (32, 32), (28, 4), (64, 8), (16, 2), (8, 1))
        for page in (1, 16, 64)
        for lens in (*UNIFORM, *SKEWED, *LONG)
    ]
    return [shape for shape in shapes if shape.kv_bytes <= LARGEST_KV_BYTES]


def mixed_grid() -> list[Shape]:
    """Four head layouts, pages of 1 and 16, batches of requests of all lengths; bf16 and fp8 KV."""
    return [
        Shape(heads_q, heads_kv, page, lens, kv_dtype=kv_dtype)
        for kv_dtype in ("bfloat16", "float8_e4m3fn")
        for heads_q, heads_kv in ((32, 8), (28, 4), (16, 1), (8, 1))
        for page in (1, 16)
        for lens in MIXED
    ]


def small_grid() -> list[Shape]:
    """A handful of real shapes for `demo` and for a first look: small, middling, large, skewed, fp8."""
    return [
        Shape(32, 8, 1, parse_lens("1x2K")),
        Shape(32, 8, 16, parse_lens("8x1K")),
        Shape(32, 8, 1, parse_lens("64x2K")),
        Shape(8, 1, 1, parse_lens("64x2K")),
        Shape(32, 32, 16, parse_lens("16x1K")),
        Shape(32, 8, 1, parse_lens("1x64K+31x4K")),
        Shape(32, 8, 1, parse_lens("64x2K"), kv_dtype="float8_e4m3fn"),
    ]


GRIDS = {"basic": basic_grid, "full": full_grid, "mixed": mixed_grid, "small": small_grid}


@dataclass(frozen=True)
class Model:
    """What of a model decides the work of one decode step: sizes in elements."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads_q: int
    heads_kv: int
    head_dim: int

    def slice(self, tensor_parallel: int) -> Model:
        """One rank's share under tensor parallelism; kv heads are repeated where there are fewer than ranks.

        Raises ValueError where the query heads do not divide, or the kv heads neither divide nor are divided.
        """
        if (
            tensor_parallel < 1
            or self.heads_q % tensor_parallel
            or (self.heads_kv % tensor_parallel and tensor_parallel % self.heads_kv)
        ):
            raise ValueError(
                f"tensor_parallel must divide the {self.heads_q} query and {self.heads_kv} kv heads of {self.name}, "
                f"got {tensor_parallel}"
            )
        return Model(
            name=self.name if tensor_parallel == 1 else f"{self.name} TP-{tensor_parallel}",
            hidden=self.hidden,
            intermediate=self.intermediate // tensor_parallel,
            layers=self.layers,
            heads_q=self.heads_q // tensor_parallel,
            heads_kv=max(1, self.heads_kv // tensor_parallel),
            head_dim=self.head_dim,
        )

    def shape(self, kv_lens: KvLens, page_size: int = 1, kv_dtype: str = "bfloat16") -> Shape:
        """The decode call of one layer of this model."""
        return Shape(self.heads_q, self.heads_kv, page_size, kv_lens, self.head_dim, query_dtype(kv_dtype), kv_dtype)


MODELS = {
    model.name: model
    for model in (
        Model("llama-2-7b", 4096, 11008, 32, 32, 32, 128),
        Model("llama-3-8b", 4096, 14336, 32, 32, 8, 128),
        Model("llama-3-70b", 8192, 28672, 80, 64, 8, 128),
        Model("llama-3-405b", 16384, 53248, 126, 128, 8, 128),
        Model("llama-3.2-1b", 2048, 8192, 16, 32, 8, 64),
        Model("mistral-7b", 4096, 14336, 32, 32, 8, 128),
        Model("mixtral-8x7b", 4096, 14336, 32, 32, 8, 128),
        Model("qwen2.5-7b", 3584, 18944, 28, 28, 4, 128),
        Model("qwen2.5-72b", 8192, 29568, 80, 64, 8, 128),
        Model("qwen3-8b", 4096, 12288, 36, 32, 8, 128),
        Model("qwen3-32b", 5120, 25600, 64, 64, 8, 128),
        Model("qwen3-30b-a3b", 2048, 6144, 48, 32, 4, 128),
        Model("gpt-oss-20b", 2880, 2880, 24, 64, 8, 64),
        Model("gpt-oss-120b", 2880, 2880, 36, 64, 8, 64),
        Model("gemma-2-9b", 3584, 14336, 42, 16, 8, 256),
    )
}


def model_grid(
    model: Model, batches: Sequence[int], contexts: Sequence[int], page_size: int = 1, kv_dtype: str = "bfloat16"
) -> Iterator[Shape]:
    """The decode calls of `model` at every batch and context length."""
    for batch in batches:
        for context in contexts:
            yield model.shape(((context, batch),), page_size, kv_dtype)
