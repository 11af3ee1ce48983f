"""Fetched assets and published implementations that some tests compare with, or a skip that says how to get them."""

import importlib
from pathlib import Path
from typing import Any

import pytest

ASSETS = Path("assets")


def fetched(asset: str) -> Path:
    """The folder of an asset; skips the test where it was not fetched."""
    folder = ASSETS / asset
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there: `unicom data fetch recipes/quickstart.yaml` puts it there")
    return folder


def published(module: str, package: str) -> Any:
    """A module of an optional package; skips the test where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        pytest.skip(f"{package} is not installed: `pip install {package}` lets this test compare with it")
