"""Imported once by the server of `forked`: what every process of train.py would take seconds to import or to build."""

import importlib

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

for name in (
    "captioning.training.features",
    "captioning.show.run_folder",
    "captioning.training.trainer",
    "datasets.arrow_dataset",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "rouge_score.rouge_scorer",
    "train",
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.vision_encoder_decoder.modeling_vision_encoder_decoder",
    "transformers.models.vit.image_processing_pil_vit",
    "transformers.models.vit.modeling_vit",
):
    importlib.import_module(name)
get_checkpoint_conversion_mapping("vit")
