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
    CLIPVisionConfig,
    Gemma3Config,
    InternVLConfig,
    InternVLVisionConfig,
    LlavaConfig,
    Mistral3Config,
    PixtralVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import tiny

IMAGE = 300  # the token that stands for a part of an image
PARTS = 4  # of an image
SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION: dict[str, Any] = SIZES | {"image_size": 28, "patch_size": 14}


def _text(family: str) -> dict[str, Any]:
    return tiny.CONFIGS[family].to_dict()


CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "gemma3": lambda: Gemma3Config(
        text_config=_text("gemma3"), vision_config=SiglipVisionConfig(**VISION).to_dict(), mm_tokens_per_image=PARTS,
        image_token_index=IMAGE, boi_token_index=301, eoi_token_index=302,
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
    if family == "mistral3":
        inputs["image_sizes"] = torch.full((2, 2), 28)
    return inputs


def masked_wrapper(whole: PreTrainedModel, text: Mapping[str, Tensor], decoder: str) -> PreTrainedModel:
    """A copy of a whole model with the weights `text`, named as in a language model whose decoder is `decoder`."""
    model: Any = copy.deepcopy(whole)
    state = {name.removeprefix(f"{decoder}."): each for name, each in text.items() if name.startswith(f"{decoder}.")}
    model.get_decoder().load_state_dict(state)
    return model
