"""The image's one vector: open_clip's vision tower, behind the resize that Stable Video Diffusion was trained with.

Axes: b batch, c channels, H W pixels of the image, h w pixels of the encoder's input.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import ClipConfig


class ImageEncoder(nn.Module):
    """Image [b,3,H,W] in [-1,1] -> CLIP embedding [b,1,projection_dim], not normalised. `visual` is
    `open_clip.transformer.VisionTransformer`, with open_clip's parameter names. Source: arXiv 2103.00020, section 2.4
    (the tower); arXiv 2311.15127, section 4 (its use)."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        from open_clip.transformer import QuickGELU, VisionTransformer  # slow to import: only who encodes pays

        self.config = config
        self.visual = VisionTransformer(
            image_size=config.image_size,
            patch_size=config.patch_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            mlp_ratio=config.intermediate_size / config.hidden_size,
            output_dim=config.projection_dim,
            act_layer={"gelu": nn.GELU, "quick_gelu": QuickGELU}[config.hidden_act],
        )

    def forward(self, image: Tensor) -> Tensor:
        """Raises ValueError unless the image is [b,3,H,W]."""
        if image.ndim != 4 or image.shape[1] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}; need [b,3,H,W]")
        x = (resize_antialiased(image.float(), self.config.image_size) + 1) / 2
        mean, std = (x.new_tensor(v)[:, None, None] for v in (self.config.mean, self.config.std))
        return rearrange(self.visual(((x - mean) / std).to(self.visual.conv1.weight.dtype)), "b c -> b 1 c")


def resize_antialiased(image: Tensor, size: int) -> Tensor:
    """[b,c,H,W] -> [b,c,size,size]: Gaussian blur along each side that shrinks, then bicubic with aligned corners.

    A side that shrinks by a factor f is blurred with sigma = (f - 1) / 2 pixels over about 4 sigma, mirrored at the
    edges; a side that grows or stays is not. Source: kornia's `resize(..., antialias=True)`, as used in training.
    """
    for axis in (2, 3):
        factor = image.shape[axis] / size
        if factor > 1:
            image = blur(image, axis, sigma=max((factor - 1) / 2, 1e-3))
    return F.interpolate(image, size=(size, size), mode="bicubic", align_corners=True)


def blur(image: Tensor, axis: int, sigma: float) -> Tensor:
    """Convolve [b,c,H,W] along axis 2 or 3 with a normalised Gaussian; its odd length is at least 3."""
    radius = max(int(4 * sigma), 3) // 2
    x = torch.arange(-radius, radius + 1, dtype=image.dtype, device=image.device)
    kernel = torch.softmax(-(x**2) / (2 * sigma**2), dim=0)
    rows = rearrange(image.transpose(axis, 3), "b c h w -> (b c h) 1 w")
    rows = F.conv1d(F.pad(rows, (radius, radius), mode="reflect"), kernel[None, None])
    b, c, h, _ = image.transpose(axis, 3).shape
    return rearrange(rows, "(b c h) 1 w -> b c h w", b=b, c=c, h=h).transpose(axis, 3)
