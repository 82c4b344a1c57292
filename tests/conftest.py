"""Settings every test shares."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same random state."""
    torch.manual_seed(0)
