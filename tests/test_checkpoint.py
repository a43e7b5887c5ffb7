"""Both published layouts fill the same modules completely, and whatever cannot be loaded is refused by name."""

import contextlib
import copy
import gc
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoint_files import LAYOUTS, SMALL, published, small_modules, stated_config, write_folder, write_single_file
from minisvd import load
from minisvd.checkpoint import (
    MODULES,
    RELEASED,
    Checkpoint,
    Entry,
    checked_dtype,
    finite,
    load_unet,
    locate,
    read_header,
    resolve,
)
from minisvd.cli import main
from minisvd.config import XT, GenerationConfig, UNetConfig
from minisvd.folder import CONFIG_FILES, FIXED, GENERATION_FILE, PARTS, PREPROCESSOR_FILE, STEMS
from minisvd.layouts import FOLDER, SINGLE_FILE, rules, sources
from tools.folder.convert import main as convert

BOTH = (FOLDER, SINGLE_FILE)


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


@pytest.mark.parametrize("layout", BOTH)
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
    starts = ("first_stage_model.encoder.", "conditioner.embedders.3.encoder.", "conditioner.embedders.0.open_clip.")
    by_start = [sum(name.startswith(start) for name in dropped) for start in starts]
    assert by_start == {FOLDER: [0, 0, 0], SINGLE_FILE: [106, 140, 6]}[layout]


VICTIMS = {  # one of each part's tensors: in both layouts made with another, transposed, or reshaped where there is one
    (FOLDER, "unet"): "mid_block.attentions.0.time_pos_embed.linear_1.weight",
    (FOLDER, "vae"): "decoder.up_blocks.1.resnets.2.time_mixer.mix_factor",
    (FOLDER, "clip"): "vision_model.encoder.layers.7.self_attn.k_proj.weight",
    (SINGLE_FILE, "unet"): "model.diffusion_model.output_blocks.5.2.conv.weight",
    (SINGLE_FILE, "vae"): "first_stage_model.decoder.mid.attn_1.k.weight",
    (SINGLE_FILE, "clip"): "conditioner.embedders.0.open_clip.model.visual.proj",
}


@pytest.mark.parametrize(("layout", "part"), VICTIMS)
@pytest.mark.slow
def test_one_tensor_missing_extra_or_misshapen_is_an_error_that_names_it_before_any_read(
    layout: str, part: str
) -> None:
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


@pytest.mark.parametrize("part", PARTS)
def test_the_single_file_s_numbers_mean_the_layers_they_are_run_as(part: str) -> None:
    """Pair by pair, from a list that is not derived from the rules."""
    gather, rename = rules(part, SINGLE_FILE, RELEASED[part])
    pairs = [line.split()[1:] for line in (LAYOUTS / "pairs.txt").read_text().splitlines() if line.startswith(part)]
    assert pairs
    for ours, theirs in pairs:
        assert sources(ours, gather, rename)[0] == [theirs]
        assert theirs in published(SINGLE_FILE)[part]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", BOTH)
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
    with pytest.raises(ValueError, match=r"linear_1.weight is I8; can read F64, F32, F16, BF16"):
        load_unet(folder)


def test_an_index_buffer_that_old_versions_saved_is_dropped_by_name(modules: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"clip": modules["clip"]})
    path = folder / f"{STEMS['clip']}.safetensors"
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


# --- mapping ----------------------------------------------------------------------------------------------------


def is_mapped(path: Path) -> bool:
    gc.collect()
    return str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.linux
def test_weights_are_mapped_unless_converted_or_copied(modules: dict[str, Any], tmp_path: Path) -> None:
    """The file's pages while a module lives; the same numbers any way, and when the file has been deleted."""
    folder = write_folder(tmp_path, {"unet": modules["unet"]})
    path = folder / f"{STEMS['unet']}.safetensors"
    expected = modules["unet"].state_dict()
    unet = load_unet(folder)
    assert is_mapped(path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in unet.state_dict().items())
    del unet
    assert not is_mapped(path)
    half, copied = load_unet(folder, dtype=torch.float16), load_unet(folder, copy=True)
    assert not is_mapped(path)
    assert half.conv_in.weight.dtype == torch.float16
    unet = load_unet(folder)
    path.unlink()
    for module in (unet, copied):
        assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())


