"""The pages and tables that are made from results."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "script", ["render.py", "online/page.py", "online/alignment_page.py", "gsm8k_equations/evidence.py"]
)
def test_pages_are_made_from_the_results(script):
    subprocess.run([sys.executable, Path(__file__).parents[1] / script, "--check"], check=True)
