"""Fixtures that every folder of tests shares."""

from __future__ import annotations

from collections.abc import Callable

import batches
import pytest
import torch
from batches import Batch
from hypothesis import HealthCheck, settings

# How long an example takes says how busy the machine is, and nothing of what is tested.
settings.register_profile("fi_prefetch", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fi_prefetch")


@pytest.fixture
def batch() -> Batch:
    """Four requests, one empty, one of exactly one page."""
    return batches.make_batch([5, 0, 16, 33])


@pytest.fixture(name="make_batch")
def _make_batch() -> Callable[..., Batch]:
    return batches.make_batch


@pytest.fixture(name="dense_decode")
def _dense_decode() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    return batches.dense_decode
