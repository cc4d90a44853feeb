"""Fine-tune a SamSplit model on your pictures: transformers' Trainer, a PEFT adapter, masks before and after.

    python examples/finetune_lora.py BASE DATA OUT --preset encoder

BASE is what `sam-split convert` made. DATA is one of

* a folder with `images/NAME.png` (or .jpg) and `masks/NAME.png`, 0 for background, another value per object;
* a folder with `images/` and COCO's `annotations.json` (polygons or RLE);
* a Hugging Face dataset, a saved one or its Hub id, with columns of pictures and of such masks.

Every object is prompted with the box around its mask, which training moves about as a person would, and with
`--corrections` by clicks on errors. OUT gets `adapter/` with its card, `results.json` and `overlays.png`; several
presets at a time run one after the other, each in OUT/PRESET, and end in one table. `torchrun` takes this
script as it is.
"""

import argparse
import hashlib
import json
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
from sam_split import SamSplitConfig  # importing it also makes AutoModel know the model
from sam_split.modeling_sam_split import VOID_LABEL, segmentation_loss
from sam_split.training import (
    SamSplitCollator,
    boxes_around,
    check_example,
    drop_prefix,
    iou_and_dice,
    jitter_boxes,
    prefix_hidden_states,
    simulate_prompts,
)

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


class Pictures(torch.utils.data.Dataset):
    """Pictures read when they are asked for.

    Args:
        readers: name -> a function that returns the picture and its masks (P, height, width).
        skip_bad: whether to take the next one in place of one that cannot be read or has no usable masks.
    """

    def __init__(self, readers, skip_bad):
        self.readers, self.skip_bad = list(readers.items()), skip_bad

    def __len__(self):
        return len(self.readers)

    def __getitem__(self, index):
        if index >= len(self):
            raise IndexError(index)
        for offset in range(len(self)):
            name, read = self.readers[(index + offset) % len(self)]
            try:
                image, masks = read()
                example = {"name": name, "image": image.convert("RGB"), "masks": masks}
                check_example(example, name)
                return example
            except (OSError, ValueError, SyntaxError) as error:  # PIL's three ways to refuse a file
                if not self.skip_bad:
                    raise ValueError(f"{name}: {error}; mend or remove it, or pass --skip-bad") from error
                print(f"skipped {name}: {error}", file=sys.stderr)
        raise ValueError("no picture can be read")


def objects(instances):
    """Masks (P, height, width) of a map in which 0 is background and every other value one object."""
    instances = np.asarray(instances)
    if instances.ndim != 2:
        raise ValueError(f"a mask must have one channel, got shape {instances.shape}; save it in mode L or I;16")
    values = np.unique(instances)
    return (instances == values[values > 0][:, None, None]).astype(np.int8)


def readers(source, args):
    """Name -> reader for each picture of a folder or a Hugging Face dataset."""
    folder = Path(source)
    if (folder / "annotations.json").is_file():
        from pycocotools.coco import COCO

        coco = COCO(folder / "annotations.json")

        def read_coco(image):
            annotations = coco.loadAnns(coco.getAnnIds(image["id"]))
            masks = [coco.annToMask(annotation) for annotation in annotations]
            empty = np.zeros((0, image["height"], image["width"]), np.int8)
            return Image.open(folder / "images" / image["file_name"]), np.stack(masks) if masks else empty

        return {image["file_name"]: lambda image=image: read_coco(image) for image in coco.dataset["images"]}
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
        data = datasets.load_dataset(source, split=args.split)
    elif list(folder.glob("dataset_*.json")):
        data = datasets.load_from_disk(str(folder))
        data = data[args.split] if isinstance(data, dict) else data
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
    """Two dicts of readers, the second with `share` of them, drawn by `seed`."""
    if len(found) < 2:
        raise ValueError(f"at least two pictures are needed, one of them to test on, got {len(found)}")
    names = list(found)
    order = np.random.default_rng(seed).permutation(len(names))
    held_out = {names[i] for i in order[: max(1, round(share * len(names)))]}
    return (
        {name: read for name, read in found.items() if name not in held_out},
        {name: read for name, read in found.items() if name in held_out},
    )


