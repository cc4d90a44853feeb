"""`sam-split finetune` can be left alone: reproducible, resumed as if never stopped, and no checkpoint lost."""

import hashlib
import json
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from training_data import image_folder

import sam_split.modeling_sam_split as modeling
import sam_split.training.trainer as trainer
from conversion.cli import main
from sam_split.training import find_examples
from sam_split.training.finetuning import last_checkpoint
from sam_split.training.trainer import PromptTrainer

ROOT = Path(__file__).parents[2]
QUICK = ["--batch", "2", "--objects", "3", "--lr", "5e-3", "--rank", "4", "--no-everything", "--quiet"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Eight images to train on, four steps an epoch, and two held out."""
    return image_folder(tmp_path_factory.mktemp("images") / "data", 10)


def run(base, data, out, *options):
    return main(["finetune", str(base), str(data), str(out), *QUICK, *options])


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory):
    """A run that nothing disturbs: two epochs of four steps."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(base, data, out, "--epochs", "2") == 0
    return out


def adapter_hash(out):
    return hashlib.sha256((out / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


class Killed(Exception):
    pass


def at_step(number, action):
    """`compute_loss` that does something else when that many steps have been done."""
    step = PromptTrainer.compute_loss

    def compute_loss(self, *args, **options):
        return (action if self.state.global_step == number else step)(self, *args, **options)

    return compute_loss


def die(*args, **options):
    raise Killed


@pytest.mark.parametrize(("killed_at", "options"), [(5, []), (7, ["--save-steps", "3"])], ids=["epoch", "middle"])
def test_resumed_equals_uninterrupted(base, data, whole, tmp_path, monkeypatch, killed_at, options):
    options = ["--epochs", "2", *options]
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "compute_loss", at_step(killed_at, die))
        with pytest.raises(Killed):
            run(base, data, tmp_path, *options)
    assert last_checkpoint(tmp_path / "checkpoints").name == f"checkpoint-{6 if options[2:] else 4}"
    assert run(base, data, tmp_path, *options, "--resume") == 0
    assert adapter_hash(tmp_path) == adapter_hash(whole)


@pytest.mark.parametrize("name", ["SIGKILL", pytest.param("SIGTERM", marks=pytest.mark.night), "SIGINT"])
def test_stopped_by_a_signal_and_resumed(base, data, whole, tmp_path, name):
    """At whatever moment of whatever step it comes."""
    number = signal.Signals[name]
    options = ["--epochs", "2", "--save-steps", "1"]
    code = "import signal, sys; signal.signal(2, signal.default_int_handler); "  # tests in the background ignore it
    code += "from conversion.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "finetune", str(base), str(data), str(tmp_path / "out")]
    with (tmp_path / "printed").open("w") as file:  # bars of transformers 5.0 would fill a pipe that nobody reads
        process = subprocess.Popen([*command, *QUICK, *options], cwd=ROOT, stderr=file)
    while process.poll() is None and not (tmp_path / "out" / "checkpoints" / "checkpoint-3").exists():
        time.sleep(0.01)
    process.send_signal(number)
    process.wait()
    printed = (tmp_path / "printed").read_text()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "the same command with --resume goes on" in printed
    else:
        assert process.returncode == -number, printed
    assert not (tmp_path / "out" / "adapter").exists(), "it was in the middle"
    assert run(base, data, tmp_path / "out", *options, "--resume") == 0
    assert adapter_hash(tmp_path / "out") == adapter_hash(whole)


def test_deterministic(base, data, tmp_path, monkeypatch):
    """Two runs give the same bytes, by torch's deterministic algorithms; another seed gives others."""
    seen = []

    def noted(self, *args, **options):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *args, **options)

    step = PromptTrainer.compute_loss
    monkeypatch.setattr(PromptTrainer, "compute_loss", noted)
    hashes = []
    try:
        for seed in ("0", "0", "1"):
            out = tmp_path / str(len(hashes))
            assert run(base, data, out, "--steps", "3", "--deterministic", "--seed", seed) == 0
            hashes.append(adapter_hash(out))
    finally:
        torch.use_deterministic_algorithms(False)
    assert hashes[0] == hashes[1] != hashes[2]
    assert seen == [True] * 9


def test_what_it_takes_to_run_again(base, data, whole, tmp_path):
    """The results' own command line gives the same adapter; card and results have seed, versions, digests."""
    results = json.loads((whole / "results.json").read_text())
    command = shlex.split(results["command"])
    assert command[:5] == ["sam-split", "finetune", str(base), str(data), str(whole)]
    assert main([*command[1:4], str(tmp_path / "again"), *command[5:]]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert adapter_hash(whole) == adapter_hash(tmp_path / "again")
    assert again["data"] == results["data"]
    assert again["after"] == results["after"]
    assert results["versions"]["transformers"] == transformers.__version__
    assert results["versions"]["python"] == platform.python_version()
    card = (whole / "adapter" / "README.md").read_text()
    for said in (results["command"], results["data"]["train"]["digest"], "seed 0", f"torch {torch.__version__}"):
        assert said in card
    assert results["weights"] == adapter_hash(whole), "whoever trains on sees that the figures are of other weights"
    assert adapter_hash(whole) in card


def test_digest_is_of_names_images_and_masks(tmp_path):
    def digest(folder):
        return find_examples(folder).usable().digest()

    folder = image_folder(tmp_path / "a", 2)
    before = digest(folder)
    assert digest(image_folder(tmp_path / "b", 2)) == before, "wherever the folder is"
    mask, other = folder / "masks" / "1.png", folder / "masks" / "0.png"
    kept = mask.read_bytes()
    mask.write_bytes(other.read_bytes())
    assert digest(folder) != before
    mask.write_bytes(kept)
    assert digest(folder) == before
    for kind in ("images", "masks"):
        (folder / kind / "1.png").rename(folder / kind / "2.png")
    assert digest(folder) != before


def test_loss_that_is_not_finite_stops(base, data, whole, tmp_path, monkeypatch, capsys):
    """With step, images and advice; the last checkpoint stays, and the run can go on from it."""
    loss = trainer.segmentation_loss

    def spoilt(self, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(trainer, "segmentation_loss", lambda *given, **more: loss(*given, **more) * torch.nan)
            return step(self, *args, **options)

    step = PromptTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(PromptTrainer, "compute_loss", at_step(5, spoilt))
        assert run(base, data, tmp_path, "--epochs", "2") == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sam-split: error: ")]
    assert "the loss of step 6 is nan, with " in line
    names = line.partition("with ")[2].partition(";")[0].split(", ")
    assert len(names) == 2
    assert set(names) <= set(find_examples(data).names)
    assert "lower --lr" in line
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    assert run(base, data, tmp_path, "--epochs", "2", "--resume") == 0
    assert adapter_hash(tmp_path) == adapter_hash(whole)


def test_rate_that_is_too_high_stops(base, data, tmp_path, capsys):
    assert run(base, data, tmp_path, "--lr", "1e30") == 1
    assert "of step 2 is " in capsys.readouterr().err
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("written", ["model", "optimizer"])
def test_full_disk_loses_no_finished_checkpoint(base, data, whole, tmp_path, monkeypatch, capsys, written):
    """The system refuses to write more than some bytes to a file in the second checkpoint."""
    allowed = {"model": 1000, "optimizer": 40_000}[written]  # the adapter has 27 kB, the optimizer's state 63 kB

    def full(self, *args, **options):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.state.global_step == 8:
            resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, limits[1]))
        try:
            return save(self, *args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    save = transformers.Trainer._save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", full)
        assert run(base, data, tmp_path, "--epochs", "2") == 2
    assert "checkpoint-8 could not be written: " in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-4"]
    assert run(base, data, tmp_path, "--epochs", "2", "--resume") == 0
    assert adapter_hash(tmp_path) == adapter_hash(whole)


def test_cut_checkpoint_is_not_taken(base, data, whole, tmp_path, monkeypatch):
    """A process that was killed while it wrote one goes on from the one before."""
    assert run(base, data, tmp_path, "--epochs", "2", "--resume") == 0, "where there is none, it starts"
    (tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json").write_text('{"epoch": 2.0,')
    (tmp_path / "checkpoints" / "checkpoint-8" / "optimizer.pt").unlink()
    assert last_checkpoint(tmp_path / "checkpoints").name == "checkpoint-4"
    assert run(base, data, tmp_path, "--epochs", "2", "--resume") == 0
    assert adapter_hash(tmp_path) == adapter_hash(whole)


@pytest.mark.parametrize(
    ("preset", "again"),
    [
        # Four batches of two in a step each, one held out after the epoch, and two images before and after.
        ("encoder", [2] * (4 + 1) + [1] * 2 * 2),
        ("late", []),
        ("decoder", []),
    ],
)
def test_nothing_is_encoded_twice(base, data, tmp_path, monkeypatch, preset, again):
    """Once in a step, with corrections; once in an evaluation, with everything-mode; and where it is frozen, once."""
    encoded = []

    def forward(self, pixel_values):
        encoded.append(len(pixel_values))
        return embed(self, pixel_values)

    embed = modeling.SamSplitPatchEmbeddings.forward
    monkeypatch.setattr(modeling.SamSplitPatchEmbeddings, "forward", forward)
    quick = [option for option in QUICK if option != "--no-everything"]
    options = ["--epochs", "1", "--corrections", "3", "--preset", preset]
    assert main(["finetune", str(base), str(data), str(tmp_path), *quick, *options]) == 0
    frozen = [] if preset == "encoder" else [1] * 10
    assert encoded == frozen + again


def test_tensorboard_gets_what_is_measured(base, data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(base, data, tmp_path, "--epochs", "2", "--report-to", "tensorboard") == 0
    (events,) = (tmp_path / "checkpoints" / "runs").glob("*/events.*")
    written = EventAccumulator(str(events)).Reload()
    state = json.loads((tmp_path / "checkpoints" / "checkpoint-8" / "trainer_state.json").read_text())
    for name in ("iou", "iou_box", "iou_1_click", "iou_3_clicks"):
        expected = [(logs["step"], logs[f"eval_{name}"]) for logs in state["log_history"] if f"eval_{name}" in logs]
        found = [(event.step, event.value) for event in written.Scalars(f"eval/{name}")]
        assert [step for step, _ in found] == [4, 8]
        assert found == [(step, pytest.approx(value)) for step, value in expected]
