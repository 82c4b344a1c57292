"""Settings every test shares."""

import pytest
import torch

torch.set_num_threads(1)  # tiny tensors: threads only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same random state."""
    torch.manual_seed(0)


pytest_plugins = ["study_fixtures", "bench_models"]
