"""Say which of the ten exercises a file solves.

    python -m tools.teach.check mine.py

A line for each: solved, or what is still wrong. The status is the number of those that are not solved.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from minisvd import SpatioTemporalUNet, UNetConfig, check, check_model, edm_sigmas, preconditioning
from minisvd.attention import Attention

C, C_CONTEXT = 32, 24
CONFIG = UNetConfig(
    block_out_channels=(C, 64),
    attention=(True, False),
    num_attention_heads=(2, 4),
    cross_attention_dim=C_CONTEXT,
    addition_time_embed_dim=16,
)


class Wrong(Exception):
    """What a solution still gets wrong, in a sentence."""


def ask(holds: bool, sentence: str) -> None:
    if not holds:
        raise Wrong(sentence)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network() -> SpatioTemporalUNet:
    """A small random UNet, no parameter of which is at zero or one."""
    unet = SpatioTemporalUNet(CONFIG)
    with torch.no_grad():
        for i, parameter in enumerate(unet.parameters()):
            parameter.add_(0.05 * noise(*parameter.shape, seed=i))
    return unet


def given(keys: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return noise(1, 2, 8, 4, 4), torch.tensor(0.5), keys, torch.tensor([[6, 127, 0.02]])


def attention() -> Attention:
    module = Attention(C, 2, C_CONTEXT).double()
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i) / parameter.shape[-1] ** 0.5)
    return module


KEY = noise(1, 1, C_CONTEXT, seed=1)
QUERIES = noise(1, 5, C, seed=2).double()


def without_gradient(mine: ModuleType) -> None:
    unet = network()
    with sdpa_kernel(SDPBackend.MATH):  # written out: exact zeros
        unet(*given(KEY)).square().mean().backward()
    truth = {name for name, p in unet.named_parameters() if p.grad is not None and not p.grad.any()}
    found = mine.without_gradient(network())
    ask(not found - truth, f"{len(found - truth)} of these have a gradient, such as {min(found - truth, default='')}")
    ask(not truth - found, f"{len(truth - found)} are missing, such as {min(truth - found, default='')}")


def trained(mine: ModuleType) -> None:
    unet = network()
    learns = {id(parameter) for parameter in mine.trained(unet)}
    names = {name for name, p in unet.named_parameters() if id(p) in learns}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        unet(*given(KEY)).square().mean().backward()
    before = {name: p.detach().clone() for name, p in unet.named_parameters()}
    torch.optim.Adam([p for p in unet.parameters() if id(p) in learns], lr=0.1, eps=0).step()
    moved = {name for name, p in unet.named_parameters() if not torch.equal(before[name], p)}
    dead = {name for name in names if ".attn2.to_q" in name or ".attn2.to_k" in name or "blocks.0.norm2" in name}
    moved_too = f"{len(dead & moved)} parameters that cannot learn have moved"
    ask(not dead & moved, f"{moved_too}: their gradient is rounding, and Adam divides it by its own size")
    ask(len(names) > 180, f"only {len(names)} parameters are trained; more of them can learn")


def linear_map(mine: ModuleType) -> None:
    module = attention()
    weight, bias = mine.linear_map(module)
    ask(tuple(weight.shape) == (C, C_CONTEXT), f"W is {list(weight.shape)}; need [c, c']")
    off = (KEY.double() @ weight.mT + bias - module(QUERIES, KEY.double())).abs().max().item()
    ask(off < 1e-12, f"W key + b is {off:.1e} off the attention")


def conditioning(mine: ModuleType) -> None:
    keys = mine.conditioning(KEY)
    report = check_model(network(), *given(keys))
    trivial = [site for site in report.sites if site.holds]
    reason = trivial[0].finding[1] if trivial else ""
    ask(not trivial, f"{len(trivial)} of {len(report.sites)} cross-attentions are trivial: {reason}")
    other = mine.conditioning(KEY + 1)
    ask(not torch.equal(keys, other), "the keys say nothing of the image: another embedding gives the same")


def shared_key(mine: ModuleType) -> None:
    module, key = attention(), KEY.double()
    mean = (module(QUERIES, key) + module(QUERIES, 0 * key)) / 2
    off = (module(QUERIES, mine.shared_key(key)) - mean).abs().max().item()
    ask(off < 1e-12, f"the output at this key is {off:.1e} off the mean of the two")


def attention_macs(mine: ModuleType) -> None:
    for keys in (1, 7):
        counted = check(attention(), QUERIES, noise(1, keys, C_CONTEXT).double()).macs
        said = mine.attention_macs(QUERIES.shape[1], keys, C, C_CONTEXT)
        ask(said == counted, f"{said:,} for {keys} keys; {counted:,} are counted as it runs")


def gated(mine: ModuleType) -> None:
    report = check(lambda x, context: mine.gated(module, x, context), QUERIES, KEY.double(), module := attention())
    ask(report.query > 1e-6, "over one key the output does not move with the query")
    ask(report.affinity <= report.tolerance, f"it is no longer affine in the context, by {report.affinity:.1e}")
    ask("to_v.weight" not in report.dead, "the attention has no part in it: to_v is dead")
    ask(report.context > 1e-6, "it does not move with the context")


def sigmas(mine: ModuleType) -> None:
    for n in (2, 25):
        off = (mine.sigmas(n) / edm_sigmas(n).clamp(min=1e-9) - 1)[:-1].abs().max().item()
        ask(off < 1e-3, f"of {n} levels one is {off:.1%} off")


def denoised(mine: ModuleType) -> None:
    x, out = noise(2, 3), noise(2, 3, seed=1)
    for sigma in (torch.tensor(0.1), torch.tensor(20.0)):
        c_skip, c_out, _, _ = preconditioning(sigma)
        off = (mine.denoised(out, x, sigma) - (c_skip * x + c_out * out)).abs().max().item()
        ask(off < 1e-5, f"D is {off:.1e} off at sigma = {sigma.item():g}")


def sample(mine: ModuleType) -> None:
    levels, start = edm_sigmas(200, sigma_max=20.0), 20.0 * noise(4)

    def gaussian(x: Tensor, sigma: Tensor) -> Tensor:  # the ideal denoiser of data of variance 1
        return x / (1 + sigma**2)

    end, truth = mine.sample(gaussian, start, levels), start / (1 + levels[0] ** 2).sqrt()
    off = ((end - truth).abs().max() / truth.abs().max()).item()
    ask(off < 0.05, f"the end is {off:.0%} off the one that the equation has in closed form")


CHECKERS: dict[str, Callable[[ModuleType], None]] = {
    each.__name__: each
    for each in (
        without_gradient,
        trained,
        linear_map,
        conditioning,
        shared_key,
        attention_macs,
        gated,
        sigmas,
        denoised,
        sample,
    )
}


def load(path: Path) -> ModuleType:
    """The functions of a file. Raises FileNotFoundError where there is none."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: copy tools/teach/exercises.py")
    spec = importlib.util.spec_from_file_location("mine", path)
    assert spec is not None
    assert spec.loader is not None
    mine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(mine)
    return mine


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.teach.check", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a copy of tools/teach/exercises.py with your solutions"
    )
    mine, wrong = load(parser.parse_args(argv).file), 0
    for number, (name, checker) in enumerate(CHECKERS.items(), start=1):
        try:
            checker(mine)
            said = "solved"
        except Exception as error:  # a solution may fail in any way
            wrong, said = wrong + 1, str(error) if isinstance(error, Wrong) else f"{type(error).__name__}: {error}"
        print(f"{number:>2} {name:<17} {said}")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
