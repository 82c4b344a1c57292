"""Settings every test shares."""

import os

import pytest
import torch

# Tiny tensors: threads only wait for each other. Processes that tests start follow, so that sums round alike.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same random state."""
    torch.manual_seed(0)


pytest_plugins = ["study_fixtures", "bench_models", "study_runs"]
