"""Random plans: whatever the combination, our answer is as close to the truth as FlashInfer's, twice the same.

`fi-prefetch check` runs 20,000 cases of random_plans.py with a new seed every time; here are the same few every time,
and every session that has ever failed.
"""

from __future__ import annotations

import pytest
from harness import DEVICE
from random_plans import CASES_A_SESSION, Runner, Session, Shape, Step, explore, sessions

# Sessions that once failed, as random_plans.py printed them, as far as they matter.
REGRESSIONS: tuple[Session, ...] = (
    # A token that is there again and again: weights that are rounded but summed unrounded do not cancel.
    Session(
        shapes=(Shape(compiled=("f16", "e4m3", "f16", 256, False, False), heads_kv=4, group=3, q_len=4, page=1),),
        steps=(Step(batch=65, kind="equal", longest=1000, order="repeated", scales=(0.5, 0.5, None), seed=210103),),
    ),
)
FIXED_SEEDS = (1, 2, 3, 4)
CASES = 60 * CASES_A_SESSION


@pytest.mark.parametrize("what", [*FIXED_SEEDS, *REGRESSIONS])
def test_random_sessions(what: int | Session) -> None:
    runner = Runner(DEVICE)
    if isinstance(what, Session):
        runner.run(what)
    else:
        explore(runner, CASES, what, sessions())
        assert runner.compared > CASES_A_SESSION, "FlashInfer has hardly been asked"
