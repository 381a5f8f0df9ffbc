"""No test reads or writes what the user's own machine has measured."""

import os

import pytest


@pytest.fixture(autouse=True)
def own_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BURSAR_DATA", str(tmp_path / "bursar-data"))


def pytest_configure() -> None:
    """Output goes to no terminal, so it has no width: several workers are given one."""
    os.environ.pop("COLUMNS", None)
