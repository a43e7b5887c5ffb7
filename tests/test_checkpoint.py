"""Both published layouts fill the same modules completely, and whatever cannot be loaded is refused by name."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_files import SMALL, published, small_modules, stated_config, write_folder, write_single_file
from safetensors.torch import save_file

from minisvd import checkpoint
from minisvd.checkpoint import MODULES, RELEASED, Checkpoint, Entry, load_unet, read_header, resolve
from minisvd.config import XT, GenerationConfig, UNetConfig
from minisvd.folder import CONFIG_FILES, GENERATION_FILE, PARTS, PREPROCESSOR_FILE, STEMS
from minisvd.layouts import FOLDER, SINGLE_FILE, rules, sources

LAYOUTS = (FOLDER, SINGLE_FILE)


def released(layout: str, part: str, **changes: tuple[int, ...] | None) -> Checkpoint:
    """The released sizes with the published names and shapes, some changed (None: removed), and no bytes at all."""
    shapes = published(layout)[part] | changes
    header = {name: Entry("F32", shape, 0, 0) for name, shape in shapes.items() if shape is not None}
    nowhere = Path("nowhere.safetensors")
    return Checkpoint(layout, nowhere, {part: nowhere}, {part: header}, {part: RELEASED[part]}, GenerationConfig())


@pytest.fixture(scope="module")
def modules() -> dict[str, Any]:
    return small_modules()


@pytest.fixture(scope="module")
def small_folder(modules: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), modules)


@pytest.fixture(scope="module")
def small_file(modules: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_single_file(tmp_path_factory.mktemp("file") / "svd.safetensors", modules)


# --- the layouts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_of_a_published_layout_fills_one_parameter_or_is_dropped_by_name(layout: str) -> None:
    used: list[str] = []
    for part in PARTS:
        with torch.device("meta"):
            module = MODULES[part](RELEASED[part])
        plan = released(layout, part).plan(part, module)
        assert plan.keys() == module.state_dict().keys()
        used += [source for names, _ in plan.values() for source in names]
    assert len(used) == len(set(used)), "a tensor is used twice"
    listed = set().union(*published(layout).values())
    dropped = listed - set(used)
    print(f"{layout}: {len(listed)} tensors, {len(used)} used, {len(dropped)} dropped")
    assert (len(listed), len(dropped)) == {FOLDER: (2322, 0), SINGLE_FILE: (2446, 252)}[layout]
    assert {".".join(name.split(".")[:4]) for name in dropped} == {FOLDER: set(), SINGLE_FILE: {
        "first_stage_model.encoder.conv_in.weight", "first_stage_model.encoder.conv_in.bias",
    }}[layout] or layout == SINGLE_FILE  # fmt: skip


VICTIMS = {  # one of each part's tensors: in both layouts made with another, transposed, or reshaped where there is one
    (FOLDER, "unet"): "mid_block.attentions.0.time_pos_embed.linear_1.weight",
    (FOLDER, "vae"): "decoder.up_blocks.1.resnets.2.time_mixer.mix_factor",
    (FOLDER, "clip"): "vision_model.encoder.layers.7.self_attn.k_proj.weight",
    (SINGLE_FILE, "unet"): "model.diffusion_model.output_blocks.5.2.conv.weight",
    (SINGLE_FILE, "vae"): "first_stage_model.decoder.mid.attn_1.k.weight",
    (SINGLE_FILE, "clip"): "conditioner.embedders.0.open_clip.model.visual.proj",
}


@pytest.mark.parametrize(("layout", "part"), VICTIMS)
def test_one_tensor_missing_extra_or_misshapen_is_an_error_that_names_it_before_any_read(layout: str, part: str) -> None:
    """Nothing is read: there is no file. With every tensor in place, opening it is what fails."""
    name = VICTIMS[layout, part]
    with pytest.raises(ValueError, match=f"lacks {name}"):
        released(layout, part, **{name: None}).load()
    for extra in (f"{name}.extra", "something.new"):
        with pytest.raises(ValueError, match=f"has {extra}"):
            released(layout, part, **{extra: (1,)}).load()
    shape = published(layout)[part][name]
    for wrong in ((shape[0] + 1, *shape[1:]), (*shape, 1), (shape[0], 2, *shape[1:])):
        with pytest.raises(ValueError, match=f"{name} .*cannot fill"):
            released(layout, part, **{name: wrong}).load()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        released(layout, part).load()


PAIRS = {
    "unet": """
        conv_in.weight                                               input_blocks.0.0.weight
        time_embedding.linear_1.weight                               time_embed.0.weight
        time_embedding.linear_2.bias                                 time_embed.2.bias
        add_embedding.linear_1.weight                                label_emb.0.0.weight
        add_embedding.linear_2.weight                                label_emb.0.2.weight
        down_blocks.0.resnets.0.spatial_res_block.norm1.weight       input_blocks.1.0.in_layers.0.weight
        down_blocks.0.resnets.1.spatial_res_block.conv1.weight       input_blocks.2.0.in_layers.2.weight
        down_blocks.0.downsamplers.0.conv.weight                     input_blocks.3.0.op.weight
        down_blocks.1.resnets.0.spatial_res_block.conv_shortcut.bias input_blocks.4.0.skip_connection.bias
        down_blocks.1.resnets.0.spatial_res_block.time_emb_proj.bias input_blocks.4.0.emb_layers.1.bias
        down_blocks.1.resnets.0.temporal_res_block.norm1.weight      input_blocks.4.0.time_stack.in_layers.0.weight
        down_blocks.1.resnets.0.temporal_res_block.conv1.weight      input_blocks.4.0.time_stack.in_layers.2.weight
        down_blocks.1.resnets.0.temporal_res_block.time_emb_proj.bias input_blocks.4.0.time_stack.emb_layers.1.bias
        down_blocks.1.resnets.0.temporal_res_block.norm2.weight      input_blocks.4.0.time_stack.out_layers.0.weight
        down_blocks.1.attentions.1.transformer_blocks.0.norm1.bias   input_blocks.5.1.transformer_blocks.0.norm1.bias
        down_blocks.1.attentions.1.temporal_transformer_blocks.0.norm_in.bias  input_blocks.5.1.time_stack.0.norm_in.bias
        down_blocks.2.attentions.0.time_pos_embed.linear_1.weight    input_blocks.7.1.time_pos_embed.0.weight
        down_blocks.2.attentions.0.time_pos_embed.linear_2.weight    input_blocks.7.1.time_pos_embed.2.weight
        down_blocks.2.attentions.0.time_mixer.mix_factor             input_blocks.7.1.time_mixer.mix_factor
        down_blocks.3.resnets.1.temporal_res_block.conv2.weight      input_blocks.11.0.time_stack.out_layers.3.weight
        down_blocks.3.resnets.1.time_mixer.mix_factor                input_blocks.11.0.time_mixer.mix_factor
        mid_block.resnets.0.spatial_res_block.norm2.bias             middle_block.0.out_layers.0.bias
        mid_block.attentions.0.proj_in.weight                        middle_block.1.proj_in.weight
        mid_block.resnets.1.spatial_res_block.conv2.weight           middle_block.2.out_layers.3.weight
        up_blocks.0.resnets.2.spatial_res_block.conv1.weight         output_blocks.2.0.in_layers.2.weight
        up_blocks.0.upsamplers.0.conv.weight                         output_blocks.2.1.conv.weight
        up_blocks.1.attentions.0.proj_out.bias                       output_blocks.3.1.proj_out.bias
        up_blocks.1.upsamplers.0.conv.weight                         output_blocks.5.2.conv.weight
        up_blocks.2.upsamplers.0.conv.weight                         output_blocks.8.2.conv.weight
        up_blocks.3.attentions.2.norm.weight                         output_blocks.11.1.norm.weight
        conv_norm_out.weight                                         out.0.weight
        conv_out.bias                                                out.2.bias
    """,
    "vae": """
        encoder.conv_in.weight                             conditioner.embedders.3.encoder.encoder.conv_in.weight
        encoder.down_blocks.1.resnets.0.conv_shortcut.bias conditioner.embedders.3.encoder.encoder.down.1.block.0.nin_shortcut.bias
        encoder.down_blocks.2.resnets.1.norm2.weight       conditioner.embedders.3.encoder.encoder.down.2.block.1.norm2.weight
        encoder.down_blocks.2.downsamplers.0.conv.bias     conditioner.embedders.3.encoder.encoder.down.2.downsample.conv.bias
        encoder.mid_block.resnets.0.conv1.weight           conditioner.embedders.3.encoder.encoder.mid.block_1.conv1.weight
        encoder.mid_block.attentions.0.group_norm.weight   conditioner.embedders.3.encoder.encoder.mid.attn_1.norm.weight
        encoder.mid_block.attentions.0.to_q.weight         conditioner.embedders.3.encoder.encoder.mid.attn_1.q.weight
        encoder.mid_block.attentions.0.to_k.weight         conditioner.embedders.3.encoder.encoder.mid.attn_1.k.weight
        encoder.conv_norm_out.bias                         conditioner.embedders.3.encoder.encoder.norm_out.bias
        quant_conv.weight                                  conditioner.embedders.3.encoder.quant_conv.weight
        decoder.conv_in.weight                             first_stage_model.decoder.conv_in.weight
        decoder.mid_block.attentions.0.to_v.bias           first_stage_model.decoder.mid.attn_1.v.bias
        decoder.mid_block.attentions.0.to_out.0.weight     first_stage_model.decoder.mid.attn_1.proj_out.weight
        decoder.mid_block.resnets.1.spatial_res_block.norm1.weight   first_stage_model.decoder.mid.block_2.norm1.weight
        decoder.mid_block.resnets.1.temporal_res_block.norm1.weight  first_stage_model.decoder.mid.block_2.time_stack.in_layers.0.weight
        decoder.mid_block.resnets.1.temporal_res_block.conv1.weight  first_stage_model.decoder.mid.block_2.time_stack.in_layers.2.weight
        decoder.mid_block.resnets.1.temporal_res_block.norm2.weight  first_stage_model.decoder.mid.block_2.time_stack.out_layers.0.weight
        decoder.mid_block.resnets.1.temporal_res_block.conv2.weight  first_stage_model.decoder.mid.block_2.time_stack.out_layers.3.weight
        decoder.mid_block.resnets.1.time_mixer.mix_factor            first_stage_model.decoder.mid.block_2.mix_factor
        decoder.up_blocks.0.resnets.2.spatial_res_block.conv2.bias   first_stage_model.decoder.up.3.block.2.conv2.bias
        decoder.up_blocks.0.upsamplers.0.conv.weight       first_stage_model.decoder.up.3.upsample.conv.weight
        decoder.up_blocks.3.resnets.0.spatial_res_block.conv_shortcut.weight  first_stage_model.decoder.up.0.block.0.nin_shortcut.weight
        decoder.conv_norm_out.weight                       first_stage_model.decoder.norm_out.weight
        decoder.conv_out.weight                            first_stage_model.decoder.conv_out.weight
        decoder.time_conv_out.weight                       first_stage_model.decoder.conv_out.time_mix_conv.weight
    """,
}  # fmt: skip
"""One pair for every rule, from the order in which each implementation's forward runs: shapes cannot tell norm1 from
norm2, and a consistent mistake would survive a round trip."""


@pytest.mark.parametrize("part", PAIRS)
def test_the_single_file_s_numbers_mean_the_layers_they_are_run_as(part: str) -> None:
    prefix = "model.diffusion_model." if part == "unet" else ""
    gather, rename = rules(part, SINGLE_FILE, RELEASED[part])
    for pair in PAIRS[part].strip().splitlines():
        ours, theirs = pair.split()
        assert sources(ours, gather, rename)[0] == [prefix + theirs]
        assert prefix + theirs in published(SINGLE_FILE)[part]
        assert ours in published(FOLDER)[part]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_layouts_give_back_the_module_that_was_written_bit_for_bit(
    layout: str, dtype: torch.dtype, modules: dict[str, Any], small_folder: Path, small_file: Path
) -> None:
    """In the requested dtype it is the written one, rounded once; ready to run, and to train."""
    found = resolve(small_folder) if layout == FOLDER else resolve(small_file, configs=SMALL)
    loaded = found.load(dtype=dtype)
    assert (found.layout, list(loaded)) == (layout, list(PARTS))
    for part, module in loaded.items():
        assert module.config == SMALL[part]
        assert not module.training
        state, written = module.state_dict(), modules[part].state_dict()
        assert list(state) == list(written)
        for name, tensor in state.items():
            assert torch.equal(tensor, written[name].to(dtype)), name
            assert tensor.is_contiguous(), name
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{name} keeps more memory than it needs"
        assert all(p.requires_grad and p.dtype == dtype for p in module.parameters())
        assert not any(b.is_meta for b in module.buffers())
    q, k, _ = modules["clip"].visual.transformer.resblocks[0].attn.in_proj_weight.chunk(3)
    assert not torch.equal(q, k), "control: a swap of q and k would have shown"


def test_a_dtype_without_fractions_is_refused(small_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.int8; need a floating-point one"):
        resolve(small_folder, parts=["vae"]).load(dtype=torch.int8)


def test_quantised_weights_are_refused_by_name(modules: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"unet": modules["unet"]})
    state = {name: tensor.to(torch.int8) for name, tensor in modules["unet"].state_dict().items()}
    save_file(state, folder / f"{STEMS['unet']}.safetensors")
    with pytest.raises(ValueError, match="conv_in.weight is I8; can read F64, F32, F16, BF16"):
        load_unet(folder)


def test_an_index_buffer_that_old_versions_saved_is_dropped_by_name(modules: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"clip": modules["clip"]})
    path = folder / f"{STEMS['clip']}.safetensors"
    from safetensors.torch import load_file

    save_file(load_file(path) | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}, path)
    clip = resolve(folder, parts=["clip"]).load()["clip"]
    assert torch.equal(clip.visual.proj, modules["clip"].visual.proj)


def test_one_part_alone_needs_only_its_own_files(modules: dict[str, Any], small_file: Path, tmp_path: Path) -> None:
    for unet in (
        load_unet(write_folder(tmp_path, {"unet": modules["unet"]})),
        load_unet(str(small_file), config=SMALL["unet"]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), modules["unet"].parameters(), strict=True))
    with pytest.raises(FileNotFoundError, match=r"lacks vae/config.json, image_encoder/config.json, vae/.*, image_enc"):
        resolve(tmp_path)


# --- memory -----------------------------------------------------------------------------------------------------

PEAK = """
import json, os, sys
import torch
from safetensors.torch import load_file
from minisvd.checkpoint import MODULES, load_unet, resolve

