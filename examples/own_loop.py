"""A training loop of your own, from the parts of `sam_split.training`: LoRA on the encoder's q and v and the decoder.

    python examples/own_loop.py BASE DATA OUT

BASE is what `sam-split convert` made, DATA as for `sam-split finetune`. OUT becomes a PEFT adapter.
"""

import sys

import torch
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModel, AutoProcessor

from sam_split import segmentation_loss
from sam_split.training import (
    SamSplitCollator,
    evaluate,
    evaluation_table,
    find_examples,
    lora_config,
    training_prompts,
)


def main(base, data, out, epochs=4, rate=3e-3):
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor, model = AutoProcessor.from_pretrained(base), AutoModel.from_pretrained(base)
    train, test = find_examples(data).usable().held_out(0.2)
    batches = DataLoader(train, batch_size=2, shuffle=True, collate_fn=SamSplitCollator(processor))
    model = get_peft_model(model, lora_config("encoder+decoder", model)).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for epoch in range(epochs):
        losses = []
        for batch in batches:
            # Encoded once: prompts are simulated on the embedding, and the loss's gradient goes through it.
            embeddings = model.get_image_embeddings(batch["pixel_values"].to(device))
            prompts, labels = training_prompts(model, embeddings.detach(), batch["labels"].to(device))
            outputs = model(image_embeddings=embeddings, **prompts)
            # `model(..., labels=labels).loss` has the focal loss as well, which softens edges.
            loss = segmentation_loss(outputs.pred_masks, outputs.iou_scores, labels, focal=0, iou_power=1)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}: loss {sum(losses) / len(losses):.3f}")
    with model.disable_adapter():
        before = evaluate(model, processor, test, everything=False)
    print(evaluation_table({"before": before, "after": evaluate(model, processor, test, everything=False)}))
    model.save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
