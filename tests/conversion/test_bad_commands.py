"""Bad input on the command line: exit code 2, one line that names it, nothing left on the disk."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from models import meta_model, stock_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

import conversion
from conversion import convert, errors
from conversion.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the commands below are run beside: models, adapters, and things that are neither."""
    folder = tmp_path_factory.mktemp("here")
    stock_model().save_pretrained(folder / "stock")
    torch.save(meta_model().state_dict(), folder / "meta.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        convert(folder / "stock", folder / "split", progress=False)
    get_peft_model(stock_model(), LoraConfig(r=2, target_modules=["qkv"])).save_pretrained(folder / "lora")
    (folder / "empty").mkdir()
    (folder / "bert").mkdir()
    (folder / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    (folder / "list.json").write_text("[]")
    (folder / "text.pth").write_text("no checkpoint")
    (folder / "zero.pth").write_bytes(b"")
    save_file({"w": torch.zeros(2)}, folder / "other.safetensors")
    torch.save({"w": torch.zeros(2)}, folder / "other.pth")
    return folder


LONG = "n" * 300

# the command, run in `folder`, and what its one line must say
BAD = [
    ("conver stock out", "'conver'; did you mean 'convert'? (choose from convert,"),
    ("--verson", "--verson; did you mean '--version'?"),
    # convert
    ("convert", "SOURCE, OUT"),
    ("convert stock", "OUT"),
    ("convert stock out more", "more"),
    ("convert stock out --quite", "--quite; did you mean '--quiet'?; see sam-split convert --help"),
    ("adapter fuse lora out --bass=split", "'--base'?; see sam-split adapter fuse --help"),
    ("convert stock out --qui", "--qui"),
    ("convert stock out --private", "--private"),
    ("convert stock out --push-to-hub", "--push-to-hub"),
    ("convert stock out --push-to-hub a/b/c", "a/b/c"),
    ("convert stock out --push-to-hub ''", "''"),
    ("convert stock out --revision main", "stock"),
    ("convert meta.pth out --revision main", "meta.pth"),
    ("convert stock out --image-size 0", "--image-size 0"),
    ("convert stock out --image-size=-16", "--image-size '-16'"),
    ("convert stock out --image-size x", "--image-size 'x'"),
    ("convert stock out --image-size=", "--image-size ''"),
    ("convert stock out --image-size 12", "12 is not a multiple of the patch, 16 pixels; the nearest is 16"),
    ("convert stock out --image-size 96.0", "'96.0'"),
    ("convert stock out --image-size 96x", "'96x'"),
    ("convert stock out --image-size 96x100", "96x100"),
    ("convert stock out --image-size 96x96x96", "'96x96x96'"),
    ("convert stock out --image-size 1600000", "--image-size 1600000: expected 16 to 8192 pixels"),
    (f"convert stock out --image-size {'9' * 5000}", "--image-size"),
    ("convert stock stock", "stock exists already"),
    ("convert stock stock/out", "is inside stock"),
    ("convert stock empty/../stock/out", "is inside stock"),
    ("convert . out", "is inside ."),
    ("convert stock empty", "empty exists already"),
    ("convert stock no/out", "no is not a folder"),
    ("convert stock meta.pth/out", "meta.pth is not a folder"),
    ("convert stock out.pth", "out.pth would be a folder"),
    ("convert stock ''", "OUT is empty"),
    ("convert '' out", "name is empty"),
    (f"convert stock {LONG}", LONG),
    (f"convert {LONG} out", LONG),
    ("convert nowhere.pth out", "nowhere.pth does not exist"),
    ("convert ./nowhere out", "./nowhere does not exist"),
    ("convert nobody/nothing out", "nobody/nothing"),
    ("convert split out", "split already"),
    ("convert empty out", "empty holds no config.json"),
    ("convert bert out", "bert"),
    ("convert list.json out", "list.json"),
    ("convert text.pth out", "text.pth"),
    ("convert zero.pth out", "zero.pth"),
    ("convert other.pth out", "other.pth is not a Segment Anything checkpoint"),
    ("convert other.safetensors out", "other.safetensors is not a Segment Anything checkpoint"),
    ("convert lora out", "lora holds no config.json, it is an adapter; name its base here"),
    ("convert lora/adapter_model.safetensors out", "a PEFT adapter"),
    # fuse
    ("fuse split", "OUT"),
    ("fuse split out --format onnx", "'onnx'"),
    ("fuse split out --format split", "'split'"),
    ("fuse stock out", "stock is fused already"),
    ("fuse meta.pth out", "meta.pth is fused already"),
    ("fuse nowhere.pth out", "nowhere.pth does not exist"),
    ("fuse split out.pth", "out.pth would be a folder"),
    ("fuse split split/out.pth --format meta", "is inside split"),
    ("fuse split no/out.pth --format meta", "no is not a folder"),
    ("fuse split meta.pth --format meta", "meta.pth exists already"),
    (f"fuse split {LONG}.pth --format meta", LONG),
    # verify
    ("verify split", "B"),
    ("verify split stock --tensors", "--tensors"),
    ("verify split nowhere.pth", "nowhere.pth does not exist"),
    ("verify '' split", "name is empty"),
    ("verify split empty", "empty holds no config.json"),
    ("verify lora split", "lora holds no config.json"),
    # adapter
    ("adapter", "ACTION"),
    ("adapter merge lora out", "'merge'"),
    ("adapter fuse lora", "OUT"),
    ("adapter import other.pth out", "--base"),
    ("adapter import other.pth out --base nowhere.pth", "nowhere.pth does not exist"),
    ("adapter import other.pth out --base split", "other.pth holds 0 w_a_*"),
    ("adapter import nowhere.pth out --base split", "nowhere.pth does not exist"),
    ("adapter import other.pth split/out --base split", "is inside split"),
    ("adapter fuse lora out", "no q, k or v"),
    ("adapter fuse lora lora/out", "is inside lora"),
    ("adapter fuse lora out --base ''", "name is empty"),
    ("adapter split empty out", "empty holds no adapter_config.json"),
    ("adapter split '' out", "name is empty"),
    ("adapter split lora out --base bert", "bert"),
    ("adapter split lora split", "split exists already"),
    ("adapter split nobody/nothing out", "nobody/nothing"),
    # merge
    ("merge split lora", "OUT"),
    ("merge split lora out --format onnx", "'onnx'"),
    ("merge split empty out", "empty holds no adapter_config.json"),
    ("merge nowhere.pth lora out", "nowhere.pth does not exist"),
    ("merge split nowhere.pth out", "nowhere.pth does not exist"),
    ("merge split lora split/out", "is inside split"),
    ("merge split lora lora/out", "is inside lora"),
    ("merge split lora out.pth", "out.pth would be a folder"),
    ("merge split lora meta.pth --format meta", "meta.pth exists already"),
    # push, up to where it would ask the Hub
    ("push split", "REPO_ID"),
    ("push split a/b/c", "a/b/c"),
    ("push split ''", "''"),
    ("push split you/model --base-revision 0123", "--base-revision"),
    ("push split you/model --privat", "--privat"),
    # demo
    ("demo more", "more"),
    ("demo --source nowhere.pth --out out", "nowhere.pth"),
    ("demo --source '' --out out", "--source is empty"),
    ("demo --source meta.pth --out out", "meta.pth is a file"),
    ("demo --out split", "split exists already"),
    ("demo --out ''", "OUT is empty"),
    ("demo --source stock --out stock/out", "is inside stock"),
]  # fmt: skip


def run(command):
    argv = [word.strip("'") for word in command.split()]
    try:
        return main(argv)
    except SystemExit as error:  # argparse's own
        return error.code


@pytest.mark.parametrize(("command", "named"), BAD, ids=[command[:60] for command, _ in BAD])
def test_one_line_names_what_is_wrong_and_nothing_is_left(command, named, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert run(command) == 2
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if "Loading weights" not in line]
    assert line.startswith("sam-split: error: ")
    assert named in line
    assert sorted(folder.rglob("*")) == before


def test_a_long_name_that_the_disk_takes_is_taken(folder, tmp_path):
    assert main(["convert", str(folder / "stock"), str(tmp_path / ("n" * 255)), "--quiet"]) == 0
    assert main(["fuse", str(folder / "split"), str(tmp_path / ("ü" * 125 + ".pth")), "--format", "meta"]) == 0
    assert sorted(len(os.fsencode(path.name)) for path in tmp_path.iterdir()) == [254, 255]


def test_warnings_of_libraries_do_not_reach_the_user(folder, tmp_path, capsys, monkeypatch):
    def noisy(*args, **options):
        warnings.warn("use the new name", FutureWarning, stacklevel=1)
        warnings.warn("be careful", UserWarning, stacklevel=1)

    monkeypatch.setattr("conversion.checkpoints.convert", noisy)
    assert main(["convert", "a", "b"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("delay", [0.1, 0.2, 0.3, 0.6, 1.2])
def test_ctrl_c_while_modules_are_imported_is_one_line(delay, folder, tmp_path):
    """The clock starts when Python itself is up: before that, the interpreter answers."""
    code = "import signal, sys; signal.signal(2, signal.default_int_handler); print(flush=True); "
    code += "from conversion.cli import main; sys.exit(main(sys.argv[1:]))"
    argv = [sys.executable, "-c", code, "convert", str(folder / "stock"), str(tmp_path / "out")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert (process.returncode, error) == (130, "sam-split: error: interrupted; nothing was written\n")
    assert list(tmp_path.iterdir()) == []


ERRORS = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, ValueError)}
CURES = re.compile(r"; |expected|must |pip install|\bgive |\bname ")


def refusals():
    """Where conversion raises an error of its own: file and line -> the message as it stands there."""
    for path in sorted(Path(conversion.__file__).parent.rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                message = " ".join(ast.unparse(node.exc.args[0]).split())
                passed_on = message.startswith("str(")  # the message of another error, which has its own
                if getattr(node.exc.func, "id", "") in ERRORS and not passed_on:
                    yield f"{path.name}:{node.lineno}", message


def test_every_refusal_says_what_to_do():
    found = dict(refusals())
    assert len(found) > 80
    assert {place: message for place, message in found.items() if not CURES.search(message)} == {}
