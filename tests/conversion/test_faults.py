"""Whatever happens during a conversion, OUT is whole or absent, and nothing that was there is touched."""

import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from checkpoint_files import FILES, assert_same, stock_state
from models import meta_model, stock_model
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from conversion import checkpoints, convert, fuse, split_state_dict, writing
from conversion.cli import main

# Forked children start at once, with torch imported; none of them uses its thread pool.
fork = multiprocessing.get_context("fork")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stock")
    stock_model().save_pretrained(folder)
    convert(folder, tmp_path_factory.mktemp("warm") / "out", progress=False)  # imports all that a child needs
    return folder


@pytest.fixture(scope="module")
def expected():
    return split_state_dict(stock_state(stock_model()))


def assert_whole(out, expected):
    assert {path.name for path in out.iterdir()} == FILES
    assert_same(load_file(out / "model.safetensors"), expected)


def command(name, *paths):
    return [name, *map(str, paths), "--quiet"]


def in_child(argv):
    """Run the command line in a forked child; its exit code becomes the child's."""

    def child():
        signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background inherit that it is ignored
        os._exit(main(argv))

    process = fork.Process(target=child)
    process.start()
    return process


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link"])
def test_an_existing_out_is_never_touched(kind, stock_folder, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "file":
        out.write_text("mine")
    elif kind == "dangling link":
        out.symlink_to("nowhere")
    else:
        out.mkdir()
        if kind == "folder":
            (out / "mine").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for argv in (command("convert", stock_folder, out), [*command("fuse", stock_folder, out), "--format", "meta"]):
        assert main(argv) == 2
        assert f"{out} exists already; nothing is overwritten" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_missing_parent_is_named(stock_folder, tmp_path, capsys):
    assert main(command("convert", stock_folder, tmp_path / "no" / "out")) == 2
    assert f"{tmp_path / 'no'} is not a folder; make it first" in capsys.readouterr().err


def test_a_read_only_parent_gets_one_line(stock_folder, tmp_path, capsys, monkeypatch):
    if os.geteuid() == 0:  # root writes where it likes, so the system's answer is played
        monkeypatch.setattr("pathlib.Path.mkdir", lambda path: os.mkdir(f"/proc/{path.name}"))
    else:
        tmp_path.chmod(0o500)
    assert main(command("convert", stock_folder, tmp_path / "out")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("sam-split: error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["split", "meta"])
def test_a_full_disk_leaves_nothing(format, stock_folder, tmp_path, capfd):
    """No file may grow past 100 kB; writing past it fails as on a full disk."""
    convert(stock_folder, tmp_path / "split", progress=False)
    argv = command("convert", stock_folder, tmp_path / "out")
    if format == "meta":
        argv = [*command("fuse", tmp_path / "split", tmp_path / "out"), "--format", "meta"]

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        os._exit(main(argv))

    process = fork.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 2
    out = tmp_path / "out"
    assert capfd.readouterr().err.splitlines()[-1] == f"sam-split: error: [Errno 27] File too large: '{out}'"
    assert [path.name for path in tmp_path.iterdir()] == ["split"]


@pytest.fixture
def lock_of_this_process():
    """tqdm's own lock is shared with forked children: one that is killed while it holds the lock would stop us."""
    before = tqdm.get_lock()
    tqdm.set_lock(threading.RLock())
    yield
    tqdm.set_lock(before)


@pytest.mark.usefixtures("lock_of_this_process")
@pytest.mark.slow
@pytest.mark.parametrize("format", ["split", "meta"])
def test_killed_at_any_moment_it_leaves_no_out_or_a_whole_one(format, stock_folder, expected, tmp_path):
    convert(stock_folder, tmp_path / "split", progress=False)
    source = tmp_path / "split" if format == "meta" else stock_folder
    draw, outcomes = random.Random(0), []
    for number in range(50 if format == "split" else 10):
        out = tmp_path / f"out{number}"
        argv = command("convert", source, out)
        if format == "meta":
            argv = [*command("fuse", source, out), "--format", "meta"]
        started = time.monotonic()
        process = in_child(argv)
        if number == 0:
            process.join()  # how long it takes when nothing happens
            duration = time.monotonic() - started
        else:
            time.sleep(draw.uniform(0, 1.1 * duration))
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        outcomes.append(out.exists())
        if not out.exists():
            assert main(argv) == 0  # what the killed run left behind does not hinder
        if format == "split":
            assert_whole(out, expected)
        else:
            assert len(torch.load(out, weights_only=True)) == len(torch.load(tmp_path / "out0", weights_only=True))
    assert not all(outcomes)  # some were killed in time


def test_what_a_killed_run_left_is_pointed_out(stock_folder, tmp_path, capsys):
    (tmp_path / ".out.0123abcd.partial").mkdir()
    assert main(command("convert", stock_folder, tmp_path / "out")) == 0
    assert ".out.0123abcd.partial is left from a conversion that was killed" in capsys.readouterr().err


def test_ctrl_c_leaves_nothing(stock_folder, tmp_path, monkeypatch, capfd):
    """Sent when the weights are written and the rest is not."""
    reached = fork.Event()
    monkeypatch.setattr(checkpoints, "write_code_and_card", lambda *args, **options: (reached.set(), time.sleep(60)))
    process = in_child(command("convert", stock_folder, tmp_path / "out"))
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert process.exitcode == 130
    assert list(tmp_path.iterdir()) == []
    assert "sam-split: error: interrupted; nothing was written" in capfd.readouterr().err


def test_two_conversions_to_one_out_make_one_whole_folder(stock_folder, expected, tmp_path):
    codes = []
    for number in range(10):
        out = tmp_path / f"out{number}"
        processes = [in_child(command("convert", stock_folder, out)) for _ in range(2)]
        for process in processes:
            process.join()
        codes.append(sorted(process.exitcode for process in processes))
        assert_whole(out, expected)
    assert codes == [[0, 2]] * 10
    assert not list(tmp_path.glob(".*.partial"))


def test_two_fusions_to_one_pth_make_one_whole_file(stock_folder, tmp_path):
    convert(stock_folder, tmp_path / "split", progress=False)
    for number in range(5):
        out = tmp_path / f"out{number}.pth"
        processes = [in_child([*command("fuse", tmp_path / "split", out), "--format", "meta"]) for _ in range(2)]
        for process in processes:
            process.join()
        assert sorted(process.exitcode for process in processes) == [0, 2]
        assert torch.load(out, weights_only=True)


def test_the_name_is_taken_while_converting(stock_folder, tmp_path, monkeypatch, capsys):
    """The last check and the rename: what another program puts there in the meantime stays."""
    out = tmp_path / "out"

    def write_and_take(*args, **kwargs):
        out.mkdir()
        (out / "theirs").write_text("theirs")

    monkeypatch.setattr("conversion.checkpoints.write_code_and_card", write_and_take)
    assert main(command("convert", stock_folder, out)) == 2
    assert "exists already" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["theirs"]
    assert list(tmp_path.iterdir()) == [out]


def test_a_bit_that_flips_on_its_way_to_the_disk_is_noticed(stock_folder, tmp_path, monkeypatch, capsys):
    def save_and_flip(state, path, **options):
        save_file(state, path, **options)
        content = path.read_bytes()
        at = content.index(state["mask_decoder.iou_token.weight"].numpy().tobytes())
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    monkeypatch.setattr(writing, "save_file", save_and_flip)
    assert main(command("convert", stock_folder, tmp_path / "out")) == 2
    assert "'mask_decoder.iou_token.weight' was read back with other bits" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_bit_that_flips_on_its_way_into_a_pth_is_noticed(stock_folder, tmp_path, monkeypatch, capsys):
    convert(stock_folder, tmp_path / "split", progress=False)
    save = torch.save

    def flip_and_save(state, file):
        flipped = state["mask_decoder.iou_token.weight"].clone()
        flipped.view(torch.int32)[0, 0] ^= 1
        save({**state, "mask_decoder.iou_token.weight": flipped}, file)

    monkeypatch.setattr("torch.save", flip_and_save)
    assert main([*command("fuse", tmp_path / "split", tmp_path / "out.pth"), "--format", "meta"]) == 2
    assert "'mask_decoder.iou_token.weight' was read back with other bits" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["split"]


@pytest.mark.slow
def test_the_whole_command_from_a_shell(stock_folder, expected, tmp_path):
    argv = [sys.executable, "-m", "conversion", *command("convert", stock_folder, tmp_path / "out")]
    run = subprocess.run(argv, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")
    assert_whole(tmp_path / "out", expected)
    run = subprocess.run(argv, capture_output=True, text=True)
    assert run.returncode == 2
    assert run.stderr.startswith("sam-split: error: ")
    assert "Traceback" not in run.stderr


def test_meta_and_stock_can_be_fused_from_a_read_only_source(tmp_path):
    torch.save(meta_model().state_dict(), tmp_path / "meta.pth")
    (tmp_path / "meta.pth").chmod(0o400)
    before = (tmp_path / "meta.pth").read_bytes()
    convert(tmp_path / "meta.pth", tmp_path / "split", progress=False)
    fuse(tmp_path / "split", tmp_path / "again.pth", format="meta", progress=False)
    assert (tmp_path / "meta.pth").read_bytes() == before
