"""The tiny SAM as a split folder, and the coins."""

import sys

import pytest
from training_data import script

from conversion import convert
from conversion.cli.demo import TINY_SAM


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "split"
    convert(TINY_SAM, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def coins(tmp_path_factory):
    """The folder that examples/coins.py makes."""
    folder = tmp_path_factory.mktemp("coins") / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["coins.py", str(folder)])
        script("coins.py").main()
    return folder
