"""Tiny random models of images and text, images for them, and the oracle: the whole around a zero-masked one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    AyaVisionConfig,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma4Config,
    Gemma4UnifiedConfig,
    Idefics3Config,
    InternVLConfig,
    InternVLVisionConfig,
    Lfm2VlConfig,
    LlavaConfig,
    Mistral3Config,
    PaliGemmaConfig,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen3_5Config,
    Qwen3VLConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5VisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

import tiny

IMAGE = 300  # the token that stands for a part of an image
PARTS = 4  # of an image
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = SIZES | {"image_size": 28, "patch_size": 14}
GEMMA4: dict[str, Any] = {
    "image_token_id": IMAGE, "boi_token_id": 301, "eoi_token_id": 302, "video_token_id": 303, "boa_token_id": 304,
    "eoa_token_index": 305, "audio_token_id": 306,
}  # fmt: skip
TEXT: dict[str, Any] = tiny.COMMON | {
    "num_attention_heads": 8, "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
}  # fmt: skip


def _text(family: str) -> dict[str, Any]:
    return tiny.CONFIGS[family].to_dict()


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config=_text("gemma3"), vision_config=SiglipVisionConfig(**VISION).to_dict(), mm_tokens_per_image=PARTS,
        image_token_index=IMAGE, boi_token_index=301, eoi_token_index=302,
    ),
    # With per-layer inputs, and blocks that read the keys and values of others, as E2B and E4B have them.
    "gemma4": lambda: Gemma4Config(
        text_config=_text("gemma4-shared-mqa") | {"num_key_value_heads": 2}, **GEMMA4,
        vision_config=SIZES | {
            "num_key_value_heads": 4, "head_dim": 8, "patch_size": 7, "pooling_kernel_size": 2,
            "position_embedding_size": 8, "use_clipped_linears": True,
        },
        audio_config=SIZES | {"output_proj_dims": 32, "subsampling_conv_channels": [4, 4]},
    ),
    "gemma4_unified": lambda: Gemma4UnifiedConfig(
        text_config=_text("gemma4") | {"model_type": "gemma4_unified_text"}, **GEMMA4, audio_config={},
        vision_config={
            "patch_size": 7, "pooling_kernel_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 8, "output_proj_dims": 32,
        },
    ),
    "llava": lambda: LlavaConfig(
        text_config=_text("llama-gqa"), vision_config=CLIPVisionConfig(**VISION, projection_dim=32).to_dict(),
        image_token_index=IMAGE, image_seq_length=PARTS,
    ),
    "mistral3": lambda: Mistral3Config(
        text_config=_text("mistral"), vision_config=PixtralVisionConfig(**VISION).to_dict(),
        image_token_index=IMAGE, spatial_merge_size=1,
    ),
    "internvl": lambda: InternVLConfig(
        text_config=_text("qwen2"), image_token_id=IMAGE, downsample_ratio=1.0, image_seq_length=PARTS,
        vision_config=InternVLVisionConfig(**SIZES, image_size=[28, 28], patch_size=[14, 14]).to_dict(),
    ),
    "qwen3_5": lambda: Qwen3_5Config(
        text_config=_text("qwen3_5-hybrid"), image_token_id=IMAGE, video_token_id=301, vision_start_token_id=302,
        vision_end_token_id=303,
        vision_config=Qwen3_5VisionConfig(
            depth=2, hidden_size=32, intermediate_size=64, num_heads=4, patch_size=7, spatial_merge_size=2,
            out_hidden_size=32, num_position_embeddings=16,
        ).to_dict(),
    ),
    "aya_vision": lambda: AyaVisionConfig(
        text_config=_text("cohere2"), vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        image_token_index=IMAGE, downsample_factor=1,
    ),
    "paligemma": lambda: PaliGemmaConfig(
        text_config=_text("gemma2"), vision_config=SiglipVisionConfig(**VISION, vision_use_head=False).to_dict(),
        image_token_index=IMAGE, projection_dim=32, hidden_size=32,
    ),
    "idefics3": lambda: Idefics3Config(
        text_config=_text("llama-gqa"), vision_config=Idefics3VisionConfig(**VISION).to_dict(),
        image_token_id=IMAGE, scale_factor=1, tie_word_embeddings=True,
    ),
    "smolvlm": lambda: SmolVLMConfig(
        text_config=_text("llama-gqa"), vision_config=SmolVLMVisionConfig(**VISION).to_dict(),
        image_token_id=IMAGE, scale_factor=1, tie_word_embeddings=True,
    ),
    "qwen2_5_vl": lambda: Qwen2_5_VLConfig(
        text_config=TEXT | {"num_attention_heads": 4, "num_key_value_heads": 2}, image_token_id=IMAGE,
        video_token_id=301, vision_start_token_id=302, vision_end_token_id=303,
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7, "window_size": 28,
            "out_hidden_size": 32, "fullatt_block_indexes": [1],
        },
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config=TEXT | {"head_dim": 8}, image_token_id=IMAGE, video_token_id=301, vision_start_token_id=302,
        vision_end_token_id=303,
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "patch_size": 7,
            "out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1],
        },
    ),
    "lfm2_vl": lambda: Lfm2VlConfig(
        text_config=_text("lfm2-hybrid"), image_token_id=IMAGE, downsample_factor=2, projector_hidden_size=32,
        vision_config=Siglip2VisionConfig(**SIZES, patch_size=7, num_patches=16, vision_use_head=False).to_dict(),
    ),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    """A random model whose biases and norms are random too."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or not parameter.any():  # some projectors start as zeros
            nn.init.normal_(parameter, std=0.3)
        elif "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    tiny.draw_scalars(model)
    return model.requires_grad_(False)


