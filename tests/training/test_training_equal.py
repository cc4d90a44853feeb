"""However a batch of eight is cut up, training takes the same steps: accumulated, checkpointed, in two processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import IMAGE_SIZE, boxes, draw, pixels, split_model, stock_model, tiny_config
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments

from sam_split.training import boxes_around, drop_prefix, prefix_hidden_states

ROOT = Path(__file__).parents[2]


def examples():
    """Eight images with two objects each: with the same number of prompts everywhere, means of means agree."""
    images = draw(8, 3, IMAGE_SIZE, IMAGE_SIZE, seed=1)
    labels = torch.zeros(8, 2, IMAGE_SIZE, IMAGE_SIZE)
    for i in range(8):
        labels[i, 0, 10 + i : 50, 8 : 40 + i] = 1
        labels[i, 1, 40 : 90 - i, 30 + i : 80] = 1
    names = "pixel_values", "input_boxes", "labels"
    return [dict(zip(names, item, strict=True)) for item in zip(images, boxes_around(labels), labels, strict=True)]


def train(folder: Path, batch: int, **options):
    """Three steps of eight images; the adapter, and the model as it was and as it is."""
    torch.manual_seed(0)
    model = get_peft_model(split_model(stock_model()), LoraConfig(r=4, target_modules=["q", "v"]))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        max_steps=3,
        learning_rate=0.1,
        optim="sgd",
        max_grad_norm=0.0,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        ddp_find_unused_parameters=False,
        **options,
    )
    Trainer(model, arguments, train_dataset=examples()).train()
    return before, model.state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(tmp_path_factory.mktemp("whole"), batch=8)


def assert_same_steps(whole, after):
    before, expected = whole
    for name, tensor in expected.items():
        if "lora_" in name:
            moved = (tensor - before[name]).abs().max()
            assert moved > 0, f"{name} did not move"
            assert (after[name] - tensor).abs().max() <= 1e-4 * moved, name
        else:
            assert torch.equal(tensor, before[name]), f"{name} is of the base and moved"
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize(
    "options",
    [
        {"batch": 4, "gradient_accumulation_steps": 2},
        {"batch": 2, "gradient_accumulation_steps": 4},
        {"batch": 8, "gradient_checkpointing": True},
    ],
    ids=["2x4", "4x2", "checkpointed"],
)
def test_one_process(whole, tmp_path, options):
    assert_same_steps(whole, train(tmp_path, **options)[1])


@pytest.mark.slow
def test_two_processes(whole, tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    launch = "torch.distributed.run", "--standalone", "--nproc-per-node=2"
    command = [sys.executable, "-m", *launch, __file__, str(tmp_path)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        assert_same_steps(whole, torch.load(tmp_path / f"{rank}.pt"))


def test_cached_prefix_saves_its_layers():
    """Counted in operations, whatever the machine: a step without the prefix lacks exactly its work."""
    config = LoraConfig(r=4, target_modules=r".*layers\.3\.attn\.(q|v)")
    whole, cut = (split_model(stock_model(tiny_config(num_hidden_layers=4))) for _ in range(2))
    with FlopCounterMode(display=False) as prefix:
        tokens = prefix_hidden_states(cut, pixels(), 3)
    counts = []
    for model, inputs in ((whole, pixels()), (drop_prefix(cut, 3), tokens)):
        model = get_peft_model(model, config)
        with FlopCounterMode(display=False) as counter:
            model(pixel_values=inputs, **boxes()).pred_masks.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] - counts[1] == prefix.get_total_flops() > 0


if __name__ == "__main__":
    state = train(Path(sys.argv[1]), batch=4)[1]
    torch.save(state, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
