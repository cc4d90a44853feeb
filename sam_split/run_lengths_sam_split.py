"""Masks as run lengths: from the decoder's logits to runs of pixels in the image, and what can be read from them.

`edges` of a mask are (2 * runs,), int64: start and end (exclusive) of each run of pixels in column-major order, as in
COCO's run lengths. Sizes are (height, width), boxes (x0, y0, x1, y1) with inclusive ends, in pixels of the image.

This file is copied into each saved model folder. It imports torch alone and reads no file, network or environment.
"""

import torch
import torch.nn.functional as F

# What is held of masks that are being scaled up, whatever the sizes of the image and of the masks. A CPU's allocator
# keeps larger blocks apart, and does not give them back.
WORK_BYTES_CPU, WORK_BYTES_ACCELERATOR = 2**22, 2**28
BYTES_PER_PIXEL = 8  # a float32 logit, and bytes for the comparisons
ROWS_AT_ONCE = 128  # these depend on few rows of a mask, so that their matrix product is small
EDGE = 20  # a box so many pixels from an edge of its crop is of an object that the crop cuts
HUGE = 1e30  # instead of an infinite logit, whose product with a weight of 0 is not a number


def work_bytes(device):
    return WORK_BYTES_CPU if device.type == "cpu" else WORK_BYTES_ACCELERATOR


