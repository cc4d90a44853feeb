"""A whole run: a base and images in; an adapter with its card, results and overlays out.

data ──> examples ──> batches ──> Trainer ──> adapter ──> evaluation before and after
           └─ of a frozen encoder: what it computes, once ─┘
"""

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    EarlyStoppingCallback,
    TrainingArguments,
    enable_full_determinism,
    set_seed,
)
from transformers.integrations import get_reporting_integration_callbacks

from ..configuration_sam_split import SamSplitConfig
from .collator import SamSplitCollator
from .data import find_examples
from .evaluation import evaluate, input_size
from .prefix import CachedImages, drop_prefix
from .presets import frozen_layers, lora_config
from .report import about, replacing_folder, write_results
from .settings import Settings
from .trainer import PromptTrainer, SaveEvery


def finetune(
    base: str | Path, data: str | Path, out: str | Path, settings: Settings | None = None
) -> dict[str, Any] | None:
    """Train an adapter, and write it with its results to a folder.

    Args:
        base: a SamSplit folder or Hub id.
        data: as for `find_examples`.
        out: a folder to make, or with `settings.resume` to go on with.
        settings: `Settings`.

    Returns:
        The results, as `results.json` has them; None in all processes but the main one.

    Raises:
        ValueError, OSError: for what cannot be used; nothing is written then.
        TrainingDiverged: if a loss is not finite.
    """
    settings, out = settings or Settings(), Path(out)
    trained = fit(base, data, out, settings)
    return None if trained is None else measure(base, out, settings, **trained)


def fit(base, data, out, settings):
    """What `finetune` does before it measures: `out/adapter`.

    Returns:
        What `measure` needs beside the same arguments; None in all processes but the main one.
    """
    _check_out(out, settings.resume)
    size = _check_base(base, settings.revision)
    _check_trackers(settings.report_to)
    processor = AutoProcessor.from_pretrained(base, revision=settings.revision)
    examples = read_examples(data, settings, size)
    model = AutoModel.from_pretrained(base, revision=settings.revision)
    frozen = frozen_layers(settings.preset, model, settings.late_layers)
    config = lora_config(settings.preset, model, settings.rank, settings.late_layers)
    out.mkdir(parents=True, exist_ok=True)
    arguments = training_arguments(out, settings)
    datasets, collate = examples, SamSplitCollator(processor)
    if frozen:
        model.to(arguments.device).eval()
        folder = settings.cache or out / "cache"
        with arguments.main_process_first():
            show = not settings.quiet
            datasets = [CachedImages(part, collate, model, frozen, folder, show) for part in examples]
        drop_prefix(model, frozen)
        collate = CachedImages.collate
    costs = train(model, config, datasets, collate, arguments, settings, out / "adapter")
    if costs is None:
        return None
    return {
        "processor": processor,
        "examples": examples[1],
        "results": {**about(base, data, out, settings, examples), **costs},
        "cached": datasets[1] if frozen else None,
    }


