"""Fine-tune a SamSplit model on your images: transformers' Trainer, a PEFT adapter, masks before and after.

    python examples/finetune_lora.py BASE DATA OUT --preset encoder

BASE is what `sam-split convert` made. DATA is one of

* a folder with `images/NAME.png` (or .jpg) and `masks/NAME.png`, 0 for background, another value per object;
* a folder with `images/` and COCO's `annotations.json` (polygons or RLE);
* a Hugging Face dataset, a saved one or its Hub id, with columns of images and of such masks.

Images have 8 bits per channel. All are read once before training: one that cannot be used ends the run, or is left out
with `--skip-bad`. Every object is prompted with the box around its mask, with noise in training as a person's would
have, and with `--corrections` by clicks on errors.

OUT gets `adapter/` with its card, `results.json` and `overlays.png`. Several presets run one after the other, each in
OUT/PRESET, and end in one table. `torchrun` runs this script as it is.

The presets name what the adapter changes: `encoder` q and v of the image encoder, `decoder` the mask decoder's
attention and MLPs. `target_modules=["q_proj", "v_proj"]` of your own adapts the mask decoder alone, for the encoder's
layers are called q, k and v. `lora_dropout` (0 here) in the decoder's v_proj and out_proj acts on averages over the
image and on the few prompt tokens, not on image positions: its noise does not average out as in stock SamModel.
"""

import argparse
import contextlib
import hashlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    EarlyStoppingCallback,
    SamModel,
    Trainer,
    TrainingArguments,
)

from conversion import fuse
from sam_split import VOID_LABEL, SamSplitConfig, segmentation_loss  # which also makes AutoModel know the model
from sam_split.training import (
    SamSplitCollator,
    boxes_around,
    drop_prefix,
    iou_and_dice,
    jitter_boxes,
    prefix_hidden_states,
    simulate_prompts,
)
from sam_split.training.checks import check_example

DECODER = r"mask_decoder\.transformer\..*(q_proj|k_proj|v_proj|out_proj|lin1|lin2)"
PRESETS = {
    "encoder": r"vision_encoder\..*\.attn\.(q|v)",
    "encoder-qkv": r"vision_encoder\..*\.attn\.(q|k|v)",
    "fused": r"vision_encoder\..*\.attn\.qkv",  # stock SamModel, to compare with
    "late": r"vision_encoder\..*\.attn\.(q|v)",
    "decoder": DECODER,
    "encoder+decoder": rf"vision_encoder\..*\.attn\.(q|v)|{DECODER}",
}
COLUMNS = ["preset", "IoU before", "IoU after", "Dice before", "Dice after", "trainable", "peak GiB", "s/step"]


class Images(torch.utils.data.Dataset):
    """Examples read when they are asked for, from name -> a function that returns an image and its masks."""

    def __init__(self, readers):
        self.readers = list(readers.items())

    def __len__(self):
        return len(self.readers)

    def __getitem__(self, index):
        return read(*self.readers[index])


def read(name, reader):
    """A checked example.

    Raises:
        ValueError: naming the image, if it or its masks cannot be used.
    """
    try:
        image, masks = reader()
        example = {"name": name, "image": image, "masks": masks}
        check_example(example, name)
        image.load()  # PIL decodes a file when it is first used
    except (OSError, ValueError, TypeError, SyntaxError) as error:  # PIL has three ways to refuse a file
        raise ValueError(f"{name}: {error}; correct or remove it, or pass --skip-bad") from error
    return example


def usable(found, skip_bad):
    """The readers whose images can be used; the others raise ValueError, or are left out with `skip_bad`."""
    kept = {}
    for name, reader in found.items():
        try:
            read(name, reader)
            kept[name] = reader
        except ValueError as error:
            if not skip_bad:
                raise
            print(f"skipped {error}", file=sys.stderr)
    if not kept:
        raise ValueError("no image can be used")
    return kept


def objects(instances):
    """Masks (P, height, width) of a map in which 0 is background and every other value one object."""
    instances = np.asarray(instances)
    if instances.ndim != 2:
        raise ValueError(f"a mask must have one channel, got shape {instances.shape}; save it in mode L or I;16")
    values = np.unique(instances)
    return (instances == values[values > 0][:, None, None]).astype(np.int8)


