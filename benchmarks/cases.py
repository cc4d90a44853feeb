"""What is measured: the models, the cases, the peers of each and the targets. No torch here: this is read first."""

import re
from dataclasses import dataclass

# Fields of transformers' SamVisionConfig. The last one checks the benchmarks themselves, see --quick.
MODELS = {
    "vit_b": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "global_attn_indexes": [2, 5, 8, 11],
    },
    "vit_l": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "global_attn_indexes": [5, 11, 17, 23],
    },
    "vit_h": {
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "global_attn_indexes": [7, 15, 23, 31],
    },
    "tiny": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "global_attn_indexes": [1],
    },
}

TITLES = {
    "ours": "**SamSplit**",
    "ours_checkpointed": "**SamSplit, checkpointed**",
    "ours_compiled": "**SamSplit, torch.compile**",
    "ours_in_stock_pipeline": "SamSplit in transformers' pipeline",
    "ours_narrow": "SamSplit, values not widened",
    "ours_equal": "SamSplit, values as wide as keys (Flash)",
    "ours_cudnn": "SamSplit, keys of 192, values of 128 (cuDNN)",
    "stock_sdpa": "transformers, sdpa",
    "stock_sdpa_checkpointed": "transformers, sdpa, checkpointed",
    "stock_sdpa_compiled": "transformers, sdpa, torch.compile",
    "stock_eager": "transformers, eager",
    "meta": "segment-anything (Meta)",
    "timm": "timm samvit",
    "from_transformers": "from a transformers folder",
    "from_meta": "from Meta's .pth",
}

# Every ratio is a peer's figure beside this one's.
REFERENCE = "stock_sdpa"


@dataclass(frozen=True)
class Case:
    """One thing to measure, the same for all its peers.

    Args:
        name: what `--only` is matched against; unique in a run.
        task: a method of `benchmarks.tasks.Tasks`.
        title: for the report.
        peers: keys of `TITLES`, in the order in which they take turns.
        model: a key of `MODELS`.
        dtype: "float32" or "bfloat16".
        size: side of the square image in pixels.
        batch: images.
        prompts: prompts per image; in everything-mode a square number, the points of its grid.
        image_rows: in everything-mode, the height of the image before it is resized, a key of `everything.SIZES`.
        memory_only: one round is enough, since memory does not scatter.
    """

    name: str
    task: str
    title: str
    peers: tuple[str, ...]
    model: str
    dtype: str
    size: int = 1024
    batch: int = 1
    prompts: int = 1
    image_rows: int = 480
    memory_only: bool = False


def cases(
    models: list[str], dtypes: list[str], batches: list[int], compiled: bool = False, paddings: bool = False
) -> list[Case]:
    """All cases, the shortest first, so that a stopped run has the most to show.

    Args:
        compiled: with the peers under torch.compile.
        paddings: with a peer for each way to widen keys and values for CUDA's kernels.
    """
    extra = ("ours_compiled", "stock_sdpa_compiled") * compiled
    extra += ("ours_narrow", "ours_equal", "ours_cudnn") * paddings
    found = []
    for model in models:
        for dtype in dtypes:
            for batch in batches:
                found += _cases(model, dtype, batch, first=batch == batches[0], extra=extra)
    return found


