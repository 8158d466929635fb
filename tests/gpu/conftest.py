"""What holds for every test of this folder. Which of them run, and on what: ../devices.py."""

from pathlib import Path
import sys

import pytest

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))  # they make models and measure, as users do


@pytest.fixture(autouse=True)
def float32_is_float32(no_tf32):
    """For the products of this process; servers and benchmarks have the settings of their users."""
