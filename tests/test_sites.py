"""Proposition: `minisvd.check_model` finds the cross-attentions of anyone's model and says which are trivial.

Small random models of diffusers, transformers and torch, each with the keys that its kind is given: one image embedding
(SVD, zero123, image variations, the branch of an IP-Adapter), or several, for which it must say so.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from diffusers import UNetSpatioTemporalConditionModel as DiffusersUNet
from torch import Tensor, nn

from conftest import UNET, randomised, relative_error
from minisvd import check, check_model
from minisvd.attention import Attention
from minisvd.cli import main
from minisvd.triviality import folded

C, HEADS, C_CONTEXT = 64, 4, 48
IMAGE: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": C_CONTEXT,
    "attention_head_dim": 8,
}

pytestmark = pytest.mark.slow  # diffusers' networks are built


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def image_unet(**changes: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return randomised(UNet2DConditionModel(**{**IMAGE, **changes}))


def verdicts(report: Any) -> set[str]:
    return {site.verdict for site in report.sites}


# --- models of one key ------------------------------------------------------------------------------------------------


def test_every_cross_attention_of_svd_is_trivial_in_diffusers_unet():
    """In space and in time, with the one key of its image; with two it is not."""
    torch.manual_seed(0)
    report = check_model(unet := randomised(DiffusersUNet(**UNET)))
    print(report)
    assert len(report.sites) == 22
    assert report.holds
    assert {site.keys for site in report.sites} == {1}
    assert {tuple(site.dead) for site in report.sites} == {("to_q.weight", "to_k.weight")}
    assert sum(site.saves[0] for site in report.sites) == 171_008
    assert str(report).splitlines()[0] == "22 of 22 sites are trivial"
    assert report._repr_html_().startswith("<details open><summary><b>22 of 22 sites are trivial</b>")
    assert max(map(len, str(report).splitlines())) <= 100
    assert verdicts(check_model(unet, keys=2)) == {"not trivial"}  # control


def test_one_token_of_zero123_and_of_image_variations_is_trivial():
    """Eight input channels, and one token that is the embedding with the pose projected in; or four channels, and the
    embedding alone. As a text encoder's 77 tokens the same weights are not."""
    zero123, projection = image_unet(in_channels=8), randomised(nn.Linear(C_CONTEXT + 4, C_CONTEXT))
    token = projection(noise(1, 1, C_CONTEXT + 4))
    posed = check_model(zero123, noise(1, 8, 16, 16), torch.tensor(1), encoder_hidden_states=token)
    varied = check_model(image_unet())
    for report in (posed, varied):
        assert len(report.sites) == 4
        assert report.holds
        assert all(site.keys == 1 and site.query == 0 for site in report.sites)
    text = check_model(zero123, noise(1, 8, 16, 16), torch.tensor(1), noise(1, 77, C_CONTEXT))  # control
    assert verdicts(text) == {"not trivial"}
    assert str(text).splitlines()[0] == "0 of 4 sites are trivial"
    assert {site.keys for site in text.sites} == {77}


