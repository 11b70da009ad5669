"""Tiny encoders of every supported kind, with random weights."""

from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    SegformerConfig,
    SegformerModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTModel,
)

from captioning.model import parts

SIDE = 32
PLAIN = {
    "image_size": SIDE,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
ENCODERS = {
    "vit": lambda: ViTModel(ViTConfig(**PLAIN)),
    "deit": lambda: DeiTModel(DeiTConfig(**PLAIN)),
    "beit": lambda: BeitModel(BeitConfig(**PLAIN)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**PLAIN)),
    "swin": lambda: SwinModel(
        SwinConfig(image_size=SIDE, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    ),
    "segformer": lambda: SegformerModel(SegformerConfig(**parts.ENCODER_PRESETS["mit"] | {"image_size": SIDE})),
    "clip vision": lambda: CLIPVisionModel(CLIPVisionConfig(**PLAIN)),
    "clip": lambda: CLIPModel(
        CLIPConfig(
            vision_config=PLAIN,
            text_config={
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            },
        )
    ),
}
