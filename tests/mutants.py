"""How many random one-line mutants the tests catch. `nox -s mutants` runs it.

    python tests/mutants.py PYTHON [COUNT] [SEED]

Places in the code are sampled first, then one change for each, because cosmic-ray knows eleven changes of a plus and
one of a condition. PYTHON runs the tests of the mutant's own folder in a copy of the checkout until one fails, files
that name the mutated module first. The mutants that survive are printed as diffs: write a test for those that do harm.
"""

import os
import random
import shlex
import shutil
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.testing import run_tests
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import TestOutcome

ROOT = Path(__file__).parents[1]
TESTS = {
    "sam_split/training": "tests/training",
    "sam_split": "tests/model",
    "hub_card": "tests/hub",
    "conversion": "tests/conversion",
}
# A mutated `int | None` only stops the import, and the last two exchange names at random.
LEFT_OUT = ("ReplaceBinaryOperator_BitOr", "VariableReplacer", "VariableInserter")
PROCESSES, SECONDS = 2, 600


def tests_of(path: Path) -> str:
    return next(tests for start, tests in TESTS.items() if path.as_posix().startswith(start))


def command(python: str, tests: str, module: str = "") -> str:
    """Run the tests of a folder until one fails, files that name the module first."""
    files = sorted(Path(tests).glob("test_*.py"), key=lambda file: module not in file.read_text(encoding="utf-8"))
    options = *"-m pytest -x -q -p no:cacheprovider -m".split(), "not slow and not night and not network"
    return shlex.join([python, *options, *map(str, files)])


def sample(count: int, seed: int) -> list:
    """Mutations at `count` places, the same for the same code and seed."""
    folders = sorted({start.partition("/")[0] for start in TESTS})
    files = [path for folder in folders for path in sorted(Path(folder).rglob("*.py"))]
    places = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, use_db(str(Path(folder, "all.sqlite")), WorkDB.Mode.create) as found:
        init(files, found, {})
        for item in found.work_items:
            (mutation,) = item.mutations
            if not any(name in mutation.operator_name for name in LEFT_OUT):
                places[mutation.module_path.as_posix(), mutation.start_pos].append(mutation)
    draw = random.Random(seed)
    chosen = draw.sample(sorted(places), min(count, len(places)))
    return [draw.choice(sorted(places[place], key=lambda m: (m.operator_name, m.occurrence))) for place in chosen]


def enter_copy(folder: str) -> None:
    """Each process mutates, and imports, a checkout of its own."""
    copy = Path(tempfile.mkdtemp(dir=folder)) / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def unchanged(python: str, tests: str):
    return run_tests(command(python, tests), SECONDS)


def meet(python: str, mutation):
    path = mutation.module_path
    return mutate_and_test([mutation], command(python, tests_of(path), path.stem), SECONDS)


def main(python: str, count: str = "120", seed: str = "0") -> int:
    os.chdir(ROOT)
    mutations = sample(int(count), int(seed))
    survivors = []
    with (
        tempfile.TemporaryDirectory(prefix="sam-split-mutants-") as folder,
        ProcessPoolExecutor(PROCESSES, initializer=enter_copy, initargs=(folder,)) as pool,
    ):
        folders = sorted({tests_of(mutation.module_path) for mutation in mutations})
        whole = pool.map(unchanged, [python] * len(folders), folders)
        for tests, (outcome, output) in zip(folders, whole, strict=True):
            if outcome != TestOutcome.SURVIVED:
                print(f"{tests} fails without any mutant:\n{output[-2000:]}", file=sys.stderr)
                return 2
        results = pool.map(meet, [python] * len(mutations), mutations)
        for mutation, result in zip(mutations, results, strict=True):
            place = f"{mutation.module_path}:{mutation.start_pos[0]}: {mutation.operator_name.partition('/')[2]}"
            if result.test_outcome == TestOutcome.INCOMPETENT or result.diff is None:
                print(f"cosmic-ray failed at {place}:\n{result.output}", file=sys.stderr)
                return 2
            print("caught  " if result.is_killed else "SURVIVED", place, flush=True)
            if not result.is_killed:
                survivors.append(result.diff)
    print(*survivors, sep="\n\n")
    caught = len(mutations) - len(survivors)
    print(f"{caught} of {len(mutations)} mutants caught: {caught / len(mutations):.0%}, seed {seed}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
