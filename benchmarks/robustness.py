"""
Counts what the tests kill, damage and let fail, all of it: a quarter of an hour on one core.

    python benchmarks/robustness.py

Writes nothing unless every test passes.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import RESULTS, ROOT, read, write


TESTS = ("test_kills.py", "test_fuzz.py", "test_disk.py", "test_inputs.py", "test_distributed.py")


def main():
    with tempfile.TemporaryDirectory() as scratch:
        counts = Path(scratch) / "counts.json"
        command = [sys.executable, "-m", "pytest", "-q", *(str(ROOT / "tests" / name) for name in TESTS)]
        subprocess.run(command, check=True, cwd=ROOT, env=os.environ | {"TALLY": str(counts)})
        write(RESULTS / "robustness.json", read(counts))


if __name__ == "__main__":
    main()
