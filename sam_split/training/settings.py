"""The options of a run, and the command line that sets them."""

import dataclasses
import shlex


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `sam-split finetune`, whose --help explains them, with their defaults."""

    # data
    val: str | None = None
    holdout: float = 0.2
    split: str = "train"
    image_column: str = "image"
    mask_column: str = "mask"
    skip_bad: bool = False
    # adapter
    preset: str = "encoder+decoder"
    rank: int = 16
    late_layers: int = 3
    cache: str | None = None
    revision: str | None = None
    # prompts
    prompts: str = "mixed"
    corrections: int = 1
    background: int = 4
    objects: int = 8
    # training
    focal: float = 0.0
    epochs: float = 10
    steps: int | None = None
    batch: int = 2
    accumulate: int = 1
    lr: float = 1e-3
    patience: int = 0
    checkpointing: bool = False
    bf16: bool = False
    seed: int = 0
    deterministic: bool = False
    save_steps: int | None = None
    resume: bool = False
    # what is said of it
    everything: bool = True
    report_to: tuple[str, ...] = ()
    quiet: bool = False

    def command(self, base, data, out):
        """The words of the command line that sets these options."""
        words = ["sam-split", "finetune", str(base), str(data), str(out)]
        for field in dataclasses.fields(self):
            value, flag = getattr(self, field.name), field.name.replace("_", "-")
            if value == field.default:
                continue
            if isinstance(value, bool):
                words.append(f"--{flag}" if value else f"--no-{flag}")
            elif isinstance(value, tuple):
                words += [f"--{flag}", *value]
            else:
                whole = isinstance(value, float) and value.is_integer()  # `--epochs 4` is a float
                words.append(f"--{flag}={int(value) if whole else value}")
        return words

    def command_line(self, base, data, out):
        """The same as a line for a shell."""
        return shlex.join(self.command(base, data, out))
