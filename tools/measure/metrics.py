"""Measures of videos: consistency, dynamics, fidelity, statistics, and distance from a known right answer.

Axes: t frames, n frames of any videos, c = 3 colours (RGB), h w pixels, d features, m elements of a sample. Frames are
float tensors [t,3,h,w] in [0,1]. A feature extractor is any callable from frames [n,3,h,w] to features [n,d].

Consistencies are Eq. 5 to 8 of "Faster Image2Video Generation" (arXiv 2407.19205), section IV-B, which builds on VBench
(arXiv 2311.17982); each other measure names its source. What the paper fixes beside a formula is left to the caller:
which network makes the features, which videos and images are measured, at how many frames a second.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import minisvd
from tools.tiny import scenes

Features = Callable[[Tensor], Tensor]
Flow = Callable[[Tensor], Tensor]
Values = np.ndarray | Sequence[float]

BATCH = 16  # frames in a network at a time
HUBS = ("hf-hub:", "local-dir:")  # how a model's name begins that is in neither library


# --- consistency ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consistencies:
    """Eq. 5, 7, 6 and 8 of arXiv 2407.19205, each in [-1,1]: see `consistency`."""

    subject: float
    background: float
    image_subject: float
    image_background: float


def consistencies(frames: Tensor, image: Tensor, *, subject: Features, background: Features) -> Consistencies:
    """The four measures of frames [t,3,h,w] that were made from an image [3,H,W], with one extractor for each pair.

    Subject and background differ in nothing but the extractor: the paper takes DINO for the one, CLIP for the other.
    """
    if len(frames) < 2 or image.ndim != 3:
        raise ValueError(f"frames are {list(frames.shape)}, image {list(image.shape)}: need [t,3,h,w], t > 1, [3,H,W]")
    _check_numbers(frames, image)
    d, c = subject(frames), background(frames)
    return Consistencies(
        subject=consistency(d),
        background=consistency(c),
        image_subject=consistency(d, subject(image[None])[0]),
        image_background=consistency(c, background(image[None])[0]),
    )


def consistency(features: Tensor, reference: Tensor | None = None) -> float:
    """1/(T-1) sum over t = 2..T of (<r, d_t> + <d_t-1, d_t>) / 2, with d_t the frames' normalised features [t,d].

    r is the first frame's, d_1 (Eq. 5 with DINO, Eq. 7 with CLIP), or the normalised `reference` [d], that of the image
    which the video was made from (Eq. 6 and 8). A feature of zeros, which has no direction, has the product 0.
    VBench cuts products below 0, and compares with the image otherwise; the paper does neither.
    """
    _check_numbers(features, *([] if reference is None else [reference]), least=2)
    if reference is not None and reference.shape != features.shape[1:]:
        raise ValueError(
            f"features are {list(features.shape)}, reference {list(reference.shape)}: need one size of both"
        )
    d = F.normalize(features.double(), dim=-1)
    r = d[0] if reference is None else F.normalize(reference.double(), dim=-1)
    return ((d[1:] @ r + (d[:-1] * d[1:]).sum(dim=-1)) / 2).mean().item()


# --- feature extractors ---------------------------------------------------------------------------------------------


def pixel_features(frames: Tensor) -> Tensor:
    """The pixels of frames [n,3,h,w] themselves, less each frame's mean: [n, 3*h*w]."""
    pixels = rearrange(frames, "n c h w -> n (c h w)")
    return pixels - pixels.mean(dim=1, keepdim=True)


def tiny_features() -> Features:
    """The image encoder of the tiny model that minisvd ships, trained on 64x64 scenes: d = 128."""
    clip = minisvd.load("tiny").clip
    return _in_batches(lambda frames: rearrange(clip(2 * frames - 1), "n 1 d -> n d"))


