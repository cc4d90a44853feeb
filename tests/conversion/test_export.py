"""`sam-split export`: ONNX graphs that compute what the model computes, for every prompt, or nothing."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch
from models import BATCH, GRID, IMAGE_SIZE, PROMPTS, redraw, stock_model
from PIL import Image
from trained_adapters import ours, trained

from conversion import convert, onnx_export
from conversion.cli import main
from conversion.onnx_page import export_page
from sam_split import SamSplitConfig, SamSplitModel

FILES = {"README.md", "LICENSE", "config.json", "preprocessor_config.json", "onnx"}
NAMES = "vision_encoder", "prompt_encoder_mask_decoder", "mask_prompt_encoder"
WHOLE = dict.fromkeys(NAMES, "")  # name -> suffix of its file
# Options, suffixes, and the least IoU that docs/deploy.md promises.
SMALLER = {
    "float16": (["--dtype", "float16"], dict.fromkeys(NAMES, "_fp16"), 0.98),
    "int8": (["--quantize", "int8"], {**WHOLE, "vision_encoder": "_int8"}, 0.9),
}
JS_NAMES = {"": "fp32", "_fp16": "fp16", "_int8": "int8"}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    stock_model().save_pretrained(folder / "stock")
    convert(folder / "stock", folder / "split", progress=False)
    return folder / "split"


@pytest.fixture(scope="module")
def adapted(split):
    """An adapter's folder, and the model with it."""
    folder = split.parent / "run" / "adapter"
    return folder, trained(ours(split), folder, r=2, target_modules=["q", "v"])


def command(split, out, *options):
    """The command in a process of its own, as from a shell."""
    argv = [sys.executable, "-m", "conversion", "export", split, out, *options]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests in the background inherit that Ctrl-C is ignored.
    return subprocess.Popen(
        list(map(str, argv)), **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )


def said(process):
    """What a command that went well prints; no library's warning is beside it."""
    printed, errors = process.communicate(timeout=600)
    assert (process.returncode, errors) == (0, "")
    return printed.splitlines()


@pytest.fixture(scope="module")
def exported(split, adapted):
    out = split.parent / "onnx-adapted"
    lines = said(command(split, out, "--adapter", adapted[0]))
    assert ["differs by" in line and line.startswith("ok  ") for line in lines] == [True] * 6 + [False] * 2
    assert lines[6] == f"wrote {out}; transformers.js loads it with SamModel.from_pretrained"
    return out


class Client:
    """The graphs of a folder in onnxruntime."""

    def __init__(self, folder, suffixes=WHOLE):
        files = {name: folder / "onnx" / f"{name}{suffix}.onnx" for name, suffix in suffixes.items()}
        self.sessions = {name: onnxruntime.InferenceSession(file) for name, file in files.items()}

    def run(self, name, **feed):
        session = self.sessions[name]
        results = session.run(None, {key: np.asarray(value) for key, value in feed.items()})
        return {output.name: torch.from_numpy(x) for output, x in zip(session.get_outputs(), results, strict=True)}

    def decode(self, embeddings, model, **prompts):
        with torch.no_grad():
            positions = model.get_image_wide_positional_embeddings().expand(len(embeddings), -1, -1, -1)
        image = {"image_embeddings": embeddings, "image_positional_embeddings": positions}
        return self.run("prompt_encoder_mask_decoder", **image, **prompts)


@pytest.fixture(scope="module")
def client(exported):
    return Client(exported)


def images(batch):
    return torch.randn(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(5))


def draw(*shape):
    return IMAGE_SIZE * torch.rand(*shape, generator=torch.Generator().manual_seed(6))


def test_the_folder_is_complete(exported):
    assert {path.name for path in exported.iterdir()} == FILES
    assert {path.name for path in (exported / "onnx").iterdir()} == {f"{name}.onnx" for name in NAMES}
    config = json.loads((exported / "config.json").read_text())
    assert config["model_type"] == "sam"
    dtypes = dict.fromkeys([*NAMES, "model"], "fp32")  # transformers.js calls the image encoder by both names
    assert config["transformers.js_config"] == {"dtype": dtypes, "use_external_data_format": {}}
    assert "the adapter `run/adapter`" in (exported / "README.md").read_text()


