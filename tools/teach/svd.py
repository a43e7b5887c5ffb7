# %% [markdown]
# # From one image to a video, opened up
#
# Stable Video Diffusion makes a video that starts from an image. Here the small model that ships with minisvd does, on
# two CPU cores, and every step is looked at. What a cell claims it asserts, so if it has run, it is true of this model.
# Start Jupyter anywhere in a checkout in which `pip install .` was done.

# %%
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

root = next(p for p in (Path.cwd(), *Path.cwd().parents) if (p / "weights/tiny/example.png").is_file())
os.chdir(root)
sys.path.insert(0, str(root))

import torch
from torch import Tensor, nn

import minisvd
from minisvd.attention import AlphaBlender
from minisvd.images import load_image
from tools.cost.accounting import run_cost, unet_blocks
from tools.teach.look import beside, grey, heat, strip
from tools.teach.maps import attended, attentions, watched, weights

svd = minisvd.load("tiny")
svd.generation = replace(svd.generation, steps=10, guidance=(1.5, 1.5))  # more to look at than its three, unguided
unet, vae, clip = svd.unet, svd.vae, svd.clip
T, (W, H) = svd.generation.num_frames, svd.generation.size
for name in ("unet", "vae", "clip"):
    print(f"{name:<5}{sum(p.numel() for p in getattr(svd, name).parameters()):>12,} parameters")

# %% [markdown]
# ## Image to latent, and to one vector
#
# The VAE makes the image a latent, four channels on a grid an eighth as wide; CLIP makes it ONE vector. Both go into
# the network: the latent beside the noise in every frame, the vector as the one key of every cross-attention.

# %%
pixels = load_image("weights/tiny/example.png", (W, H))  # in [-1, 1]
with torch.no_grad():
    latent, key = vae.encode(pixels), clip(pixels)