@torch.no_grad()
def test_anyones_unet_can_be_folded():
    """With a linear map, as `folded` finds it, in the place of each attention: the same output, and as many parameters
    less as the report says. Over another number of keys it would not be the same."""

    class Stand(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
            return self.linear(encoder_hidden_states).mean(dim=1, keepdim=True).expand(-1, x.shape[1], -1)

    unet = image_unet()
    given = [(noise(2, 4, 16, 16), torch.tensor(1), noise(2, keys, C_CONTEXT)) for keys in (1, 2)]
    before, other = (unet(*each).sample for each in given)
    size, report = sum(p.numel() for p in unet.parameters()), check_model(unet)
    for site in report.sites:
        attention: Any = unet.get_submodule(site.name)
        x, key = noise(1, 1, attention.to_q.in_features), noise(1, 1, C_CONTEXT)
        linear = folded(lambda x, c, attention=attention: attention(x, encoder_hidden_states=c), x, key)
        unet.set_submodule(site.name, Stand(linear))
    assert relative_error(unet(*given[0]).sample, before) < 1e-5
    assert relative_error(unet(*given[1]).sample, other) > 1e-4  # control
    assert size - sum(p.numel() for p in unet.parameters()) == sum(site.saves[0] for site in report.sites) > 0


def test_the_branch_of_a_global_embedding_is_trivial_and_that_of_the_text_is_not():
    """IP-Adapter: each cross-attention has a summand for the text and one for the image, with keys of its own. One
    token makes the image's trivial, its to_k_ip dead; four, of the same embedding, do not."""
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    def branches(tokens: int) -> tuple[list[Any], list[Any]]:
        unet = image_unet()
        for name, module in unet.named_modules():
            if name.endswith("attn2"):
                width = module.to_q.in_features  # pyright: ignore[reportAttributeAccessIssue]
                processor = IPAdapterAttnProcessor2_0(width, C_CONTEXT, num_tokens=(tokens,))
                module.set_processor(processor)  # pyright: ignore[reportCallIssue]
        projection: Any = MultiIPAdapterImageProjection([ImageProjection(40, C_CONTEXT, tokens)])
        unet.encoder_hid_proj = projection
        unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
        embedding = {"image_embeds": [noise(1, 1, 40)]}
        inputs = noise(1, 4, 16, 16), torch.tensor(1), noise(1, 7, C_CONTEXT)
        report = check_model(randomised(unet), *inputs, added_cond_kwargs=embedding)
        print(report)
        assert len(report.sites) == 8
        return [s for s in report.sites if s.name.endswith("[0]") and "[1]" not in s.name], [
            s for s in report.sites if s.name.endswith("[1][0]")
        ]

    text, image = branches(tokens=1)
    assert [(site.verdict, site.keys) for site in text] == [("not trivial", 7)] * 4
    assert [(site.verdict, site.keys) for site in image] == [("trivial", 1)] * 4
    assert all(site.control for site in (*text, *image))
    assert {tuple(site.dead) for site in text} == {()}
    assert {tuple(site.dead) for site in image} == {("processor.to_k_ip.0.weight",)}
    _, image = branches(tokens=4)  # control
    assert [(site.verdict, site.keys) for site in image] == [("not trivial", 4)] * 4


# --- keys of other kinds, of one attention ----------------------------------------------------------------------------


def ours() -> Attention:
    torch.manual_seed(0)
    return randomised(Attention(C, HEADS, C_CONTEXT)).double()


QUERIES, KEY = noise(2, 5, C).double(), noise(2, 1, C_CONTEXT, seed=1).double()


def test_a_constant_prompt_is_one_bias():
    """One key that never changes: W c + b is a vector, which stands for the attention, whatever the query."""
    attention = ours()
    assert check(attention, QUERIES, KEY).holds
    bias = folded(attention, QUERIES, KEY)(KEY)
    assert (attention(QUERIES, KEY) - bias).abs().max() <= 1e-13
    assert (attention(QUERIES, KEY + 1) - bias).abs().max() > 0.1  # control
    prompt = noise(2, 77, C_CONTEXT).double()  # constant, but of 77 keys: the query still chooses among them
    assert check(attention, QUERIES, prompt).verdict == "not trivial"


def test_two_keys_are_not_trivial():
    report = check(ours(), QUERIES, torch.cat([KEY, -KEY], dim=1))
    assert report.finding[0] == "not trivial"
    assert report.finding[1].startswith("over 2 keys the output moves with the query")


def test_a_null_key_is_a_second_one():
    """Learnt, and beside the only key that is given: so one key is given and two are heard."""

    class WithNull(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.null = ours(), nn.Parameter(noise(1, C_CONTEXT, seed=2).double())

        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            return self.attention(x, torch.cat([self.null.expand(len(context), 1, -1), context], dim=1))

    report = check(WithNull(), QUERIES, KEY)
    assert report.finding[0] == "not trivial"
    assert report.finding[1].startswith("over 1 key the output moves with the query")
    assert report.dead == {}


def test_sigmoid_attention_is_not_trivial_over_one_key():
    """1 / (1 + exp(-s)) is no softmax: one key's weight is not 1, but the query's choice."""

    def attend(x: Tensor, context: Tensor) -> Tensor:
        q, k, v = attention.to_q(x), attention.to_k(context), attention.to_v(context)
        return attention.to_out(torch.sigmoid(q @ k.mT / C**0.5) @ v)

    attention = ours()
    report = check(attend, QUERIES, KEY, attention)
    assert report.verdict == "not trivial"
    assert report.query > 0.01
    assert report.dead == {}


def test_77_copies_of_one_key_are_one_key():
    """Whatever the query, equal keys share the weight 1; what is left is rounding. One that differs ends it."""
    copies = KEY.expand(-1, 77, -1)
    report = check(ours(), QUERIES, copies)
    print(report)
    assert report.holds
    assert report.finding[1].startswith("over 77 keys, all the same, the output is W c + b, whatever the query")
    assert list(report.dead) == ["to_q.weight", "to_k.weight"]
    assert report.saves[0] > 0
    other = torch.cat([copies[:, 1:], KEY + 1e-3], dim=1)  # control
    assert check(ours(), QUERIES, other).verdict == "not trivial"


# --- how cross-attentions are found -----------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_torchs_attention_is_found_in_a_decoder(batch_first, packed):
    """In its layer the one to the memory, not the one among the tokens; with packed projections or three."""
    layer = nn.TransformerDecoderLayer(C, HEADS, 96, batch_first=batch_first)
    if not packed:
        layer.multihead_attn = nn.MultiheadAttention(C, HEADS, kdim=C_CONTEXT, vdim=C_CONTEXT, batch_first=batch_first)
    decoder, width = randomised(layer).train(), C if packed else C_CONTEXT
    x, memory = noise(2, 5, C), noise(2, 1, width)
    given = (x, memory) if batch_first else (x.transpose(0, 1), memory.transpose(0, 1))
    (site,) = check_model(decoder, *given).sites
    print(site)
    assert site.name == "multihead_attn"
    assert site.holds
    assert site.keys == 1
    weights = [f"in_proj_weight[0:{2 * C}]"] if packed else ["q_proj_weight", "k_proj_weight"]
    assert sorted(site.dead) == sorted([*weights, f"in_proj_bias[0:{2 * C}]"])
    assert decoder.training
    three = noise(2, 3, width)  # control
    (site,) = check_model(decoder, given[0], three if batch_first else three.transpose(0, 1)).sites
    assert (site.verdict, site.keys) == ("not trivial", 3)


def test_keys_apart_from_values_are_two_contexts():
    """As where a position is added to the keys alone. Attention is linear in the values, however many there are; but
    it moves with the query."""
    attention = randomised(nn.MultiheadAttention(C, HEADS, batch_first=True))
    memory = noise(2, 3, C)
    report = check_model(attention, noise(2, 5, C), memory + 1, memory)
    assert [site.name for site in report.sites] == ["['key']", "['value']"]
    assert verdicts(report) == {"not trivial"}
    assert all(site.control is None for site in report.sites)  # one cannot be longer than the other
    assert report.sites[1].affinity <= report.sites[1].tolerance < report.sites[0].affinity


def test_attention_of_transformers_is_found():
    """A decoder of Bart over one token of its encoder and over three, though it would keep the first call's keys."""
    from transformers import BartConfig, BartModel

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in (("layers", 2), ("ffn_dim", 64))
    }
    sizes |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart = randomised(BartModel(BartConfig(vocab_size=50, d_model=C, max_position_embeddings=32, **sizes)))

    def found(length: int) -> Any:
        tokens = torch.arange(4, 4 + length)[None]
        return check_model(bart, input_ids=tokens, decoder_input_ids=torch.arange(4, 9)[None])

    report = found(1)
    print(report)
    assert [site.name for site in report.sites] == ["decoder.layers.0.encoder_attn", "decoder.layers.1.encoder_attn"]
    assert report.holds
    assert [(site.verdict, site.keys) for site in found(3).sites] == [("not trivial", 3)] * 2


@pytest.mark.parametrize("name", ["past_key_value", "cache"])
def test_keys_that_an_attention_keeps_from_an_earlier_call_are_forgotten(name: str):
    """Under the name that transformers gave its cache before 5.24, and the one since."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(C, C) for _ in range(3))

        def forward(self, x: Tensor, context: Tensor, **kept: Any) -> Tensor:
            cache = kept[name] or SimpleNamespace(kv=None)
            cache.kv = cache.kv or (self.k_proj(context), self.v_proj(context))
            return nn.functional.scaled_dot_product_attention(self.q_proj(x), *cache.kv)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross = Cross()

        def forward(self, x: Tensor, context: Tensor, kept: SimpleNamespace) -> Tensor:
            return self.cross(x, context, **{name: kept})

    torch.manual_seed(0)
    model, x, context = Model(), torch.randn(2, 5, C), torch.randn(2, 1, C)
    assert check_model(model, x, context, SimpleNamespace(kv=None)).holds
    assert not check_model(model, x, torch.randn(2, 3, C), SimpleNamespace(kv=None)).holds


def test_an_attention_written_by_hand_is_found_and_one_that_takes_one_key_has_no_control():
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wq, self.wk, self.wv = (nn.Linear(n, C) for n in (C, C_CONTEXT, C_CONTEXT))

        def forward(self, x: Tensor, image: Tensor, mask: Tensor) -> Tensor:
            scores = self.wq(x) @ self.wk(image).mT + mask  # a mask of one key, so of no more than one
            return scores.softmax(dim=-1) @ self.wv(image)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cross, self.own = Cross(), nn.MultiheadAttention(C, HEADS, batch_first=True)

        def forward(self, x: Tensor, image: Tensor) -> Tensor:
            x = x + self.own(x, x, x)[0]
            return x + self.cross(x, image, torch.zeros(2, 5, image.shape[1]))

    model = randomised(Model())
    (site,) = check_model(model, noise(2, 5, C), noise(2, 1, C_CONTEXT)).sites
    print(site)
    assert site.name == "cross"
    assert site.holds
    assert site.keys == 1


def test_a_model_that_cannot_be_run_by_itself_asks_for_inputs():
    with pytest.raises(
        ValueError, match=r"what a Linear is called with is not known: give it, check_model\(model, \*i"
    ):
        check_model(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"UNet2DConditionModel does not run on noise \(.*class_labels.*\): give its inp"
    ):
        check_model(image_unet(class_embed_type="timestep"))
    assert not check_model(nn.Linear(2, 2), noise(1, 2)).sites
    assert "no cross-attention was met" in str(check_model(nn.Linear(2, 2), noise(1, 2)))


def test_a_run_leaves_the_model_as_it_was():
    unet = image_unet().train()
    unet.conv_in.eval()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with torch.inference_mode():
        assert check_model(unet).holds
    assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())
    assert unet.training
    assert not unet.conv_in.training
    assert not any(module._forward_pre_hooks for module in unet.modules())


@pytest.mark.parametrize("kind", ["3d", "motion", "sdxl"])
def test_other_unets_of_diffusers_run_on_noise(kind):
    """Two for video, and one with the sizes that SDXL is told; each with the keys that are asked for."""
    torch.manual_seed(0)
    if kind == "3d":
        changes = {"down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D")}
        changes["up_block_types"] = ("UpBlock3D", "CrossAttnUpBlock3D")
        unet = randomised(UNet3DConditionModel(**{**IMAGE, **changes, "attention_head_dim": 8}))
    elif kind == "motion":
        changes = {"down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion")}
        changes["up_block_types"] = ("UpBlockMotion", "CrossAttnUpBlockMotion")
        sizes = {name: size for name, size in IMAGE.items() if name != "attention_head_dim"}
        unet = randomised(UNetMotionModel(**{**sizes, **changes, "num_attention_heads": 4}))
    else:
        size = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 20}
        unet = image_unet(addition_embed_type="text_time", **size)
    one, several = check_model(unet), check_model(unet, keys=5)
    assert one.holds
    assert one.sites
    assert verdicts(several) == {"not trivial"}
    assert {site.keys for site in several.sites} == {5}


# --- minisvd verify ---------------------------------------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """An image-variation model as diffusers saves it, of which `verify` needs the UNet alone."""
    image_unet().save_pretrained(tmp_path / "unet")
    return tmp_path


def test_verify_takes_a_folder_of_another_architecture(image_folder: Path, capsys: pytest.CaptureFixture[str]):
    """With the keys of its text encoder where it has one, and with those that are asked for."""
    argv = ["verify", "--model", str(image_folder)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[0] == "4 of 4 sites are trivial"
    assert [row.split()[1:3] for row in out.splitlines()[5:]] == [["1", "trivial"]] * 4
    assert main(["verify", "--model", str(image_folder / "unet")]) == 0
    assert capsys.readouterr().out == out

    (image_folder / "text_encoder").mkdir()
    (image_folder / "text_encoder/config.json").write_text(json.dumps({"max_position_embeddings": 77}))
    assert main([*argv, "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["hold"] == 0
    assert [(site["keys"], site["finding"][0]) for site in report["sites"]] == [(77, "not trivial")] * 4
    assert main([*argv, "--keys", "1"]) == 0
    assert main([*argv, "--keys", "0"]) == 2
    assert "keys is 0; need at least 1" in capsys.readouterr().err


def test_verify_says_what_it_lacks(image_folder: Path, capsys: pytest.CaptureFixture[str]):
    config = image_folder / "unet/config.json"
    config.write_text(config.read_text().replace("UNet2DConditionModel", "UNetOfNobody"))
    assert main(["verify", "--model", str(image_folder)]) == 2
    said = capsys.readouterr().err
    assert "holds a UNetOfNobody, which is read by diffusers: pip install diffusers" in said
    config.write_text("{")
    assert main(["verify", "--model", str(image_folder)]) == 2
    assert "unet/config.json is" in capsys.readouterr().err


@pytest.mark.slow
def test_diffusers_is_imported_for_a_folder_of_another_architecture_only(image_folder: Path, tiny_folder: Path):
    code = "import sys; from minisvd.cli import main; main(['verify', '--model', sys.argv[1]]);"
    code += "print('diffusers' in sys.modules)"
    for folder, imported in ((tiny_folder, "False"), (image_folder, "True")):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", code, folder], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == imported, done.stderr
