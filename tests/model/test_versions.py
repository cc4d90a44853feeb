"""A converted folder gives the same numbers whichever transformers converts it and whichever loads it.

One process has one transformers, so the numbers are written down here: stock SamModel's in float64, on weights that
numpy draws alike everywhere. Running this file under each supported version compares all of them. Nothing warns on the
way, and files broken in the ways that remote code breaks when transformers moves are noticed.
"""

import json
import re
import shutil

import pytest
import torch
from isolated import run_isolated
from models import pixels, points, stock_model
from parity import stock_forward
from transformers import AutoModel
from transformers import __version__ as transformers_version

from conversion import convert

IOU_SCORES = [  # of the first image: a row for each prompt
    [-0.4793616, -0.8222024, -0.3718356],
    [-0.3110987, -0.9755580, -0.1885766],
    [-0.3507565, -0.6833150, -0.2061548],
]
PRED_MASKS = [  # of the second image, row 10, column 13
    [-0.0227006, -0.2026605, -0.2421995],
    [-0.0501059, -0.2672006, -0.2204978],
    [-0.0524331, -0.2283259, -0.2035328],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("versions")
    stock_model().save_pretrained(work / "stock")
    convert(str(work / "stock"), work / "split", progress=False)
    return work / "split"


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_numbers(folder, attn_implementation):
    model = AutoModel.from_pretrained(folder, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        outputs = stock_forward(model, pixels(), **points(1, 0, -1, -10))
    torch.testing.assert_close(outputs["iou_scores"][0], torch.tensor(IOU_SCORES), rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs["pred_masks"][1, :, :, 10, 13], torch.tensor(PRED_MASKS), rtol=0, atol=1e-5)


def test_config_says_nothing_of_its_version(folder):
    """A config that one version writes must not carry defaults which another would take for settings."""
    config = json.loads((folder / "config.json").read_text())
    assert set(config) == {
        "architectures",
        "auto_map",
        "custom_pipelines",
        "dtype",
        "mask_decoder_config",
        "model_type",
        "prompt_encoder_config",
        "transformers_version",
        "vision_config",
    }


# Loads, runs forward and backward, and saves each folder named on the command line, with warnings turned into errors.
# The last check is transformers 5's rule for `_init_weights`: what is marked as loaded is not drawn again.
USE = """
import json, sys, warnings
from pathlib import Path
import torch
from transformers import AutoModel
try:
    from transformers.initialization import guard_torch_init_functions as guard
except ImportError:
    from contextlib import nullcontext as guard

warnings.simplefilter("error")
expected, errors = torch.load(sys.argv[1]), {}
for folder in map(Path, sys.argv[2:]):
    try:
        model = AutoModel.from_pretrained(folder, trust_remote_code=True)
        outputs = model(**expected["inputs"])
        torch.testing.assert_close(outputs.pred_masks, expected["pred_masks"], rtol=0, atol=1e-5)
        outputs.pred_masks.mean().backward()
        model.save_pretrained(folder / "saved")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with guard():
            for module in model.modules():
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor._is_hf_initialized = True
                if guard.__name__ != "nullcontext":
                    model._init_weights(module)
        redrawn = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert not redrawn, f"drawn again: {redrawn[0]}"
    except Exception as error:
        errors[folder.name] = f"{type(error).__name__}: {error}"
print(json.dumps(errors))
"""

MODELING = "modeling_sam_split.py"
BREAKS = {  # what is replaced, by what, and the error on transformers 4 and on 5, "" where it is right there
    "whole": ("", "", "", ""),
    "old_import": (
        "from transformers.utils import ModelOutput",
        "{0}\nfrom transformers.utils.fx import symbolic_trace",
        "",
        "fx",
    ),
    "new_import": (
        "from transformers.utils import ModelOutput",
        "{0}\nimport transformers.conversion_mapping",
        "conversion",
        "",
    ),
    "data_draw": (
        "nn.init.normal_(module.weight, std=std)",
        "module.weight.data.normal_(std=std)",
        "",
        "drawn again|random",
    ),
    "tied_list": ("supports_gradient_checkpointing = True", '{0}\n    _tied_weights_keys = ["a.b"]', "", "keys"),
}


@pytest.fixture(scope="module")
def errors(folder, tmp_path_factory):
    work = tmp_path_factory.mktemp("broken")
    for name, (old, new, *_) in BREAKS.items():
        shutil.copytree(folder, work / name)
        code = (folder / MODELING).read_text()
        assert old in code
        (work / name / MODELING).write_text(code.replace(old, new.format(old)) if old else code)
        # One process loads them all, and some versions take folders with one configuration file for one model.
        with (work / name / "configuration_sam_split.py").open("a") as file:
            file.write(f"# {name}\n")
    model, inputs = AutoModel.from_pretrained(folder), {"pixel_values": pixels(), **points(1, 0)}
    expected = {"inputs": inputs, "pred_masks": model(**inputs).pred_masks.detach()}
    torch.save(expected, work / "expected.pt")
    printed = run_isolated(USE, work / "expected.pt", *(work / name for name in BREAKS), home=work / "home")
    return json.loads(printed.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("name", BREAKS)
def test_use(errors, name):
    """The whole folder raises and warns of nothing; a broken one does on the versions that it breaks on."""
    *_, on_4, on_5 = BREAKS[name]
    expected = on_4 if transformers_version.startswith("4.") else on_5
    assert re.search(expected, errors.get(name, ""))
    assert bool(expected) == (name in errors), errors.get(name)
