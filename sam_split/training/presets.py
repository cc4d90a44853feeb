"""Which layers an adapter changes."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from peft import LoraConfig

_QV = r"vision_encoder\.layers\.\d+\.attn\.(q|v)"
_DECODER = (
    r"mask_decoder\.transformer\..*(q_proj|k_proj|v_proj|out_proj|lin1|lin2)"
    r"|mask_decoder\.(iou_prediction_head|output_hypernetworks_mlps\.\d+)\.(proj_in|layers\.\d+|proj_out)"
)
# preset -> the full names of its layers; `late` has those of the encoder's last layers filled in.
PRESETS = {
    "encoder": _QV,
    "encoder-qkv": r"vision_encoder\.layers\.\d+\.attn\.(q|k|v)",
    "late": r"vision_encoder\.layers\.({layers})\.attn\.(q|v)",
    "decoder": _DECODER,
    "encoder+decoder": f"{_QV}|{_DECODER}",
    "dora": _QV,
}


def lora_config(preset: str, model: nn.Module, rank: int = 16, late_layers: int = 3) -> "LoraConfig":
    """PEFT's config of a preset.

    | preset | what the adapter changes | parameters of ViT-B at rank 16 |
    |---|---|---|
    | `encoder` | q and v of the image encoder | 589,824 |
    | `encoder-qkv` | q, k and v of the image encoder | 884,736 |
    | `late` | q and v of the image encoder's last layers; what the others compute can be kept | 147,456 |
    | `decoder` | the mask decoder's attention and MLPs, and the heads for masks and their IoU | 440,384 |
    | `encoder+decoder` | q and v of the image encoder, and what `decoder` changes; `finetune`'s default | 1,030,208 |
    | `dora` | q and v of the image encoder, by DoRA | 608,256 |

    Without the decoder's heads, the predicted IoU changes only as far as the image embedding does. Everything-mode
    keeps masks by it: only `decoder` and `encoder+decoder` can teach what the masks of new images are worth.

    `target_modules=["q_proj", "v_proj"]` of your own adapts the mask decoder alone, for the encoder's layers are
    called q, k and v. `lora_dropout` (0 here) in the decoder's v_proj and out_proj acts on averages over the image and
    on the few prompt tokens, not on image positions: its noise does not average out as in stock SamModel.

    Args:
        preset: one of `PRESETS`.
        model: a `SamSplitModel`.
        rank: of the update of each layer.
        late_layers: how many layers of the image encoder `late` changes.
    """
    from peft import LoraConfig

    layers = range(frozen_layers(preset, model, late_layers), len(model.vision_encoder.layers))
    target = PRESETS[preset].replace("{layers}", "|".join(map(str, layers)))
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=target, use_dora=preset == "dora")


def frozen_layers(preset, model, late_layers=3):
    """How many of the image encoder's first layers a preset leaves as they are, so that their output can be kept.

    Raises:
        ValueError: if there is no such preset, or `late_layers` leaves no layer frozen.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    number = len(model.vision_encoder.layers)
    if preset == "decoder":
        return number
    if preset != "late":
        return 0
    if not 0 < late_layers < number:
        raise ValueError(f"--late-layers must be from 1 to {number - 1}, got {late_layers}")
    return number - late_layers
