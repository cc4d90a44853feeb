"""Images as rows: files in, masks or image embeddings out, for engines that compute a table's rows on many machines.

    table (path, bytes) ──> ImageRows ──> table (path, height, width, scores, boxes, areas, counts)
                                      └─> table (path, embedding)

A row depends on its image alone, whatever machine computes it and whatever else is in the table.
"""

import io

import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset
import torch
from PIL import Image

from sam_split.images_sam_split import pixels_of

from .errors import ConversionError
from .loading import image_processor, load_model, on_device, statistics_of

# Written out, because an image without a mask says nothing about the type of its lists.
MASKS = pa.schema(
    {
        "path": pa.string(),
        "height": pa.int32(),
        "width": pa.int32(),
        "scores": pa.list_(pa.float32()),
        "boxes": pa.list_(pa.list_(pa.int32(), 4)),
        "areas": pa.list_(pa.int64()),
        "counts": pa.list_(pa.string()),
    }
)


class ImageRows:
    """A model that is loaded once, and turns a table of files into a table of what it finds.

    Args:
        source: a checkpoint in any format.
        adapter: a PEFT adapter of it, or None.
        kind: "masks" or "embeddings".
        skip_bad: whether to leave out a file that cannot be read as an image.
        options: of `generate_masks`; `batch_size` is for embeddings too.
    """

    def __init__(self, source, adapter=None, kind: str = "masks", *, skip_bad: bool = False, **options):
        model, self.processor, _ = load_model(source, adapter)
        self.model = on_device(None, model)
        self.table = {"masks": self._masks, "embeddings": self._embeddings}[kind]
        self.skip_bad, self.options = skip_bad, options

    def __call__(self, files: pa.Table) -> pa.Table:
        """Rows of the files in `files`, in their order.

        Raises:
            ConversionError: for a file that cannot be read as an image.
        """
        paths, images = [], []
        for path, content in zip(files["path"].to_pylist(), files["bytes"].to_pylist(), strict=True):
            try:
                images.append(pixels_of(Image.open(io.BytesIO(content))))
                paths.append(path)
            except Exception as error:  # whatever a damaged file makes its reader raise
                reason = f"{path} cannot be read as an image ({' '.join(str(error).split())})"
                if not self.skip_bad:
                    raise ConversionError(f"{reason}; remove it or add --skip-bad, and repeat the command") from error
                print(f"skipped: {reason}")
        return self.table(paths, images)

    def _masks(self, paths, images):
        found = self.model.generate_masks(
            images,
            output_masks=False,
            output_rle_mask="compressed",
            output_bboxes_mask=True,
            output_details=True,
            progress=False,
            **{**statistics_of(self.processor), **self.options},
        )
        columns = {
            "path": paths,
            "height": [image.shape[1] for image in images],
            "width": [image.shape[2] for image in images],
            "scores": [result["scores"].tolist() for result in found],
            "boxes": [result["bounding_boxes"].tolist() for result in found],
            "areas": [result["areas"].tolist() for result in found],
            "counts": [[mask["counts"] for mask in result["rle_mask"]] for result in found],
        }
        return pa.table(columns, schema=MASKS)

    @torch.no_grad()
    def _embeddings(self, paths, images):
        processor = image_processor(self.processor)
        pixels = [processor(image, return_tensors="pt")["pixel_values"] for image in images]
        batches = torch.cat(pixels).to(self.model.device).split(self.options.get("batch_size", 1))
        embeddings = torch.cat([self.model.get_image_embeddings(batch) for batch in batches])  # (B, C, H, W)
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(embeddings.cpu().contiguous().numpy())
        return pa.table({"path": paths, "embedding": column})


def summary(folder: str) -> str:
    """How many rows a folder of Parquet, or the URI of one, has, and what to do where none has a mask."""
    table = pa.dataset.dataset(folder)
    said = f"{folder}: {table.count_rows():,} rows"
    if "scores" not in table.schema.names:
        return said
    if len(table.head(1, columns=["path"], filter=pa.compute.list_value_length(pa.dataset.field("scores")) > 0)):
        return said
    return f"{said}, all without a mask; lower --min-iou or --min-stability, and name another OUT"