def open_clip_features(name: str, pretrained: str | None = None) -> Features:
    """CLIP image features, not normalised: any model that open_clip has, behind its own preprocessing.

    `pretrained` is one of the model's tags, downloaded once, or a file of weights; None is the first of the tags.
    `name` may also be hf-hub:owner/name or local-dir:folder, which hold their weights.
    ValueError: no such model, tag or file; weights that do not fit or cannot be downloaded.
    """
    import open_clip  # slow to import: only who extracts pays
    from open_clip.pretrained import download_pretrained
    from open_clip.transform import PreprocessCfg, image_transform_v2

    if not name.startswith(HUBS):
        _check_known("open_clip", name, open_clip.list_models())
        tags = open_clip.list_pretrained_tags_by_model(name)
        pretrained = pretrained or next(iter(tags), "")
        tag = open_clip.get_pretrained_cfg(name, pretrained)
        if not tag and not Path(pretrained).is_file():
            raise ValueError(f"{name} has no weights {pretrained!r}: give {' or '.join([*tags, 'a file of weights'])}")
        with _one_sentence(name, pretrained):
            download_pretrained(tag)
    with _one_sentence(name, pretrained):
        model: Any = open_clip.create_model(name, pretrained=pretrained).eval()
    transform: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    return _in_batches(lambda frames: model.encode_image(transform(frames)))


def timm_features(name: str, weights: str | Path | None = None) -> Features:
    """Pooled features of any model that timm has, such as the DINO vit_base_patch16_224.dino, behind its preprocessing.

    `weights` is a file with timm's names, None downloads timm's own, once. A classifier in it is left out.
    ValueError: no such model or file; weights that do not fit or cannot be downloaded.
    """
    import timm  # slow to import: only who extracts pays
    from timm.data import create_transform, resolve_model_data_config
    from timm.models import load_state_dict

    if not name.startswith(HUBS):
        _check_known("timm", name, [*timm.list_models(), *timm.list_pretrained()])
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"{name} has no weights {str(weights)!r}: give a file of weights")
    with _one_sentence(name, weights):
        model: Any = timm.create_model(name, pretrained=weights is None, num_classes=0).eval()
        if weights is not None:
            classifier = model.pretrained_cfg["classifier"]
            heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
            state = load_state_dict(str(weights))
            model.load_state_dict({key: value for key, value in state.items() if not key.startswith(heads)})
    transform: Any = create_transform(**resolve_model_data_config(model), is_training=False)
    return _in_batches(lambda frames: model(transform(frames)))


def _in_batches(extract: Features) -> Features:
    """`extract` on BATCH frames at a time, without gradients."""

    @torch.inference_mode()
    def features(frames: Tensor) -> Tensor:
        return torch.cat([extract(batch).float() for batch in frames.float().split(BATCH)])

    return features


def _check_known(library: str, name: str, names: Iterable[str]) -> None:
    if name not in names:
        close = get_close_matches(name, names, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"see {library}.list_models() for its names"
        raise ValueError(f"{library} has no model {name!r}: {hint}")


@contextmanager
def _one_sentence(name: str, weights: object) -> Iterator[None]:
    """Turn whatever a library says of weights that it cannot get or load into a ValueError of one line."""
    try:
        yield
    except Exception as error:  # no connection, a wrong or broken file: each library and case has its own class
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load {weights or 'the weights'} of {name}, give a file that fits: {reason}"
        ) from error


# --- dynamics -------------------------------------------------------------------------------------------------------


def gaussian(length: int, sigma: float) -> Tensor:
    """A window [length] that sums to 1."""
    x = torch.arange(length) - (length - 1) / 2
    return torch.softmax(-(x**2) / (2 * sigma**2), dim=0)


def windowed(images: Tensor, window: Tensor, padding: int = 0) -> Tensor:
    """Each place's mean of images [n,c,h,w] under a window along both sides; outside is 0, if `padding` lets it in."""
    rows = rearrange(images, "n c h w -> (n c) 1 h w")
    window = window.to(images.dtype)
    rows = F.conv2d(rows, window[None, None, :, None], padding=(padding, 0))
    rows = F.conv2d(rows, window[None, None, None, :], padding=(0, padding))
    return rearrange(rows, "(n c) 1 h w -> n c h w", n=len(images))


STEPS, RIDGE = 10, 1e-3  # of `lucas_kanade`: steps a level; the square of a gradient that counts as none