def status(key):
    return 1024 * int(open("/proc/self/status").read().split(key + ":")[1].split()[0])

def load_all_then_convert(folder, variant, dtype):
    found = resolve(folder, parts=["unet"], variant=variant)
    unet = MODULES["unet"](found.configs["unet"]).to(dtype)
    unet.load_state_dict(load_file(found.files["unet"]))
    return unet

small, large = sys.argv[1:]
for load in (load_unet, load_all_then_convert):
    for variant, dtype in ((None, torch.float32), (None, torch.float16), ("fp16", torch.float16), ("fp16", torch.float32)):
        if os.fork() == 0:  # every measurement in a process of its own
            load(small, variant=None, dtype=dtype)
            open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
            before = status("VmRSS")
            unet = load(large, variant=variant, dtype=dtype)
            peak = status("VmHWM") - before
            weights = sum(p.nbytes for p in unet.parameters())
            print(json.dumps([load.__name__, str(variant), str(dtype), peak, weights]), flush=True)
            os._exit(0)
        os.wait()
"""


def test_peak_memory_is_at_most_a_tenth_above_the_weights_and_one_tensor(tmp_path: Path, small_folder: Path) -> None:
    """Of the process, mapped file pages included, for every pair of dtypes. Control: reading all, then converting."""
    config = replace(UNetConfig(), block_out_channels=(64, 128, 256, 256), num_attention_heads=(1, 2, 4, 4))
    unet = MODULES["unet"](config)
    for variant in (None, "fp16"):
        write_folder(tmp_path, {"unet": unet}, variant)
    one_tensor = max(p.nbytes for p in unet.parameters())
    output = subprocess.run(
        [sys.executable, "-c", PEAK, small_folder, tmp_path],
        check=True, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    ).stdout  # fmt: skip
    rows = [json.loads(line) for line in output.splitlines()]
    assert len(rows) == 8
    for load, variant, dtype, peak, weights in rows:
        print(f"{load} {variant} -> {dtype}: peak {peak / weights:.3f} of {weights / 2**20:.0f} MiB")
        assert (peak <= 1.1 * weights + one_tensor) == (load == "load_unet")


# --- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("unet", "_class_name", "UNet2DConditionModel"),
        ("unet", "down_block_types", ["CrossAttnDownBlock2D", "DownBlockSpatioTemporal", "DownBlockSpatioTemporal"]),
        ("unet", "down_block_types", None),
        ("unet", "up_block_types", ["UpBlockSpatioTemporal"] * 3),
        ("unet", "transformer_layers_per_block", 2),
        ("unet", "transformer_layers_per_block", [1, 1, 2]),
        ("unet", "projection_class_embeddings_input_dim", 768),
        ("unet", "layers_per_block", [1, 2, 2]),
        ("unet", "cross_attention_dim", [24, 24, 32]),
        ("unet", "cross_attention_dim", 32),  # not what CLIP gives
        ("unet", "num_attention_heads", [1, 2]),
        ("unet", "num_attention_heads", 3),
        ("unet", "num_attention_heads", "1"),
        ("unet", "block_out_channels", [32, 64, 65]),
        ("unet", "block_out_channels", 32),
        ("unet", "in_channels", 9),  # not the noise and the image's latent
        ("unet", "out_channels", 5),
        ("unet", "addition_time_embed_dim", 0),
        ("unet", "num_frames", 0),
        ("unet", "motion_module", True),
        ("vae", "_class_name", "AutoencoderKL"),
        ("vae", "layers_per_block", 3),
        ("vae", "in_channels", 4),
        ("vae", "down_block_types", ["DownEncoderBlock2D"]),
        ("vae", "block_out_channels", None),
        ("vae", "scaling_factor", "0.18215"),
        ("vae", "shift_factor", 0.1),
        ("clip", "model_type", "siglip_vision_model"),
        ("clip", "hidden_act", "relu"),
        ("clip", "layer_norm_eps", 1e-6),
        ("clip", "num_channels", 4),
        ("clip", "num_attention_heads", 0),
        ("clip", "image_size", 33),
        ("clip", "qk_norm", True),
    ],
)
def test_a_config_that_these_modules_cannot_have_is_an_error_that_names_the_field(
    part: str, field: str, value: Any, tmp_path: Path, modules: dict[str, Any]
) -> None:
    """And so is the same field left out, if it has a meaning. The control is the config as it was."""
    write_folder(tmp_path, modules)
    path, stated = tmp_path / CONFIG_FILES[part], stated_config(part, SMALL[part])
    resolve(tmp_path)
    path.write_text(json.dumps(stated | {field: value}))
    with pytest.raises(ValueError, match=field):
        resolve(tmp_path)
    if field in stated and field not in ("_class_name", "model_type", "num_frames") and field not in checkpoint_optional:
        del stated[field]
        path.write_text(json.dumps(stated))
        with pytest.raises(ValueError, match=f"lacks the field {field}"):
            resolve(tmp_path)
