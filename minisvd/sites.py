"""The cross-attentions of any model, each checked with the keys that it is given: what `minisvd verify` prints.

    print(check_model(unet))                 a UNet of ours or of diffusers, run on noise with one key
    print(check_model(unet, keys=77))        the same with as many keys as a text encoder gives
    print(check_model(model, *inputs))       any model, with the keys that these inputs come to

The model is run once and watched: a cross-attention is a module with a query projection of its own that is called with
tokens and with other tokens as context. So a UNet of diffusers, an attention of transformers, torch's
MultiheadAttention and one written by hand are found alike. Each is then repeated, in float64 and on a copy, by `check`.
"""

import copy
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten
from tqdm import tqdm

from .attention import Attention
from .checkpoint import load_unet
from .etc import SpatialUNet
from .text import load_sd
from .triviality import Redraw, Report, html, largest, linear_map, measured, ratio

QUERY = re.compile(r"(to_|lin_|proj_|w_?)?(q|query)(_proj|_lin|_linear)?|in_proj_weight|q_proj_weight", re.IGNORECASE)
ASIDE = re.compile(r"mask|bias|pos(_|ition)|rotary|freq|temb")  # arguments that are neither tokens nor keys
KEPT = re.compile(r"past|cache")  # arguments that hold the keys of an earlier call, which would hide the control's
OURS = "UNetSpatioTemporalConditionModel"


