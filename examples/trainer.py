"""transformers' own Trainer on a SamSplit model: boxes around the masks as prompts, LoRA on q and v.

    python examples/trainer.py BASE DATA OUT

BASE is what `sam-split convert` made, DATA as for `sam-split finetune`. `sam_split.training.trainer.PromptTrainer`
takes clicks, corrections and background as well.
"""

import sys

from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoProcessor, Trainer, TrainingArguments

from sam_split.training import SamSplitCollator, find_examples


def main(base, data, out, epochs=4):
    train, test = find_examples(data).usable().held_out(0.2)
    model = AutoModel.from_pretrained(base)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"]))
    arguments = TrainingArguments(
        output_dir=out,
        num_train_epochs=epochs,
        learning_rate=3e-3,
        per_device_train_batch_size=2,
        eval_strategy="epoch",
        label_names=["labels"],  # or Trainer takes input_labels for labels as well
        remove_unused_columns=False,  # or it removes all that the collator needs
        report_to=[],
    )
    collate = SamSplitCollator(AutoProcessor.from_pretrained(base))  # masks give input_boxes and labels
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=train, eval_dataset=test)
    trainer.train()
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
