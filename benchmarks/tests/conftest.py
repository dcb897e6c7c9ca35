import os
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
FOLDERS = ("tests", "examples", "benchmarks", "benchmarks/online", "benchmarks/gsm8k_equations")
sys.path += [str(ROOT / folder) for folder in FOLDERS]
# As in tests/conftest.py
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