def test_the_card_says_how_to_use_them_in_python(exported, adapted, tmp_path, monkeypatch):
    shutil.copytree(exported, tmp_path / "out")
    pixels = np.random.default_rng(0).integers(0, 256, (900, 700, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "out" / "photo.jpg")
    monkeypatch.chdir(tmp_path / "out")
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    found: dict = {}
    exec(compile(code, "README.md", "exec"), found)
    inputs = {name: found["inputs"][name] for name in ("pixel_values", "input_points")}
    with torch.no_grad():
        expected = adapted[1](**inputs)
    torch.testing.assert_close(torch.from_numpy(found["masks"]), expected.pred_masks, atol=1e-5, rtol=1e-4)
    assert found["best"].shape == (900, 700)


def test_the_graphs_do_not_tell_of_the_machine(exported):
    """The exporter notes the lines of code that each node comes from: paths, and most of a small graph's bytes."""
    for path in (exported / "onnx").iterdir():
        content = path.read_bytes()
        assert [word for word in (b".py", b"site-packages", str(Path.cwd()).encode()) if word in content] == []


@pytest.mark.parametrize("batch", [1, BATCH])
def test_the_encoder_is_the_models(batch, client, adapted, split):
    found = client.run("vision_encoder", pixel_values=images(batch))
    assert found.keys() == {"image_embeddings", "image_positional_embeddings"}
    with torch.no_grad():
        expected, base = (model.get_image_embeddings(images(batch)) for model in (adapted[1], ours(split)))
        positions = adapted[1].get_image_wide_positional_embeddings()
    assert (expected - base).abs().max() > 0.1
    torch.testing.assert_close(found["image_embeddings"], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["image_positional_embeddings"], positions.expand(batch, -1, -1, -1))


def prompts(kind, batch, number, points):
    """The model's prompts of a kind, and the decoder's points and labels for the same."""
    where, labels = draw(batch, number, points, 2), torch.ones(batch, number, points, dtype=torch.long)
    labels[..., 1::2], labels[..., 2::3] = 0, -10
    corners = torch.stack([draw(batch, number, 2) / 2, draw(batch, number, 2) / 2 + IMAGE_SIZE / 2], dim=2)
    as_points = {"input_points": corners, "input_labels": torch.tensor([2, 3]).expand(batch, number, -1)}
    if kind == "points":
        return {"input_points": where, "input_labels": labels}, {"input_points": where, "input_labels": labels}
    if kind == "boxes":
        return {"input_boxes": corners.flatten(2)}, as_points
    together = {
        "input_points": torch.cat([where, corners], dim=2),
        "input_labels": torch.cat([labels, as_points["input_labels"]], dim=2),
    }
    return {"input_points": where, "input_labels": labels, "input_boxes": corners.flatten(2)}, together


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 5, 1), (BATCH, PROMPTS, 4)])
@pytest.mark.parametrize("kind", ["points", "boxes", "points and boxes"])
def test_every_prompt_is_the_models(kind, sizes, client, adapted):
    given, feed = prompts(kind, *sizes)
    with torch.no_grad():
        embeddings = adapted[1].get_image_embeddings(images(sizes[0]))
        expected = adapted[1](image_embeddings=embeddings, **given)
    found = client.decode(embeddings, adapted[1], **feed)
    torch.testing.assert_close(found["iou_scores"], expected.iou_scores, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found["pred_masks"], expected.pred_masks, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_an_earlier_mask_is_the_models(batch, client, adapted):
    given, feed = prompts("points", batch, 1, 1)
    earlier = torch.randn(batch, 1, 4 * GRID, 4 * GRID, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        embeddings = adapted[1].get_image_embeddings(images(batch))
        expected, without = (
            adapted[1](image_embeddings=embeddings, **given, **mask) for mask in ({"input_masks": earlier}, {})
        )
    assert (expected.pred_masks - without.pred_masks).abs().max() > 0.1
    masked = client.run("mask_prompt_encoder", image_embeddings=embeddings, input_masks=earlier)
    found = client.decode(masked["image_embeddings_with_masks"], adapted[1], **feed)
    torch.testing.assert_close(found["pred_masks"], expected.pred_masks, atol=1e-5, rtol=1e-4)


def test_a_click_beside_a_box_says_that_it_has_none(client, adapted):
    """Documented in docs/deploy.md: the call has a box, so the click brings its own point with the label -1."""
    click, box = torch.tensor([[40.0, 30.0]]), torch.tensor([[20.0, 20.0], [70.0, 60.0]])
    feed = {
        "input_points": torch.stack([torch.cat([click, torch.zeros(1, 2)]), box])[None],
        "input_labels": torch.tensor([[[1, -1], [2, 3]]]),
    }
    with torch.no_grad():
        embeddings = adapted[1].get_image_embeddings(images(1))
        alone = adapted[1](image_embeddings=embeddings, input_points=click[None, None])
        boxed = adapted[1](image_embeddings=embeddings, input_boxes=box.view(1, 1, 4))
    found = client.decode(embeddings, adapted[1], **feed)
    expected = torch.cat([alone.pred_masks, boxed.pred_masks], dim=1)
    torch.testing.assert_close(found["pred_masks"], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.night
def test_another_geometry_with_dora_is_the_models(tmp_path):
    """Grid of 4 x 7 that no window fills, keys adapted as well, and another version of the operators."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "global_attn_indexes": [1]}
    config = SamSplitConfig(vision_config={**small, "image_size": [64, 112], "window_size": 3, "mlp_dim": 64})
    base = redraw(SamSplitModel(config))
    base.save_pretrained(tmp_path / "split")
    adapter = {"r": 2, "target_modules": ["q", "k", "v"], "use_dora": True, "modules_to_save": ["mask_embed"]}
    model = trained(base, tmp_path / "adapter", **adapter)
    assert run(tmp_path / "split", tmp_path / "out", "--adapter", tmp_path / "adapter", "--opset", 20) == 0
    client, pixels = Client(tmp_path / "out"), torch.randn(3, 3, 64, 112, generator=torch.Generator().manual_seed(5))
    assert {onnx.load(path).opset_import[0].version for path in (tmp_path / "out" / "onnx").iterdir()} == {20}
    with torch.no_grad():
        expected = model.get_base_model().get_image_embeddings(pixels)
    found = client.run("vision_encoder", pixel_values=pixels)["image_embeddings"]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


# Smaller weights


def run(split, out, *options):
    return main(["export", str(split), str(out), "--quiet", *map(str, options)])


def graphs_of(folder):
    """A stand-in for the exporter: it copies a folder's graphs."""

    def copy(graph, path, *options):
        shutil.copyfile(folder / "onnx" / f"{graph.name}.onnx", path)

    return copy


def traced(folder, name):
    """The graph of a folder as the exporter gives it."""
    return SimpleNamespace(model=onnx_ir.load(folder / "onnx" / f"{name}.onnx"))


def nothing_in(folder):
    return [path.name for path in folder.iterdir()] == []


@pytest.fixture(scope="module", params=["int8", pytest.param("float16", marks=pytest.mark.night)])
def smaller(request, split, adapted, exported):
    """A precision, the folder that was exported in it, and what the command printed."""
    out, options = split.parent / f"onnx-{request.param}", [*SMALLER[request.param][0], "--adapter", adapted[0]]
    if request.param == "float16":
        return request.param, out, said(command(split, out, *options))
    with contextlib.redirect_stdout(io.StringIO()) as printed, pytest.MonkeyPatch.context() as patch:
        # 8 bits are made of the graphs in float32, which are traced already.
        patch.setattr(onnx_export, "_trace", lambda graph, opset: traced(exported, graph.name))
        assert run(split, out, *options) == 0
    return request.param, out, printed.getvalue().splitlines()


def test_smaller_weights_are_stored_and_declared(smaller, exported):
    precision, out, _ = smaller
    files = {name: out / "onnx" / f"{name}{suffix}.onnx" for name, suffix in SMALLER[precision][1].items()}
    assert set((out / "onnx").iterdir()) == set(files.values())
    dtypes = json.loads((out / "config.json").read_text())["transformers.js_config"]["dtype"]
    expected = {name: JS_NAMES[suffix] for name, suffix in SMALLER[precision][1].items()}
    assert dtypes == {**expected, "model": expected["vision_encoder"]}
    for name, path in files.items():
        model, whole = onnx.load(path), onnx.load(exported / "onnx" / f"{name}.onnx")
        assert {x.type.tensor_type.elem_type for x in [*model.graph.input, *model.graph.output]} <= {
            onnx.TensorProto.FLOAT,
            onnx.TensorProto.INT64,
        }
        numbers = Counter()
        for x in model.graph.initializer:
            numbers[x.data_type] += math.prod(x.dims)
        if precision == "float16":
            assert numbers[onnx.TensorProto.FLOAT16] > 40 * numbers[onnx.TensorProto.FLOAT]
            assert path.stat().st_size < (exported / "onnx" / f"{name}.onnx").stat().st_size
        elif name == "vision_encoder":
            products = [node for node in model.graph.node if node.op_type == "MatMulInteger"]
            assert len(products) == 2 * 4  # layers; q, k and v together, proj, lin1, lin2
            assert numbers[onnx.TensorProto.INT8] > 0
        else:
            assert model == whole


def test_smaller_weights_give_the_masks(smaller, adapted):
    """The bar is printed, and holds for other images and prompts than the command's."""
    precision, out, lines = smaller
    least, suffixes = SMALLER[precision][2], SMALLER[precision][1]
    ends = f"with those of float32; the least is {least}"
    assert [line.startswith("ok  ") and line.endswith(ends) for line in lines] == [True] * 5 + [False] * 2
    client = Client(out, suffixes)
    given, feed = prompts("points and boxes", BATCH, PROMPTS, 4)
    with torch.no_grad():
        expected = adapted[1](pixel_values=images(BATCH), **given).pred_masks > 0
    encoded = client.run("vision_encoder", pixel_values=images(BATCH))
    found = client.run("prompt_encoder_mask_decoder", **encoded, **feed)["pred_masks"] > 0
    assert 0.1 < expected.float().mean() < 0.9
    assert (found & expected).sum() / (found | expected).sum() > least


@pytest.mark.parametrize("precision", SMALLER)
def test_masks_below_the_bar_do_not_appear(precision, split, exported, tmp_path, capsys, monkeypatch):
    """The adapted model's graphs in the place of the base's."""
    monkeypatch.setattr(onnx_export, "_write", graphs_of(exported))
    assert run(split, tmp_path / "out", *SMALLER[precision][0]) == 1
    printed = capsys.readouterr()
    assert "not the same model: a point: masks have an IoU of 0." in printed.err
    assert f"the least is {SMALLER[precision][2]}" in printed.err
    assert "FAIL  a point" in printed.out
    assert nothing_in(tmp_path)


# Twice


def test_what_was_exported_before_is_copied(split, adapted, exported, tmp_path, monkeypatch):
    """With the files of its weights; onnxruntime has loaded the copies."""
    made = []
    monkeypatch.setattr(
        onnx_export, "_trace", lambda graph, _: made.append(graph.name) or traced(exported, graph.name)
    )
    monkeypatch.setattr(onnx_export, "MAX_BYTES", 0)
    folders, seen = [tmp_path / "one", tmp_path / "two"], {}
    for folder in folders:
        onnx_export.export(split, folder, adapter=adapted[0], progress=False, seen=seen)
    assert tuple(made) == NAMES
    one, two = ({path.name: path.read_bytes() for path in (folder / "onnx").iterdir()} for folder in folders)
    assert one == two
    assert one.keys() == {f"{name}.onnx{end}" for name in NAMES for end in ("", "_data")}


def test_the_pages_base_takes_over_what_the_adapter_left_alone(split, adapted, tmp_path, monkeypatch):
    made = []

    def write(graph, path, *_):
        made.append(graph.name)
        path.write_bytes(bytes(len(made)))

    monkeypatch.setattr(onnx_export, "_write", write)
    monkeypatch.setattr(onnx_export, "compare", lambda *_: [])
    export_page(split, tmp_path / "out", adapter=adapted[0], progress=False)
    assert made == [*NAMES, "vision_encoder"]
    assert [path.name for path in (tmp_path / "out/base/onnx").iterdir()] == ["vision_encoder.onnx"]


# What goes wrong


@pytest.mark.parametrize("page", [[], ["--page"]])
def test_an_existing_out_is_kept(page, split, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    assert run(split, tmp_path / "out", *page) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "exists already; nothing is overwritten" in line
    assert nothing_in(tmp_path / "out")


@pytest.mark.parametrize("page", [[], ["--page"]])
def test_an_adapter_of_another_base_is_refused(page, split, tmp_path, capsys):
    wider = SamSplitModel(SamSplitConfig(vision_config={"hidden_size": 48, "num_hidden_layers": 2, "image_size": 64}))
    trained(wider, tmp_path / "adapter", r=2, target_modules=["q", "v"])
    capsys.readouterr()
    assert run(split, tmp_path / "out", "--adapter", tmp_path / "adapter", *page) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not fit the base" in line
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_channels_that_no_client_feeds_are_refused(tmp_path, capsys):
    SamSplitModel(
        SamSplitConfig(vision_config={"hidden_size": 48, "num_hidden_layers": 1, "image_size": 64, "num_channels": 5})
    ).save_pretrained(tmp_path / "five")
    capsys.readouterr()
    assert run(tmp_path / "five", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "takes images of 5 channels, and clients of the exported graphs feed 3" in line
    assert [path.name for path in tmp_path.iterdir()] == ["five"]


def test_int8_is_not_made_of_float16(split, tmp_path, capsys):
    assert run(split, tmp_path / "out", "--dtype", "float16", "--quantize", "int8") == 2
    assert "int8 is made of float32" in capsys.readouterr().err


@pytest.mark.parametrize("options", [("--opset", "5"), ("--opset", "new"), ("--dtype", "fp16"), ("--quantize", "4")])
def test_a_wrong_option_is_named(options, split, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(split, tmp_path / "out", *options)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"sam-split: error: argument {options[0]}: ")
    assert nothing_in(tmp_path)


def test_a_missing_package_is_named(split, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run(split, tmp_path / "out") == 2
    assert 'pip install "sam-split[onnx]"' in capsys.readouterr().err


@pytest.mark.parametrize("page", [[], pytest.param(["--page"], marks=pytest.mark.night)])
def test_ctrl_c_in_the_middle_leaves_nothing(page, split, tmp_path):
    process = command(split, tmp_path / "out", *page)
    while not list(tmp_path.rglob("vision_encoder.onnx")):  # the next graph is in the making
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=600)
    assert (process.returncode, printed) == (130, "")
    assert errors == "sam-split: error: interrupted; nothing was written\n"
    assert nothing_in(tmp_path)


def in_a_full_disk(largest, split, out, *options):
    """The exit code of the command in a child, where writing past so many bytes fails as on a full disk."""

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
        os._exit(run(split, out, *options))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize("page", [[], ["--page"]])
@pytest.mark.parametrize("file", ["a graph", "weights of a graph", "the rest"])
def test_a_full_disk_leaves_nothing(file, page, split, exported, tmp_path, capfd, monkeypatch):
    """With a page, the rest is the page's own files; without one, the configs and the card."""
    largest, out = 20_000, tmp_path / "out"
    if file == "the rest":
        largest = 12_000 if page else 1_000
        monkeypatch.setattr(onnx_export, "compare", lambda *_: [])
        monkeypatch.setattr(onnx_export, "_write", lambda graph, path, *rest: path.write_bytes(b"small"))
    else:
        monkeypatch.setattr(onnx_export, "_trace", lambda *_: traced(exported, "vision_encoder"))
    if file == "weights of a graph":
        monkeypatch.setattr(onnx_export, "MAX_BYTES", 0)
    assert in_a_full_disk(largest, split, out, *page) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"sam-split: error: [Errno 27] File too large: '{out}'"
    assert nothing_in(tmp_path)


def test_graphs_of_another_model_do_not_appear(split, exported, tmp_path, capsys, monkeypatch):
    """The adapted model's graphs in the place of the base's."""
    monkeypatch.setattr(onnx_export, "_write", graphs_of(exported))
    assert run(split, tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "not the same model: image embedding: differs by" in printed.err
    assert "FAIL  image embedding" in printed.out
    assert nothing_in(tmp_path)
