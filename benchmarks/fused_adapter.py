"""`python -m benchmarks.fused_adapter`: what `sam-split finetune` does, with LoRA on stock SamModel's fused qkv.

The same data, prompts, loss, steps and evaluation: the adapter of qkv is carried over to q, k and v, exactly, and then
measured as any other. Its options are those of `sam-split finetune`, without `--preset`.
"""

import argparse
import shlex
import shutil
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig
from transformers import AutoProcessor, SamModel

from conversion import fuse
from conversion.adapters.transport import split_adapter
from conversion.cli import finetune
from sam_split import segmentation_loss
from sam_split.training import SamSplitCollator
from sam_split.training.finetuning import measure, read_examples, train, training_arguments
from sam_split.training.report import about

FUSED = r"vision_encoder\.layers\.\d+\.attn\.qkv"


class StockModel(SamModel):
    """SamModel with gradients through the image embedding, a mask for each prompt, and SamSplit's loss."""

    accepts_loss_kwargs = False

    def get_image_embeddings(self, pixel_values):
        return self.vision_encoder(pixel_values)[0]

    def forward(self, pixel_values=None, image_embeddings=None, input_masks=None, labels=None, **prompts):
        if input_masks is not None:  # stock takes one mask per image: each prompt becomes an image
            images, number = input_masks.shape[:2]
            multimask_output = prompts.pop("multimask_output")
            prompts = {name: value.flatten(0, 1)[:, None] for name, value in prompts.items() if value is not None}
            prompts |= {"multimask_output": multimask_output, "input_masks": input_masks.flatten(0, 1)}
            image_embeddings = image_embeddings.repeat_interleave(number, dim=0)
        output = super().forward(pixel_values, image_embeddings=image_embeddings, **prompts)
        if input_masks is not None:
            for name in ("pred_masks", "iou_scores"):
                output[name] = output[name][:, 0].unflatten(0, (images, number))
        if labels is not None:
            output["loss"] = segmentation_loss(output.pred_masks, output.iou_scores, labels)
        return output


def fit(base, data, out, settings):
    """As `sam_split.training.finetuning.fit`, with stock's model."""
    out.mkdir(parents=True)
    processor = AutoProcessor.from_pretrained(base)
    examples = read_examples(data, settings)
    with tempfile.TemporaryDirectory() as folder:
        fuse(base, Path(folder) / "stock", progress=False)
        model = StockModel.from_pretrained(Path(folder) / "stock")
    config = LoraConfig(r=settings.rank, lora_alpha=2 * settings.rank, target_modules=FUSED)
    arguments, collate = training_arguments(out, settings), SamSplitCollator(processor)
    costs = train(model, config, examples, collate, arguments, settings, out / "fused")
    split_adapter(out / "fused", out / "adapter", base=base)
    shutil.copy(out / "fused" / "README.md", out / "adapter")
    results = {**about(base, data, out, settings, examples), **costs}
    return {"processor": processor, "examples": examples[1], "results": results}


def main(words):
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    finetune.add_parser(parser.add_subparsers())
    args = parser.parse_args(["finetune", *words])
    settings = replace(finetune.settings_of(args, "encoder"), preset="fused")
    out = Path(args.out)
    trained = fit(args.base, args.data, out, settings)
    trained["results"]["command"] = shlex.join(["python", "-m", "benchmarks.fused_adapter", *words])
    measure(args.base, out, settings, **trained)


if __name__ == "__main__":
    main(sys.argv[1:])
