"""Training, whatever the model: runs that stop and go on, their checkpoints, the moving average, Muon and AdamW."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from minisvd.checkpoint import checked_dtype
from tools.output import atomic
from tools.tiny import scenes

EMA_DECAY = 0.999
SAVE_EVERY = 60  # seconds

M = TypeVar("M", bound=nn.Module)


def half(device: torch.device) -> torch.dtype:
    """bfloat16, or float32 on a CPU that has no products of it: there they would take fifty times as long."""
    return torch.float32 if checked_dtype("auto", device) == torch.float32 else torch.bfloat16


def autocast(device: torch.device) -> torch.autocast:
    """Products in `half`, on weights in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half(device) == torch.bfloat16)


@dataclass(frozen=True)
class Stage:
    """How long and how fast: `steps` of `batch` items, peak learning rate `lr`; a report every `report` steps.

    The rate falls after a share `hold` of the steps.
    """

    name: str
    steps: int
    batch: int
    lr: float
    report: int
    hold: float = 0.0

    def lr_at(self, step: int) -> float:
        """lr * min(step / 100, (1 + cos(pi x)) / 2), with x the share that is done of the steps after `hold`."""
        fallen = max(0.0, (step / self.steps - self.hold) / (1 - self.hold))
        return self.lr * min(step / 100, 0.5 + 0.5 * math.cos(math.pi * fallen))


@dataclass(frozen=True)
class Run:
    """Where a run works and on what: `work` holds checkpoints and the log; this is process `rank` of `processes`.

    Its `stages` come in turn; what a stage draws depends on its place among them.
    With `finish` nothing is trained: a stage counts as done where its checkpoint is, or, not begun, as it begins.
    """

    work: Path
    stages: tuple[Stage, ...]
    device: torch.device
    seed: int
    finish: bool = False
    rank: int = 0
    processes: int = 1

    def log(self, line: str) -> None:
        """Show a line above the progress bar and append it to the log; the first process only."""
        if self.rank == 0:
            tqdm.write(line)
            with (self.work / "train.log").open("a") as file:
                file.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    def autocast(self) -> torch.autocast:
        return autocast(self.device)

    def unit(self, frames: np.ndarray) -> Tensor:
        """uint8 frames to a tensor in [-1, 1] on the device."""
        return torch.from_numpy(scenes.to_unit(frames)).to(self.device)

    def average(self, parameters: list[Tensor]) -> None:
        """Average the parameters' gradients over the processes."""
        if self.processes > 1:
            gradients = [p.grad for p in parameters if p.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            distributed.all_reduce(flat)
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient) / self.processes)


def fit(
    run: Run,
    stage: Stage,
    build: Callable[[], M],
    loss: Callable[[M, np.random.Generator, int], Tensor],
    report: Callable[[M], str],
    optimize: Callable[[nn.Module, float], list[torch.optim.Optimizer]] | None = None,
) -> M:
    """Train what `build` returns for the stage's steps and return its moving average; goes on where a checkpoint ends.

    AdamW unless `optimize` makes another; gradient norm at most 1; learning rate linear up over 100 steps, held if the
    stage says so, and a cosine down to zero. `loss` draws its share of the batch from a generator that only seed,
    stage, step and process fix: a stopped run goes on as it would. What is frozen exists once, in model and average
    alike, and in no checkpoint.
    """
    checkpoint = run.work / f"{stage.name}.pt"
    torch.manual_seed(run.seed)
    model = build().to(run.device)
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    ema = copy.deepcopy(model, {id(p): p for p in frozen.values()})
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    averaged: list[Tensor] = [a for a, p in zip(ema.parameters(), model.parameters(), strict=True) if p.requires_grad]
    optimizers = (optimize or adamw)(model, stage.lr)
    first, state = 0, {}
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=run.device)
        model.load_state_dict(state["model"], strict=False)
        ema.load_state_dict(state["ema"], strict=False)
        first = state["step"]
    if run.processes > 1:
        distributed.barrier()  # nobody writes a checkpoint before everybody has read it
    if first >= stage.steps or run.finish:
        return ema
    if first > 0:
        for optimizer, past in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(past)
    run.log(f"{stage.name}: from step {first} of {stage.steps}, {sum(p.numel() for p in parameters):,} parameters")
    saved, losses = time.monotonic(), []
    bar = tqdm(range(first + 1, stage.steps + 1), stage.name, stage.steps, initial=first, disable=run.rank > 0)
    for step in bar:
        where = [run.seed, run.stages.index(stage), step, run.rank]
        rng = np.random.default_rng(where)
        torch.manual_seed(int(rng.integers(2**32)))
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = stage.lr_at(step)
        value = loss(model, rng, stage.batch // run.processes)
        model.zero_grad()
        value.backward()
        run.average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(averaged, parameters, 1 - min(EMA_DECAY, step / (step + 10)))
        losses.append(value.item())
        bar.set_postfix(loss=f"{np.mean(losses[-50:]):.4f}", refresh=False)
        done = step == stage.steps
        if run.rank == 0 and (step % stage.report == 0 or done):
            with torch.no_grad():
                run.log(f"{stage.name}: step {step}, loss {np.mean(losses):.5f}, {report(ema)}")
            losses = []
        if run.rank == 0 and (time.monotonic() - saved > SAVE_EVERY or done):
            with atomic(checkpoint) as path:
                state: dict[str, Any] = {"step": step}
                for name, module in (("model", model), ("ema", ema)):
                    state[name] = {k: tensor for k, tensor in module.state_dict().items() if k not in frozen}
                torch.save(state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, path)
            saved = time.monotonic()
    return ema


@torch.no_grad()
def midway(a: M, b: M) -> M:
    """`a`, with the mean of both networks' weights. Where one was trained on from the other it keeps what either does
    better (arXiv 2109.01903)."""
    for mine, other in zip(a.parameters(), b.parameters(), strict=True):
        mine.lerp_(other, 0.5)
    return a


@contextmanager
def written_out_attention(device: torch.device) -> Iterator[None]:
    """Where `half` is bfloat16: attention as two products and a softmax in it. For as few tokens as ours, and for its
    gradients above all, that is faster on a CPU than the fused kernel; in float32 it is slower."""
    if half(device) == torch.float32:
        yield
        return
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()  # a switch of all devices, whatever its name
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)


def adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]


class Muon(torch.optim.Optimizer):
    """w -= lr * 0.4 sqrt(max(m, n)) * O, with O the nearest semi-orthogonal matrix to the Nesterov momentum [m, n].

    A step so changes every direction of a matrix by as much, not only the few that dominate its gradient. Kernels
    count as matrices [c_out, (c_in kernel)]. O has mean square 1/max(m, n), so a step's root mean square is 0.4 lr, an
    AdamW step's size. O comes of five Newton-Schulz iterations in `half`, for all matrices of one shape at once.
    Source: K. Jordan et al., "Muon", 2024; the scale is that of arXiv 2502.16982.
    """

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": 0.01})

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.flatten(1).shape, []).append(p)
            directions = []
            for alike in shapes.values():
                nesterov = []
                for p in alike:
                    assert p.grad is not None
                    past = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    past.lerp_(p.grad, 1 - group["momentum"])
                    nesterov.append(p.grad.lerp(past, group["momentum"]).flatten(1))
                directions.append(torch.stack(nesterov))
            for ((m, n), alike), updates in zip(shapes.items(), orthogonalised_together(directions), strict=True):
                for p, update in zip(alike, updates.to(alike[0].dtype), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update.view_as(p), alpha=group["lr"] * 0.4 * max(m, n) ** 0.5)


def orthogonalised_together(stacks: list[Tensor]) -> list[Tensor]:
    """`orthogonalised` of each stack, [k, m, n]; of several processes with equal stacks, each does its part of them."""
    if not distributed.is_initialized():
        return [orthogonalised(stack) for stack in stacks]
    rank, processes = distributed.get_rank(), distributed.get_world_size()
    parts = [torch.zeros_like(stack) for stack in stacks]
    for part, stack in zip(parts, stacks, strict=True):
        if len(stack) > rank:
            part[rank::processes] = orthogonalised(stack[rank::processes]).to(part.dtype)
    flat = torch.cat([part.flatten() for part in parts])
    distributed.all_reduce(flat)  # where one process has a matrix, the others have zeros
    return [whole.view_as(part) for whole, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]


def orthogonalised(matrices: Tensor) -> Tensor:
    """U V^T of each matrix U S V^T, [k, m, n], about: five iterations bring singular values near 1 (0.7 to 1.2)."""
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.mT
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(half(x.device))
    for _ in range(5):  # x <- 3.4445 x - 4.7750 (x x^T) x + 2.0315 (x x^T)^2 x
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x if wide else x.mT


def muon_and_adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and kernels inside a UNet or VAE; AdamW for the ends, embeddings, biases and norms."""
    ends = ("conv_in", "conv_out", "quant_conv", "embedding", "time_pos_embed", "time_emb_proj")
    inside, rest = [], []
    for name, parameter in model.named_parameters():
        inner = parameter.ndim > 1 and not any(end in name for end in ends)
        (inside if inner else rest).append(parameter)
    return [Muon(inside, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.99), weight_decay=0.01)]
