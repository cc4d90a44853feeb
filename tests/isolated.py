"""Run Python where nothing of this repository can be imported, as for someone who only downloads a model folder."""

import os
import subprocess
import sys
from pathlib import Path

PREAMBLE = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("sam_split", "conversion", "hub_card"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
sys.path = [entry for entry in sys.path if entry not in ("", CHECKOUT, CHECKOUT + "/tests")]
for package in ("sam_split", "conversion", "hub_card"):
    try:
        __import__(package)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{package} must not be importable here")
"""


def run_isolated(
    code: str, *arguments: object, home: Path, timeout: int = 300, unseen: str | None = None, **variables: str
) -> str:
    """Run `code` offline in a fresh interpreter with its own cache in `home`, and return what it prints.

    `variables` are added to its environment.

    Raises:
        AssertionError: with its standard error, if it fails; if it prints `unseen`, there or in its output.
    """
    home.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    environment |= variables
    checkout = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"CHECKOUT = {str(checkout)!r}\n{PREAMBLE}\n{code}", *map(str, arguments)],
        cwd=home,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert unseen is None or unseen not in done.stdout + done.stderr
    return done.stdout