def test_training_changes_neither_the_file_nor_another_load(modules: dict[str, Any], tmp_path: Path) -> None:
    folder = write_folder(tmp_path, {"unet": modules["unet"]})
    path = folder / f"{STEMS['unet']}.safetensors"
    before, trained, other = path.read_bytes(), load_unet(folder), load_unet(folder)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(1)
    assert path.read_bytes() == before
    for parameter, same, given in zip(
        trained.parameters(), other.parameters(), modules["unet"].parameters(), strict=True
    ):
        assert torch.equal(same, given)
        assert torch.equal(parameter, given + 1)  # control: it did change


def test_a_file_whose_tensors_are_not_aligned_is_read(modules: dict[str, Any], tmp_path: Path) -> None:
    """As a header of any length may leave them; safetensors pads it with spaces, one of which is taken away here."""
    folder = write_folder(tmp_path, {"unet": modules["unet"]})
    path = folder / f"{STEMS['unet']}.safetensors"
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    path.write_bytes((n + 1).to_bytes(8, "little") + data[8 : 8 + n] + b" " + data[8 + n :])
    unet = load_unet(folder)
    assert all(p.data_ptr() % 4 == 0 for p in unet.parameters())
    assert torch.equal(unet.conv_in.weight, modules["unet"].conv_in.weight)


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
f32, f16 = torch.float32, torch.float16
cases = [(load_unet, None, f32), (load_unet, None, f16), (load_unet, "fp16", f32), (load_all_then_convert, None, f16)]
for load, variant, dtype in cases:
    if os.fork() == 0:  # every measurement in a process of its own
        load(small, variant=None, dtype=dtype)  # what the first load brings along: code, caches
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts from here
        before = status("VmRSS")
        unet = load(large, variant=variant, dtype=dtype)
        peak = status("VmHWM") - before
        weights = sum(p.nbytes for p in unet.parameters())
        print(json.dumps([load.__name__, str(variant), str(dtype), peak, weights]), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.linux
@pytest.mark.slow
def test_peak_memory_is_at_most_a_tenth_above_the_weights_and_one_tensor(tmp_path: Path, small_folder: Path) -> None:
    """Of the process, mapped file pages included, whatever the dtypes. Control: reading all, then converting."""
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
    assert len(rows) == 4
    for loader, variant, dtype, peak, weights in rows:
        print(f"{loader} {variant} -> {dtype}: peak {peak / weights:.3f} of {weights / 2**20:.0f} MiB")
        assert (peak <= 1.1 * weights + one_tensor) == (loader == "load_unet")


# --- dtypes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bf16", "amx"), [(True, False), (False, True), (False, False)])
def test_auto_is_the_half_precision_that_the_hardware_multiplies(
    bf16: bool, amx: bool, tmp_path: Path, modules: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    expected = torch.bfloat16 if bf16 or amx else torch.float32
    assert load_unet(write_folder(tmp_path, modules), dtype="auto").conv_in.weight.dtype == expected
    assert checked_dtype("auto", torch.device("cuda")) == torch.float16
    assert checked_dtype("auto", torch.device("mps")) == torch.float32


# --- numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_weight_that_is_no_number_is_refused_by_name(
    tmp_path: Path, modules: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """When it is read, by `load` and by `verify`; a mapped one, when it is used. Control: the weights as they were."""
    load(write_folder(tmp_path / "whole", modules), copy=True)
    picture, inf = torch.zeros(3, 64, 64), float("inf")
    places = ("unet", "conv_in.weight", inf), ("vae", "decoder.conv_in.bias", -inf), ("clip", "visual.proj", inf - inf)
    for part, name, value in places:
        broken = copy.deepcopy(modules[part])
        broken.get_parameter(name).data.flatten()[1] = value
        folder = write_folder(tmp_path / part, modules | {part: broken})
        with pytest.raises(ValueError, match=r"safetensors: .* has values that are infinite or not numbers"):
            load(folder, copy=True)
        with pytest.raises(ValueError, match=rf"no finite numbers.*{part}\.{name} has values that are infinite or not"):
            load(folder)(picture, size=(64, 64), num_frames=2, steps=2, progress=False)
    assert main(["verify", "--model", str(tmp_path / "unet")]) == 2
    assert "conv_in.weight has values that are infinite" in capsys.readouterr().err
    broken = copy.deepcopy(modules["unet"])
    name = next(name for name in broken.state_dict() if name.endswith("attn2.to_v.weight"))
    broken.get_parameter(name).data[0, 0] = inf
    with pytest.raises(ValueError, match=r"attn2.*has values that are infinite"):
        load(write_folder(tmp_path / "folded", modules | {"unet": broken}), vcut="lossless")


@pytest.mark.slow
def test_a_weight_that_float16_cannot_hold_is_refused(tmp_path: Path, modules: dict[str, Any]) -> None:
    """When it is loaded so, when it is saved so, and by the program that converts; bfloat16 holds it."""
    large = copy.deepcopy(modules["unet"])
    large.conv_in.weight.data.flatten()[1] = 1e5
    folder = write_folder(tmp_path / "large", modules | {"unet": large})
    with pytest.raises(ValueError, match=r"conv_in.weight does not fit in torch.float16: load it in float32 or bfl"):
        load(folder, dtype="float16")
    for save in (
        lambda: load(folder).save(tmp_path / "out", torch.float16),
        lambda: convert([str(folder), str(tmp_path / "out")]),
    ):
        with contextlib.suppress(ValueError):
            assert save() == 2
        assert not (tmp_path / "out").exists()
    assert load(folder, dtype="bfloat16").unet.conv_in.weight.dtype == torch.bfloat16
    load(folder).save(tmp_path / "out", torch.bfloat16)


def test_a_folder_does_not_take_a_preset_s_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tiny` and `svd` mean what they mean everywhere, whatever lies here; ./tiny and a Path are the folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "svd"):
        (tmp_path / name).mkdir()
        assert locate(f"./{name}") == locate(Path(name)) == Path(name)
    assert locate("tiny") not in (Path("tiny"), None)
    assert locate("svd") is None
    assert main(["account", "--model", "svd", "--json"]) == 0


@pytest.mark.posix
def test_a_full_disk_is_a_sentence_and_leaves_no_half_folder(
    tmp_path: Path, small_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 2, nothing there, and the next try, with room, writes the folder."""
    import resource  # there is none on Windows

    argv = [str(small_folder), str(tmp_path / "out")]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        assert convert(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "convert: error: cannot write" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert convert(argv) == 0
    assert load(tmp_path / "out").unet.config == SMALL["unet"]


def test_no_finite_number_is_taken_for_infinite() -> None:
    """`finite` says what `isfinite` says, at the ends of every dtype and of nothing."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        ends = torch.tensor([torch.finfo(dtype).min, 0, torch.finfo(dtype).max], dtype=dtype)
        assert finite(ends)
        assert finite(ends[:0])
        for bad in (torch.nan, torch.inf, -torch.inf):
            assert not finite(torch.cat([ends, ends.new_tensor([bad])]))


@pytest.mark.posix
@pytest.mark.parametrize("source", [5, None, "", b"tiny", "~nobody-here", "loop", "pipe.safetensors", "/dev/zero"])
def test_what_is_no_model_is_a_sentence(source: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name or path, a home that nobody has, a link to itself, a pipe, a device: nothing is waited for."""
    monkeypatch.chdir(tmp_path)
    os.symlink("loop", "loop")
    os.mkfifo("pipe.safetensors")
    with pytest.raises((ValueError, FileNotFoundError), match=r"model|there is no file|neither a file"):
        load(source)
    wrongs: list[dict[str, Any]] = [{"dtype": "int8"}, {"dtype": 5}, {"device": "cuda:99"}, {"device": [1]}]
    wrongs += [{"variant": 3}, {"revision": b"main"}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            load("tiny", **wrong)


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
    if field in stated and field not in (*FIXED[part], "num_frames"):
        del stated[field]
        path.write_text(json.dumps(stated))
        with pytest.raises(ValueError, match=f"lacks the field {field}"):
            resolve(tmp_path)


def test_one_number_for_all_levels_and_one_number_for_each_say_the_same(
    modules: dict[str, Any], tmp_path: Path
) -> None:
    write_folder(
        tmp_path, modules, num_attention_heads=2, cross_attention_dim=[24] * 3, transformer_layers_per_block=[1] * 3,
        layers_per_block=[2] * 3, _name_or_path="elsewhere",
    )  # fmt: skip
    assert resolve(tmp_path).configs["unet"] == replace(SMALL["unet"], num_attention_heads=(2, 2, 2))


def test_the_encoder_s_mean_and_std_come_from_the_preprocessor_s_file(modules: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, modules)
    (tmp_path / PREPROCESSOR_FILE).parent.mkdir()
    (tmp_path / PREPROCESSOR_FILE).write_text('{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.25, 1]}')
    assert resolve(tmp_path).configs["clip"] == replace(SMALL["clip"], mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 1.0))
    (tmp_path / PREPROCESSOR_FILE).write_text('{"image_mean": [0.5, 0.5]}')
    with pytest.raises(ValueError, match="mean is"):
        resolve(tmp_path)


def test_generation_settings_come_from_the_folder_then_from_the_release_with_as_many_frames(
    modules: dict[str, Any], small_file: Path, tmp_path: Path
) -> None:
    assert resolve(write_folder(tmp_path, modules, num_frames=25)).generation == XT
    assert resolve(write_folder(tmp_path, modules, num_frames=6)).generation == GenerationConfig(num_frames=6)
    (tmp_path / GENERATION_FILE).write_text('{"num_frames": 8, "guidance": [1, 2.5], "size": [64, 32]}')
    assert resolve(tmp_path).generation == GenerationConfig(num_frames=8, guidance=(1.0, 2.5), size=(64, 32))
    for bad in ('{"frames": 8}', '{"size": [64]}', '{"steps": 2.5}', '{"guidance": "high"}'):
        (tmp_path / GENERATION_FILE).write_text(bad)
        with pytest.raises(ValueError, match=f"{GENERATION_FILE}: {json.loads(bad).popitem()[0]} is"):
            resolve(tmp_path)
    assert resolve(small_file, configs=SMALL).generation == GenerationConfig()
    (xt := tmp_path / "svd_xt.safetensors").write_bytes(small_file.read_bytes())
    assert resolve(xt, configs=SMALL).generation == XT


def test_broken_json_is_one_sentence(modules: dict[str, Any], tmp_path: Path) -> None:
    write_folder(tmp_path, modules)
    for text, reason in (("{", "is not valid JSON"), ("[]", "holds a list; need a JSON object")):
        (tmp_path / CONFIG_FILES["vae"]).write_text(text)
        with pytest.raises(ValueError, match=f"vae/config.json {reason}"):
            resolve(tmp_path)


# --- sources ----------------------------------------------------------------------------------------------------


def test_plain_files_come_first_then_fp16_ones_and_a_named_variant_must_be_there(
    modules: dict[str, Any], tmp_path: Path
) -> None:
    write_folder(tmp_path, modules, "fp16")
    names = [f"{stem}.fp16.safetensors" for stem in STEMS.values()]
    assert [*resolve(tmp_path).files.values()] == [tmp_path / name for name in names]
    write_folder(tmp_path, modules)
    assert [*resolve(tmp_path).files.values()] == [tmp_path / f"{stem}.safetensors" for stem in STEMS.values()]
    assert [*resolve(tmp_path, variant="fp16").files.values()] == [tmp_path / name for name in names]
    with pytest.raises(
        FileNotFoundError, match=r"lacks unet/diffusion_pytorch_model.bf16.safetensors, .*; it has .*fp16"
    ):
        resolve(tmp_path, variant="bf16")


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("svd-xl", ValueError, r"unknown model 'svd-xl': did you mean 'svd-xt'\? Else give one of tiny, svd, "),
        ("no such model", ValueError, r"unknown model 'no such model': give one of tiny, svd, svd-xt, svd-xt-1-1, a p"),
        ("a/b/c", ValueError, "unknown model 'a/b/c'"),
        ("weights/svd.safetensors", FileNotFoundError, "there is no file or folder weights/svd.safetensors"),
        ("svd.ckpt", FileNotFoundError, "there is no file or folder svd.ckpt"),
        ("./tiny", FileNotFoundError, "there is no file or folder ./tiny"),
        ("~/svd-models", FileNotFoundError, "there is no file or folder ~/svd-models"),
        (Path("svd"), FileNotFoundError, "there is no file or folder svd"),
    ],
)
def test_what_is_neither_a_path_nor_a_preset_nor_a_hub_id_is_refused_by_name(
    source: str | Path, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        resolve(source)


def test_options_that_mean_nothing_for_a_source_are_refused(small_folder: Path, small_file: Path) -> None:
    with pytest.raises(ValueError, match=r"revision 'v1' is for a hub id, but .* is local"):
        resolve(small_folder, revision="v1")
    with pytest.raises(ValueError, match=r"variant 'fp16' chooses among a folder's files, but .* is a file"):
        resolve(small_file, variant="fp16")


@pytest.mark.parametrize("suffix", [".ckpt", ".bin", ".pt", ".pth", ".pkl"])
def test_pickles_are_refused_unopened(suffix: str, tmp_path: Path, modules: dict[str, Any]) -> None:
    """As a file, and as all that a folder has for a part; beside a safetensors file they are passed over."""
    (tmp_path / f"svd{suffix}").write_bytes(b"not even a pickle")
    with pytest.raises(ValueError, match=rf"svd{suffix} is a pickle, which can run any code .* convert it"):
        resolve(tmp_path / f"svd{suffix}")
    write_folder(tmp_path, modules)
    (tmp_path / "vae" / f"diffusion_pytorch_model{suffix}").write_bytes(b"")
    resolve(tmp_path)
    (tmp_path / f"{STEMS['vae']}.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"vae/diffusion_pytorch_model{suffix} is a pickle"):
        resolve(tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "svd.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"svd.gguf is not a .safetensors file"):
        resolve(tmp_path / "svd.gguf")


def test_a_git_lfs_pointer_is_refused_with_the_command_that_fetches_the_file(tmp_path: Path) -> None:
    path = tmp_path / "svd.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9559625564\n")
    with pytest.raises(ValueError, match=r"svd.safetensors is a git-lfs pointer, not the weights: run `git lfs pull`"):
        resolve(path)


def test_every_proper_prefix_of_a_file_is_refused_by_name_and_size(tmp_path: Path) -> None:
    """The whole file is the control."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.float16)}, path)
    whole = path.read_bytes()
    assert read_header(path)["b"][:2] == ("F16", (2, 2))
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=rf"model.safetensors \({length} bytes\) is cut off or corrupt"):
            read_header(path)


def test_a_pickle_under_another_name_is_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "svd.safetensors")
    with pytest.raises(ValueError, match="is cut off or corrupt"):
        resolve(tmp_path / "svd.safetensors")


def test_an_empty_folder_is_told_every_file_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        resolve(tmp_path)
    for name in (*CONFIG_FILES.values(), *(f"{stem}.safetensors" for stem in STEMS.values())):
        assert name in str(error.value)
    assert str(error.value).endswith("it has no .safetensors file at all")


@pytest.mark.slow
def test_importing_needs_neither_the_hub_s_client_nor_open_clip(modules: dict[str, Any]) -> None:
    """They take seconds. Control: once an image encoder was built, as here, open_clip is there."""
    slow = ("open_clip", "huggingface_hub", "diffusers", "transformers")
    code = f"import sys, minisvd.checkpoint; print([name for name in {slow} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"
    assert "clip" in modules
    assert "open_clip" in sys.modules