def coco_readers(folder):
    from pycocotools.coco import COCO

    try:
        with contextlib.redirect_stdout(None):
            coco = COCO(folder / "annotations.json")
        images = {image["file_name"]: image["id"] for image in coco.dataset["images"]}
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{folder / 'annotations.json'} is not in COCO's format: {error!r}") from error

    def read_coco(name, number):
        image = Image.open(folder / "images" / name)
        try:
            masks = [coco.annToMask(annotation) for annotation in coco.loadAnns(coco.getAnnIds(number))]
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"its annotations are not in COCO's format: {error!r}") from error
        return image, np.stack(masks) if masks else np.zeros((0, image.height, image.width), np.int8)

    return {name: lambda name=name, number=number: read_coco(name, number) for name, number in images.items()}


def readers(source, args):
    """Name -> reader for each image of a folder or a Hugging Face dataset."""
    folder = Path(source)
    if (folder / "annotations.json").is_file():
        return coco_readers(folder)
    if (folder / "images").is_dir():
        found = {}
        for path in sorted((folder / "images").glob("[!.]*")):
            mask = folder / "masks" / f"{path.stem}.png"
            if not mask.is_file():
                raise ValueError(f"{path} has no mask {mask}")
            found[path.name] = lambda path=path, mask=mask: (Image.open(path), objects(Image.open(mask)))
        return found
    import datasets

    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or source.count("/") > 1:
            raise ValueError(
                f"{source} is not a folder; name a folder with images/ and masks/, or a dataset on the Hub"
            )
        try:
            data = datasets.load_dataset(source, split=args.split)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"{source} is neither a folder nor a dataset that the Hub gives: {reason}") from error
    elif list(folder.glob("dataset_*.json")):
        data = datasets.load_from_disk(str(folder))
        if isinstance(data, dict):
            if args.split not in data:
                raise ValueError(f"{source} has no split {args.split!r}; name one with --split: {', '.join(data)}")
            data = data[args.split]
    else:
        raise ValueError(
            f"{source} holds neither images/ and masks/, nor images/ and annotations.json, nor a saved dataset"
        )
    for column in (args.image_column, args.mask_column):
        if column not in data.column_names:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(data.column_names)}")

    def read_row(index):
        row = data[index]
        return row[args.image_column], objects(row[args.mask_column])

    return {f"row {index}": lambda index=index: read_row(index) for index in range(len(data))}


def split(found, share, seed):
    """Two dicts of readers, the second with `share` of them, sampled by `seed`."""
    if len(found) < 2:
        raise ValueError(f"at least two images are needed, one of them to test on, got {len(found)}")
    names = list(found)
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[i] for i in order[: max(1, round(share * len(names)))]}
    return (
        {name: read for name, read in found.items() if name not in held_out},
        {name: read for name, read in found.items() if name in held_out},
    )


class CachedImages(torch.utils.data.Dataset):
    """Images as the frozen layers left them, one file each, computed once and found again by later runs.

    A file is named by the hash of the layers' weights, the image and its masks, so a change of any makes a new one.
    """

    def __init__(self, images, collate, model, layers, folder):
        folder.mkdir(parents=True, exist_ok=True)
        weights = hashlib.sha256()
        for name, tensor in sorted(model.vision_encoder.state_dict().items()):
            if not name.startswith("layers.") or int(name.split(".")[1]) < layers:
                weights.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        self.files = []
        for image in images:
            batch = collate([image])
            key = weights.copy()
            key.update(
                str(layers).encode() + batch["pixel_values"].numpy().tobytes() + batch["labels"].numpy().tobytes()
            )
            self.files.append(folder / f"{key.hexdigest()[:32]}.safetensors")
            if not self.files[-1].exists():
                tokens = prefix_hidden_states(model, batch["pixel_values"].to(model.device), layers)
                partial = self.files[-1].with_suffix(".partial")
                save_file({"pixel_values": tokens[0].cpu().contiguous(), "labels": batch["labels"][0]}, partial)
                partial.rename(self.files[-1])

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        return load_file(self.files[index])

    @staticmethod
    def collate(examples):
        prompts = max(len(example["labels"]) for example in examples)
        labels = torch.full((len(examples), prompts, *examples[0]["labels"].shape[1:]), VOID_LABEL, dtype=torch.int8)
        for row, example in zip(labels, examples, strict=True):
            row[: len(example["labels"])] = example["labels"]
        return {"pixel_values": torch.stack([e["pixel_values"] for e in examples]), "labels": labels}


