"""The tests of exported graphs, in a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_exported_graphs():
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist"]
    tests = Path(__file__).with_name("test_export.py")
    done = subprocess.run([*command, tests], env=own, capture_output=True, text=True)
    print(done.stdout[-20_000:], done.stderr[-5_000:])
    assert done.returncode == 0
