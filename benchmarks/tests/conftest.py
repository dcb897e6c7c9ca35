import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / folder) for folder in ("tests", "benchmarks")]  # of the latter `harness` names the others
import harness  # noqa: F401


# As in tests/conftest.py
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
