"""Four floors, and no import runs upwards: `sam_split` <- `hub_card` <- `conversion` <- everything else.

What stands lower is used by more people: the model works without the converter, the card without either.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ["sam_split", "hub_card", "conversion"]
TOP = len(FLOORS)  # benchmarks, examples, tests, noxfile.py: all one floor
FILES = [path for path in ROOT.glob("*/**/*.py") if not path.relative_to(ROOT).parts[0].startswith(".")]
# Test helpers and examples are imported by their bare names.
TOP_NAMES = {path.stem for path in FILES if path.relative_to(ROOT).parts[0] in ("tests", "examples")}
TOP_NAMES |= {"benchmarks", "examples", "tests", "noxfile"}


def floor(name):
    """The floor of a module by its full name, None for a package of somebody else's."""
    top, *_ = name.split(".")
    if top in FLOORS:
        return FLOORS.index(top)
    return TOP if top in TOP_NAMES else None


def imported(source):
    """Full names of all that a file imports, wherever it does so; relative imports stay on their floor."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__", "importorskip", "find_spec") and node.args:
                yield ast.literal_eval(node.args[0]) if isinstance(node.args[0], ast.Constant) else ""


def upwards(path, source):
    here = floor(path.parts[0])
    return [name for name in imported(source) if (floor(name) or 0) > here]


@pytest.mark.parametrize("package", FLOORS)
def test_no_import_runs_upwards(package):
    files = [path.relative_to(ROOT) for path in FILES if package == path.relative_to(ROOT).parts[0]]
    assert len(files) > 3
    assert {str(path): found for path in files if (found := upwards(path, (ROOT / path).read_text("utf-8")))} == {}


@pytest.mark.parametrize(
    "line",
    [
        "import conversion.folder",
        "from conversion import convert",
        "def late():\n    from benchmarks.cases import Case",
        "if TYPE_CHECKING:\n    from conversion.errors import ConversionError",
        "importlib.import_module('conversion')",
        "from models import stock_model",
    ],
)
def test_every_way_to_import_is_seen(line):
    assert upwards(Path("hub_card/card.py"), line)
    assert not upwards(Path("tests/models.py"), line)
