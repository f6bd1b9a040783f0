"""Makes train_gpt.py, the tools, the data scripts and helpers.py importable; --slow."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tools", ROOT / "data", ROOT / "tests"):
    sys.path.insert(0, str(folder))
os.environ["OMP_NUM_THREADS"] = "1"         # test files run side by side, a core each


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests, and only these")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes a minute or so; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        if is_slow != config.getoption("--slow"):
            reason = "not slow" if config.getoption("--slow") else "slow: run with --slow"
            item.add_marker(pytest.mark.skip(reason=reason))
