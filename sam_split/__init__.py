"""Segment Anything with native q, k and v layers.

Importing this package registers its classes with transformers' Auto classes, which then need no `trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor, SamProcessor

from .configuration_sam_split import (
    SamSplitConfig,
    SamSplitMaskDecoderConfig,
    SamSplitPromptEncoderConfig,
    SamSplitVisionConfig,
)
from .mask_generation_sam_split import SamSplitMaskGenerationPipeline
from .modeling_sam_split import (
    VOID_LABEL,
    SamSplitImageSegmentationOutput,
    SamSplitModel,
    SamSplitPreTrainedModel,
    SamSplitVisionEncoderOutput,
    SamSplitVisionModel,
    segmentation_loss,
)

__version__ = "0.1.0"

# The files that travel with every saved model; the Auto classes find them by AUTO_MAP, in the configuration file.
CODE_FILES = (
    "configuration_sam_split.py",
    "products_sam_split.py",
    "attention_sam_split.py",
    "checks_sam_split.py",
    "images_sam_split.py",
    "run_lengths_sam_split.py",
    "mask_generation_sam_split.py",
    "modeling_sam_split.py",
)

__all__ = [
    "VOID_LABEL",
    "SamSplitConfig",
    "SamSplitImageSegmentationOutput",
    "SamSplitMaskDecoderConfig",
    "SamSplitMaskGenerationPipeline",
    "SamSplitModel",
    "SamSplitPreTrainedModel",
    "SamSplitPromptEncoderConfig",
    "SamSplitVisionConfig",
    "SamSplitVisionEncoderOutput",
    "SamSplitVisionModel",
    "segmentation_loss",
]

AutoConfig.register(SamSplitConfig.model_type, SamSplitConfig, exist_ok=True)
AutoConfig.register(SamSplitVisionConfig.model_type, SamSplitVisionConfig, exist_ok=True)
AutoModel.register(SamSplitConfig, SamSplitModel, exist_ok=True)
AutoModel.register(SamSplitVisionConfig, SamSplitVisionModel, exist_ok=True)
AutoModelForMaskGeneration.register(SamSplitConfig, SamSplitModel, exist_ok=True)
AutoProcessor.register(SamSplitConfig, SamProcessor, exist_ok=True)
