"""Runs the tests of inside/, which import SGLang, with each release's interpreter."""

from __future__ import annotations

from releases import HERE, Release


def test_everything_inside_passes(release: Release) -> None:
    inside = HERE / "inside"
    output = release.run(
        "-m", "pytest", "-q", "-c", inside / "pytest.ini", "--confcutdir", inside, "-p", "no:cacheprovider", inside,
        path=(HERE, HERE / "gpu_path"),
    )  # fmt: skip
    last = output.strip().splitlines()[-1]
    assert "passed" in last and "skipped" not in last and "deselected" not in last, output[-3000:]
