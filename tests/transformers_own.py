"""transformers' own common model tests, unedited, on our two models and on stock's. `nox -s transformers_own` runs it.

    python tests/transformers_own.py SDIST

SDIST is the unpacked source distribution of the installed transformers. Every test must pass on ours, end on stock as
on ours, or stand in `NOT_APPLICABLE` with its reason. A test that stands there and passes is an error too.
"""

import importlib
import sys
import types
import unittest
from collections import Counter

import transformers
from models import BATCH, IMAGE_SIZE, PROMPTS, TINY, boxes, draw, pixels, points, split_config, tiny_config

from sam_split import SamSplitModel, SamSplitVisionModel

REFUSED = "loads a checkpoint without weights, which we refuse on purpose"

DECORATOR = "is about a decorator of transformers >= 5, and one file serves 4.57 as well"

# Tests that stock passes and this model cannot, and why.
NOT_APPLICABLE = {
    "ours": {
        "test_can_init_all_missing_weights": REFUSED,
        "test_model_weights_reload_no_missing_tied_weights": REFUSED,
        "test_init_weights_can_init_buffers": "takes buffers for constants; our positional matrix is drawn",
        "test_capture_outputs_decorator": DECORATOR,
    },
    "our image encoder": {
        "test_can_init_all_missing_weights": REFUSED,
        "test_model_weights_reload_no_missing_tied_weights": REFUSED,
        "test_capture_outputs_decorator": DECORATOR,
        "test_can_capture_specific_layers_hidden_states": DECORATOR,
    },
}


PROMPTED = {**points(1, 0, -1, -10), **boxes()}


class Tester:
    """What the common tests ask about a model: a small config, inputs and sizes."""

    batch_size, seq_length = BATCH, PROMPTS
    hidden_size = TINY["vision_config"]["hidden_size"]
    num_hidden_layers = TINY["vision_config"]["num_hidden_layers"]
    num_attention_heads = TINY["vision_config"]["num_attention_heads"]

    def __init__(self, get_config, **prompts):
        self.get_config, self.prompts = get_config, prompts
        self.is_training = bool(prompts)  # the image encoder alone has no loss

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": pixels(), **self.prompts}


def make_classes(sdist: str) -> dict[str, type[unittest.TestCase]]:
    """The same tests for stock and for ours."""
    sys.path.insert(0, sdist)
    # The sdist lacks the mixins for generation, which this model does not do, and for export.
    for name, mixin in (
        ("generation.test_utils", "GenerationTesterMixin"),
        ("exporters.test_export", "ExportTesterMixin"),
    ):
        module = sys.modules[f"tests.{name}"] = types.ModuleType(name)
        setattr(module, mixin, type(mixin, (), {}))
    common = importlib.import_module("tests.test_modeling_common")
    assert common.__file__.startswith(sdist), common.__file__

    class Common(common.ModelTesterMixin):
        _is_composite = True
        test_resize_embeddings = False  # there are no token embeddings
        test_can_init_all_missing_weights_before_2023 = True
        # Switches of 4.57 for what later versions no longer try.
        test_pruning = test_head_masking = test_torchscript = fx_compatible = False

    class Stock(Common, unittest.TestCase):
        all_model_classes = (transformers.SamModel,)

        def setUp(self):
            self.model_tester = Tester(tiny_config, **PROMPTED)

    class Ours(Common, unittest.TestCase):
        all_model_classes = (SamSplitModel,)

        def setUp(self):
            self.model_tester = Tester(lambda: split_config(tiny_config()), **PROMPTED)

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            if return_labels:  # stock has no loss, so its training tests do nothing
                inputs["labels"] = (draw(BATCH, PROMPTS, IMAGE_SIZE, IMAGE_SIZE, seed=8) > 0).long()
            return inputs

    class StockVision(Common, unittest.TestCase):
        all_model_classes = (transformers.SamVisionModel,)
        _is_composite = False

        def setUp(self):
            self.model_tester = Tester(lambda: tiny_config().vision_config)

    class OursVision(Common, unittest.TestCase):
        all_model_classes = (SamSplitVisionModel,)
        _is_composite = False

        def setUp(self):
            self.model_tester = Tester(lambda: split_config(tiny_config()).vision_config)

    return {"stock": Stock, "ours": Ours, "stock's image encoder": StockVision, "our image encoder": OursVision}


def run(cls: type[unittest.TestCase]) -> dict[str, tuple[str, str]]:
    """What became of each test, and the last line of why."""
    names = unittest.defaultTestLoader.getTestCaseNames(cls)
    outcomes = dict.fromkeys(names, ("passed", ""))
    result = unittest.TestResult()
    unittest.TestSuite(map(cls, names)).run(result)
    for outcome, entries in (("skipped", result.skipped), ("failed", result.failures + result.errors)):
        for test, why in entries:
            outcomes[getattr(test, "test_case", test)._testMethodName] = outcome, why.strip().splitlines()[-1]
    return outcomes


def main(sdist: str) -> int:
    outcomes = {name: run(cls) for name, cls in make_classes(sdist).items()}
    wrong = []
    for ours, theirs in (("ours", "stock"), ("our image encoder", "stock's image encoder")):
        for test, (outcome, why) in outcomes[ours].items():
            stock, _ = outcomes[theirs].get(test, ("absent", ""))
            listed = test in NOT_APPLICABLE[ours]
            if outcome == "passed" if listed else outcome not in ("passed", stock):
                wrong.append(f"{ours}: {test}: {outcome}, {theirs} {stock}, {'' if listed else 'not '}listed: {why}")
    for name, found in outcomes.items():
        print(
            f"transformers {transformers.__version__}, {name}:",
            dict(Counter(outcome for outcome, _ in found.values())),
        )
    print(*wrong, sep="\n")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
