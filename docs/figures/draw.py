"""The figures of `how-it-works.md`, as SVG: `python docs/figures/draw.py`.

Plain text and the standard library, so that every machine draws the same bytes; a test compares them with what is
committed.
"""

from pathlib import Path
from xml.sax.saxutils import escape

INK, PALE, BLUE, GREEN, ORANGE = "#1b1f24", "#e8ebef", "#bcd7f5", "#bfe3c6", "#f8d4a8"


class Drawing:
    """A white sheet. Lengths are in pixels, from the top left corner."""

    def __init__(self, width: int, height: int, title: str):
        self.parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
            f'font-family="sans-serif" font-size="14" fill="{INK}">',
            f"<title>{escape(title)}</title>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
            f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        ]

    def box(self, x, y, width, height, colour=PALE, text="", dashed=False):
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="3" fill="{colour}" stroke="{INK}"{dash}/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, "middle")

    def text(self, x, y, text, anchor="start", size=14, bold=False):
        weight = ' font-weight="bold"' if bold else ""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}"{weight}>{escape(text)}</text>'
        )

    def arrow(self, *points):
        """Through (x, y), (x, y), ...; the tip is at the last."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{INK}" marker-end="url(#tip)"/>')

    def svg(self) -> str:
        return "\n".join([*self.parts, "</svg>", ""])


def split() -> str:
    """One fused layer with its adapter, beside three layers of which two have one."""
    sheet = Drawing(760, 330, "The fused qkv layer of stock SAM, and the q, k and v layers of SamSplit")
    sheet.text(20, 28, "stock SamModel", bold=True)
    sheet.box(20, 150, 60, 40, PALE, "x")
    sheet.arrow((80, 170), (130, 170))
    for index, name in enumerate("qkv"):
        sheet.box(130, 80 + 60 * index, 110, 60, BLUE, f"rows of {name}")
    sheet.text(185, 68, "attn.qkv", "middle")
    sheet.box(262, 80, 44, 180, ORANGE, "B A")
    sheet.text(284, 68, "LoRA", "middle")
    sheet.text(20, 290, "One A for q, k and v: the adapter changes k too.")
    sheet.text(380, 28, "SamSplit", bold=True)
    sheet.box(380, 150, 60, 40, PALE, "x")
    for index, name in enumerate("qkv"):
        y = 62 + 75 * index
        sheet.box(520, y, 110, 60, BLUE, f"attn.{name}")
        sheet.arrow((440, 170), (480, 170), (480, y + 30), (520, y + 30))
        if name != "k":
            sheet.box(652, y, 60, 60, ORANGE, "B A")
    sheet.text(682, 50, "LoRA", "middle")
    sheet.text(380, 290, "The same rows of the same weights, in three layers:")
    sheet.text(380, 310, "an A and a B for each that is named, and k as it was.")
    return sheet.svg()


def attention() -> str:
    """Folded for fused kernels, tiled for a CPU: what exists at once."""
    sheet = Drawing(760, 370, "Three ways to compute attention with relative positions")
    for left, title, *lines in (
        (20, "eager: all scores", "H W x H W scores and biases", "of each head are in memory"),
        (270, "tiled: CPU, MPS, XPU, NPU", "a few rows of scores at once,", "forward and backward"),
        (510, "folded: CUDA, torch.compile", "positions are channels of q and k:", "a fused kernel, no bias"),
    ):
        sheet.text(left, 28, title, bold=True)
        for row, line in enumerate(lines):
            sheet.text(left, 322 + 20 * row, line)
    sheet.text(20, 60, "keys", size=12)
    sheet.arrow((52, 56), (210, 56))
    sheet.box(20, 70, 200, 200, ORANGE, "q k / sqrt(D) + rel")
    sheet.box(270, 70, 200, 200, "#ffffff", dashed=True)
    sheet.box(270, 120, 200, 30, ORANGE, "tile")
    sheet.arrow((370, 152), (370, 196))
    sheet.text(370, 216, "softmax, times v,", "middle", 12)
    sheet.text(370, 232, "then the next tile", "middle", 12)
    for top, parts in (
        (90, ("q / sqrt(D)", "rel_h(q)", "rel_w(q)")),
        (160, ("k", "row of key", "column of key")),
    ):
        for index, (part, colour) in enumerate(zip(parts, (BLUE, GREEN, GREEN), strict=True)):
            sheet.box(510 + 78 * index, top, 78, 40, colour)
            sheet.text(549 + 78 * index, top + 24, part, "middle", 11)
    sheet.text(510, 84, "query", size=12)
    sheet.text(510, 154, "key (one-hot rows and columns)", size=12)
    sheet.text(510, 232, "query . key =", size=12)
    sheet.text(510, 250, "q k / sqrt(D) + rel_h + rel_w", size=12)
    return sheet.svg()


def decoder() -> str:
    """What is computed for an image once, and what for each prompt."""
    sheet = Drawing(760, 330, "What the mask decoder computes once per image, and what per prompt")
    sheet.text(20, 28, "stock SamModel", bold=True)
    for index in range(3):
        y = 60 + 70 * index
        sheet.box(20, y, 90, 46, GREEN, f"prompt {index + 1}")
        sheet.box(150, y, 170, 46, ORANGE, "image, projected")
        sheet.arrow((110, y + 23), (150, y + 23))
    sheet.text(20, 290, "The image is copied and projected for each prompt.")
    sheet.text(400, 28, "SamSplit", bold=True)
    sheet.box(400, 128, 130, 50, ORANGE, "image, projected")
    sheet.text(465, 120, "once per image", "middle", 12)
    for index in range(3):
        y = 60 + 70 * index
        sheet.box(610, y, 120, 46, GREEN, f"prompt {index + 1}")
        sheet.arrow((530, 153), (570, 153), (570, y + 23), (610, y + 23))
    sheet.text(400, 290, "The first block's keys and queries are shared;")
    sheet.text(400, 310, "then a prompt's few tokens pass the projections.")
    return sheet.svg()


FIGURES = {"split.svg": split, "attention.svg": attention, "decoder.svg": decoder}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        Path(__file__).with_name(name).write_text(draw(), encoding="utf-8")
