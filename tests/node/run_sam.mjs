// Run an exported folder with transformers.js, a client that is not ours.
//
//   node run_sam.mjs FOLDER REQUESTS.json
//
// REQUESTS is {"image": {width, height, data}, "calls": {name: {input_points, input_labels}}}; the image is RGB, and
// points are in its pixels. Prints, for each call, scores, masks as logits, and their sizes, as JSON.
import { readFileSync } from "node:fs";
import { basename, dirname } from "node:path";
import { AutoProcessor, RawImage, SamModel, env } from "@huggingface/transformers";

const [folder, requests] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);

const { image, calls } = JSON.parse(readFileSync(requests));
const raw = new RawImage(Uint8ClampedArray.from(image.data), image.width, image.height, 3);
const model = await SamModel.from_pretrained(basename(folder));
const processor = await AutoProcessor.from_pretrained(basename(folder));

const results = {};
for (const [name, prompts] of Object.entries(calls)) {
  const inputs = await processor(raw, prompts);
  const { iou_scores, pred_masks } = await model(inputs);
  const masks = await processor.post_process_masks(pred_masks, inputs.original_sizes, inputs.reshaped_input_sizes);
  results[name] = {
    pixel_values: Array.from(inputs.pixel_values.data),
    scores: Array.from(iou_scores.data),
    logits: Array.from(pred_masks.data),
    shape: pred_masks.dims,
    masks: { shape: masks[0].dims, inside: Array.from(masks[0].data, Number) },
  };
}
process.stdout.write(JSON.stringify(results));