def write_checkpoint(path: Path, family: str) -> PreTrainedModel:
    """Write such a model with its tokenizer and a processor's settings, and return it."""
    model = build(family)
    model.save_pretrained(path)
    tiny.tokenizer().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps({"size": 28, "image_mean": [0.5, 0.5, 0.5]}))
    return model


def image_inputs(family: str) -> dict[str, Tensor]:
    """Two sequences with an image each."""
    ids = torch.randint(4, IMAGE - 1, (2, 24), generator=torch.Generator().manual_seed(1))
    ids[:, 3 : 3 + PARTS] = IMAGE
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(2))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return inputs | _more(family, pixels, ids)


def _more(family: str, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
    """What some models are given beside the images, or in place of them."""
    if family == "mistral3":
        return {"image_sizes": torch.full((2, 2), 28)}
    if family in ("idefics3", "smolvlm"):
        return {"pixel_values": pixels[:, None]}
    if family == "paligemma":
        return {"token_type_ids": torch.zeros_like(ids)}
    if family.startswith("qwen"):  # patches of two frames
        grid = torch.tensor([[1, 4, 4]] * 2)
        patches = pixels.repeat(1, 2, 1, 1).flatten().reshape(2 * 16, -1)
        return {"pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": (ids == IMAGE).int()}
    if family.startswith("gemma4"):  # patches in the place of images, with their places in these
        side = 2 if family == "gemma4_unified" else 4
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side)).flip(-1)
        return {"pixel_values": pixels.reshape(2, side * side, -1), "image_position_ids": places.repeat(2, 1, 1)}
    if family == "lfm2_vl":
        shapes, mask = torch.tensor([[4, 4]] * 2), torch.ones(2, 16, dtype=torch.long)
        return {"pixel_values": pixels.reshape(2, 16, -1), "spatial_shapes": shapes, "pixel_attention_mask": mask}
    return {}


def masked_wrapper(whole: PreTrainedModel, text: Mapping[str, Tensor], decoder: str) -> PreTrainedModel:
    """A copy of a whole model with the weights `text`, named as in a language model whose decoder is `decoder`."""
    model: Any = copy.deepcopy(whole)
    state = {name.removeprefix(f"{decoder}."): each for name, each in text.items() if name.startswith(f"{decoder}.")}
    model.get_decoder().load_state_dict(state)
    return model
