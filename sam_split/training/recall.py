"""How many of the objects everything-mode finds: average recall, by pycocotools' COCOeval.

A mask is a dict as in COCO's annotations: `segmentation`, compressed run lengths, and their `area` and `bbox`; that of
a model also has its `score`, that of an object `void`, the run lengths of the pixels where nothing counts, if any.
"""

import contextlib

import numpy as np

from ..modeling_sam_split import VOID_LABEL

MASKS = 100  # of an image that are compared with its objects, those with the highest score


def object_entry(mask):
    """An object's mask (height, width), 0, 1 or void, as a dict."""
    from pycocotools import mask as run_lengths

    def encoded(pixels):
        lengths = run_lengths.encode(np.asfortranarray(pixels, np.uint8))
        return {**lengths, "counts": lengths["counts"].decode()}

    void = mask == VOID_LABEL
    return mask_entry(encoded(mask == 1), **({"void": encoded(void)} if void.any() else {}))


def mask_entry(segmentation, **more):
    """Run lengths as a dict, with what else is known of them."""
    from pycocotools import mask as run_lengths

    area, bbox = int(run_lengths.area(segmentation)), run_lengths.toBbox(segmentation).tolist()
    return {"segmentation": segmentation, "area": area, "bbox": bbox, **more}


def average_recall(objects, found):
    """Recall over IoU thresholds from 0.5 to 0.95, of an image's 100 masks with the highest score.

    Args:
        objects: a list of masks for each image.
        found: the same of what a model found, with scores.

    Returns:
        The average over thresholds and the recall at 0.5, of the objects of all images; and an array (images, 2) of
        the same for each image alone.

    Source: COCO's AR@100, without categories.
    """
    from pycocotools import mask as run_lengths
    from pycocotools.cocoeval import COCOeval

    found = [sorted(masks, key=lambda mask: -mask["score"])[:MASKS] for masks in found]

    class WithVoid(COCOeval):
        def computeIoU(self, image, category):
            """IoU (masks, objects), void left out of both."""
            ious = super().computeIoU(image, category)
            if not any("void" in mask for mask in objects[image]) or not found[image]:
                return ious
            nothing = run_lengths.encode(np.zeros(objects[image][0]["segmentation"]["size"], np.uint8, order="F"))
            void = [mask.get("void", nothing) for mask in objects[image]]
            masks = [mask["segmentation"] for mask in found[image]]
            areas = run_lengths.area(masks)[:, None].astype(float)
            union = (areas + [mask["area"] for mask in objects[image]]) / (1 + ious)
            # With a crowd, pycocotools divides what both share by the area of the mask.
            hidden = run_lengths.iou(masks, void, [1] * len(void)) * areas
            return np.round(ious * union) / np.round(union - hidden)

    with contextlib.redirect_stdout(None):
        evaluation = WithVoid(_coco(objects), _coco(found), "segm")
        evaluation.params.useCats, evaluation.params.maxDets = 0, [1, 10, MASKS]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    matches = [image["gtMatches"] > 0 for image in evaluation.evalImgs[: len(objects)]]  # (thresholds, objects)
    each = np.array([(match.mean(), match[0].mean()) for match in matches])
    return float(evaluation.stats[8]), float(evaluation.eval["recall"][0, 0, 0, -1]), each


def _coco(images):
    from pycocotools.coco import COCO

    coco, masks = COCO(), [(number, mask) for number, masks in enumerate(images) for mask in masks]
    coco.dataset = {
        "images": [
            {"id": number, **dict(zip(("height", "width"), masks[0]["segmentation"]["size"], strict=True))}
            for number, masks in enumerate(images)
            if masks
        ],
        "categories": [{"id": 1}],
        # An id of 0 would be no match.
        "annotations": [
            {**mask, "id": index, "image_id": number, "category_id": 1, "iscrowd": 0}
            for index, (number, mask) in enumerate(masks, start=1)
        ],
    }
    coco.createIndex()
    return coco
