"""transformers' Trainer with prompts made from labels, which stops where a loss is not finite."""

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..modeling_sam_split import segmentation_loss
from .prompts import training_prompts
from .scores import score_prompts


class TrainingDiverged(ArithmeticError):
    """A loss or a gradient is not finite: to go on would only spoil the weights."""


class PromptTrainer(Trainer):
    """Trainer that prompts each step by `training_prompts`, and evaluates by `score_prompts`.

    A batch needs `pixel_values` and `labels`, and may have `names` of its images for messages. Each image is encoded
    once: the prompts are simulated on its embedding, and the step goes on from there. Mixed prompts ask twice,
    from boxes and from clicks: the mask decoder costs little beside the image encoder.

    The prompts of a batch depend on the seed and on the number of the batch, and not on what was sampled before. So a
    resumed run samples what an uninterrupted one would, and two processes what one would that accumulates two batches.

    Args:
        prompts: options of `training_prompts`.
        focal: weight of the focal loss, see `segmentation_loss`. Predicted IoUs learn the median, by absolute errors.
    """

    def __init__(self, *args, prompts=None, focal=0.0, **options):
        options = {"compute_metrics": mean_ious, **options}
        super().__init__(*args, **options)
        self.prompts, self.focal = {"prompts": "mixed", **(prompts or {})}, focal
        self.batches: tuple[int, int, list[str]] = (-1, 0, [])  # a step, its batches so far, names of their images
        self.add_callback(_FiniteGradients(self))
        quiet = self.args.disable_tqdm
        self.remove_callback(PrinterCallback if quiet else ProgressCallback)
        if not quiet:
            self.add_callback(Progress())

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inner = self.accelerator.unwrap_model(model)
        generator = self._generator(inputs)
        with self.accelerator.autocast():
            embeddings = inner.get_image_embeddings(inputs["pixel_values"])
        kind, losses = self.prompts["prompts"], []
        for first in ("box", "points") if kind == "mixed" else (kind,):
            options = {**self.prompts, "prompts": first, "generator": generator}
            with self.accelerator.autocast():
                prompts, labels = training_prompts(inner, embeddings.detach(), inputs["labels"], **options)
            outputs = model(image_embeddings=embeddings, **prompts)
            losses.append(segmentation_loss(outputs.pred_masks, outputs.iou_scores, labels, self.focal, iou_power=1))
        loss = torch.stack(losses).mean()
        self.check_finite(loss, "loss")
        return (loss, outputs) if return_outputs else loss

    def _generator(self, inputs):
        """That of this batch: the i-th of process r of W is batch i * W + r of the step."""
        step, number, names = self.batches
        if step != self.state.global_step:
            step, number, names = self.state.global_step, 0, []
        self.batches = (step, number + 1, [*names, *inputs.get("names", [])])
        batch = number * self.accelerator.num_processes + self.accelerator.process_index
        (seed,) = np.random.SeedSequence([self.args.seed, step, batch]).generate_state(1)
        return torch.Generator(inputs["labels"].device).manual_seed(int(seed))

    def check_finite(self, value, what):
        """Raise TrainingDiverged unless a scalar is finite."""
        if not torch.isfinite(value):
            step, _, names = self.batches
            among = f", with {', '.join(map(str, names))}" if names else ""
            raise TrainingDiverged(
                f"the {what} of step {step + 1} is {float(value)}{among}; lower --lr, leave out --bf16, look at these "
                "images and their masks. The last checkpoint stays"
            )

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        inner = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.accelerator.autocast():
            embeddings = inner.get_image_embeddings(inputs["pixel_values"])
            scores = score_prompts(inner, embeddings, inputs["labels"])
        ious = torch.stack([true for true, _ in scores.values()], dim=-1)  # (B, P, 3)
        ious = ious.float().nan_to_num(-100)  # what Trainer fills up with as well
        return None, ious, ious

    def _save_checkpoint(self, *args, **options):
        """As Trainer's, but what could not be written to its end does not stay."""
        try:
            super()._save_checkpoint(*args, **options)
        except Exception as error:  # safetensors, torch and Python each have their own for a full disk
            folder = Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")
            shutil.rmtree(folder, ignore_errors=True)
            raise OSError(
                f"{folder} could not be written: {error}; those before it stay: free space, and go on with --resume"
            ) from error


class _FiniteGradients(TrainerCallback):
    """Keeps a step from spoiling the weights."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        self.trainer.check_finite(torch.nn.utils.get_total_norm(gradients), "gradient")


class SaveEvery(TrainerCallback):
    """A checkpoint every few steps, beside those at the end of each epoch."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **others):
        if state.global_step % self.steps == 0 and not state.epoch.is_integer():
            control.should_save = True


class Progress(ProgressCallback):
    """The bar with steps and time left, which also says the loss and the IoU so far."""

    def __init__(self):
        super().__init__()
        self.said = {}

    def on_log(self, args, state, control, logs=None, **others):
        if "loss" in logs:
            self._say(loss=logs["loss"])

    def on_evaluate(self, args, state, control, metrics=None, **others):
        super().on_evaluate(args, state, control, **others)
        self._say(IoU=metrics["eval_iou"])

    def _say(self, **numbers):
        self.said |= {name: f"{value:.3f}" for name, value in numbers.items()}
        if self.training_bar is not None:
            self.training_bar.set_postfix(self.said)


def mean_ious(prediction):
    """Means over all objects: from the box, from 1 click, from 3, and of these three."""
    scores = prediction.predictions.reshape(-1, 3)
    means = scores[scores[:, 0] >= 0].mean(0).tolist()
    names = "iou_box", "iou_1_click", "iou_3_clicks", "iou"
    return dict(zip(names, [*means, sum(means) / 3], strict=True))