@torch.no_grad()
def lucas_kanade(frames: Tensor) -> Tensor:
    """Optical flow [t-1,2,h,w] of frames [t,3,h,w] as (x, y) in pixels: what is at p in a frame is at p + flow(p) next.

    Coarse to fine, halving until the shorter side is under 32. At each level, from the flow of the coarser one, STEPS
    times: warp the next frame back, r = frame - warped, and add the d that minimises, over a Gaussian window and the
    three colours, sum (r - g . d)^2 + RIDGE |d|^2 with g the frame's gradient; d is at most a pixel. What the warp
    fetches from outside the frame has no weight, and where nothing has texture the coarser flow stands.
    On textures of 6 to 24 pixels that move by up to 7, it is wrong by under 0.1 pixel in the mean.
    Source: Lucas and Kanade, 1981, with the gradient of the frame that stays, as in Baker and Matthews, 2004.
    """
    _check_numbers(frames, least=2)
    levels = [frames.float()]
    while min(levels[-1].shape[-2:]) >= 32:
        half = [math.ceil(side / 2) for side in levels[-1].shape[-2:]]
        levels.append(F.interpolate(levels[-1], half, mode="bilinear", antialias=True))
    flow = torch.zeros(len(frames) - 1, 2, *levels[-1].shape[-2:])
    for level in reversed(levels):
        (h, w), (old_h, old_w) = level.shape[-2:], flow.shape[-2:]
        flow = F.interpolate(flow, (h, w), mode="bilinear") * torch.tensor([w / old_w, h / old_h])[:, None, None]
        flow = _refined(level[:-1], level[1:], flow)
    return flow