def train(model, config, datasets, collate, arguments, settings, adapter):
    """Train an adapter of a model and write it to the folder `adapter`.

    Args:
        model: whose images are those of `datasets`: whole, or without its frozen first layers.
        config: PEFT's.
        datasets: to train on and to test on after each epoch.
        collate: makes a batch of their examples.
        arguments: from `training_arguments`.

    Returns:
        What it took, in the main process; None in the others, which are done.
    """
    set_seed(settings.seed)  # the adapter's own start
    model = get_peft_model(model, config)
    trainer = PromptTrainer(
        model,
        arguments,
        data_collator=_with_names(collate),
        train_dataset=datasets[0],
        eval_dataset=datasets[1],
        callbacks=_callbacks(settings),
        prompts={name: getattr(settings, name) for name in ("prompts", "corrections", "background", "objects")},
        focal=settings.focal,
    )
    checkpoint = last_checkpoint(arguments.output_dir) if settings.resume else None
    start, cpu = time.perf_counter(), time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    steps = trainer.state.global_step - (int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    if not trainer.is_world_process_zero():
        return None
    with replacing_folder(adapter) as partial:
        model.save_pretrained(partial)
    return {
        "processes": arguments.world_size,
        "steps": trainer.state.global_step,
        "seconds_per_step": round((time.perf_counter() - start) / max(1, steps), 3),
        "cpu_seconds_per_step": round((time.process_time() - cpu) / max(1, steps), 3),  # the same beside other work
        "peak_gib": round(_peak_bytes(arguments.device) / 2**30, 2),
        "trainable": model.get_nb_trainable_parameters()[0],
    }


def measure(base, out, settings, processor, examples, results, cached=None):
    """Evaluate base and adapter on examples, `cached` or not, and complete `out` and the results."""
    model = AutoModel.from_pretrained(base, revision=settings.revision)
    if cached is not None:
        drop_prefix(model, cached.layers)
    model = PeftModel.from_pretrained(model, out / "adapter")
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    options = {"everything": settings.everything, "progress": not settings.quiet, "cached": cached}
    with model.disable_adapter():
        before = evaluate(model, processor, examples, **options)
    after = evaluate(model, processor, examples, **options)
    return write_results(out, results, examples, {"before": before, "after": after})


def _check_out(out, resume):
    if (out / "results.json").exists() and not resume:
        raise ValueError(f"{out} holds a finished run; name another OUT, or go on with --resume")
    if (out / "checkpoints").exists() and not resume:
        raise ValueError(f"{out} holds an unfinished run; name another OUT, or go on with --resume")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder for OUT")


def _check_base(base, revision):
    """(height, width) of its input."""
    if Path(base).is_dir() and not (Path(base) / "config.json").is_file():
        raise ValueError(f"{base} is neither a model's folder nor a Hub id that can be read: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(base, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{base} is neither a model's folder nor a Hub id that can be read: {reason}") from error
    kind = config.model_type
    if kind != SamSplitConfig.model_type:
        raise ValueError(f"{base} is a {kind!r} model; `sam-split convert {base} NEW` makes a SamSplit folder")
    return input_size(config)


def _check_trackers(names):
    """Each starts, or raise before anything is written."""
    for name in names:
        try:
            for callback in get_reporting_integration_callbacks([name]):
                callback()
        except (ValueError, RuntimeError, AssertionError, ImportError) as error:
            raise ValueError(f"--report-to {name}: {error}") from error


def read_examples(data, settings, size=None):
    """Those to train on and those to test on, each with a pixel at least in an input of `size`, (height, width)."""
    columns = settings.split, settings.image_column, settings.mask_column
    found = find_examples(data, *columns).usable(settings.skip_bad, size)
    if settings.val is None:
        return found.held_out(settings.holdout, settings.seed)
    return found, find_examples(settings.val, *columns).usable(settings.skip_bad, size)


def training_arguments(out, settings):
    """transformers' arguments of a run. Where asked for, torch is deterministic from here on."""
    if settings.deterministic:
        enable_full_determinism(settings.seed)
    return TrainingArguments(
        output_dir=str(out / "checkpoints"),
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        gradient_checkpointing=settings.checkpointing,
        learning_rate=settings.lr,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        bf16=settings.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or Trainer refuses bf16 there
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        restore_callback_states_from_checkpoint=True,  # how long the IoU has not risen
        metric_for_best_model="iou",
        logging_steps=10,
        logging_nan_inf_filter=False,  # PromptTrainer stops there
        label_names=["labels"],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # no buffer changes, and the image was encoded before DDP's forward
        disable_tqdm=settings.quiet,
        report_to=list(settings.report_to),
    )


def _callbacks(settings):
    callbacks = []
    if settings.patience:
        callbacks.append(EarlyStoppingCallback(settings.patience))
    if settings.save_steps:
        callbacks.append(SaveEvery(settings.save_steps))
    return callbacks


def last_checkpoint(folder):
    """The last checkpoint that was written to its end, or None."""

    def whole(path):
        try:
            return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))  # what is written last
        except (OSError, ValueError):
            return None

    found = [path for path in Path(folder).glob("checkpoint-*") if whole(path)]
    return max(found, key=lambda path: int(path.name.split("-")[1]), default=None)


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