assert latent.shape == (1, vae.config.latent_channels, H // vae.config.factor, W // vae.config.factor)
assert key.shape == (1, 1, unet.config.cross_attention_dim)
channels = {f"latent {i}": grey(channel, 8) for i, channel in enumerate(latent[0])}
beside({"image": strip((pixels + 1) / 2), **channels})

# %% [markdown]
# ## Noise levels
#
# A video is noise walked down from sigma_max to 0. The levels are even in their seventh root (EDM, Eq. 5), so that most
# of them are small: a third and more lie below sigma = 10, a seventieth of the way.

# %%
sigmas = minisvd.edm_sigmas(svd.generation.steps)
roots = sigmas[:-1].double() ** (1 / 7)
assert torch.allclose(roots.diff(), roots.diff().mean(), rtol=1e-3)
assert sigmas[-1] == 0
assert (sigmas[:-1] < 10).float().mean() > 1 / 3
c_skip, c_out, c_in, c_noise = minisvd.preconditioning(sigmas[:-1])
assert torch.allclose(
    c_in**2 * (sigmas[:-1] ** 2 + 1), torch.ones(len(c_in)), atol=1e-4
)  # the network's input: variance 1
assert c_skip[-1] > 0.999  # at the end D is the input,
assert c_skip[0] < 1e-5  # and at the beginning the network's word alone
print(*(f"{sigma:.3g}" for sigma in sigmas.tolist()))

# %% [markdown]
# ## A video, and what was thought on the way
#
# `callback` sees every step: its number, the level that it reached, the noisy latents there, and D, the estimate of the
# clean latents that it followed.

# %%
steps = []
video = svd("weights/tiny/example.png", callback=lambda *step: steps.append(step), progress=False)
assert len(steps) == svd.generation.steps
assert video.frames.shape == (T, 3, H, W)
strip(video.frames, 2)

# %%
at = range(len(steps))


def decoded(latents: Tensor) -> Tensor:
    with torch.no_grad():
        return ((vae.decode(latents)[0] + 1) / 2).clamp(0, 1)


estimates = {f"step {steps[i][0]}": decoded(steps[i][3]) for i in at}
away = [(D - steps[-1][3]).square().mean().sqrt().item() for *_, D in steps]
assert torch.allclose(steps[-1][2], steps[-1][3], atol=1e-5)  # at sigma = 0 the latents are the estimate
assert away[-2] < 0.1 * away[0]  # which has come near its end by then
assert steps[0][2].std() > 100  # while the latents of the first steps are all noise
print("from the end, root mean square:", *(f"{away[i]:.3f}" for i in at))
beside({name: strip(frames[[0, T - 1]]) for name, frames in estimates.items()}, 3)

# %% [markdown]
# Above: the first and the last frame of each estimate D.
#
# ## One call of the network, block by block
#
# What the network gets in the middle of the run: noisy latents, scaled by c_in, and the image's latent in every frame;
# the level; the key; fps - 1, motion bucket and noise augmentation.

# %%
step, sigma, x, _ = steps[len(steps) // 2]
c_skip, c_out, c_in, c_noise = minisvd.preconditioning(sigma)
sample = torch.cat([c_in * x, latent[:, None].expand(-1, T, -1, -1, -1)], dim=2)
given = sample, c_noise, key, torch.tensor([[6, 127, 0.02]])
blocks = list(unet_blocks(unet.config, T, (sample.shape[-1], sample.shape[-2]), batch=1))
outputs: dict[str, Tensor] = {}


def keep(name: str, module: nn.Module) -> None:
    def note(_module: nn.Module, _given: tuple[Tensor, ...], out: Tensor) -> None:
        outputs[name] = out

    module.register_forward_hook(note)


for block in blocks:
    keep(block.name, unet.get_submodule(block.name))
with torch.no_grad(), watched(unet) as seen:
    F = unet(*given)
for block in blocks:
    if len(block.leaves) == 3:  # the formulas of tools/cost know every shape
        assert outputs[block.name].shape == (T, *block.leaves), block.name
    print(f"{block.name:<28}{list(outputs[block.name].shape)}")

# %%
D = c_skip * x + c_out * F
assert (D - steps[-1][3]).square().mean() < (x - steps[-1][3]).square().mean()  # one call, and much nearer to the end
shown = {b.name.replace("_blocks", ""): outputs[b.name][0].abs().mean(0) for b in blocks if len(b.leaves) == 3}
beside({name: grey(channel, 96 // channel.shape[0]) for name, channel in shown.items()}, 7)

# %% [markdown]
# Above: the mean size of what each block gives to the first frame. The U is coarse in its middle.
#
# ## Attention maps
#
# In space, each token of a frame asks all tokens of that frame; along time, each place asks the same place in all
# frames. The query is the token that differs most from the others, marked: it lies on the shape. A row of weights sums
# to 1, heads look elsewhere than each other, and to_out(weights v) is exactly what the layer returns.

# %%
names = {"space": "up_blocks.2.attentions.0.transformer_blocks.0.attn1"}
names["time"] = names["space"].replace("transformer_blocks", "temporal_transformer_blocks")
end = steps[-1][2][0]
grid = end.shape[-2:]
place = int((end[0] - end[0].mean((1, 2), keepdim=True)).square().sum(0).argmax())
mark = divmod(place, grid[1])
maps = {}
for name in names.values():
    attention = attentions(unet)[name]
    maps[name] = weights(attention, *seen[name])
    assert torch.allclose(maps[name].sum(-1), torch.ones(()), atol=1e-5)
    assert torch.allclose(attended(attention, maps[name], seen[name][1]), attention(*seen[name]), atol=1e-4)
in_space, in_time = maps.values()
assert in_space.shape == (T, attentions(unet)[names["space"]].num_heads, grid.numel(), grid.numel())
assert in_time.shape[0] == grid.numel()
assert in_time.shape[2:] == (T, T)
assert (in_space[0, 0, place] - in_space[0, 1, place]).abs().max() > 0.01
pictures = {"frame 1": strip(video.frames[:1], 2)}
pictures |= {f"space, head {n + 1}": heat(w[place].view(grid), 16, mark) for n, w in enumerate(in_space[0])}
pictures |= {f"time, head {n + 1}": heat(w, 16) for n, w in enumerate(in_time[place])}
beside(pictures)

# %% [markdown]
# Of the maps in time, a row is the frame that asks and a column the frame that is asked.
#
# ## What the temporal layers do
#
# Each one is blended in by a learned share. With all of them set to the spatial branch alone, no frame hears of
# another: give the frames their noise in another order, and they come out in that order, to rounding. With them, they
# do not. And nothing moves: what number a frame has is for the temporal layers to know.

# %%
noise = torch.randn(1, T, *latent.shape[1:], generator=torch.Generator().manual_seed(0))
order = torch.arange(T).flip(0)
blenders = [module for module in unet.modules() if isinstance(module, AlphaBlender)]
learned = [blender.mix_factor.detach().clone() for blender in blenders]


def generate(noise: Tensor) -> Tensor:
    return svd("weights/tiny/example.png", noise=noise, progress=False).frames


with_time, with_time_turned = generate(noise), generate(noise[:, order])
for blender in blenders:
    blender.mix_factor.data.fill_(100.0)  # sigmoid(100) = 1: all of the spatial branch
latents: list[Tensor] = []
svd("weights/tiny/example.png", noise=noise, callback=lambda *s: latents.append(s[2]), progress=False)
svd("weights/tiny/example.png", noise=noise[:, order], callback=lambda *s: latents.append(s[2]), progress=False)
for blender, mix in zip(blenders, learned, strict=True):
    blender.mix_factor.data.copy_(mix)
n = svd.generation.steps
alone, turned = latents[n - 1], latents[2 * n - 1]
assert (alone[:, order] - turned).abs().max() < 1e-3 * alone.abs().max()  # frame by frame
assert (with_time.flip(0) - with_time_turned).abs().mean() > 0.01  # with them: a video, whatever the noise's order
moved = [(frames - frames[:1]).abs().mean().item() for frames in (with_time, decoded(alone))]
assert moved[1] < moved[0] / 5
print("mean difference from the first frame, with and without:", *(f"{m:.3f}" for m in moved))
beside({"with": strip(with_time), "noise turned": strip(with_time_turned), "without": strip(decoded(alone))}, 1)

# %% [markdown]
# ## The theorem
#
# attention(x, c) = W c + b for one key c, because a softmax over one number is 1. Move the query, and nothing changes,
# not by a bit. Add a second key, and it does.

# %%
site = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
attention, (tokens, context) = attentions(unet)[site], seen[site]
two = torch.cat([context, torch.zeros_like(context)], dim=1)
other = tokens.flip(1)  # each place asks with another place's query
with torch.no_grad():
    assert torch.equal(attention(tokens, context), attention(other, context))
    assert (attention(tokens, two) - attention(other, two)).abs().max() > 0.1
    assert (weights(attention, tokens, context) == 1).all()
report = minisvd.check(attention, tokens.double(), context.double(), attention.double())
attention.float()
assert report.holds
print(report)

# %%
of_the_model = minisvd.check_model(unet)
assert of_the_model.holds
assert len(of_the_model.sites) == 2 * sum(".attentions." in block.name for block in blocks)
print(of_the_model)

# %% [markdown]
# ## The fold
#
# So W c + b can stand there, computed once for a video. It is the same function: the latents stay within rounding.
# Omitting the temporal ones (`vcut=True`) is another function, and a worse estimate of the first.

# %%
runs: dict[object, Tensor] = {}
counts: dict[object, int] = {}
for vcut in (False, "lossless", True):
    build = minisvd.load("tiny", vcut=vcut)
    build.generation = svd.generation
    counts[vcut] = sum(p.numel() for p in build.unet.parameters())
    seen_latents: list[Tensor] = []
    build("weights/tiny/example.png", callback=lambda *s, into=seen_latents: into.append(s[2]), progress=False)
    runs[vcut] = seen_latents[-1]
lossless, omitted = ((runs[vcut] - runs[False]).abs().max().item() for vcut in ("lossless", True))
assert counts[False] > counts["lossless"] > counts[True]
assert lossless < 1e-4
assert omitted > 100 * lossless
print(f"largest difference of the final latents: lossless {lossless:.1e}, omitted {omitted:.1e}; parameters {counts}")

# %% [markdown]
# ## Guidance and the two stages
#
# Classifier-free guidance runs two branches and goes from the unconditional estimate past the conditional one. VCUT
# stops at step c and runs one branch from there, at half the key, which gives each cross-attention the mean of both.

# %%
c = 7  # as the 17 of 25 of the paper: 2 n / 3
size = sample.shape[-1], sample.shape[-2]
costs = {cut: run_cost(unet.config, T, size, n, cut).macs for cut in (None, c, 1)}
with torch.no_grad():
    mean = (attention(tokens, context) + attention(tokens, 0 * context)) / 2
    assert torch.allclose(attention(tokens, context / 2), mean, atol=1e-5)
cut_video = svd("weights/tiny/example.png", cut_step=c, progress=False)
error = (cut_video.frames - video.frames).square().mean()
psnr = (-10 * error.log10()).item()
assert costs[1] < costs[c] < costs[None]
assert psnr > 30
print(f"c = {c}: {costs[c] / costs[None]:.1%} of the multiply-accumulates, {psnr:.1f} dB to the guided video")
beside({"guided throughout": strip(video.frames), f"c = {c}": strip(cut_video.frames)}, 1)

# %% [markdown]
# ## The frontier
#
# One video is one video. The study measured 200 unseen scenes: of the ways to spend less work, these are the ones that
# no other beats, in work and in how near the video stays to the one without cuts (PSNR, with a 95 % interval).

# %%
arms = [
    a for a in json.loads(Path("tools/results/study.json").read_text("utf-8"))["arms"] if "frontier_paired_psnr" in a
]
scored = [(arm["relative_macs"], arm["measures"]["paired_psnr"]["value"], arm) for arm in arms]
frontier = [(m, p, arm) for m, p, arm in scored if not any(o != p and o >= p and w <= m for w, o, _ in scored)]
assert [arm["name"] for *_, arm in frontier] == [arm["name"] for arm in arms if arm["frontier_paired_psnr"]]
for work, near, arm in sorted(frontier, key=lambda one: -one[0]):
    interval = arm["measures"]["paired_psnr"]
    print(f"{arm['name']:<20}{work:>7.3f} of the work {near:>6.1f} dB [{interval['low']:.1f}, {interval['high']:.1f}]")
