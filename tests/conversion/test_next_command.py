"""A finished command names those that follow, as lines that the parser accepts."""

import shlex
import shutil

import pytest
import torch
from models import stock_model
from peft import LoraConfig, get_peft_model

from conversion import convert
from conversion.cli import build_parser, main
from conversion.verification import Row
from sam_split import SamSplitModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stock checkpoint, the split one, and an adapter of it."""
    folder = tmp_path_factory.mktemp("here")
    stock_model().save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "split", progress=False)
    model = get_peft_model(SamSplitModel.from_pretrained(folder / "split"), LoraConfig(r=2, target_modules=["q", "v"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # an adapter that was never trained is refused
    model.save_pretrained(folder / "lora")
    return folder


def following(argv, capsys):
    """The command lines that `argv` names at its end, once it has run."""
    capsys.readouterr()
    assert main(argv) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("next: ", "  or: "))]
    assert [line[:6] for line in lines] == ["next: ", *["  or: "] * (len(lines) - 1)][: len(lines)]
    return [line[6:] for line in lines]


# what has run, in a folder with a blank in its name, and what follows
CHAIN = [
    (
        "convert stock new",
        [
            "sam-split finetune new DATA ADAPTER",
            "sam-split segment new IMAGES MASKS",
            "sam-split push new NAME/REPOSITORY",
        ],
    ),
    ("fuse split 'my stock'", ["sam-split verify split 'my stock'"]),
    ("adapter fuse lora for-stock", []),
    ("merge split lora merged", ["sam-split push merged NAME/REPOSITORY", "sam-split export merged ONNX"]),
    ("merge split lora merged.pth --format meta", ["sam-split export merged.pth ONNX"]),
]


@pytest.mark.parametrize(("command", "expected"), CHAIN)
def test_what_follows_is_named_and_accepted(command, expected, folder, tmp_path, capsys, monkeypatch):
    for name in ("stock", "split", "lora"):
        shutil.copytree(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    found = following(shlex.split(command), capsys)
    assert found == expected
    for line in found:
        build_parser().parse_args(shlex.split(line)[1:])


def test_an_adapter_for_split_models_can_be_merged(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["adapter", "fuse", str(folder / "lora"), "for-stock"]) == 0
    (line,) = following(["adapter", "split", "for-stock", "back"], capsys)
    assert line == "sam-split merge BASE back MERGED"
    words = shlex.split(line.replace("BASE", shlex.quote(str(folder / "split"))))
    assert main(words[1:]) == 0
    assert (tmp_path / "MERGED" / "model.safetensors").is_file()


def test_after_finetune(monkeypatch, capsys):
    """What finetune itself does is tested elsewhere; here it has done it."""
    monkeypatch.setattr("sam_split.training.finetuning.finetune", lambda *arguments: {"steps": 1})
    expected = [
        "sam-split evaluate sam DATA --adapter out/adapter --out RESULTS",
        "sam-split segment sam IMAGES MASKS --adapter out/adapter",
        "sam-split merge sam out/adapter MERGED",
    ]
    assert following(["finetune", "sam", "cells", "out"], capsys) == expected
    for line in expected:
        build_parser().parse_args(shlex.split(line)[1:])
    monkeypatch.setattr("sam_split.training.finetuning.finetune", lambda *arguments: None)
    assert following(["finetune", "sam", "cells", "out"], capsys) == []  # all processes but the main one


@pytest.mark.parametrize("page", [True, False])
def test_after_export(page, monkeypatch, capsys):
    for name in ("onnx_export.export", "onnx_page.export_page"):
        monkeypatch.setattr(f"conversion.{name}", lambda *arguments, **options: [Row("masks", "equal", True)])
    serve = ["python -m http.server --directory out"] * page
    found = following(["export", "sam", "out", *["--page"] * page], capsys)
    assert found == [*serve, "sam-split push out NAME/REPOSITORY" + " --space" * page]
    build_parser().parse_args(shlex.split(found[-1])[1:])
