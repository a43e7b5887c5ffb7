"""Theorem: with the same weights, minisvd and diffusers (residual eps as in the original) compute the same functions.

Relative errors are the largest difference over the largest magnitude, in float32, at most 1e-5 per part.
"""

import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from PIL import Image
from torch import Tensor

import minisvd
from conftest import CLIP, UNET_CONFIG, VAE, original_eps, randomised, relative_error
from minisvd import AutoencoderKLTemporalDecoder, ClipConfig, ImageEncoder, SpatioTemporalUNet, UNetConfig, VAEConfig


def unet_inputs(b: int, t: int, h: int, w: int, c_context: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(b, t, 8, h, w, generator=generator)
    c_noise = torch.linspace(-1.5, 1.6, b)
    embeds = torch.randn(b, 1, c_context, generator=generator)
    ids = torch.tensor([[6.0, 127.0, 0.02], [11.0, 30.0, 0.1]])[:b]
    return sample, c_noise, embeds, ids


@torch.no_grad()
def test_unet_equals_diffusers(diffusers_pipeline):
    unet = SpatioTemporalUNet(UNET_CONFIG)
    unet.load_state_dict(diffusers_pipeline.unet.state_dict())
    inputs = unet_inputs(2, 5, 8, 12, 48)
    theirs = diffusers_pipeline.unet(*inputs, return_dict=False)[0]
    error = relative_error(unet(*inputs), theirs)
    print(f"tiny UNet: relative error {error:.1e}")
    assert error <= 1e-5

    unet.get_parameter("up_blocks.0.resnets.0.temporal_res_block.norm1.weight")[0] += 0.1  # control: one weight
    assert relative_error(unet(*inputs), theirs) > 1e-5


@torch.no_grad()
@pytest.mark.slow
def test_released_unet_equals_diffusers():
    """The full configuration, 1,524,623,082 parameters, random weights in one copy that both sides share."""
    torch.manual_seed(0)
    theirs = original_eps(DiffusersUNet().eval())
    with torch.device("meta"):
        ours = SpatioTemporalUNet(UNetConfig())
    ours.load_state_dict(theirs.state_dict(), assign=True)
    shared = {p.data_ptr() for p in theirs.parameters()}
    assert all(p.data_ptr() in shared for p in ours.parameters())
    assert sum(p.numel() for p in ours.parameters()) == 1_524_623_082
    inputs = unet_inputs(1, 2, 8, 8, 1024)
    error = relative_error(ours(*inputs), theirs(*inputs, return_dict=False)[0])
    print(f"released UNet: relative error {error:.1e}")
    assert error <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.slow
def test_vae_equals_diffusers(diffusers_pipeline, chunk):
    """Encoder mode and decoded frames, whatever the chunk: diffusers decodes all frames at once here."""
    vae = AutoencoderKLTemporalDecoder(VAEConfig(block_out_channels=VAE["block_out_channels"]))
    vae.load_state_dict(diffusers_pipeline.vae.state_dict())
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(2, 3, 64, 96, generator=generator) * 2 - 1
    error = relative_error(vae.encode(image), diffusers_pipeline.vae.encode(image).latent_dist.mode())
    assert error <= 1e-5

    latents = torch.randn(2, 5, 4, 8, 12, generator=generator)
    theirs = diffusers_pipeline.vae.decode(latents.flatten(0, 1) / 0.18215, num_frames=5).sample.unflatten(0, (2, 5))
    error = relative_error(vae.decode(latents, chunk), theirs)
    print(f"VAE decode, chunk {chunk}: relative error {error:.1e}")
    assert error <= 1e-5

    by_chunks = [vae.decode(part) for part in latents.split(2, dim=1)]  # control: what chunking outside the layers does
    assert relative_error(torch.cat(by_chunks, dim=1), theirs) > 1e-3


@torch.no_grad()
def test_clip_equals_transformers(diffusers_pipeline, diffusers_folder):
    """From the same folder, for an image that shrinks along one side and grows along the other."""
    encoder = minisvd.load(diffusers_folder).clip
    assert isinstance(encoder, ImageEncoder)
    assert encoder.config.hidden_size == CLIP["hidden_size"]
    image = torch.rand(2, 3, 90, 500, generator=torch.Generator().manual_seed(3)) * 2 - 1

    def theirs(resized: Tensor) -> Tensor:
        mean, std = (torch.tensor(v)[:, None, None] for v in (ClipConfig.mean, ClipConfig.std))
        return diffusers_pipeline.image_encoder(((resized + 1) / 2 - mean) / std).image_embeds[:, None]

    from diffusers.pipelines.stable_video_diffusion.pipeline_stable_video_diffusion import _resize_with_antialiasing

    error = relative_error(encoder(image), theirs(_resize_with_antialiasing(image, (224, 224))))
    print(f"CLIP: relative error {error:.1e}")
    assert error <= 1e-5
    plain = torch.nn.functional.interpolate(image, (224, 224), mode="bicubic", align_corners=True)
    assert relative_error(encoder(image), theirs(plain)) > 1e-3  # control: without the blur


@torch.no_grad()
@pytest.mark.parametrize("guidance", [(1.0, 3.0), (2.0, 2.0), (1.0, 1.0)])
@pytest.mark.slow
def test_pipeline_equals_diffusers(diffusers_pipeline, diffusers_folder, guidance):
    """The same image and noise give the same latents at every step and the same frames, within 1e-4."""
    generator = torch.Generator().manual_seed(4)
    image = Image.fromarray(torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8).numpy())
    noise = torch.randn(1, 3, 4, 8, 8, generator=generator)
    svd = minisvd.load(diffusers_folder)
    settings = {"num_frames": 3, "size": (64, 64), "fps": 7, "motion_bucket": 100}

    ours: list[Tensor] = []
    aug_noise = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    video = svd(
        image, steps=5, noise=noise, aug_noise=aug_noise, guidance=guidance, progress=False, **settings,
        callback=lambda *call: ours.append(call[2]),
    )  # fmt: skip

    theirs: list[Tensor] = []

    def keep(_pipeline, _step, _timestep, tensors):
        theirs.append(tensors["latents"])
        return tensors

    frames = diffusers_pipeline(
        image, height=64, width=64, num_frames=3, num_inference_steps=5, fps=7, motion_bucket_id=100,
        min_guidance_scale=guidance[0], max_guidance_scale=guidance[1], latents=noise, output_type="pt",
        decode_chunk_size=3, generator=torch.Generator().manual_seed(5), callback_on_step_end=keep,
    ).frames  # fmt: skip

    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    print("latents, step by step:", *(f"{error:.1e}" for error in errors))
    assert len(errors) == 5
    assert max(errors) <= 1e-4
    assert (video.frames - frames[0]).abs().max() <= 1e-4

    other = svd(image, steps=5, noise=noise, aug_noise=-aug_noise, guidance=guidance, progress=False, **settings)
    assert (other.frames - frames[0]).abs().max() > 1e-4  # control: another draw of the noise augmentation


def test_randomised_leaves_no_parameter_as_initialised():
    module = randomised(torch.nn.GroupNorm(2, 4))
    assert not torch.isin(torch.cat([module.weight, module.bias]), torch.tensor([0.0, 1.0])).any()
