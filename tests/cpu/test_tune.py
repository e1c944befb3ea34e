"""Grids: the table, the file, and what is made of measurements."""

import json

import pytest

from fi_prefetch import tune
from fi_prefetch.tune import MIB, Grid, Rule

SMALL, LARGE = Grid(8, 1, 1), Grid(4, 2, 1)


@pytest.mark.parametrize("kv_bytes", [0, 64 * MIB, 64 * MIB + 1, 1 << 40, None])
def test_the_built_in_table_is_one_grid(kv_bytes):
    assert tune.grid_for(tune.BUILT_IN, kv_bytes) == Grid(warps=8, blocks_per_sm=1, min_tiles_per_warp=0)
    assert tune.BUILT_IN[-1].grid in tune.CANDIDATES


@pytest.mark.parametrize("kv_bytes, grid", [(0, SMALL), (64 * MIB, SMALL), (64 * MIB + 1, LARGE), (None, SMALL)])
def test_the_first_rule_that_holds(kv_bytes, grid):
    assert tune.grid_for((Rule(64 * MIB, SMALL), Rule(None, LARGE)), kv_bytes) == grid


@pytest.mark.parametrize(
    "bad",
    [(0, 1, 1), (9, 1, 1), (8, 0, 1), (8, 5, 1), (8, 1, -1), (8, 1, 1 << 17), (True, 1, 1), (8.0, 1, 1), (8, 1, False)],
)
def test_a_grid_that_no_kernel_takes(bad):
    with pytest.raises(ValueError, match="expected [01] to"):
        Grid(*bad)


def test_rules_survive_the_file(tmp_path):
    path = tmp_path / "deep" / "h200.json"
    rules = (Rule(1 * MIB, Grid(2, 4, 2)), *tune.BUILT_IN)
    tune.write_rules(path, rules, gpu="NVIDIA H200", version="1")
    assert tune.read_rules(path) == rules
    assert json.loads(path.read_text())["gpu"] == "NVIDIA H200"
    assert [p.name for p in path.parent.iterdir()] == ["h200.json"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"rules": []}', '{"rules": [{"kv_bytes": 5, "warps": 8, "blocks_per_sm": 1, "min_tiles_per_warp": 1}]}',
     '{"rules": [{"kv_bytes": null, "warps": 80, "blocks_per_sm": 1, "min_tiles_per_warp": 1}]}'],
)  # fmt: skip
def test_a_broken_file_says_so(tmp_path, text):
    path = tmp_path / "gpu.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="gpu.json: not a file of tuned grids"):
        tune.read_rules(path)


def test_what_was_tuned_replaces_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tune.rules_for.cache_clear()
    assert tune.rules_for("h200") == tune.BUILT_IN
    tune.rules_for.cache_clear()
    tune.write_rules(tune.tuned_file("h200"), (Rule(None, LARGE),))
    assert tune.rules_for("h200") == (Rule(None, LARGE),)
    tune.rules_for.cache_clear()


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("no home directory")])
def test_a_home_that_cannot_be_read_has_no_tuned_grids(monkeypatch, caplog, error):
    def tuned_file(key):
        raise error

    monkeypatch.setattr(tune, "tuned_file", tuned_file)
    assert tune.rules_for.__wrapped__("h200") == tune.BUILT_IN
    assert str(error) in caplog.text


def test_the_best_grid_of_every_size():
    other = Grid(2, 4, 1)
    times = {
        1 * MIB: {SMALL: [5.0, 5.0], LARGE: [9.0, 9.0], other: [4.0, 8.0]},
        8 * MIB: {SMALL: [10.0], LARGE: [9.95]},  # within noise: no rule of its own
        512 * MIB: {SMALL: [140.0], LARGE: [130.0]},
    }
    assert tune.best_rules(times) == (Rule(8 * MIB, SMALL), Rule(None, LARGE))


def test_tuning_measures_all_and_leaves_out_what_does_not_fit():
    seen = []

    def measure(shape, grid):
        return None if grid == LARGE and shape == "b" else {SMALL: 7.0, LARGE: 1.0}[grid]

    rules = tune.tune({MIB: ["a", "b"]}, measure, (SMALL, LARGE), lambda *step: seen.append(step))
    assert rules == (Rule(None, SMALL),)
    assert len(seen) == 4


def test_nothing_measured():
    with pytest.raises(ValueError, match="times_us: expected at least one"):
        tune.best_rules({})
