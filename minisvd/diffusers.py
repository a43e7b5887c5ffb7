"""A drop-in for diffusers' UNet: one line of import changed, and what was written for that one runs on ours.

    from minisvd.diffusers import UNetSpatioTemporalConditionModel  # was: from diffusers import ...

Only this module imports diffusers, and only when it is itself imported. Parameters have the published names, so that
weights go both ways; what is here is the other UNet's manner of being called, configured, loaded and saved. Beyond it:
`vcut=` chooses the build, and `network` is the SpatioTemporalUNet inside, for all that minisvd does with one.

The residual blocks run at the eps of the original training code, 1e-5; diffusers runs most of them at 1e-6.
"""

# ruff: noqa: ARG002 (the arguments of __init__ are read from self.config, where diffusers' decorator puts them)

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import Timesteps
from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .adapt import checkpoint_activations, fold
from .config import Vcut
from .folder import unet_config
from .unet import SpatioTemporalUNet

WITH, WITHOUT = "CrossAttn", ""
KINDS = (WITH, WITH, WITH, WITHOUT)  # which of the released levels have transformers
REPLACE = "SVD's attentions take no processors here: replace the module, such as block.attn1, by one of yours"


class UNetSpatioTemporalConditionModel(ModelMixin, ConfigMixin):
    """`network`, a SpatioTemporalUNet, called as diffusers calls its own; the config has diffusers' fields and `vcut`.

    Both have one dictionary of children, so that names have no prefix and a layer replaced here is replaced there.
    Raises ValueError naming the first field that no such UNet can have.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        sample_size: int | None = None,
        in_channels: int = 8,
        out_channels: int = 4,
        down_block_types: tuple[str, ...] = tuple(f"{kind}DownBlockSpatioTemporal" for kind in KINDS),
        up_block_types: tuple[str, ...] = tuple(f"{kind}UpBlockSpatioTemporal" for kind in reversed(KINDS)),
        block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280),
        addition_time_embed_dim: int = 256,
        projection_class_embeddings_input_dim: int = 768,
        layers_per_block: int | tuple[int, ...] = 2,
        cross_attention_dim: int | tuple[int, ...] = 1024,
        transformer_layers_per_block: int | tuple[int, ...] = 1,
        num_attention_heads: int | tuple[int, ...] = (5, 10, 20, 20),
        num_frames: int = 25,
        vcut: Vcut = False,
    ) -> None:
        super().__init__()
        stated = {name: list(value) if isinstance(value, tuple) else value for name, value in self.config.items()}
        self.adopt(SpatioTemporalUNet(unet_config(stated)))

    def register_to_config(self, **stated: Any) -> None:
        """States `vcut` only where the build is not the released one, so that diffusers reads what it can read."""
        super().register_to_config(**{name: value for name, value in stated.items() if value or name != "vcut"})

    def adopt(self, network: SpatioTemporalUNet) -> None:
        """Be the face of this network."""
        self.__dict__["network"], self._modules = network, network._modules
        self.time_proj = Timesteps(network.config.block_out_channels[0], True, downscale_freq_shift=0)
        self.add_time_proj = Timesteps(network.config.addition_time_embed_dim, True, downscale_freq_shift=0)

    @classmethod
    def from_pretrained(cls, source: Any, *, vcut: Vcut | None = None, **options: Any) -> Any:
        """As in diffusers, with all its options; then folded to `vcut`, None for the build that the folder holds."""
        loaded = super().from_pretrained(source, **options)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with output_loading_info
        if vcut is not None and vcut != model.network.config.vcut:
            model.adopt(fold(model.network, vcut))
            model.register_to_config(vcut=vcut)
        return loaded

    def forward(
        self, sample: Tensor, timestep: Tensor | float, encoder_hidden_states: Tensor, added_time_ids: Tensor,
        return_dict: bool = True,
    ) -> UNetSpatioTemporalConditionOutput | tuple[Tensor]:  # fmt: skip
        """F as `.sample` or [0]; timestep is c_noise = 0.25 ln sigma, a number, 0-d or [b]. encoder_hidden_states is
        [b,1,c'], or [b*t,1,c'] where each frame has a key of its own. Raises ValueError for sides that are no multiples
        of the network's stride, and for keys of another number."""
        (b, t), keys = sample.shape[:2], encoder_hidden_states
        if len(keys) not in (b, b * t):
            need = f"need one row a video, {b}, or a frame, {b * t}"
            raise ValueError(f"encoder_hidden_states is {list(keys.shape)}; {need}")
        if len(keys) != b:
            keys = keys.unflatten(0, (b, t))
        level = torch.as_tensor(timestep, device=sample.device).expand(b)
        out = self.network(sample, level, keys, added_time_ids)
        return UNetSpatioTemporalConditionOutput(sample=out) if return_dict else (out,)

    def _set_gradient_checkpointing(self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint) -> None:
        self.gradient_checkpointing = enable
        checkpoint_activations(self.network, gradient_checkpointing_func if enable else None)

    @property
    def attn_processors(self) -> dict[str, Any]:
        raise NotImplementedError(REPLACE)

    def set_attn_processor(self, _processor: Any) -> None:
        raise NotImplementedError(REPLACE)
