"""`sam-split finetune` can be left alone: reproducible, resumed as if never stopped, and no checkpoint lost."""

import hashlib
import json
import platform
import resource
import shlex

import pytest
import torch
import transformers
from training_data import image_folder
from transformers.integrations import integration_utils

import sam_split.modeling_sam_split as modeling
from conversion.cli import main
from sam_split.training import find_examples
from sam_split.training.finetuning import last_checkpoint
from sam_split.training.trainer import PromptTrainer

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
    loss = modeling.segmentation_loss

    def spoilt(self, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(modeling, "segmentation_loss", lambda *given: loss(*given) * torch.nan)
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


def test_nothing_is_encoded_twice(base, data, tmp_path, monkeypatch):
    """Once in a step, with corrections; once in an evaluation, for all prompts; not at all where it is frozen."""
    encoded = []

    def forward(self, *args, **options):
        encoded.append(len(self.layers) if hasattr(self.layers[0], "attn") else 0)
        return encode(self, *args, **options)

    encode = modeling.SamSplitVisionEncoder.forward
    monkeypatch.setattr(modeling.SamSplitVisionEncoder, "forward", forward)
    options = "--epochs", "1", "--corrections", "3"
    assert run(base, data, tmp_path / "encoder", *options) == 0
    # Four steps, one batch of two images held out, and at the end each of these before and after.
    assert encoded == [4] * (4 + 1 + 2 * 2)
    encoded.clear()
    assert run(base, data, tmp_path / "decoder", *options, "--preset", "decoder") == 0
    assert encoded == [0] * (4 + 1) + [4] * (2 * 2)


def test_trackers_of_transformers(base, data, tmp_path, monkeypatch):
    logged = []

    class Tracker(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **others):
            logged.append(logs)

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "mine", Tracker)
    assert run(base, data, tmp_path, "--epochs", "1", "--report-to", "mine") == 0
    assert any("eval_iou_1_click" in logs for logs in logged)
