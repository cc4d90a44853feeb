"""The examples in the docstrings do what they say, and the reference lists every public name."""

import doctest
import importlib
import re

import pytest
from pages import PAGES

WITH_EXAMPLES = {
    "sam_split.configuration_sam_split": {"SamSplitConfig"},
    "sam_split.attention_sam_split": {"kernel_widths", "window_indices"},
    "sam_split.modeling_sam_split": {"SamSplitModel", "segmentation_loss"},
    "sam_split.training.metrics": {"iou_and_dice"},
    "sam_split.training.prompts": {"boxes_around"},
    "conversion.image_size": {"resample_relative"},
}


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples(name):
    module = importlib.import_module(name)
    found = [test for test in doctest.DocTestFinder(exclude_empty=True).find(module) if test.examples]
    assert {test.name.removeprefix(f"{name}.") for test in found} == WITH_EXAMPLES[name]
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("name", ["sam_split", "sam_split.training", "conversion"])
def test_the_reference_is_whole(name):
    """`nox -s docs` makes sure that what it lists has docstrings."""
    text = PAGES["docs/reference.md"]
    for public in importlib.import_module(name).__all__:
        assert re.search(rf"^::: {name.split('.')[0]}\.[\w.]*\b{public}$|`{public}`", text, re.MULTILINE), public
