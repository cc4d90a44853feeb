"""Damaged files, by the thousand at night: each conversion ends in a whole folder or in one clear line."""

import json
import random
import shutil
import signal

import pytest
import torch
from checkpoint_files import FILES, in_bin_shards, in_shards, stock_state
from models import meta_model, stock_model

from conversion import atomic, convert
from conversion.cli import main

SECONDS = 20  # far more than any conversion here takes


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    theirs = stock_model()
    theirs.save_pretrained(folder / "single")
    for name, write in (("shards", in_shards), ("bins", in_bin_shards)):
        (folder / name).mkdir()
        shutil.copy(folder / "single" / "config.json", folder / name)
        write(folder / name, stock_state(theirs))
    state = meta_model().state_dict()
    for name, is_zip in (("zip.pth", True), ("legacy.pth", False)):
        torch.save(state, folder / name, _use_new_zipfile_serialization=is_zip)
    convert(folder / "single", folder / "warm", progress=False)
    return folder


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def structure(name: str, content: bytes) -> list[tuple[int, int]]:
    """Where a file's own structure lies, as opposed to the numbers in its tensors."""
    if name.endswith(".safetensors"):
        return [(0, 9), (0, header_end(content))]
    if name.endswith(".json"):
        return [(0, len(content))]
    pickled = content.find(b"data.pkl") + 8 if content[:2] == b"PK" else 0
    return [(pickled, min(len(content), pickled + 15_000)), (max(0, len(content) - 15_000), len(content))]


def mutate(name: str, content: bytes, draw: random.Random) -> bytes:
    """One to four small changes, most of them where the structure is."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 4))):
        start, end = draw.choice([*structure(name, bytes(content)), (0, len(content))]) if content else (0, 0)
        end = max(start + 1, min(end, len(content)))
        at, length = draw.randrange(start, end), draw.choice((1, 1, 2, 8, 100))
        kind = draw.randrange(7)
        if kind == 0:
            content[at : at + 1] = bytes([content[at] ^ (1 << draw.randrange(8))]) if at < len(content) else b""
        elif kind == 1:
            content[at : at + length] = draw.randbytes(length)
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        elif kind == 4:
            content[at:at] = draw.randbytes(length)
        elif kind == 5:
            digits = [i for i in range(at, min(at + 200, len(content))) if 48 <= content[i] <= 57]
            if digits:  # another number of the same length
                content[draw.choice(digits)] = 48 + draw.randrange(10)
        else:
            del content[at:]
    return bytes(content)


VALUES = [None, True, -1, 0, 1, 3, 7, 10**9, 2**63, 1.5, float("nan"), "", "x", [], [1], [1, 2, 3], {}, {"a": 1}]


def replace_a_value(content: bytes, draw: random.Random) -> bytes:
    """Valid JSON with one value, or one key, exchanged."""
    root = json.loads(content)
    node, path = root, None
    while isinstance(node, dict) and node:
        parent, path = node, draw.choice(sorted(node))
        node = node[path]
        if draw.random() < 0.3:
            break
    if draw.random() < 0.1:
        parent[draw.choice(["", "x", "../x", path + "x"])] = parent.pop(path)
    else:
        parent[path] = draw.choice([*VALUES, "../model.safetensors", "/dev/zero", "model.safetensors", "config.json"])
    return json.dumps(root).encode()


def hung(signum, frame):
    raise TimeoutError(f"no end after {SECONDS} s")


CASES = [
    # source, the file to damage, how often, how
    ("single", "model.safetensors", 700, mutate),
    ("single", "config.json", 200, mutate),
    ("single", "config.json", 150, lambda name, content, draw: replace_a_value(content, draw)),
    ("shards", "model.safetensors.index.json", 150, mutate),
    ("shards", "model.safetensors.index.json", 150, lambda name, content, draw: replace_a_value(content, draw)),
    ("bins", "pytorch_model-00002-of-00003.bin", 150, mutate),
    ("zip.pth", None, 350, mutate),
    ("legacy.pth", None, 300, mutate),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("share", [0.1, pytest.param(1, marks=pytest.mark.night)])
@pytest.mark.parametrize("case", range(len(CASES)), ids=[f"{s}-{f}-{n}" for s, f, n, _ in CASES])
def test_a_damaged_file_ends_in_a_folder_or_in_one_line(case, share, sources, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        atomic, "_flush_entry", lambda path: None
    )  # thousands of flushes take minutes and show nothing
    source, file, count, damage = CASES[case]
    count = int(share * count)
    source = sources / source
    work = tmp_path / source.name
    if file:
        shutil.copytree(source, work)
    target = work / file if file else work
    original = (source / file if file else source).read_bytes()
    draw, codes = random.Random(case), []
    previous = signal.signal(signal.SIGALRM, hung)
    try:
        for number in range(count):
            damaged = damage(target.name, original, draw)
            target.write_bytes(damaged)
            signal.alarm(SECONDS)
            code = main(["convert", str(work), str(tmp_path / "out"), "--quiet"])
            signal.alarm(0)
            lines = capsys.readouterr().err.splitlines()
            assert code in (0, 2), (number, lines)
            if code == 0:
                assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
                shutil.rmtree(tmp_path / "out")
            else:
                assert lines[-1].startswith("sam-split: error: "), (number, lines)
            assert not [line for line in lines if not line.startswith("sam-split: ")], (number, lines)
            assert [path.name for path in tmp_path.iterdir()] == [work.name], number
            codes.append(code)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert codes.count(2) > count / 10  # the damage does something
