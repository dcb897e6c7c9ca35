import json
import os
from collections import Counter
from pathlib import Path

import pytest


# Tiny models: threads cost more than they bring. Set before torch is imported, so child processes inherit it
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may reach for the network
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


# Two workers take file after file: the longest first, so that both end at about the same time
LONGEST = ("test_examples", "test_distributed", "test_training", "test_kills", "test_cli")


def pytest_collection_modifyitems(items):
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="session")
def tally():
    """Injected faults, counted by the tests themselves; written to the file that TALLY names."""
    counts = Counter()
    yield counts
    if "TALLY" in os.environ:
        Path(os.environ["TALLY"]).write_text(json.dumps(dict(sorted(counts.items())), indent=1) + "\n")