class PromptTrainer(Trainer):
    """Trainer that makes prompts from labels.

    They are sampled in the step and not by the data loader, which runs ahead of the steps: so a resumed run samples
    what an uninterrupted one would.
    """

    objects_per_image, corrections = 8, 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        pixels, labels = inputs["pixel_values"], inputs["labels"]
        prompts = {"input_boxes": boxes_around(labels), "multimask_output": False}
        if model.training:
            labels = some_objects(labels, self.objects_per_image)
            rounds = int(torch.randint(self.corrections + 1, ()))
            if rounds:
                inner = self.accelerator.unwrap_model(model)
                with torch.no_grad():
                    embeddings = inner.get_image_embeddings(pixels)
                prompts = simulate_prompts(inner, embeddings, labels, rounds, points_only=False)
            else:
                prompts["input_boxes"] = jitter_boxes(boxes_around(labels), labels.shape[-2:])
        if isinstance(self.accelerator.unwrap_model(model).get_base_model(), SamModel):  # stock has no loss
            outputs = model(pixel_values=pixels, **prompts)
            loss = segmentation_loss(outputs.pred_masks, outputs.iou_scores, labels)
        else:
            outputs = model(pixel_values=pixels, **prompts, labels=labels)
            loss = outputs.loss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        scores = torch.stack(iou_and_dice(outputs.pred_masks[:, :, 0], inputs["labels"]), -1)  # (B, P, 2)
        scores = scores.float().nan_to_num(-100)  # what Trainer fills up with as well
        return loss, scores, scores


def some_objects(labels, number):
    """At most `number` of each image's objects, sampled at each call: (B, number, height, width)."""
    if labels.shape[1] <= number:
        return labels
    real = (labels != VOID_LABEL).flatten(2).any(-1)
    chosen = (torch.rand(real.shape, device=labels.device) + real).topk(number).indices
    return labels[torch.arange(len(labels), device=labels.device)[:, None], chosen]


def mean_scores(prediction):
    scores = prediction.predictions.reshape(-1, 2)
    iou, dice = scores[scores[:, 0] >= 0].mean(0)
    return {"iou": float(iou), "dice": float(dice)}


def check_base(args):
    if Path(args.base).is_dir() and not (Path(args.base) / "config.json").is_file():
        raise ValueError(
            f"{args.base} is neither a model's folder nor a Hub id that can be read: it has no config.json"
        )
    try:
        kind = AutoConfig.from_pretrained(args.base, revision=args.revision).model_type
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{args.base} is neither a model's folder nor a Hub id that can be read: {reason}") from error
    if kind != SamSplitConfig.model_type:
        raise ValueError(
            f"{args.base} is a {kind!r} model; `sam-split convert {args.base} NEW` makes a SamSplit folder"
        )


def adapted(args):
    """The base with a fresh adapter, and how many of its layers stay frozen at the start."""
    if args.preset == ["fused"]:
        with tempfile.TemporaryDirectory() as folder:
            fuse(args.base, Path(folder) / "stock", progress=False)
            model = SamModel.from_pretrained(Path(folder) / "stock")
    else:
        model = AutoModel.from_pretrained(args.base, revision=args.revision)
    frozen = 0
    chosen = {}
    if args.preset == ["late"]:
        number = len(model.vision_encoder.layers)
        if not 0 < args.late_layers < number:
            raise ValueError(f"--late-layers must be from 1 to {number - 1}, got {args.late_layers}")
        frozen = number - args.late_layers
        last = "|".join(str(layer) for layer in range(frozen, number))
        chosen["target_modules"] = rf"vision_encoder\.layers\.({last})\.attn\.(q|v)"
    config = LoraConfig(
        **{"r": args.rank, "lora_alpha": 2 * args.rank, "target_modules": PRESETS[args.preset[0]], **chosen}
    )
    return model, config, frozen


