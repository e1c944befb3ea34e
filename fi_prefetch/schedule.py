"""The kernel's schedule (csrc/schedule.cuh), as arithmetic on the host: for explanations, pictures and tests.

Nothing that runs a decode uses this: the kernel makes its schedule itself, on the device.

All tiles of a batch form one line, ordered by request, then kv head, then token. It is cut into one piece a warp, equal
to within one tile. Where requests differ in length and pieces need not be much longer for it, every piece is of one
request and head: the line is then one of splits, one a warp. Where many differ, warps go from one to the next, and the
line has a gap before each request and head, for the time that this takes. Where pieces are long, neighbouring warps
read neighbouring kv heads abreast: the line is then that of every so-many-th head, and as many warps have the same
piece of it, each of another head.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

TILE_TOKENS = 16
# Bytes of K and V: of 16-bit numbers in 128 dimensions.
LARGE_TILE = 8 << 10
# What csrc/decode.cu gives a warp's pipeline, but for larger tiles.
RING_BYTES = 16 << 10


def ring_tiles(tile_bytes: int) -> int:
    """Tiles of `tile_bytes` (K and V) that a warp's pipeline holds: `stage_count` in csrc/decode.cu."""
    return max(2, min(RING_BYTES // tile_bytes, 8))


def request_tiles(length: int, q_len: int = 1, window_left: int = -1) -> int:
    """Tiles of one kv head that a request of `length` tokens has.

    Args:
        length: tokens in its KV cache, >= 0.
        q_len: query tokens, the newest of the request.
        window_left: tokens before a query's own that it sees; -1 for all.
    """
    first_token = 0
    if window_left >= 0:
        first_token = max(length - q_len - window_left, 0) // TILE_TOKENS * TILE_TOKENS
    return -(-(length - first_token) // TILE_TOKENS)


@dataclass(frozen=True)
class Partition:
    """The cut of a line of `tiles` over `workers` (at most 65,535) warps: worker j takes [begin(j), begin(j + 1)).

    Sizes differ by at most one tile up to 2^32 / workers tiles, and by a few beyond. `gap`: empty places before every
    request and head, counted among the tiles.
    """

    tiles: int
    workers: int
    gap: int = 0

    def begin(self, j: int) -> int:
        if j >= self.workers:
            return self.tiles
        share = -(-(1 << 32) // self.workers)  # of the line, in 2^-32; the kernel divides no further
        return self.tiles * (j * share % (1 << 32)) >> 32


def default_min_tiles(tiles: int, blocks: int, warps: int, longest_request: int, tile_bytes: int) -> int:
    """Tiles that the kernel gives a warp at least: by all tiles, the grid, the tiles of the longest request, and a
    tile's bytes of K and V."""
    workers = blocks * warps
    least = 1 << (max(longest_request // 128, 1).bit_length() - 1) // 2
    if tile_bytes < LARGE_TILE and tiles > workers:
        return min(least, 2)
    piece = max(least, 2 if tiles > workers else 1)
    nearly_all_work = tiles <= workers * piece and 4 * tiles > 3 * workers * piece
    return 2 * piece if piece <= 2 and nearly_all_work and longest_request > warps * piece else least


def most_abreast(warps: int, num_kv_heads: int) -> int:
    """As many kv heads as the grid's warps can share out evenly, a power of two up to 32."""
    abreast = 1
    while abreast < 32 and warps % (2 * abreast) == 0 and num_kv_heads % (2 * abreast) == 0:
        abreast *= 2
    return abreast


def reads_abreast(tiles: int, warps: int, longest_request: int, page_size: int, equal: bool) -> bool:
    """Whether `warps` warps with `tiles` tiles to share read kv heads abreast. `equal`: as all requests are."""
    of_longest = 2 * longest_request if page_size % TILE_TOKENS else longest_request // 2
    return tiles >= max(32 if equal else 128, of_longest) * warps


def gap_of_line(requests: Sequence[int], tiles: int, workers: int, piece: int, tile_bytes: int) -> int:
    """Places of the gap before every request and head of a line.

    Args:
        requests: tiles of one kv head, by request; they differ.
        tiles: of the line; workers: who share it; piece: tiles that each has at most.
        tile_bytes: K and V of a tile.
    """
    gap = max(LARGE_TILE // tile_bytes, 1)
    if tiles <= 2 * gap * workers:
        return 0
    aligned = sum(n for n in requests if n % piece == 0)
    return 0 if aligned // 3 >= sum(requests) // 4 else gap


def tiles_of_a_block(tiles: int, blocks: int, warps: int, min_tiles: int, equal: int = 0) -> int:
    """Tiles of a block that works. `equal`: what all requests have in tiles, 0 where they differ."""
    piece = min_tiles
    if tiles > blocks * warps * min_tiles:
        piece = -(-tiles // (blocks * warps))
        unit = max((1 << (piece.bit_length() - 1)) // 16, 1) if piece < 512 else 1
        piece = -(-piece // unit) * unit
    of_a_block = piece * warps
    return equal if of_a_block < equal <= of_a_block + 2 * warps else of_a_block


def active_blocks(tiles: int, of_a_block: int) -> int:
    """Blocks of the grid that get work where pieces are cut anywhere: `of_a_block` tiles each."""
    return max(-(-tiles // of_a_block), 1)


def split_count(tiles: int, most_tiles: int) -> int:
    """Splits of at most `most_tiles` tiles that `tiles` tiles are cut into."""
    return -(-tiles // most_tiles)


def whole_pieces(tiles: Sequence[int], num_kv_heads: int, blocks: int, warps: int, piece: int) -> int:
    """Tiles of the longest piece where every one is to be of one request and head; 1 where they are cut anywhere.

    Args:
        tiles: of one kv head, by request.
        piece: what a piece has at most if it is cut anywhere.
    """
    workers = blocks * warps
    if piece == 1 or len(tiles) * num_kv_heads > workers:
        return 1
    for most in range(piece, piece + min(max(piece // 8, 1), 4) + 1):
        total = sum(split_count(n, most) for n in tiles)
        pieces = num_kv_heads * total
        if pieces <= workers:
            return 1 if total * most == sum(tiles) and pieces % warps == 0 else most
    return 1


@dataclass(frozen=True)
class Segment:
    """Neighbouring tiles of one request and kv head that one warp works on: [first_tile, end_tile)."""

    block: int
    warp: int
    request: int
    head: int
    first_tile: int
    end_tile: int


@dataclass(frozen=True)
class Schedule:
    """What every warp of a launch does.

    Attributes:
        lengths: tokens of each request.
        num_kv_heads: heads; each request and head is worked on separately.
        blocks, warps: the grid, and the warps of a block.
        min_tiles_per_warp: with less than this to do for every warp, fewer blocks work; 0: the kernel chooses.
        q_len, window_left: as in the wrapper's plan.
        tile_bytes: K and V of a tile.
        page_size: tokens of a page.
    """

    lengths: Sequence[int]
    num_kv_heads: int
    blocks: int
    warps: int
    min_tiles_per_warp: int = 0
    q_len: int = 1
    window_left: int = -1
    tile_bytes: int = LARGE_TILE
    page_size: int = 1

    @cached_property
    def tiles(self) -> list[int]:
        """Tiles of one kv head, by request."""
        return [request_tiles(length, self.q_len, self.window_left) for length in self.lengths]

    @cached_property
    def all_tiles(self) -> int:
        """Tiles of all requests and kv heads."""
        return sum(self.tiles) * self.num_kv_heads

    @cached_property
    def longest(self) -> int:
        """Tiles of one kv head of the longest request."""
        return max(self.tiles, default=0)

    @cached_property
    def abreast(self) -> int:
        """Kv heads that are read abreast, each by a warp of its own; a worker of the partition is so many warps."""
        warps = self.blocks * self.warps
        if not reads_abreast(self.all_tiles, warps, self.longest, self.page_size, self.equal_tiles > 0):
            return 1
        return most_abreast(warps, self.num_kv_heads)

    @cached_property
    def equal_tiles(self) -> int:
        """What all requests have in tiles; 0 where they differ."""
        return self.longest if self.longest * len(self.tiles) == sum(self.tiles) else 0

    @cached_property
    def min_tiles(self) -> int:
        """Tiles that a warp has at least, as long as there are more."""
        return self.min_tiles_per_warp or default_min_tiles(
            self.all_tiles, self.blocks, self.warps, self.longest, self.tile_bytes
        )

    @cached_property
    def split_tiles(self) -> int:
        """Tiles of the longest split where the line is one of splits; 1 where it is one of tiles."""
        if self.equal_tiles or self.abreast > 1 or self.longest == 0:
            return 1
        piece = tiles_of_a_block(self.all_tiles, self.blocks, self.warps, self.min_tiles) // self.warps
        return whole_pieces(self.tiles, self.num_kv_heads, self.blocks, self.warps, piece)

    @cached_property
    def partition(self) -> Partition:
        """The cut of the line, which all workers share."""
        if self.split_tiles > 1:
            pieces = self.num_kv_heads * sum(split_count(tiles, self.split_tiles) for tiles in self.tiles)
            return Partition(pieces, pieces)
        line = self.all_tiles // self.abreast
        blocks, warps = self.blocks, self.warps
        if self.abreast > 1:  # workers, parts of one or more blocks
            blocks, warps = blocks * warps // self.abreast, 1
        of_a_block = tiles_of_a_block(line, blocks, warps, self.min_tiles, self.equal_tiles)
        workers = active_blocks(line, of_a_block) * warps
        gap = 0
        if not self.equal_tiles:
            gap = gap_of_line(self.tiles, line, workers, of_a_block // warps, self.tile_bytes)
        gaps = gap * sum(n > 0 for n in self.tiles) * self.num_kv_heads // self.abreast
        return Partition(line + gaps, workers, gap)

    @property
    def working_blocks(self) -> int:
        return -(-self.partition.workers * self.abreast // self.warps)

    @cached_property
    def segments(self) -> list[Segment]:
        """All segments, in the line's order; those of heads that are read abreast one head after another."""
        if self.split_tiles > 1:
            return self._whole_segments()
        segments = []
        gap = self.partition.gap
        for lane in range(self.abreast):
            position, worker = 0, 0
            for request, tiles in enumerate(self.tiles):
                for head in range(lane, self.num_kv_heads, self.abreast):
                    position += gap if tiles else 0
                    tile = 0
                    while tile < tiles:
                        while self.partition.begin(worker + 1) <= position:
                            worker += 1
                        end_tile = min(tiles, tile + self.partition.begin(worker + 1) - position)
                        block, warp = divmod(worker * self.abreast + lane, self.warps)
                        segments.append(Segment(block, warp, request, head, tile, end_tile))
                        position += end_tile - tile
                        tile = end_tile
        return segments

    def _whole_segments(self) -> list[Segment]:
        """One a warp: a request and head's are equal to within one tile, the longer ones first."""
        segments: list[Segment] = []
        for request, tiles in enumerate(self.tiles):
            splits = split_count(tiles, self.split_tiles)
            for head in range(self.num_kv_heads):
                for split in range(splits):
                    first, end = (i * (tiles // splits) + min(i, tiles % splits) for i in (split, split + 1))
                    segments.append(Segment(*divmod(len(segments), self.warps), request, head, first, end))
        return segments

    @property
    def longest_piece(self) -> int:
        """Tiles of the warp that has most to do."""
        tiles = Counter[tuple[int, int]]()
        for s in self.segments:
            tiles[s.block, s.warp] += s.end_tile - s.first_tile
        return max(tiles.values(), default=0)

    def blocks_of(self, request: int) -> int:
        """Blocks that share a request's first kv head: how many partial results are merged for it."""
        return len({s.block for s in self.segments if s.request == request and s.head == 0})
