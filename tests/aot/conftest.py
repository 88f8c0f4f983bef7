"""Ahead-of-time compiles: no GPU, and a process in which Triton compiles instead of interpreting."""

from __future__ import annotations

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    collect_ignore_glob = ["test_*.py"]


def pytest_report_header() -> str | None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "tests/aot: left out, the interpreter and the compiler cannot share a process"
    return None