def train(args):
    check_base(args)
    collate = SamSplitCollator(AutoProcessor.from_pretrained(args.base, revision=args.revision))
    if args.val:
        found, held_out = (usable(readers(data, args), args.skip_bad) for data in (args.data, args.val))
    else:
        found, held_out = split(usable(readers(args.data, args), args.skip_bad), args.holdout, args.seed)
    images, held_out = Images(found), Images(held_out)
    torch.manual_seed(args.seed)  # the adapter's own start
    model, config, frozen = adapted(args)
    args.out.mkdir(parents=True, exist_ok=True)
    training = TrainingArguments(
        output_dir=args.out / "checkpoints",
        num_train_epochs=args.epochs,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=args.batch,
        gradient_accumulation_steps=args.accumulate,
        gradient_checkpointing=args.checkpointing,
        learning_rate=args.lr,
        weight_decay=0.0,
        lr_scheduler_type="cosine",
        bf16=args.bf16,
        use_cpu=not torch.accelerator.is_available(),  # said aloud, or Trainer refuses bf16 there
        seed=args.seed,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="iou",
        logging_steps=10,
        label_names=["labels"],
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        report_to=[],
    )
    train_data, eval_data, collator = images, held_out, collate
    if frozen:
        model.to(training.device).eval()
        with training.main_process_first():
            train_data, eval_data = (
                CachedImages(data, collate, model, frozen, args.cache or args.out / "cache")
                for data in (images, held_out)
            )
        drop_prefix(model, frozen)
        collator = CachedImages.collate
    model = get_peft_model(model, config)
    callbacks = [EarlyStoppingCallback(args.patience)] if args.patience else []
    trainer = PromptTrainer(
        model,
        training,
        data_collator=collator,
        train_dataset=train_data,
        eval_dataset=eval_data,
        compute_metrics=mean_scores,
        callbacks=callbacks,
    )
    trainer.objects_per_image, trainer.corrections = args.objects, args.corrections
    with model.disable_adapter():
        before = trainer.evaluate()
    start, done = time.perf_counter(), 0
    if args.resume:
        done = max((int(path.name.split("-")[1]) for path in args.out.glob("checkpoints/checkpoint-*")), default=0)
    trainer.train(resume_from_checkpoint=bool(done))
    seconds = (time.perf_counter() - start) / max(1, trainer.state.global_step - done)
    after = trainer.evaluate()
    row = {
        "preset": args.preset[0],
        "IoU before": round(before["eval_iou"], 4),
        "IoU after": round(after["eval_iou"], 4),
        "Dice before": round(before["eval_dice"], 4),
        "Dice after": round(after["eval_dice"], 4),
        "trainable": model.get_nb_trainable_parameters()[0],
        "peak GiB": round(peak_bytes(training.device) / 2**30, 2),
        "s/step": round(seconds, 3),
    }
    if trainer.is_world_process_zero():
        (args.out / "results.json").write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
        save_adapter(model, args.out / "adapter", row)
        model.eval()
        draw_overlays(model, held_out, eval_data, collate, collator, args.out / "overlays.png")
        print(table([row]))


def peak_bytes(device):
    """The most memory in use so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def save_adapter(model, folder, row):
    """The adapter and PEFT's card of it, with the results."""
    model.save_pretrained(folder)
    card = ModelCard.load(folder / "README.md")
    card.text = f"# SamSplit adapter\n\nMade by `examples/finetune_lora.py`, on held-out images:\n\n{table([row])}\n"
    card.save(folder / "README.md")