def masks_at_once(device, crop_bytes):
    """On a CPU each mask is scaled in its own box; an accelerator wants many at once, in a box that holds them all."""
    return 1 if device.type == "cpu" else max(1, work_bytes(device) // crop_bytes)


class Axis:
    """One direction of scaling a mask up: interpolate to the padded input, cut the padding, interpolate to the crop.

    Both steps are linear and treat rows and columns apart, so a mask is scaled by one matrix for each direction.

    Args:
        low, padded, kept, full: pixels of the mask, of the model's input, of the crop inside it, and of the crop.
        device: of the masks.
    """

    def __init__(self, low, padded, kept, full, device):
        identity = torch.eye(low)[None]  # (1, low, low); float32 like masks, so that positions round alike
        scaled = F.interpolate(identity, padded, mode="linear", align_corners=False)[..., :kept]
        matrix = F.interpolate(scaled, full, mode="linear", align_corners=False)[0].T.contiguous()  # (full, low)
        weights = matrix != 0
        # The first and the last place of the mask that a pixel depends on; both rise from pixel to pixel.
        self.first = weights.int().argmax(1)
        self.last = low - 1 - weights.flip(1).int().argmax(1)
        self.matrix = matrix.to(device)

    def reached(self, first, last):
        """The pixels from start to end (exclusive), 2 of (n,), that depend on a place from `first` to `last`."""
        first, last = torch.tensor(first), torch.tensor(last)
        return torch.searchsorted(self.last, first), torch.searchsorted(self.first, last, right=True)

    def support(self, start, end):
        """The places that pixels from `start` to `end` depend on."""
        return slice(int(self.first[start]), int(self.last[end - 1]) + 1)

    def scale(self, places, offset, start, end):
        """(..., places from `offset` on) to (..., pixels from `start` to `end`)."""
        pieces = []
        for first in range(start, end, ROWS_AT_ONCE):
            after = min(first + ROWS_AT_ONCE, end)
            used = self.support(first, after)
            pieces.append(places[..., used.start - offset : used.stop - offset] @ self.matrix[first:after, used].T)
        return torch.cat(pieces, dim=-1)


def run_edges(masks, down, across, corner, image_height, threshold, offset):
    """Scale masks up, piece by piece, and keep where they cross the threshold.

    A scaled logit is a convex combination of the mask's, so none exceeds a threshold outside the box that the logits
    above it reach.

    Args:
        masks: (n, h, w), logits of any dtype; what is not a number counts as outside.
        down, across: the `Axis` of rows and that of columns.
        corner: (left, top) of the crop in the image.
        image_height: in pixels.
        threshold: the logit above which a pixel is inside.
        offset: stability is the IoU of the masks at `threshold + offset` and `threshold - offset`.

    Returns:
        n tensors of edges, a pair per run and column, and n stability scores, not a number for 0 / 0.
    """
    device, edges = masks.device, [[torch.zeros(0, dtype=torch.long)] for _ in masks]
    inner, outer = masks.new_zeros(2, len(masks), dtype=torch.long)
    for chosen, (top, bottom), (left, right) in _boxes(masks, down, across, threshold - abs(offset)):
        where = torch.tensor(chosen, device=device)
        rows = down.support(top, bottom)
        step = max(1, work_bytes(device) // (BYTES_PER_PIXEL * len(chosen) * (bottom - top)))
        for start in range(left, right, step):
            end = min(start + step, right)
            columns = across.support(start, end)
            part = masks[where, rows, columns].float().nan_to_num(-HUGE, HUGE, -HUGE).transpose(1, 2)
            # (m, columns, rows), so that runs lie in memory as they are counted
            logits = down.scale(across.matrix[start:end, columns] @ part, rows.start, top, bottom)
            inner[where] += _count(logits > threshold + offset)
            outer[where] += _count(logits > threshold - offset)
            inside = F.pad(logits > threshold, (1, 1))
            mask, column, row = (inside[..., 1:] != inside[..., :-1]).nonzero().unbind(1)
            place = (corner[0] + start + column) * image_height + corner[1] + top + row
            mask, place = torch.stack([mask, place]).cpu()
            for index, found in zip(chosen, place.split(mask.bincount(minlength=len(chosen)).tolist()), strict=True):
                edges[index].append(found)
    return [torch.cat(pieces) for pieces in edges], (inner / outer).tolist()


def _count(inside):
    """The pixels (n,) of (n, columns, rows) that are true."""
    if inside.device.type != "cpu":
        return inside.sum((1, 2))
    return torch.stack([torch.count_nonzero(mask) for mask in inside])  # a CPU's sum would make an int64 of each


def _boxes(masks, down, across, low):
    """The pixels that can exceed `low`: lists of indices of masks, with the rows and the columns to scale for them."""
    if not len(masks):
        return []
    hot = masks > low
    extents = []
    for seen in hot.any(2), hot.any(1):  # (n, h), (n, w)
        extents += [seen.int().argmax(1), seen.shape[1] - 1 - seen.flip(1).int().argmax(1)]
    *extents, some = torch.stack([*extents, hot.flatten(1).any(1)]).tolist()
    (top, bottom), (left, right) = down.reached(*extents[:2]), across.reached(*extents[2:])
    # A shrunk mask has places, and its padding is made of places, that no pixel depends on.
    some = (torch.tensor(some, dtype=torch.bool) & (top < bottom) & (left < right)).nonzero()[:, 0].tolist()
    crop_bytes = BYTES_PER_PIXEL * len(down.matrix) * len(across.matrix)
    together = masks_at_once(masks.device, crop_bytes)
    chunks = [some[start : start + together] for start in range(0, len(some), together)]
    return [
        (chunk, (int(top[chunk].min()), int(bottom[chunk].max())), (int(left[chunk].min()), int(right[chunk].max())))
        for chunk in chunks
    ]


def joined(edges):
    """Edges of which no run ends where the next one starts, at the foot of a column and the head of the next."""
    apart = edges[1:-1:2] != edges[2::2]  # (runs - 1,)
    return torch.cat([edges[:1], edges[1:-1][apart.repeat_interleave(2)], edges[-1:]])


def box_of(edges, height):
    """The box of edges that are not joined, or None without any."""
    if not len(edges):
        return None
    top, bottom = (edges[::2] % height).min(), ((edges[1::2] - 1) % height).max()
    return [int(edges[0]) // height, int(top), int(edges[-1] - 1) // height, int(bottom)]


def near_crop_edge(box, crop_box, size):
    """Whether a side of a box lies near its crop's and not near the image's."""
    sides = zip(box, crop_box, (0, 0, size[1], size[0]), strict=True)
    return any(abs(side - crop) <= EDGE < abs(side - image) for side, crop, image in sides)


def suppress(boxes, scores, threshold):
    """Indices of the boxes (n, 4) that overlap no better kept one with an IoU above `threshold`, best first."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order].float()
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    alive, kept = torch.ones(len(boxes), dtype=torch.bool), []
    for index in range(len(boxes)):
        if alive[index]:
            kept.append(index)
            box, rest = boxes[index], boxes[index + 1 :]
            sides = (torch.minimum(box[2:], rest[:, 2:]) - torch.maximum(box[:2], rest[:, :2])).clamp(min=0)
            shared = sides[:, 0] * sides[:, 1]
            iou = shared / (areas[index] + areas[index + 1 :] - shared)
            alive[index + 1 :] &= ~(iou.double() > threshold)
    return order[kept]


def mask_of(edges, size):
    """Edges as a (height, width) bool tensor."""
    height, width = size
    steps = torch.zeros(height * width + 1, dtype=torch.int8)
    steps[edges[::2]], steps[edges[1::2]] = 1, -1
    return steps.cumsum(0, dtype=torch.int8)[:-1].view(torch.bool).view(width, height).T


def counts(edges, size):
    """COCO's run lengths: of pixels outside and inside in turn, in column-major order."""
    last = torch.tensor([size[0] * size[1]])
    counts = torch.cat([torch.zeros_like(last), edges, last]).diff()
    return counts[:-1] if len(counts) > 1 and counts[-1] == 0 else counts


def compressed(counts):
    """COCO's string of run lengths: differences to the last but one, five bits a character, lowest first."""
    values = counts.clone()
    values[3:] -= counts[1:-2]
    shifts = 5 * torch.arange(13)
    rest = values[:, None] >> shifts  # (runs, characters)
    # The last character of a number is the first after which nothing but its sign is left.
    more = (rest >> 5) != -((rest >> 4) & 1)
    used = torch.cat([torch.ones_like(more[:, :1]), more[:, :-1]], dim=1).cumprod(1).bool()
    characters = (rest & 31) + 32 * more + 48
    return bytes(characters[used].tolist()).decode("ascii")


def without_small_regions(edges, size, hole, island):
    """Edges without holes and islands of so many pixels or fewer; the largest island stays. Diagonals connect."""
    ends = torch.tensor([0]), torch.tensor([size[0] * size[1]])
    for largest, holes in (hole, True), (island, False):
        if not largest or not len(edges):
            continue
        outside = torch.cat([ends[0], edges, ends[1]])
        runs = columns_of(outside if holes else edges, size[0])
        runs = runs.view(-1, 2)[runs[1::2] > runs[::2]]
        label = _components(runs, size[0])
        areas = torch.zeros(len(runs), dtype=torch.long).index_add_(0, label, runs[:, 1] - runs[:, 0])
        small = areas[label] <= largest
        small &= holes | (label != areas.argmax())
        if small.any():
            runs = runs[~small].flatten()
            if holes:
                edges = torch.cat([ends[0], joined(runs), ends[1]])
                edges = edges.view(-1, 2)[edges[1::2] > edges[::2]].flatten()
            else:
                edges = joined(runs)
    return edges


def columns_of(edges, height):
    """Edges with each run cut where a column ends."""
    starts, ends = edges[::2], edges[1::2]
    pieces = (ends - 1).div(height, rounding_mode="floor") - starts // height + 1  # of each run; an empty one has one
    pieces = pieces.clamp(min=1)
    run = torch.arange(len(starts)).repeat_interleave(pieces)
    index = torch.arange(len(run)) - (pieces.cumsum(0) - pieces)[run]
    column = starts[run] // height + index
    starts, ends = torch.maximum(starts[run], column * height), torch.minimum(ends[run], (column + 1) * height)
    return torch.stack([starts, ends], dim=1).flatten()


def _components(runs, height):
    """The component of each run (n, 2) of a column, as the smallest index in it; diagonals connect."""
    column = runs[:, 0] // height
    starts, ends = (runs - column[:, None] * height).unbind(1)
    stride = height + 2  # so that no range below reaches another column
    left, right = starts + (column + 1) * stride, ends + (column + 1) * stride
    lowest = torch.searchsorted(ends + column * stride, left)
    number = (torch.searchsorted(starts + column * stride, right, right=True) - lowest).clamp(min=0)
    one = torch.arange(len(runs)).repeat_interleave(number)
    other = lowest[one] + torch.arange(len(one)) - (number.cumsum(0) - number)[one]
    label = torch.arange(len(runs))
    while True:
        a, b = label[one], label[other]
        smallest = torch.minimum(a, b)
        joined = label.scatter_reduce(0, a, smallest, "amin").scatter_reduce(0, b, smallest, "amin")
        joined = joined[joined]
        if torch.equal(joined, label):
            return label
        label = joined