@dataclass(frozen=True)
class ModelReport:
    """The cross-attentions that one run of a model of `parameters` numbers has met; holds if all are trivial."""

    sites: tuple[Report, ...]
    parameters: int

    @property
    def holds(self) -> bool:
        return all(site.holds for site in self.sites)

    def __str__(self) -> str:
        """What holds, what is dead, what a fold saves; then a line for each site: its keys, its verdict, how far the
        query moves it, the same with a key more, how many numbers are dead."""
        if not self.sites:
            return "no cross-attention was met: none was called with other tokens than its queries as context"
        held, dead = [site for site in self.sites if site.holds], sum(sum(site.dead.values()) for site in self.sites)
        names = sorted({name.removesuffix(".weight") for site in self.sites for name in site.dead})
        lines = [
            f"{len(held)} of {len(self.sites)} sites are trivial",
            shorten(f"dead in them: {', '.join(names) or 'nothing'}", 78, placeholder=" ..."),
            f"that is {dead:,} of {self.parameters:,} parameters ({dead / self.parameters:.1%})",
        ]
        if held:
            saved, macs, of = (sum(n) for n in zip(*((*site.saves, site.macs) for site in held), strict=True))
            lines.append(f"a fold saves {saved:,} of them and {macs:,} of {of:,} MACs of this run")
        lines.append(f"{'site':<38} keys verdict       query  +1 key     dead")
        for site in self.sites:
            name = re.sub(r"[._]transformer_blocks|_blocks?(?=\.)|\.attn2", "", site.name)
            name, more = name if len(name) <= 38 else f"..{name[-36:]}", site.control
            moves = f"{site.query:>7.1e} {f'{more.query:.1e}' if more else 'none':>7}"
            lines.append(f"{name:<38} {site.keys:>4} {site.verdict:<11} {moves} {sum(site.dead.values()):>8,}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return html(str(self))


def check_model(
    model: nn.Module, *inputs: Any, keys: int = 1, control: bool = True, progress: bool = False, **named: Any
) -> ModelReport:
    """`check` of each cross-attention that model(*inputs, **named) calls, with what it was given.

    One with several contexts, such as IP-Adapter's, has a report for the summand of each. Without inputs, a UNet of
    ours or of diffusers is run on noise of the smallest size with `keys` keys; any other model raises ValueError then.
    `control=False` leaves out the second key; where a module takes none it is left out anyway, and the report says so.
    `progress` draws a bar on a terminal.
    """
    if keys < 1:
        raise ValueError(f"keys is {keys}; need at least 1")
    noise = {} if inputs or named else small_inputs(model, keys)
    with torch.inference_mode(False):
        try:
            calls = record(model, inputs, {**named, **noise})
        except Exception as error:
            if not noise:
                raise
            kind = f"{type(model).__name__} does not run on noise ({error})"
            raise ValueError(f"{kind}: give its inputs, check_model(model, *inputs)") from error
        bar = tqdm(calls.items(), desc="sites", leave=False, disable=None if progress else True)
        sites = [report for name, call in bar for report in call.check(name, control)]
    return ModelReport(tuple(sites), sum(p.numel() for p in model.parameters()))


def record(model: nn.Module, inputs: tuple, named: dict[str, Any]) -> dict[str, "Call"]:
    """The cross-attentions that model(*inputs, **named) calls, name -> the call with the most keys: without gradients,
    and in eval mode, the modes being restored."""
    calls: dict[str, Call] = {}

    def note(name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = Call(module, args, kwargs)
        if call.keys > (calls[name].keys if name in calls else 0):
            calls[name] = call

    with ExitStack() as undo, torch.no_grad():
        for name, module in model.named_modules():
            undo.callback(setattr, module, "training", module.training)
            own = {key for key, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
            if any(map(QUERY.fullmatch, own)):
                undo.enter_context(module.register_forward_pre_hook(partial(note, name), with_kwargs=True))
        model.eval()(*inputs, **named)
    return calls


class Call:
    """One call of an attention, to be repeated on a copy of it with other tokens and other keys."""

    def __init__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.module, self.bound = module, signature(module.forward).bind(*args, **kwargs)
        found, self.spec = tree_flatten_with_path(dict(self.bound.arguments))
        self.paths = [keystr(path) for path, _ in found]
        self.leaves: list[Any] = [None if KEPT.search(keystr(path)) else leaf for path, leaf in found]
        places: dict[int, list[int]] = {}  # where each tensor of tokens stands: the queries, then the contexts
        for i, x in enumerate(self.leaves):
            tokens = isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (3, 4)
            if tokens and not ASIDE.search(self.paths[i]):
                places.setdefault(id(x), []).append(i)
        self.places, self.swapped = list(places.values()), getattr(module, "batch_first", True) is False
        self.keys = sum(context.shape[1] for context in self.contexts())

    def contexts(self) -> list[Tensor]:
        """Each as [b, k, c']: torch's are [k, b, c'] by default, IP-Adapter's [b, images, k, c']."""
        found = (self.leaves[place[0]] for place in self.places[1:])
        return [c.transpose(0, 1) if self.swapped else c.flatten(1, -2) for c in found]

    def check(self, name: str, control: bool) -> Iterator[Report]:
        """A report for each context."""
        module = copy.deepcopy(self.module).cpu().double().eval()
        leaves = [exact(leaf) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        contexts = list(map(exact, self.contexts()))

        def attend(i: int, x: Tensor, context: Tensor) -> Tensor:
            given, swap = [*contexts[:i], context, *contexts[i + 1 :]], dict.fromkeys(self.places[0], x)
            for place, keys in zip(self.places[1:], given, strict=True):
                keys = keys.transpose(0, 1) if self.swapped else keys
                swap |= dict.fromkeys(place, keys[:, None] if leaves[place[0]].ndim == 4 else keys)
            arguments = tree_unflatten([swap.get(j, leaf) for j, leaf in enumerate(leaves)], self.spec)
            self.bound.arguments.update(arguments)
            out = module(*self.bound.args, **self.bound.kwargs)
            return out[0] if isinstance(out, tuple) else out

        def summand(i: int, x: Tensor, context: Tensor) -> Tensor:
            return attend(i, x, context) - attend(i, x, torch.zeros_like(context))

        x = leaves[self.places[0][0]]
        for i, context in enumerate(contexts):
            whole = branch = partial(attend, i)
            label = name
            if len(contexts) > 1:
                path = self.paths[self.places[i + 1][0]]  # ['encoder_hidden_states'][1][0], or ['key']
                branch, label = partial(summand, i), name + (path.partition("]")[2] or path)
            try:
                report = measured(label, branch, whole, x, context, module, control)
            except ValueError:
                if not control:
                    raise
                report = measured(label, branch, whole, x, context, module, False)
            if isinstance(module, Attention) and context.shape[1] == 1:  # ours: is it what the fold puts there?
                linear = nn.functional.linear(context, *linear_map(module)).repeat_interleave(len(x) // len(context), 0)
                out = whole(x, context)
                report = replace(report, affinity=max(report.affinity, ratio(largest(out - linear), largest(out))))
            yield report


def exact(x: Tensor) -> Tensor:
    """A copy in float64, or of what has no fractions in its own dtype, on the CPU."""
    return x.detach().to("cpu", torch.float64 if x.is_floating_point() else None, copy=True)


# --- models ---------------------------------------------------------------------------------------------------------


def small_inputs(model: nn.Module, keys: int) -> dict[str, Any]:
    """Noise of the smallest size for a UNet of ours or of diffusers, by its config, with `keys` keys."""
    if isinstance(model, SpatialUNet):
        c, width, side = model.config.in_channels, model.config.cross_attention_dim, 2 * model.config.stride
        video, text = (Redraw()(torch.ones(shape)) for shape in ((1, 4, c, side, side), (1, keys, width)))
        return {"video": video, "timestep": torch.tensor(500), "text": text, "fps": torch.tensor(8)}
    config, takes = getattr(model, "config", None), signature(model.forward).parameters
    context = next((name for name in ("image_embeds", "encoder_hidden_states") if name in takes), None)
    if "sample" not in takes or context is None or config is None:
        kind = type(model).__name__
        raise ValueError(f"what a {kind} is called with is not known: give it, check_model(model, *inputs)")
    stated, like, redraw = vars(config) if context == "image_embeds" else config, next(model.parameters()), Redraw()

    def noise(*shape: int) -> Tensor:
        return redraw(like.new_ones(shape))

    c, width, side = stated["in_channels"], stated["cross_attention_dim"], 2 ** len(stated["block_out_channels"])
    frames_first, frames_last = "added_time_ids" in takes, re.search("3D|Motion", type(model).__name__)
    made = {"sample": noise(1, *((2, c) if frames_first else (c, 2) if frames_last else (c,)), side, side)}
    made["c_noise" if "c_noise" in takes else "timestep"] = like.new_ones(())
    width = stated.get("encoder_hid_dim") or (width if isinstance(width, int) else width[0])
    made[context] = noise(2 if "Motion" in type(model).__name__ else 1, keys, width)  # there, a row for each frame
    ids, embedded = stated.get("projection_class_embeddings_input_dim"), stated.get("addition_time_embed_dim")
    if frames_first:
        made["added_time_ids"] = noise(1, stated.get("num_time_ids") or ids // embedded)
    if stated.get("addition_embed_type") == "text_time":  # SDXL
        return {**made, "added_cond_kwargs": {"text_embeds": noise(1, ids - 6 * embedded), "time_ids": noise(1, 6)}}
    return made


def load_any(source: str, **options: Any) -> tuple[Any, int]:
    """A UNet, and how many keys it hears: ours by `load_unet`, with its options, or by `load_sd`; that of a folder of
    another architecture by diffusers, imported only then, with as many keys as the folder's text encoder gives, or 1.
    Raises ValueError where diffusers is missing or has no such class, and what `load_unet` raises."""
    folder = Path(source).expanduser()
    inside = folder / "unet" if (folder / "unet/config.json").is_file() else folder
    stated = inside / "config.json"
    text = stated.read_text(encoding="utf-8", errors="replace") if stated.is_file() else ""
    kind = "".join(re.findall(r'"_class_name": *"(\w+)"', text)[:1]) or OURS  # what is no JSON, load_unet refuses
    if kind == OURS:
        return load_unet(source, **options), 1
    with suppress(ValueError, FileNotFoundError):  # ours as well, if it is of Stable Diffusion 2.1's kind
        unet, encoder = load_sd(folder)
        return unet, encoder.config.max_position_embeddings
    try:
        import diffusers

        unet = getattr(diffusers, kind).from_pretrained(inside, variant=options.get("variant"), use_safetensors=True)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{inside} holds a {kind}, which is read by diffusers: pip install diffusers") from error
    encoder = folder / "text_encoder/config.json"
    keys = json.loads(encoder.read_text(encoding="utf-8")) if encoder.is_file() else {}
    return unet, keys.get("max_position_embeddings", 1)


# --- ours -----------------------------------------------------------------------------------------------------------


def cross_attentions(unet: nn.Module) -> dict[str, Attention]:
    """The sites at which `unet` has a cross-attention: 32 in the released model, none where a vcut build has removed
    or replaced them."""
    return {name: m for name, m in unet.named_modules() if name.split(".")[-1] == "attn2" and isinstance(m, Attention)}


def dead_names(unet: nn.Module) -> set[str]:
    """Parameters that no gradient can reach while each attn2 hears one key: its queries and keys, and the norm before.
    Leave them out of what is trained and of what gets a LoRA; an optimiser's weight decay would still move them."""
    sites = cross_attentions(unet)
    projections = {f"{site}.{name}.weight" for site in sites for name in ("to_q", "to_k")}
    return projections | {f"{site[:-5]}norm2.{name}" for site in sites for name in ("weight", "bias")}