class CachedPictures(torch.utils.data.Dataset):
    """Pictures as the frozen layers left them, one file each, computed once and found again by later runs.

    A file is named by the hash of the layers' weights, the picture and its masks, so a change of any makes a new one.
    """

    def __init__(self, pictures, collate, model, layers, folder):
        folder.mkdir(parents=True, exist_ok=True)
        weights = hashlib.sha256()
        for name, tensor in sorted(model.vision_encoder.state_dict().items()):
            if not name.startswith("layers.") or int(name.split(".")[1]) < layers:
                weights.update(tensor.cpu().contiguous().view(torch.uint8).numpy())
        self.files = []
        for picture in pictures:
            batch = collate([picture])
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

    They are drawn in the step and not by the data loader, which runs ahead of the steps: so a resumed run draws what
    an uninterrupted one would.
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
    """At most `number` of each image's objects, drawn anew each time: (B, number, height, width)."""
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
    try:
        kind = AutoConfig.from_pretrained(args.base, revision=args.revision).model_type
    except OSError as error:
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
        found, held_out = readers(args.data, args), readers(args.val, args)
    else:
        found, held_out = split(readers(args.data, args), args.holdout, args.seed)
    pictures, held_out = Pictures(found, args.skip_bad), Pictures(held_out, args.skip_bad)
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
    torch.manual_seed(args.seed)  # the adapter's own start
    model, config, frozen = adapted(args)
    train_data, eval_data, collator = pictures, held_out, collate
    if frozen:
        model.to(training.device).eval()
        with training.main_process_first():
            train_data, eval_data = (
                CachedPictures(data, collate, model, frozen, args.cache or args.out / "cache")
                for data in (pictures, held_out)
            )
        drop_prefix(model, frozen)
        collator = CachedPictures.collate
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
    card.text = f"# SamSplit adapter\n\nMade by `examples/finetune_lora.py`, on held-out pictures:\n\n{table([row])}\n"
    card.save(folder / "README.md")


def table(rows):
    def shown(value):
        return f"{value:.3f}" if isinstance(value, float) else str(value)

    lines = [COLUMNS, ["---"] * len(COLUMNS), *([shown(row[column]) for column in COLUMNS] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@torch.no_grad()
def draw_overlays(model, pictures, examples, collate_pictures, collate_examples, path, number=4):
    """A row per held-out picture: masks before, after, and the truth."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    number = min(number, len(pictures))
    figure, axes = plt.subplots(number, 3, figsize=(9, 3 * number), squeeze=False)
    processor = collate_pictures.image_processor
    mean, deviation = (torch.tensor(value) for value in (processor.image_mean, processor.image_std))
    for row, index in zip(axes, range(number), strict=True):
        pixels = collate_pictures([pictures[index]])["pixel_values"][0].permute(1, 2, 0) * deviation + mean
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


def at_least_one(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def parse(arguments):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("base", help="a SamSplit folder or Hub id")
    parser.add_argument("data", help="a folder of pictures and masks, or a Hugging Face dataset")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["encoder"])
    parser.add_argument("--val", help="pictures to test on, in the form of DATA; left out, a part of DATA")
    parser.add_argument("--holdout", type=float, default=0.2, help="that part (%(default)s)")
    parser.add_argument("--revision", help="of the base on the Hub")
    parser.add_argument("--split", default="train", help="of a Hub dataset")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--mask-column", default="mask")
    parser.add_argument("--skip-bad", action="store_true", help="go on without pictures that cannot be used")
    parser.add_argument("--rank", type=at_least_one, default=16)
    parser.add_argument("--late-layers", type=int, default=3, help="layers that `late` trains (%(default)s)")
    parser.add_argument("--cache", type=Path, help="where `late` keeps what the other layers gave (OUT/cache)")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--steps", type=int, default=-1, help="instead of epochs")
    parser.add_argument("--batch", type=at_least_one, default=2)
    parser.add_argument("--accumulate", type=at_least_one, default=1)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--objects", type=at_least_one, default=8, help="of a picture in a step (%(default)s)")
    parser.add_argument("--corrections", type=int, default=0, help="rounds of correcting clicks, at most")
    parser.add_argument("--patience", type=int, default=0, help="epochs without gain after which to stop; 0: never")
    parser.add_argument("--checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="from OUT's last checkpoint")
    args = parser.parse_args(arguments)
    if not 0 < args.holdout < 1:
        parser.error(f"--holdout must be between 0 and 1, got {args.holdout}")
    return args


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse(arguments)
    if len(args.preset) == 1:
        try:
            if (args.out / "results.json").exists() and not args.resume:
                raise ValueError(f"{args.out} holds a finished run; name another OUT, or go on with --resume")
            args.out.mkdir(parents=True, exist_ok=True)
            train(args)
        except (ValueError, OSError) as error:  # a path or Hub id that is not there is the latter
            print(f"finetune_lora: error: {error}", file=sys.stderr)
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