def _refined(now: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    """One level of `lucas_kanade`: frames [p,3,h,w] and next frames, flow [p,2,h,w] -> better flow."""
    h, w = now.shape[-2:]
    size = torch.tensor([w, h])
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    padded = F.pad(now, (1, 1, 1, 1), mode="replicate")
    gx = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    gy = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    for _ in range(STEPS):
        place = 2 * rearrange(torch.stack([x, y]) + flow, "p xy h w -> p h w xy") / size - 1
        inside = (place.abs() <= 1).all(dim=-1)[:, None]
        r = (now - F.grid_sample(after, place, "bicubic", "border", align_corners=False)) * inside
        products = [gx * gx * inside, gx * gy * inside, gy * gy * inside, gx * r, gy * r]
        sums = torch.stack([product.sum(dim=1) for product in products], dim=1)
        xx, xy, yy, xr, yr = windowed(sums, gaussian(13, 2.0), padding=6).unbind(dim=1)
        xx, yy = xx + RIDGE, yy + RIDGE
        step = torch.stack([yy * xr - xy * yr, xx * yr - xy * xr], dim=1) / (xx * yy - xy * xy)[:, None]
        flow = flow + step / step.norm(dim=1, keepdim=True).clamp(min=1)
    return flow


@dataclass(frozen=True)
class Dynamics:
    """How much a video moves: pixels per frame, the same over the shorter side, and whether that is called moving."""

    pixels: float
    relative: float
    moving: bool


def dynamics(frames: Tensor, flow: Flow = lucas_kanade) -> Dynamics:
    """How much frames [t,3,h,w] move: per pair of frames, the mean length of the largest 5 % of its flow vectors.

    `pixels` is the mean of that over the pairs. `moving`: it is above 6 pixels for each 256 of the shorter side in at
    least t / 4 pairs, rounded, and in one. Both rules are those of VBench's dynamic degree (vbench/dynamic_degree.py).
    `flow` maps frames to flow [t-1,2,h,w], in pixels. `lucas_kanade` is not RAFT, which VBench takes, and VBench first
    thins its frames to about 8 a second: so the number is not VBench's. Of a small shape it is some 0.4 pixels high.
    """
    if len(frames) < 2:
        raise ValueError(f"frames are {list(frames.shape)}: need at least two")
    lengths = flow(frames).norm(dim=1).flatten(1)
    largest = lengths.topk(max(1, int(0.05 * lengths.shape[1]))).values.mean(dim=1)
    side = min(frames.shape[-2:])
    pairs = (largest > 6 * side / 256).sum().item()
    mean = largest.mean().item()
    return Dynamics(pixels=mean, relative=mean / side, moving=pairs >= max(1, round(len(frames) / 4)))


@torch.no_grad()
def smoothness(frames: Tensor, flow: Flow = lucas_kanade) -> float:
    """1 - mean |interpolated - dropped| in [0,1], 1 best: every second of frames [t,3,h,w] is dropped and made again of
    its two neighbours; the last of an even count has only one, and counts not.

    Half-way between a and b, with f the flow from a to b: m(q) = (a(p) + b(p + f(p))) / 2 at p + f(p)/2 = q.
    Source: motion smoothness of VBench (vbench/motion_smoothness.py), as arXiv 2407.19205 takes it. Both interpolate by
    a network, AMT; `flow` stands in for it, so the number is not theirs.
    """
    _check_numbers(frames, least=3)
    kept = frames[::2].float()
    dropped = frames[1::2][: len(kept) - 1].float()
    a, b, f = kept[:-1], kept[1:], flow(kept)
    back = -f / 2
    for _ in range(3):  # the fixed point p = q - f(p) / 2
        back = -_fetched(f, back) / 2
    middle = (_fetched(a, back) + _fetched(b, -back)) / 2
    return 1 - (middle - dropped).abs().mean().item()


def _fetched(images: Tensor, offset: Tensor) -> Tensor:
    """images [n,c,h,w] at q + offset(q), for offsets [n,2,h,w] as (x, y) in pixels."""
    h, w = images.shape[-2:]
    y, x = torch.meshgrid(torch.arange(h) + 0.5, torch.arange(w) + 0.5, indexing="ij")
    place = 2 * rearrange(torch.stack([x, y]) + offset, "n xy h w -> n h w xy") / torch.tensor([w, h]) - 1
    return F.grid_sample(images, place, "bilinear", "border", align_corners=False)


# --- fidelity to a reference ----------------------------------------------------------------------------------------


def psnr(a: Tensor, b: Tensor) -> float:
    """10 log10(1 / mean (a - b)^2), in decibels, over all of two tensors of one shape in [0,1]; inf if equal."""
    _check_same_shape(a, b)
    _check_numbers(a, b)
    error = (a.double() - b.double()).square().mean().item()
    return -10 * math.log10(error) if error else math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of frames [n,c,h,w] in [0,1]: the mean over frames, channels and places of

    (2 m_a m_b + K1^2) (2 s_ab + K2^2) / ((m_a^2 + m_b^2 + K1^2) (s_a^2 + s_b^2 + K2^2))

    where m and s are means and (co)variances under an 11x11 Gaussian window, sigma 1.5, at every place where it fits
    in the frame; K1 = 0.01, K2 = 0.03. Source: Wang et al. 2004, eq. 13, without shrinking the frames first.
    """
    _check_same_shape(a, b)
    if a.ndim != 4 or min(a.shape[-2:]) < 11:
        raise ValueError(f"frames are {list(a.shape)}: need [n,c,h,w], both sides at least 11")
    _check_numbers(a, b)
    a, b, c1, c2 = a.double(), b.double(), 0.01**2, 0.03**2
    m_a, m_b, aa, bb, ab = (windowed(x, gaussian(11, 1.5)) for x in (a, b, a * a, b * b, a * b))
    luminance = (2 * m_a * m_b + c1) / (m_a**2 + m_b**2 + c1)
    structure = (2 * (ab - m_a * m_b) + c2) / (aa - m_a**2 + bb - m_b**2 + c2)
    return (luminance * structure).mean().item()


def _check_numbers(*tensors: Tensor, least: int = 1) -> None:
    """Raise ValueError if the first tensor has fewer than `least` rows, or any a value that is not finite."""
    if len(tensors[0]) < least:
        raise ValueError(f"the shape is {list(tensors[0].shape)}: need at least {least} frames")
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError("some values are infinite or not numbers: nothing can be measured by them, leave them out")


def _check_same_shape(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape or not a.numel():
        raise ValueError(f"the shapes are {list(a.shape)} and {list(b.shape)}: need one shape, not empty")


# --- statistics -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """The mean of differences, the interval that holds it, its standard error and its p: see `paired_difference`."""

    mean: float
    low: float
    high: float
    error: float
    p: float


def bootstrap_interval(
    values: Values,
    statistic: Callable[[np.ndarray], float],
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """The percentile bootstrap interval of `statistic` over m values: its middle `level` over samples of them.

    Each sample draws m of the values, or rows of an array [m,...], with replacement.
    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    values = _finite(values)
    samples = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    found = [statistic(values[rows]) for rows in samples]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def clustered(
    values: np.ndarray, statistic: Callable[..., Any] = np.mean, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of values [m,k], k of each of m scenes, and its 95 % bootstrap interval: whole scenes are drawn, so
    that what a scene's k values share does not pass for as many findings. `statistic` is numpy's, with its `axis`.
    Source: Davison and Hinkley, 1997, section 3.8."""
    values = _finite(values)
    samples = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    found = statistic(values[samples].reshape(draws, -1), axis=1)
    low, high = np.quantile(found, [0.025, 0.975])
    return float(statistic(values)), float(low), float(high)


def paired_difference(a: Values, b: Values) -> Difference:
    """The mean of a_i - b_i over scenes i, and its 95 % bootstrap interval: the scenes are drawn, as pairs.

    a and b are [m], or [m,k] for k pairs of each scene, which count as their mean. p is that of Student's t over the
    scenes, two-sided: how likely so large a mean is if there is none; 1 if every scene's difference is 0.
    """
    a, b = _finite(a), _finite(b)
    if a.shape != b.shape:
        raise ValueError(f"{len(a)} values and {len(b)}: need a pair for each scene")
    scenes_own = (a - b).reshape(len(a), -1)
    mean, low, high = clustered(scenes_own.mean(axis=1, keepdims=True))
    error = float(scenes_own.mean(axis=1).std(ddof=1) / math.sqrt(len(a))) if len(a) > 1 else math.inf
    p = (student_p(mean / error, len(a) - 1) if len(a) > 1 else 1.0) if error else float(mean == 0)
    return Difference(mean, low, high, error, p)


def student_p(t: float, df: int) -> float:
    """P(|T| >= |t|) of Student's t with df > 0 degrees of freedom, by its finite series in the cosine of
    atan(t / sqrt(df)). Source: Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(abs(t) / math.sqrt(df))
    cos, term, total = math.cos(angle), 1.0, 0.0
    first = df % 2
    for i in range(first, df - 1, 2):  # 1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 ..., or cos + 2/3 cos^3 ...
        term = (cos if first else 1.0) if i == first else term * cos * cos * (i - 1) / i
        total += term
    within = 2 / math.pi * (angle + math.sin(angle) * total) if first else math.sin(angle) * total
    return max(0.0, 1 - within)


def smallest_effect(error: float, comparisons: int = 1, power: float = 0.8) -> float:
    """(z_(1 - 0.05 / 2m) + z_power) error: the effect that a study finds with this power, at the standard `error` of a
    difference, when it makes m comparisons and each has to pass Bonferroni's level, the first of `holm`.
    Source: Bloom, Minimum detectable effects, 1995."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - 0.025 / comparisons) + normal.inv_cdf(power)) * error


def holm(p: Values) -> np.ndarray:
    """p values [m] corrected for their number: max over j <= i of (m - j + 1) p_(j), at most 1, in the given order.

    If all that are at most 0.05 are called effects, the chance that any of them is none is at most 5 %.
    Source: Holm, 1979.
    """
    p = _finite(p)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def clustered_share(hits: np.ndarray) -> tuple[float, float, float]:
    """The share of true in hits [m,k], k of each of m scenes; Wilson's interval for as many trials as they are worth:

    p (1 - p) / var(p), with var(p) the squared standard error of the scenes' own shares, at least m and at most m k; m
    where all hits agree, for then nothing tells how much a scene's agree. Source: Kish, 1965 (the design effect).
    """
    hits = _finite(hits)
    m, k = hits.shape
    p, worth = float(hits.mean()), float(m)
    variance = hits.mean(axis=1).var(ddof=1) / m if m > 1 else 0.0
    if variance > 0:
        worth = min(max(p * (1 - p) / variance, m), m * k)
    return (p, *wilson_interval(p * worth, worth))


def wilson_interval(successes: float, n: float, level: float = 0.95) -> tuple[float, float]:
    """The chances p that s successes of n trials leave open: all with |s/n - p| <= z sqrt(p (1 - p) / n).

    z is the normal quantile of (1 + level) / 2. Source: Wilson, 1927.
    """
    if not 0 <= successes <= n or n < 1:
        raise ValueError(f"{successes} successes of {n}: need at least one trial, and no more successes than trials")
    z, p = NormalDist().inv_cdf((1 + level) / 2), successes / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def spearman(a: Values, b: Values) -> float:
    """Pearson's correlation of the ranks of m pairs, equal values sharing their mean rank; nan if all are equal."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values and {len(b)}: need pairs")
    x, y = (ranks - ranks.mean() for ranks in (_ranks(_finite(a)), _ranks(_finite(b))))
    scale = math.sqrt((x @ x) * (y @ y))
    return float(x @ y) / scale if scale else math.nan


def _ranks(values: np.ndarray) -> np.ndarray:
    """1 for the smallest; equal values share the mean of their places."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def _finite(values: Values) -> np.ndarray:
    array = np.asarray(values, dtype=float)
    if not array.size or not np.isfinite(array).all():
        raise ValueError(
            f"of {array.size} values {np.isfinite(array).sum()} are finite: leave the others out, keep one"
        )
    return array


# --- distance from a known right answer -----------------------------------------------------------------------------

TRAVEL = 4.0  # pixels; of a shape that moves less, heading and relative speed are not measured
RIGHT_HEADING, RIGHT_COLOUR, RIGHT_OVERLAP = 30.0, 0.1, 0.7  # degrees; RGB distance; a star is a pixel off at 0.7


@dataclass(frozen=True)
class Measured:
    """How far a clip of a scene is from the one right answer. Lengths are pixels of the 64x64 frame.

    heading_error        degrees in [0,180]; nan where the true path is under TRAVEL pixels
    asked_speed, speed   pixels per frame: what bucket and fps ask for, and of the line through the found positions
    speed_error          |speed - asked_speed| / asked_speed; nan as for the heading
    last_position_error  distance of the shape from its true place in the last frame
    colour_error         distance of the body's median colour from the true one, RGB in [0,1]
    shape_kept           its outline, over all frames, is nearest to that of the right class
    class_right          the same of each frame's own outline
    overlap              of each frame's shape with the true one at its true place: intersection over union, in pixels
                         nearer to the shape's colour than half-way to the backdrop's
    found                fraction of the frames in which there is a shape
    first_frame_psnr     decibels, of the first frame against the true first frame; inf if equal
    psnr                 decibels, of all frames against the true clip; inf if equal
    right                found in every frame, heading within 30 degrees if measured, colour within 0.1, shape kept
    right_in_every_frame right, and each frame alone is of the right class, with an overlap of at least 0.7

    What needs a shape that was not found is nan.
    """

    heading_error: float
    asked_speed: float
    speed: float
    speed_error: float
    last_position_error: float
    colour_error: float
    shape_kept: bool
    class_right: tuple[bool, ...]
    overlap: tuple[float, ...]
    found: float
    first_frame_psnr: float
    psnr: float
    right: bool
    right_in_every_frame: bool


def against_truth(frames: Tensor, scene: scenes.Scene, motion_bucket: float, fps: float) -> Measured:
    """Frames [t,3,64,64] in [0,1], t > 1, against the clip of t frames that scene, bucket and fps fix."""
    if len(frames) < 2 or frames.shape[1:] != (3, scenes.SIZE, scenes.SIZE):
        raise ValueError(f"frames are {list(frames.shape)}: need [t,3,{scenes.SIZE},{scenes.SIZE}] with t > 1")
    _check_numbers(frames)
    places = scenes.path(scene, motion_bucket, fps, len(frames))
    truth = torch.from_numpy(scenes.render(scene, places)).float() / 255
    track = scenes.track(frames.float().numpy(), scene)

    asked = scenes.speed(motion_bucket) / fps
    moves = asked * (len(frames) - 1) >= TRAVEL
    heading_error = math.degrees(scenes.angle_between(track.heading, scene.heading)) if moves else math.nan
    found = float(np.isfinite(track.positions).all(axis=1).mean())
    colour_error = float(np.linalg.norm(track.rgb - np.array(scene.rgb)))
    class_right = tuple(shape == scene.shape for shape in track.shapes)
    overlap = tuple(scenes.same_place(frames.float().numpy(), truth.numpy(), scene).tolist())
    kept = track.shape == scene.shape
    right = found == 1 and not heading_error > RIGHT_HEADING and colour_error <= RIGHT_COLOUR and kept
    return Measured(
        heading_error=heading_error,
        asked_speed=asked,
        speed=track.speed,
        speed_error=abs(track.speed - asked) / asked if moves else math.nan,
        last_position_error=float(np.linalg.norm(track.positions[-1] - places[-1])),
        colour_error=colour_error,
        shape_kept=kept,
        class_right=class_right,
        overlap=overlap,
        found=found,
        first_frame_psnr=psnr(frames[0], truth[0]),
        psnr=psnr(frames, truth),
        right=right,
        right_in_every_frame=right and all(class_right) and min(overlap) >= RIGHT_OVERLAP,
    )