def _cases(model: str, dtype: str, batch: int, first: bool, extra: tuple[str, ...]) -> list[Case]:
    everyone = ("ours", "stock_sdpa", "stock_eager", "meta")
    label = f"{model} {dtype}"
    title = f"{model.replace('vit_', 'ViT-').replace('b', 'B').replace('l', 'L').replace('h', 'H')}, {dtype}"
    if model == "tiny":
        title = f"tiny, {dtype}"
    size = 1024 if model != "tiny" else 256
    common = {"model": model, "dtype": dtype, "size": size}
    found = []
    if first and dtype == "float32":  # neither depends on the dtype of the computation or on the batch
        found += [
            Case(f"load {label}", "load", f"from_pretrained, {title}", ("ours", REFERENCE), **common),
            Case(f"convert {label}", "convert", f"convert, {title}", ("from_transformers", "from_meta"), **common),
        ]
    if first:
        found += [
            Case(
                f"decoder-{prompts} {label}",
                "decoder",
                f"Prompt encoder and mask decoder, {prompts} prompt{'s' * (prompts > 1)}, {title}",
                everyone,
                prompts=prompts,
                memory_only=prompts == 256,  # four times as long as 64, at the same rate
                **common,
            )
            for prompts in (1, 64, 256)
        ]
    found += [
        Case(
            f"encoder-b{batch} {label}",
            "encoder",
            f"Image encoder, forward, batch {batch}, {title}",
            (*everyone, "timm", *extra),
            batch=batch,
            **common,
        ),
        Case(
            f"lora-b{batch} {label}",
            "lora_step",
            f"LoRA training step, r=16, batch {batch}, {title}",
            ("ours", REFERENCE, "ours_checkpointed", "stock_sdpa_checkpointed", "stock_eager", *extra),
            batch=batch,
            **common,
        ),
    ]
    if first and dtype == "float32":
        peers = ("ours", REFERENCE, "ours_in_stock_pipeline", "meta")
        points = (16, 64) if model == "tiny" else (144, 1024)
        found += [
            Case(
                f"everything-{count}{suffix} {label}",
                "everything",
                f"Segment everything, {count} points, image of {image}, {title}",
                peers if rows == 480 else peers[:2],
                prompts=count,
                image_rows=rows,
                memory_only=count > 144,
                **common,
            )
            for count, rows, image, suffix in (
                (points[0], 480, "640 x 480", ""),
                (points[1], 480, "640 x 480", ""),
                (points[1], 3000, "12 MP", "-12mp"),
            )
        ]
    if first:
        found += [
            Case(
                f"encoder-{other} {label}",
                "encoder",
                f"Image encoder, forward, {other} pixels, {title}",
                ("ours", REFERENCE),
                memory_only=True,
                **{**common, "size": other},
            )
            for other in (size // 2, size * 3 // 2)
        ]
    return found


@dataclass(frozen=True)
class Target:
    """A figure that the report follows over all runs, and what it must reach, if anything.

    `figure` is one of `Run.ratios`: `faster` and `share` of at least `limit` are wanted, memory of at most `limit`.
    """

    title: str
    case: str
    figure: str
    limit: float | None = None
    stretch: float | None = None
    peer: str = "ours"
    against: str = REFERENCE
    devices: str = "cpu|cuda"
    dtypes: str = "float32|bfloat16"

    @property
    def more_is_better(self) -> bool:
        return self.figure in ("faster", "share")

    def applies(self, name: str, device: str) -> bool:
        """Whether a case is the one that the target is about."""
        part, model, dtype = name.split()
        return (
            model == "vit_b"
            and re.fullmatch(self.devices, device) is not None
            and re.fullmatch(self.dtypes, dtype) is not None
            and re.fullmatch(self.case, part) is not None
        )

    def met(self, values: list[float]) -> str:
        """What the least favourable of the values reaches."""
        if self.limit is None:
            return "-"
        worst = min(values) if self.more_is_better else -max(values)
        sign = 1 if self.more_is_better else -1
        return "stretch" if worst >= sign * self.stretch else "yes" if worst >= sign * self.limit else "**no**"


# What holds everywhere comes first: memory, and the share of the machine's best matrix product.
TARGETS = [
    Target("image encoder, added memory", "encoder-b1", "added", 0.17, 0.10, devices="cpu"),
    Target("LoRA step, peak memory", "lora-b1", "peak", 0.42, 0.30, devices="cpu"),
    Target("LoRA step checkpointed, peak memory", "lora-b1", "peak", 0.25, 0.20, "ours_checkpointed", devices="cpu"),
    Target("64 prompts, added memory", "decoder-64", "added", devices="cpu"),
    Target("256 prompts, added memory", "decoder-256", "added", 0.05, 0.02, devices="cpu"),
    Target("image encoder, share of the best matrix product", "encoder-b1", "share", dtypes="float32"),
    Target("LoRA step, share of the best matrix product", "lora-b1", "share", dtypes="float32"),
    Target("image encoder, times as fast", "encoder-b1", "faster", 1.35, 2.1, devices="cpu", dtypes="float32"),
    Target(
        "image encoder, times as fast as Meta's", "encoder-b1", "faster", 1.0, 1.0, against="meta", dtypes="float32"
    ),
    Target(
        "image encoder, times as fast as timm's", "encoder-b1", "faster", 1.0, 1.0, against="timm", dtypes="float32"
    ),
    Target("LoRA step, times as fast", "lora-b1", "faster", 1.7, 2.5, devices="cpu", dtypes="float32"),
    Target(
        "LoRA step checkpointed, times as fast",
        "lora-b1",
        "faster",
        peer="ours_checkpointed",
        devices="cpu",
        dtypes="float32",
    ),
    Target("64 prompts, times as fast", "decoder-64", "faster", 2.2, 4.0, devices="cpu", dtypes="float32"),
    Target("everything-mode, 144 points, added memory", "everything-144", "added", 0.12, 0.08, devices="cpu"),
    Target("everything-mode, 144 points, times as fast", "everything-144", "faster", 2.22, 2.86, devices="cpu"),
    Target(
        "everything-mode, 144 points, times as fast as Meta's",
        "everything-144",
        "faster",
        3.03,
        4.0,
        against="meta",
        devices="cpu",
    ),
    Target("everything-mode, 1,024 points, added memory", "everything-1024", "added", 0.12, 0.08, devices="cpu"),
    Target("everything-mode, 1,024 points, times as fast", "everything-1024", "faster", 2.78, 4.0, devices="cpu"),
    Target("256 prompts, times as fast", "decoder-256", "faster", devices="cpu", dtypes="float32"),
    Target("LoRA step, peak memory", "lora-b.", "peak", 0.35, 0.35, devices="cuda"),
    Target("LoRA step, times as fast", "lora-b.", "faster", 1.25, 1.25, devices="cuda"),
    Target("image encoder, times as fast", "encoder-b8", "faster", 1.3, 1.3, devices="cuda", dtypes="bfloat16"),
]
