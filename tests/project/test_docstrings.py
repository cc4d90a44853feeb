"""The examples in the docstrings do what they say."""

import doctest
import importlib

import pytest

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
