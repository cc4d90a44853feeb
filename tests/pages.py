"""README and the pages of `docs`, as tests read and run them."""

import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}

# Lines that other tests run, by their first words: they need a network, a server, a second environment or an hour.
ELSEWHERE = {
    "pip install": "noxfile.py",
    "python3 -m venv": ".ci/run",
    "sam-split demo": "tests/conversion/test_demo.py",
    "python -m http.server": "tests/conversion/browser_page.py",
    "python -m samexporter.export_": "tests/conversion/samexporter_reads.py",
    "python examples/segment_ray.py": "tests/conversion/test_segment_ray.py",
}
# What makes a command as quick as a test should be; it says nothing else about it.
CUT_SHORT = {
    "finetune": ["--steps", "1", "--no-everything"],
    "evaluate": ["--no-everything"],
    "segment": ["--points", "4"],
}


def blocks(text: str, *languages: str) -> list[tuple[str, str]]:
    """(language, code) of each block in these languages, in order."""
    found = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(language, code) for language, code in found if language in languages]


def lines(code: str) -> list[str]:
    """The commands of a block, without comments."""
    return [line for line in (line.partition("  #")[0].strip() for line in code.splitlines()) if line]


def commands(text: str) -> list[str]:
    return [line for _, code in blocks(text, "bash") for line in lines(code)]


def section(page: str, title: str) -> str:
    text = PAGES[page]
    return text[text.index(f"## {title}\n") :].split("\n## ")[0]


def elsewhere(line: str) -> str | None:
    """Who runs a line, if it is not run as it stands."""
    return next((file for start, file in ELSEWHERE.items() if line.startswith(start)), None)


def run_page(name: str, monkeypatch) -> dict:
    """Run every block of a page in the current folder, from the top: what the last Python block can see."""
    namespace: dict = {}
    for language, code in blocks(PAGES[name], "bash", "python"):
        if language == "python":
            exec(compile(code, name, "exec"), namespace)
            continue
        for line in lines(code):
            if not elsewhere(line):
                _run_line(line, monkeypatch)
    return namespace


def _run_line(line: str, monkeypatch) -> None:
    program, *words = shlex.split(line)
    if program == "sam-split":
        from conversion.cli import main

        assert main([*words, *CUT_SHORT.get(words[0], [])]) == 0, line
    else:
        assert program == "python", f"no test knows how to run: {line}"
        monkeypatch.setattr(sys, "argv", words)
        exec(compile((ROOT / words[0]).read_text(encoding="utf-8"), words[0], "exec"), {"__name__": "__main__"})
