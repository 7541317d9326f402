"""The example works as a person would run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ifabric.errors import StartupError
from ifabric.programs import find_etcd, find_nats_server

EXAMPLE = Path(__file__).parent / "provider.py"


def test_the_books_of_the_example_agree_and_its_cap_holds() -> None:
    try:
        find_etcd(), find_nats_server()
    except StartupError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("IFABRIC")}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=60, env=clean, check=False
    )
    assert (ran.returncode, ran.stderr) == (0, ""), ran.stdout + ran.stderr
    lines = ran.stdout.splitlines()
    assert [line[0] for line in lines[:6]] == ["✔"] * 6
    billed = re.search(r"billed (\S+) USD, the fabric has charged (\S+) USD", ran.stdout)
    assert billed is not None and billed[1] == billed[2] and 0.9 < float(billed[1]) <= 1.0
    assert "available of 1.00" in lines[-1]
