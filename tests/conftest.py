"""Settings every test shares."""

import gc
import os
from collections import Counter

import pytest

# Tiny tensors: threads only wait for each other. Processes that tests start follow, so that sums round alike.
os.environ["OMP_NUM_THREADS"] = "1"


def pytest_configure(config):
    """The process that only hands tests to workers imports no torch: the workers would wait for it."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return
    gc.disable()  # until all is imported: what imports make stays
    import torch

    torch.set_num_threads(1)
    for name in ("study_fixtures", "bench_models", "study_runs"):
        config.pluginmanager.import_plugin(name)


def pytest_collection_finish():
    """From here on, the collector of cycles passes over what was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    """So that libraries find everything freed when the process ends."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded():
    """Each test starts from the same random state."""
    import torch

    torch.manual_seed(0)


# Long files in seconds, the longest first. The others follow by their number of tests.
LONG = (
    *("matrix", "from_peft", "ddp", "adapters", "demo", "feature_extraction", "resume", "compare", "fresh_process"),
    *("docs", "vpt_networks", "cli", "zero_shot", "training", "study_search", "compare_search", "cloud_cli"),
    *("clip_demo", "tune", "fleet", "clip_training", "crews", "kills"),
)


def pytest_collection_modifyitems(config, items):
    """Workers take whole files: what is long comes first, so that none is left alone with a long one at the end."""
    if hasattr(config, "workerinput"):  # without workers the order is that of the command line
        tests = Counter(item.path for item in items)
        rank = {f"test_{name}": place for place, name in enumerate(LONG)}
        items.sort(key=lambda item: (rank.get(item.path.stem, len(LONG)), -tests[item.path], item.path))
