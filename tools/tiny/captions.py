"""Captions of scenes, and the contrastive pair that learns from them: an image encoder beside a small text encoder.

Axes: b batch, d embedding, H W pixels.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from minisvd.clip import ImageEncoder
from minisvd.config import ClipConfig
from tools.tiny import scenes

WORDS = sorted({word for name in (*scenes.HEADINGS, *scenes.COLOURS, *scenes.SHAPES) for word in name.split()})
WORDS += ["a", "an", "moving", "over", *scenes.TONES, *scenes.BACKGROUNDS]
CAPTION_LENGTH = 12  # words, and an end
TEXT_ENCODER = "text_encoder/model.safetensors"  # in a model's folder


class CaptionedImages(nn.Module):
    """The image encoder beside a small text encoder, which only training and evaluation need."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.image = ImageEncoder(config)
        self.text = TextTransformer(
            context_length=CAPTION_LENGTH,
            vocab_size=len(WORDS) + 2,  # 0 pads, the last one ends
            width=128,
            heads=4,
            layers=2,
            output_dim=config.projection_dim,
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors [b, d] of images and of captions."""
        return F.normalize(self.image(image)[:, 0], dim=-1), F.normalize(self.text(tokens), dim=-1)


def tokens(captions: list[str]) -> Tensor:
    """[b, CAPTION_LENGTH], by words."""
    ids = torch.zeros(len(captions), CAPTION_LENGTH, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        words = [1 + WORDS.index(word) for word in caption.split()]
        row[: len(words) + 1] = torch.tensor([*words, len(WORDS) + 1])
    return ids


def draw_captioned(rng: np.random.Generator, count: int, distinct: bool = False) -> tuple[np.ndarray, list[str]]:
    """First frames [b,3,H,W], uint8, and their captions; `distinct` allows no caption twice."""
    frames, captions = [], []
    while len(captions) < count:
        scene = scenes.random_scene(rng)
        if not (distinct and scenes.caption(scene) in captions):
            frames.append(scenes.render(scene, scenes.path(scene, 0, 1, frames=1)))
            captions.append(scenes.caption(scene))
    return np.concatenate(frames), captions
