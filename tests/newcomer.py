"""The pages' commands by an installed wheel, from `convert` to `push --dry-run`. `nox -s wheel` runs them.

    python tests/newcomer.py DOMAIN=DATA...

The checkout is out of sight of `sam-split`; only DATA, what `examples/DOMAIN.py` made, comes from it. The Hub is the
tests' own, with the tiny SAM in the place of ViT-B. Cut short: three steps, and the first two images of each folder.
"""

import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from pages import PAGES, ROOT, commands

sys.path.append(str(ROOT / "tests" / "hub"))
BIN = Path(sys.executable).parent
BASE = "facebook/sam-vit-base"
STEPS, IMAGES = 3, 2


def main(domains: dict[str, Path], folder: Path) -> None:
    from hub_server import HubServer

    with HubServer() as hub:
        environment = hub.environment(folder / "home") | {"OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)

        def run(line: str) -> str:
            print(f"$ {line}", flush=True)
            program, *words = shlex.split(line, comments=True)
            done = subprocess.run(
                [BIN / program, *words], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE
            )
            print(done.stdout, end="", flush=True)
            assert done.returncode == 0, f"exit code {done.returncode}: {line}"
            return done.stdout

        package = Path(run('python -c "import conversion; print(conversion.__path__[0])"').strip())
        assert package != ROOT / "conversion", "the checkout answers, not an installed wheel"
        typed = {path.parent.name for path in package.parent.glob("*/py.typed")}
        assert {"sam_split", "conversion", "hub_card"} <= typed, "type checkers would ignore the annotations"
        hub.create(BASE, {path.name: path.read_bytes() for path in (package / "cli" / "tiny_sam").iterdir()})
        run(printed("convert", BASE))
        base = shlex.split(printed("convert", BASE))[3]
        for domain, data in domains.items():
            for source in sorted(data.glob("*/*")):
                (folder / domain / source.relative_to(data)).mkdir(parents=True)
                for path in sorted(source.iterdir())[:IMAGES]:
                    shutil.copy(path, folder / domain / path.relative_to(data))

            def here(command: str, domain=domain) -> str:
                """The page's line for this domain, from the model that was converted."""
                line = printed(command).replace("coins", domain).replace("merged", f"{domain}-merged")
                return line.replace(" tiny ", f" {base} ")

            run(f"{here('finetune')} --steps {STEPS}")
            results = json.loads((folder / f"{domain}-adapter" / "results.json").read_text())
            assert results["steps"] == STEPS
            assert results["versions"]["sam-split"][0].isdigit(), results["versions"]
            assert (folder / f"{domain}-adapter" / "overlays" / "index.html").is_file()
            assert "AR@100" in run(here("evaluate"))
            measured = json.loads((folder / f"{domain}-results" / "results.json").read_text())["evaluations"]
            for name, ours in (base, "before"), (f"{domain}-adapter/adapter", "after"):
                assert abs(measured[name]["means"]["iou_box"] - results[ours]["means"]["iou_box"]) < 5e-3
            run(here("merge"))
            last = run(here("push"))
            assert "It loads: " in last
            assert "Dry run: " in last
        assert list(hub.repositories) == [BASE], "a dry run writes nothing"


def printed(command: str, *words: str) -> str:
    """The first line of README, or of the page on fine-tuning, with that command and these words."""
    lines = [line for page in ("README.md", "docs/finetune.md") for line in commands(PAGES[page])]
    return next(line for line in lines if line.startswith(f"sam-split {command} ") and {*words} <= {*line.split()})


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main({name: Path(data) for name, _, data in (word.partition("=") for word in sys.argv[1:])}, Path(scratch))
