"""Hypothesis without a deadline (a shared machine stalls) and with few examples; one thread, as the models are tiny."""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from warm_programs import Warm

settings.register_profile(
    "core", deadline=None, max_examples=40, suppress_health_check=[HealthCheck.differing_executors]
)
settings.load_profile("core")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[Warm]:
    """Interpreters that have imported torch and transformers, but neither peft nor so8t_core; one thread each."""
    running = Warm("python", {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    yield running
    running.close()
