"""transformers' Trainer trains the model: accumulation, evaluation and checkpoints mean what they say."""

import pytest
import torch
from models import BATCH, IMAGE_SIZE, PROMPTS, draw, pixels, points, split_model, stock_model
from transformers import AutoModel, Trainer, TrainingArguments


@pytest.fixture(scope="module")
def examples():
    labels = (draw(BATCH, PROMPTS, IMAGE_SIZE, IMAGE_SIZE, seed=8) > 0).long()
    batch = {"pixel_values": pixels(), **points(1, 0), "labels": labels}
    return [{name: value[i] for name, value in batch.items()} for i in range(BATCH)]


def trainer(folder, examples, **options) -> Trainer:
    options = {"max_steps": 1, "learning_rate": 1e-3, "optim": "sgd", "lr_scheduler_type": "constant", **options}
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "logging_steps": 1, "label_names": ["labels"]}
    return Trainer(
        model=split_model(stock_model()),
        args=TrainingArguments(output_dir=str(folder), **quiet, **options),
        train_dataset=examples,
        eval_dataset=examples,
    )


def test_accumulated_batches_are_one_batch(tmp_path, examples):
    whole = trainer(tmp_path / "whole", examples, per_device_train_batch_size=2)
    parts = trainer(tmp_path / "parts", examples, per_device_train_batch_size=1, gradient_accumulation_steps=2)
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    losses = [run.train().training_loss for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    after = parts.model.state_dict()
    assert sum(not torch.equal(value, before[name]) for name, value in after.items()) > len(before) / 2
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(after[name], value, rtol=1e-4, atol=1e-6)


def test_evaluation_and_checkpoints(tmp_path, examples):
    run = trainer(tmp_path, examples, max_steps=2, save_steps=1, per_device_train_batch_size=2)
    run.train()
    with torch.no_grad():
        batch = {name: torch.stack([example[name] for example in examples]) for name in examples[0]}
        expected = run.model.eval()(**batch).loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)

    resumed = trainer(tmp_path, examples, max_steps=2, save_steps=1, per_device_train_batch_size=2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    loaded = AutoModel.from_pretrained(tmp_path / "checkpoint-2", trust_remote_code=True).state_dict()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(loaded[name], value, rtol=1e-5, atol=1e-7)