def table(rows):
    def shown(value):
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [COLUMNS, ["---"] * len(COLUMNS), *([shown(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.no_grad()
def draw_overlays(model, images, examples, collate_images, collate_examples, path, number=4):
    """A row per held-out image: masks before, after, and the truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    number = min(number, len(images))
    figure, axes = plt.subplots(number, 3, figsize=(9, 3 * number), squeeze=False)
    processor = collate_images.image_processor
    mean, deviation = (torch.tensor(value) for value in (processor.image_mean, processor.image_std))
    for row, index in zip(axes, range(number), strict=True):
        pixels = collate_images([images[index]])["pixel_values"][0].permute(1, 2, 0) * deviation + mean
        batch = {name: value.to(model.device) for name, value in collate_examples([examples[index]]).items()}
        labels = batch["labels"]
        inputs = {"pixel_values": batch["pixel_values"], "input_boxes": boxes_around(labels)}
        after = model(**inputs, multimask_output=False).pred_masks[0, :, 0]
        with model.disable_adapter():
            before = model(**inputs, multimask_output=False).pred_masks[0, :, 0]
        for axis, name, masks in zip(
            row, ("before", "after", "truth"), (before > 0, after > 0, labels[0] == 1), strict=True
        ):
            masks = torch.nn.functional.interpolate(masks[None].float(), pixels.shape[:2])[0].cpu()
            axis.imshow(pixels.clamp(0, 1))
            for i, mask in enumerate(masks):
                shade = np.zeros((*mask.shape, 4))
                shade[mask > 0.5] = (*matplotlib.colormaps["tab10"](i % 10)[:3], 0.55)
                axis.imshow(shade)
            axis.set_title(name)
            axis.axis("off")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"finetune_lora: error: {message}; see --help\n")


def at_least(least, kind=int):
    """A parser of numbers."""

    def number(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:  # nor NaN
            whole = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {whole} of at least {least}, got {text}")
        return value

    return number


def parse(arguments):
    summary, _, details = __doc__.partition("\n")
    parser = Parser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("base", help="a SamSplit folder or Hub id")
    parser.add_argument("data", help="a folder of images and masks, or a Hugging Face dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["encoder"])
    parser.add_argument("--val", help="images to test on, in the form of DATA (default: a part of DATA)")
    parser.add_argument("--holdout", type=float, default=0.2, help="that part (%(default)s)")
    parser.add_argument("--revision", help="of the base on the Hub")
    parser.add_argument("--split", default="train", help="of a Hub dataset")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--mask-column", default="mask")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be used")
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--late-layers", type=at_least(1), default=3, help="layers that `late` trains (%(default)s)")
    parser.add_argument("--cache", type=Path, help="where `late` keeps the outputs of the frozen layers (OUT/cache)")
    parser.add_argument("--epochs", type=at_least(0, float), default=10)
    parser.add_argument("--steps", type=at_least(1), default=-1, help="instead of epochs")
    parser.add_argument("--batch", type=at_least(1), default=2)
    parser.add_argument("--accumulate", type=at_least(1), default=1)
    parser.add_argument("--lr", type=at_least(0, float), default=1e-3)
    parser.add_argument("--objects", type=at_least(1), default=8, help="of an image in a step (%(default)s)")
    parser.add_argument("--corrections", type=at_least(0), default=0, help="rounds of correcting clicks, at most")
    parser.add_argument(
        "--patience", type=at_least(0), default=0, help="stop after this many epochs without gain; 0: never"
    )
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--resume", action="store_true", help="from OUT's last checkpoint, if there is one")
    args = parser.parse_args(arguments)
    if not 0 < args.holdout < 1:
        parser.error(f"--holdout must be between 0 and 1, got {args.holdout}")
    if len(set(args.preset)) < len(args.preset):
        parser.error(f"--preset names one twice: {' '.join(args.preset)}")
    return args


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments)
    if len(args.preset) == 1:
        try:
            if (args.out / "results.json").exists() and not args.resume:
                raise ValueError(f"{args.out} holds a finished run; name another OUT, or go on with --resume")
            if (args.out / "checkpoints").exists() and not args.resume:
                raise ValueError(f"{args.out} holds an unfinished run; name another OUT, or go on with --resume")
            if args.out.exists() and not args.out.is_dir():
                raise ValueError(f"{args.out} is a file; name a folder for OUT")
            train(args)
        except (ValueError, OSError) as error:  # a path or Hub id that is not there is the latter
            print(f"finetune_lora: error: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
        return 0
    rows = []
    for preset in args.preset:  # each in a process of its own, or the memory of one would count for the next
        out = args.out / preset
        rest = [str(a) for a in arguments]
        rest[max(i for i, a in enumerate(rest) if Path(a) == args.out)] = str(out)
        at = rest.index("--preset")
        rest[at + 1 : at + 1 + len(args.preset)] = [preset]
        if code := subprocess.run([sys.executable, __file__, *rest]).returncode:
            return code  # it has said why
        rows.append(json.loads((out / "results.json").read_text(encoding="utf-8")))
    (args.out / "results.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
