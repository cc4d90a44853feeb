"""A whole run: a base and images in; an adapter with its card, results and overlays out."""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModel, AutoProcessor, EarlyStoppingCallback, TrainingArguments

from ..configuration_sam_split import SamSplitConfig
from .collator import SamSplitCollator
from .data import find_examples
from .prefix import CachedImages, drop_prefix
from .presets import frozen_layers, lora_config
from .report import draw_overlays, save_adapter, table
from .trainer import PromptTrainer


def finetune(
    base,
    data,
    out,
    *,
    preset="encoder",
    val=None,
    holdout=0.2,
    revision=None,
    split="train",
    image_column="image",
    mask_column="mask",
    skip_bad=False,
    rank=16,
    late_layers=3,
    cache=None,
    epochs=10,
    steps=-1,
    batch=2,
    accumulate=1,
    lr=1e-3,
    prompts="mixed",
    corrections=1,
    background=4,
    objects=8,
    patience=0,
    checkpointing=False,
    bf16=False,
    seed=0,
    resume=False,
):
    """Train an adapter, and write it with its results to a folder.

    The options are those of `sam-split finetune`, which explains them.

    Args:
        base: a SamSplit folder or Hub id.
        data: as for `find_examples`.
        out: a folder to make, or with `resume` to go on with.

    Returns:
        The results, as `results.json` has them.

    Raises:
        ValueError, OSError: for what cannot be used; nothing is written then.
        TrainingDiverged: if a loss is not finite.
    """
    out = Path(out)
    _check_out(out, resume)
    _check_base(base, revision)
    collate = SamSplitCollator(AutoProcessor.from_pretrained(base, revision=revision))
    found, held_out = (
        find_examples(source, split, image_column, mask_column).usable(skip_bad) if source else None
        for source in (data, val)
    )
    if not val:
        found, held_out = found.held_out(holdout, seed)
    model = AutoModel.from_pretrained(base, revision=revision)
    config, frozen = lora_config(preset, model, rank, late_layers), frozen_layers(preset, model, late_layers)
    out.mkdir(parents=True, exist_ok=True)
    arguments = TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=epochs,
        max_steps=steps,
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        gradient_checkpointing=checkpointing,
        learning_rate=lr,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or Trainer refuses bf16 there
        seed=seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="iou",
        logging_steps=10,
        logging_nan_inf_filter=False,  # PromptTrainer stops there
        label_names=["labels"],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no buffer changes, and the image was encoded before DDP's forward
        report_to=[],
    )
    train_data, eval_data, collator = found, held_out, _with_names(collate)
    if frozen:
        model.to(arguments.device).eval()
        with arguments.main_process_first():
            train_data, eval_data = (
                CachedImages(examples, collate, model, frozen, cache or out / "cache")
                for examples in (found, held_out)
            )
        drop_prefix(model, frozen)
        collator = _with_names(CachedImages.collate)
    torch.manual_seed(seed)  # the adapter's own start
    model = get_peft_model(model, config)
    trainer = PromptTrainer(
        model,
        arguments,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data,
        callbacks=[EarlyStoppingCallback(patience)] if patience else [],
        prompts={"prompts": prompts, "corrections": corrections, "background": background, "objects": objects},
    )
    with model.disable_adapter():
        before = trainer.evaluate()
    start, done = time.perf_counter(), 0
    if resume:
        done = max((int(path.name.split("-")[1]) for path in out.glob("checkpoints/checkpoint-*")), default=0)
    trainer.train(resume_from_checkpoint=bool(done))
    seconds = (time.perf_counter() - start) / max(1, trainer.state.global_step - done)
    after = trainer.evaluate()
    row = {
        "preset": preset,
        "IoU before": round(before["eval_iou"], 4),
        "IoU after": round(after["eval_iou"], 4),
        "trainable": model.get_nb_trainable_parameters()[0],
        "peak GiB": round(_peak_bytes(arguments.device) / 2**30, 2),
        "s/step": round(seconds, 3),
    }
    if trainer.is_world_process_zero():
        save_adapter(model, out / "adapter", row)
        model.eval()
        draw_overlays(model, held_out, eval_data, collate, collator, out / "overlays.png")
        (out / "results.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        print(table([row]))
    return row


def _check_out(out, resume):
    if (out / "results.json").exists() and not resume:
        raise ValueError(f"{out} holds a finished run; name another OUT, or go on with --resume")
    if (out / "checkpoints").exists() and not resume:
        raise ValueError(f"{out} holds an unfinished run; name another OUT, or go on with --resume")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for OUT")


def _check_base(base, revision):
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ValueError(f"{base} is neither a model's folder nor a Hub id that can be read: it has no config.json")
    try:
        kind = AutoConfig.from_pretrained(base, revision=revision).model_type
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{base} is neither a model's folder nor a Hub id that can be read: {reason}") from error
    if kind != SamSplitConfig.model_type:
        raise ValueError(f"{base} is a {kind!r} model; `sam-split convert {base} NEW` makes a SamSplit folder")


def _with_names(collate):
    def with_names(examples):
        return {**collate(examples), "names": [example["name"] for example in examples]}

    return with_names


def _peak_bytes(device):
    """The most memory in use so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used
