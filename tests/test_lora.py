"""LoRAs: every family of files gives the same weights, and the base comes back to the bit."""

from __future__ import annotations

import base64
import hashlib
import json
import random
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lora_files as files
import pytest
import torch
from lora_files import RANK, File, Modules, as_diffusers, delta, modules
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import flux_engine
from flux_engine import FluxEngineError, InvalidRequest, LoRA, WeightsError
from flux_engine.cli import main
from flux_engine.lora import side
from flux_engine.lora.modes import mode_of
from flux_engine.quantization.linears import QuantizedLinear, quantize_weight
from flux_engine.specs import SDXL

FLUX_ATTENTION = [f"transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k", "to_v", "to_out.0")]
FLUX_TEXT = [f"transformer_blocks.1.attn.{n}" for n in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
FLUX_ALL = [
    *FLUX_ATTENTION, *FLUX_TEXT, "transformer_blocks.0.ff.net.0.proj", "transformer_blocks.0.ff.net.2",
    "transformer_blocks.1.ff_context.net.0.proj", "transformer_blocks.0.norm1.linear",
    "transformer_blocks.1.norm1_context.linear", *(f"single_transformer_blocks.0.attn.{n}" for n in ("to_q", "to_k",
    "to_v")), "single_transformer_blocks.0.proj_mlp", "single_transformer_blocks.0.proj_out",
    "single_transformer_blocks.1.norm.linear", "x_embedder", "context_embedder", "proj_out", "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2",
    "time_text_embed.text_embedder.linear_1",
]  # fmt: skip
FLUX_FAMILIES: dict[str, tuple[list[str], Callable[[Modules], File]]] = {
    "diffusers, alpha = rank": (FLUX_ALL, files.peft("transformer.")),
    "diffusers with alpha": (FLUX_ALL, files.with_alpha("transformer.", "lora_A", "lora_B")),
    "diffusers, alpha in the header": (FLUX_ALL, files.in_metadata("transformer.")),
    "diffusers, rslora": (FLUX_ALL, files.in_metadata("transformer.", rslora=True)),
    "PEFT with an adapter's name": (FLUX_ALL, files.peft("transformer.", ("lora_A.default", "lora_B.default"))),
    "mixed": (FLUX_ALL, files.with_alpha("transformer.", "lora_down", "lora_up")),
    "OneTrainer": (FLUX_ALL, files.with_alpha("lora_transformer_", "lora_down", "lora_up", squeeze=True)),
    "kohya": (FLUX_ALL, files.bfl(files.with_alpha("lora_unet_", "lora_down", "lora_up", squeeze=True))),
    "ComfyUI, down and up": (FLUX_ALL, files.bfl(files.with_alpha("diffusion_model.", "lora_down", "lora_up"))),
    "ComfyUI, A and B": (FLUX_ALL, files.bfl(files.with_alpha("diffusion_model.", "lora_A", "lora_B"))),
    "fal": (FLUX_ALL, files.bfl(files.peft("base_model.model."))),
    "BFL": (FLUX_ALL, files.bfl(files.peft(""))),
    "XLabs": ([*FLUX_ATTENTION, *FLUX_TEXT], files.xlabs),
    "LyCORIS": (FLUX_ALL, files.with_alpha("lycoris_", "lora_down", "lora_up", squeeze=True)),
}
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0."
SDXL_ATTENTION = [f"{BLOCK}{attn}.{n}" for attn in ("attn1", "attn2") for n in ("to_q", "to_k", "to_v", "to_out.0")]
SDXL_LINEARS = [
    *SDXL_ATTENTION, BLOCK + "ff.net.0.proj", BLOCK + "ff.net.2", "down_blocks.1.attentions.0.proj_in",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q", "up_blocks.0.attentions.0.proj_out",
]  # fmt: skip
SDXL_ALL = [
    *SDXL_LINEARS, "conv_in", "conv_out", "down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.1.conv2",
    "down_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.resnets.0.time_emb_proj", "up_blocks.0.upsamplers.0.conv",
    "down_blocks.0.downsamplers.0.conv", "time_embedding.linear_1", "add_embedding.linear_1",
    "mid_block.resnets.0.conv1",
    "up_blocks.1.resnets.2.conv1",
]  # fmt: skip
SDXL_FAMILIES: dict[str, tuple[list[str], Callable[[Modules], File]]] = {
    "diffusers": (SDXL_ALL, files.peft("unet.")),
    "diffusers with alpha": (SDXL_ALL, files.with_alpha("unet.", "lora_A", "lora_B")),
    "diffusers, the older names": (SDXL_ALL, files.peft("unet.", ("lora.down", "lora.up"))),
    "kohya, diffusers' blocks": (SDXL_ALL, files.with_alpha("lora_unet_", "lora_down", "lora_up", squeeze=True)),
    "kohya": (SDXL_ALL, files.sgm((False, True, True))),
    "attention processors": (SDXL_ATTENTION, files.processors("unet.")),
    "Replicate": (SDXL_ATTENTION, files.processors("")),
}


class Model:
    """An engine, its network's weights before anything was merged, and files to merge."""

    def __init__(self, name: str, folder: Path, **how: Any) -> None:
        self.engine = flux_engine.load(name, device="cpu", **how)
        self.folder, self.count = folder, 0
        self.base = self.weights()
        self.bits = self.state()

    @property
    def net(self) -> Any:
        return self.engine._pipeline.family.net

    def weights(self) -> dict[str, Tensor]:
        spec = self.engine.spec
        width = getattr(spec, "transformer", None) and spec.transformer.hidden_size  # pyright: ignore
        attention = () if width else tuple(map(bool, spec.unet.transformer_depth))  # pyright: ignore
        return {name: t.clone() for name, t in as_diffusers(self.net, width or 0, attention).items()}

    def state(self) -> dict[str, Tensor]:
        networks = self.engine._pipeline.family.networks()
        return {f"{part}.{n}": p.clone() for part, net in networks.items() for n, p in net.state_dict().items()}

    def digest(self) -> str:
        """Of every bit of the network that denoises, and of what stands beside its weights, wherever there is room."""
        found = hashlib.sha256()
        beside = {n: t if n.endswith("down") else t.t() for n, t in self.net.named_buffers() if "side_" in n}
        for tensor in (*self.net.state_dict().values(), *(t[t.any(dim=1)] for t in beside.values())):
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        return found.hexdigest()

    def file(self, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
        self.count += 1
        path = self.folder / f"{self.count}.safetensors"
        save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata=metadata)
        return path

    def unchanged(self) -> bool:
        now = self.state()
        return now.keys() == self.bits.keys() and all(torch.equal(now[name], t) for name, t in self.bits.items())


def of(name: str, **how: Any) -> Any:
    @pytest.fixture(scope="module")
    def made(tmp_path_factory: pytest.TempPathFactory) -> Model:
        return Model(name, tmp_path_factory.mktemp("loras"), **how)

    return made


flux = of("demo-dev", dtype="float32")
flux_bf16 = of("demo-dev", dtype="bfloat16")
flux_int8 = of("demo-dev", dtype="float32", quantization="int8")
flux_fp8 = of("demo-dev", dtype="float32", quantization="fp8")
sdxl = of("demo-sdxl", dtype="float32")
sdxl_bf16 = of("demo-sdxl", dtype="bfloat16")


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    found: Model = request.getfixturevalue(request.param)
    yield found
    found.engine.lora.clear()
    assert found.unchanged(), "the base did not come back"


def ulps(a: Tensor, wanted: Tensor, *terms: Tensor) -> float:
    """How many numbers of a's dtype lie between it and what is wanted, at most, counted where the largest of the sum's
    terms lies: what cancels out keeps their rounding."""
    size = torch.stack([t.double().abs() for t in (wanted, *terms)]).amax(0).clamp_min(2**-12)
    spacing = torch.finfo(a.dtype).eps * torch.exp2(torch.floor(torch.log2(size)))
    return float(((a.double() - wanted.to(a.dtype).double()).abs() / spacing).max())


def merged(model: Model, made: Modules, tensors: dict[str, Tensor], metadata: dict[str, str], scale: float) -> None:
    """Set it, and compare every weight with the sum in float64."""
    model.engine.lora.set([LoRA(model.file(tensors, metadata), scale)])
    for name, weight in model.weights().items():
        before, module = model.base[name], name.removesuffix(".weight")
        if module not in made or name.endswith(".bias"):
            assert torch.equal(weight, before), f"{name} changed"
        else:
            added = delta(made[module], scale)
            assert not torch.equal(weight, before)
            summed = delta((made[module][0].abs(), made[module][1].abs()), scale)
            # A product over the rank has more rounding than one number of float32's; of bfloat16's it has none.
            assert ulps(weight, before.double() + added, before, summed) <= (1 if weight.itemsize == 2 else 4), name


@pytest.mark.parametrize("family", FLUX_FAMILIES)
@pytest.mark.parametrize("model", ["flux", "flux_bf16"], indirect=True)
def test_flux_families_give_the_same_weights(model: Model, family: str) -> None:
    names, write = FLUX_FAMILIES[family]
    made = modules(model.base, names)
    merged(model, made, *write(made), scale=0.75)


@pytest.mark.parametrize("family", SDXL_FAMILIES)
@pytest.mark.parametrize("model", ["sdxl", "sdxl_bf16"], indirect=True)
def test_sdxl_families_give_the_same_weights(model: Model, family: str) -> None:
    names, write = SDXL_FAMILIES[family]
    made = modules(model.base, names)
    merged(model, made, *write(made), scale=-0.5)


QKV, CONV = "double_blocks.0.img_attn.qkv", "down_blocks.0.resnets.0.conv1"


@pytest.mark.parametrize("form", ["lokr", "lokr whole", "lokr tucker", "loha", "loha tucker", "locon cp", "diff"])
@pytest.mark.parametrize("model", ["sdxl", "flux"], indirect=True)
def test_other_forms_against_a_dense_difference(model: Model, form: str) -> None:
    """LyCORIS' own formulas, written out in float64."""
    conv = model.engine.spec.name == "demo-sdxl"
    if not conv and ("tucker" in form or "cp" in form):
        form = form.split()[0].replace("locon", "diff")
    stem = f"lora_unet_{CONV.replace('.', '_')}" if conv else "lycoris_transformer_blocks_0_attn_to_k"
    name = f"{CONV}.weight" if conv else "transformer_blocks.0.attn.to_k.weight"
    before = model.base[name]
    n, k, *kernel = before.shape
    generator = torch.Generator().manual_seed(3)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    r, alpha = 3, torch.tensor(1.5)
    match form:
        case "lokr":
            t = {"lokr_w1_a": some(4, r), "lokr_w1_b": some(r, 4), "lokr_w2": some(n // 4, k // 4, *kernel)}
            w1 = (t["lokr_w1_a"].double() @ t["lokr_w1_b"].double()).reshape(4, 4, *(1 for _ in kernel))
            wanted = torch.kron(w1, t["lokr_w2"].double()) * 0.5
        case "lokr whole":  # alpha has no rank to be divided by
            t = {"lokr_w1": some(4, 4), "lokr_w2": some(n // 4, k // 4, *kernel)}
            wanted = torch.kron(t["lokr_w1"].double().reshape(4, 4, *(1 for _ in kernel)), t["lokr_w2"].double())
        case "lokr tucker":
            t = {"lokr_w1": some(4, 4), "lokr_w2_a": some(r, n // 4), "lokr_w2_b": some(r, k // 4)}
            t["lokr_t2"] = some(r, r, *kernel)
            w2 = torch.einsum("abhw,an,bk->nkhw", *(t[f"lokr_{x}"].double() for x in ("t2", "w2_a", "w2_b")))
            wanted = torch.kron(t["lokr_w1"].double()[..., None, None], w2.contiguous()) * 0.5
        case "loha":
            inner = k * kernel[0] * kernel[1] if kernel else k
            t = {f"hada_w{i}_{x}": some(*((n, r) if x == "a" else (r, inner))) for i in (1, 2) for x in "ab"}
            w1, w2 = (t[f"hada_w{i}_a"].double() @ t[f"hada_w{i}_b"].double() for i in (1, 2))
            wanted = (w1 * w2 * 0.5).reshape(before.shape)
        case "loha tucker":
            t = {f"hada_w{i}_{x}": some(r, n if x == "a" else k) for i in (1, 2) for x in "ab"}
            t |= {f"hada_t{i}": some(r, r, *kernel) for i in (1, 2)}
            w1, w2 = (
                torch.einsum("abhw,an,bk->nkhw", *(t[f"hada_{x}"].double() for x in (f"t{i}", f"w{i}_a", f"w{i}_b")))
                for i in (1, 2)
            )
            wanted = w1 * w2 * 0.5
        case "locon cp":
            t = {"lora_down.weight": some(r, k, 1, 1), "lora_up.weight": some(n, r, 1, 1)}
            t["lora_mid.weight"] = some(r, r, *kernel)
            up, down = t["lora_up.weight"][..., 0, 0].double(), t["lora_down.weight"][..., 0, 0].double()
            wanted = torch.einsum("nr,rshw,sk->nkhw", up, t["lora_mid.weight"].double(), down) * 0.5
        case _:
            t, wanted = {"diff": some(*before.shape)}, None
            wanted = t["diff"].double()
    if form != "diff":
        t["alpha"] = alpha
    model.engine.lora.set([LoRA(model.file({f"{stem}.{slot}": each for slot, each in t.items()}), 0.5)])
    now = model.weights()
    torch.testing.assert_close(now[name], (before.double() + 0.5 * wanted).float(), rtol=2e-6, atol=2e-6)
    assert [other for other in now if not torch.equal(now[other], model.base[other])] == [name]


@pytest.mark.parametrize("slot", ["dora_scale", "lora_magnitude_vector", "by column"])
@pytest.mark.parametrize("model", ["sdxl", "flux"], indirect=True)
def test_dora_stretches_rows_or_columns(model: Model, slot: str) -> None:
    conv = model.engine.spec.name == "demo-sdxl"
    module = CONV if conv else "transformer_blocks.0.attn.to_k"
    before = model.base[f"{module}.weight"].double()
    (pair,) = modules(model.base, [module]).values()
    axis = 1 if slot == "by column" else 0
    others = tuple(i for i in range(before.ndim) if i != axis)
    magnitude = torch.rand(before.shape[axis], generator=torch.Generator().manual_seed(1)).double() + 0.5
    shape = [-1 if i == axis else 1 for i in range(before.ndim)]
    changed = before + delta(pair)
    wanted = magnitude.reshape(shape) * changed / torch.linalg.vector_norm(changed, dim=others, keepdim=True)
    prefix = "unet." if conv else "transformer."
    tensors, _ = files.with_alpha(prefix, "lora_A", "lora_B")({module: pair})
    stored = magnitude.float()
    if slot != "lora_magnitude_vector":
        stored = stored.reshape(shape)
    tensors[f"{prefix}{module}.{'dora_scale' if slot == 'by column' else slot}"] = stored
    path = model.file(tensors)
    for scale in (1.0, 0.5, 0.0):
        model.engine.lora.set([LoRA(path, scale)])
        sum_ = (before + scale * (wanted - before)).float()
        torch.testing.assert_close(model.weights()[f"{module}.weight"], sum_, rtol=1e-5, atol=1e-6)
    assert model.unchanged()


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_what_is_merged_is_quantized_anew_and_not_added_to_8_bits(
    scheme: str, flux: Model, request: pytest.FixtureRequest
) -> None:
    eight: Model = request.getfixturevalue(f"flux_{scheme}")
    made = modules(flux.base, FLUX_ALL, size=0.02)
    tensors, metadata = files.peft("transformer.")(made)
    for model in (flux, eight):
        model.engine.lora.set([model.file(tensors, metadata)])
    count = 0
    plain = dict(flux.net.named_modules())
    for name, layer in eight.net.named_modules():
        if isinstance(layer, QuantizedLinear):
            values, scale = quantize_weight(plain[name].weight, layer.scheme)
            assert torch.equal(layer.weight.float(), values.float()), name
            assert torch.equal(layer.weight_scale, scale), name
            count += 1
    assert count > 10
    for model in (flux, eight):
        model.engine.lora.clear()
        assert model.unchanged()


@pytest.mark.parametrize("model", ["flux", "sdxl"], indirect=True)
def test_text_encoders_are_merged_too_and_prompts_encoded_anew(model: Model) -> None:
    request: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent"}
    plain = model.engine("a red circle", **request).images[0]
    family = model.engine._pipeline.family
    clip = family.networks()["text_encoder"]
    width = clip.config.hidden_size
    pair = torch.randn(RANK, width), torch.randn(width, RANK)
    stem = "text_model_encoder_layers_0_self_attn_q_proj"
    first, _ = files.with_alpha("lora_te1_", "lora_down", "lora_up")({stem: pair})
    second, _ = files.with_alpha("text_encoder.", "lora_A", "lora_B")(
        {"text_model.encoder.layers.0.self_attn.q_proj": pair}
    )
    pictures: list[Tensor] = []
    for tensors in (first, second):
        (read,) = model.engine.lora.set([model.file(tensors)])
        assert {part for part, _ in read.changes} == {"text_encoder"}
        pictures.append(model.engine("a red circle", **request).images[0])
    assert torch.equal(*pictures)
    assert not torch.equal(pictures[0], plain)
    model.engine.lora.clear()
    assert torch.equal(model.engine("a red circle", **request).images[0], plain)


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_several_add_up_and_only_what_changes_is_touched(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [modules(model.base, FLUX_ATTENTION[:2], seed) for seed in (0, 1)]
    paths = [model.file(files.peft("transformer.")(each)[0]) for each in made]
    addresses = {name: p.data_ptr() for name, p in model.net.named_parameters()}
    model.engine.lora.set([LoRA(paths[0], 0.5), LoRA(paths[1], -1.0)])
    for module in FLUX_ATTENTION[:2]:
        wanted = model.base[f"{module}.weight"].double() + delta(made[0][module], 0.5) + delta(made[1][module], -1.0)
        torch.testing.assert_close(model.weights()[f"{module}.weight"], wanted.float(), rtol=1e-6, atol=1e-6)
    assert {name: p.data_ptr() for name, p in model.net.named_parameters()} == addresses, "not in place"
    assert [entry["scale"] for entry in model.engine.describe()["loras"]] == [0.5, -1.0]

    touched: list[str] = []
    refresh = type(model.engine.lora._networks[0].loaded).refresh

    def counted(self: Any, name: str) -> None:
        touched.append(name)
        refresh(self, name)

    monkeypatch.setattr(type(model.engine.lora._networks[0].loaded), "refresh", counted)
    model.engine.lora.set([LoRA(paths[0], 0.5), LoRA(paths[1], -1.0)])
    assert touched == []
    model.engine.lora.set([LoRA(paths[0], 0.5)])
    assert touched == [f"{QKV}.weight"]


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("model", ["flux", "flux_int8"], indirect=True)
def test_what_is_interrupted_leaves_what_was(model: Model, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = FLUX_ALL[:12]
    paths = [model.file(files.peft("transformer.")(modules(model.base, names, seed))[0]) for seed in (0, 1)]
    model.engine.lora.set([paths[0]])
    before = model.state()
    loaded = type(model.engine.lora._networks[0].loaded)
    refresh, left = loaded.refresh, [after]

    def interrupted(self: Any, name: str) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        refresh(self, name)

    monkeypatch.setattr(loaded, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.engine.lora.set([paths[1]])
    now = model.state()
    assert all(torch.equal(now[name], t) for name, t in before.items())
    assert model.engine.lora.active == (LoRA(paths[0]),)


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_what_is_interrupted_twice_is_put_right_before_the_next_request(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model.file(files.peft("transformer.")(modules(model.base, FLUX_ATTENTION, 0))[0])
    loaded = type(model.engine.lora._networks[0].loaded)
    with monkeypatch.context() as patch:
        patch.setattr(loaded, "refresh", lambda self, name: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            model.engine.lora.set([path])
    model.net.double_blocks[0].img_attn.proj.weight.add_(1)  # as if it had been half done
    model.engine("a red circle", seed=0, num_inference_steps=1, width=64, height=64)
    assert model.unchanged()


def refusals(model: Model) -> dict[str, tuple[dict[str, Tensor], str]]:
    to_q = "transformer.transformer_blocks.0.attn.to_q"
    width = model.net.params.hidden_size
    a, b = torch.ones(RANK, width), torch.ones(width, RANK)
    good = {f"{to_q}.lora_A.weight": a, f"{to_q}.lora_B.weight": b}
    return {
        "unknown": ({**good, "transformer.nothing.lora_A.weight": a + 1}, "1 tensors mean nothing to this model"),
        "half": ({f"{to_q}.lora_A.weight": a}, "without its up"),
        "alpha alone": ({f"{to_q}.alpha": torch.tensor(1.0)}, "without what it scales"),
        "rank": ({**good, f"{to_q}.lora_B.weight": torch.zeros(width, RANK + 1)}, "down has rank 4, up 5"),
        "shape": ({**good, f"{to_q}.lora_A.weight": torch.zeros(RANK, 5)}, "does not fit transformer"),
        "nan": ({**good, f"{to_q}.lora_A.weight": a + float("nan")}, "not finite"),
        "infinite alpha": ({**good, f"{to_q}.alpha": torch.tensor(float("inf"))}, "not finite"),
        "twice": ({**good, f"{to_q}.lora_down.weight": a + 1}, "say the same"),
        "SDXL": (
            {f"lora_unet_{n}": t for n, t in {
                "down_blocks_1_attentions_0_transformer_blocks_3_attn1_to_q.lora_down.weight": a,
                "down_blocks_1_attentions_0_transformer_blocks_3_attn1_to_q.lora_up.weight": b,
            }.items()},
            "was made for SDXL",
        ),
        "no lora": ({"something": a}, "is no LoRA that is known here"),
        "whole numbers": ({**good, f"{to_q}.lora_A.weight": a.to(torch.int32)}, "whole numbers"),
    }  # fmt: skip


REFUSED = [
    "unknown", "half", "alpha alone", "rank", "shape", "nan", "infinite alpha", "twice", "SDXL", "no lora",
    "whole numbers",
]  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_what_cannot_be_used_is_refused_and_nothing_changes(model: Model, kind: str) -> None:
    tensors, message = refusals(model)[kind]
    good = model.file(files.peft("transformer.")(modules(model.base, FLUX_ATTENTION))[0])
    model.engine.lora.set([good])
    before = model.state()
    with pytest.raises(WeightsError, match=message):
        model.engine.lora.set([good, model.file(tensors)])
    now = model.state()
    assert all(torch.equal(now[name], t) for name, t in before.items())


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_unknown_tensors_are_reported_where_they_are_let_pass(model: Model) -> None:
    tensors, _ = refusals(model)["unknown"]
    (read,) = model.engine.lora.set([model.file(tensors)], strict=False)
    assert read.unknown == ("transformer.nothing.lora_A.weight",)
    result = model.engine("a red circle", seed=0, num_inference_steps=1, width=64, height=64)
    assert any("transformer.nothing.lora_A.weight" in note for note in result.notes)


@pytest.mark.parametrize(
    ("loras", "message"),
    [
        ("a.safetensors", "are a list"),
        ([LoRA("a", float("nan"))], "is a number"),
        ([LoRA("a", True)], "is a number"),
        ([LoRA("a", 1e9)], "at most 1,000"),
        ([3], "named by the path"),
        ([LoRA("")], "named by the path"),
        (["a\0b"], "named by the path"),
    ],
)
def test_what_is_no_list_of_loras_is_refused(flux: Model, loras: Any, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        flux.engine.lora.set(loras)


def test_files_that_are_none_are_refused(flux: Model, tmp_path: Path) -> None:
    pickled, short = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save({"a": torch.zeros(1)}, pickled)
    short.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    for path, message in (
        (tmp_path / "none", "does not exist"), (pickled, "is a pickle"),
        (short, "not a whole"),
    ):  # fmt: skip
        with pytest.raises(WeightsError, match=message):
            flux.engine.lora.set([path])
    assert flux.unchanged()


@pytest.mark.parametrize("memory", ["evict", "file"])
def test_weights_that_come_and_go_come_back_merged(memory: str, flux: Model, tmp_path: Path) -> None:
    """Modulation leaves after use and is read once more, with what is merged in it."""
    path = flux.file(files.peft("transformer.")(modules(flux.base, FLUX_ALL))[0])
    request: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent"}
    engine = flux_engine.load(
        "demo-dev", dtype="float32", device="cpu", memory="evict" if memory == "evict" else 37_000_000
    )
    plain = engine("a red circle", **request).images[0]
    for which in (flux.engine, engine):
        which.lora.set([path])
    merged_ = [which("a red circle", **request).images[0] for which in (flux.engine, engine)]
    assert torch.equal(*merged_)
    assert not torch.equal(merged_[0], plain)
    for which in (flux.engine, engine):
        which.lora.clear()
    assert torch.equal(engine("a red circle", **request).images[0], plain)


def test_both_precisions_are_merged(flux: Model) -> None:
    path = flux.file(files.peft("transformer.")(modules(flux.base, FLUX_ALL))[0])
    request: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent"}
    engine = flux_engine.load("demo-dev", dtype="float32", device="cpu", quantization="both", loras=[path])
    flux.engine.lora.set([path])
    assert torch.equal(
        flux.engine("a red circle", **request).images[0],
        engine("a red circle", **request, go_fast=False).images[0],
    )
    flux.engine.lora.clear()


def test_a_lora_that_is_written_over_is_read_anew(flux: Model) -> None:
    path = flux.folder / "same.safetensors"
    seen: list[dict[str, Tensor]] = []
    for seed in (0, 1):
        save_file(files.peft("transformer.")(modules(flux.base, FLUX_ATTENTION, seed))[0], path)
        flux.engine.lora.set([path])
        seen.append(flux.weights())
    name = f"{FLUX_ATTENTION[0]}.weight"
    assert not torch.equal(seen[0][name], seen[1][name])
    flux.engine.lora.clear()
    assert flux.unchanged()


def test_prepared_loras_are_bounded_in_bytes(flux: Model) -> None:
    lora = flux.engine.lora
    paths = [flux.file(files.peft("transformer.")(modules(flux.base, FLUX_ATTENTION, n))[0]) for n in range(4)]
    (read,) = lora.set([paths[0]])
    before, lora.cache_bytes = lora.cache_bytes, 2 * read.bytes
    try:
        for path in paths:
            lora.set([path])
            assert sum(each.prepared.bytes for each in lora._ready.values()) <= lora.cache_bytes
    finally:
        lora.cache_bytes = before
        lora.clear()


def test_two_at_once_take_turns(flux: Model) -> None:
    paths = [flux.file(files.peft("transformer.")(modules(flux.base, FLUX_ALL, n))[0]) for n in range(2)]
    request: dict[str, Any] = {"seed": 0, "num_inference_steps": 1, "width": 64, "height": 64, "output_type": "latent"}
    known: list[Tensor] = []
    for path in paths:
        flux.engine.lora.set([path])
        known.append(flux.engine("a red circle", **request).images[0])
    stop = threading.Event()

    def switch() -> None:
        n = 0
        while not stop.is_set():
            flux.engine.lora.set([paths[n % 2]])
            n += 1

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(10):
            picture = flux.engine("a red circle", **request).images[0]
            assert any(torch.equal(picture, one) for one in known)
    finally:
        stop.set()
        thread.join()
    flux.engine.lora.clear()
    assert flux.unchanged()


@pytest.mark.full
@pytest.mark.parametrize("how", ["flux_bf16", "flux_int8", "flux_fp8", "sdxl_bf16"])
def test_a_thousand_changes_end_with_the_base(
    how: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set, unset, and interrupted anywhere; what is merged depends on what is wanted, not on the way there."""
    model: Model = request.getfixturevalue(how)
    names = FLUX_ALL if how.startswith("flux") else SDXL_ALL
    write = files.peft("transformer." if how.startswith("flux") else "unet.")
    paths = [model.file(write(modules(model.base, names[n::3] + names[:2], n))[0]) for n in range(5)]
    rng, left = random.Random(0), [-1]
    loaded = type(model.engine.lora._networks[0].loaded)
    refresh = loaded.refresh

    def interrupted_at(work: Callable[[], None]) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        work()

    def interrupted(self: Any, name: str) -> None:
        interrupted_at(lambda: refresh(self, name))

    monkeypatch.setattr(loaded, "refresh", interrupted)
    fill = side.fill

    def interrupted_too(module: Any, parts: Any) -> None:
        interrupted_at(lambda: fill(module, parts))

    monkeypatch.setattr(side, "fill", interrupted_too)
    interruptions, seen, applied = 0, dict[Any, str](), "merge"
    for _ in range(1000):
        wanted = tuple(LoRA(path, rng.choice([-1.0, 0.0, 0.5, 1.0])) for path in rng.sample(paths, rng.randint(0, 2)))
        left[0] = rng.randint(0, 12) if rng.random() < 0.3 else -1
        asked: Any = rng.choice(["merge", "side"])
        try:
            model.engine.lora.set(wanted, how=asked)
            applied = asked
        except KeyboardInterrupt:
            interruptions += 1
        left[0] = -1
        bits = model.digest()
        assert seen.setdefault((model.engine.lora.active, applied), bits) == bits
    assert interruptions > 50
    model.engine.lora.clear()
    assert model.unchanged()


MODE_NAMES = {
    "models--latent-consistency--lcm-lora-sdxl/snapshots/x/pytorch_lora_weights.safetensors": ("lcm", 4),
    "sdxl_lightning_8step_lora.safetensors": ("lightning", 8),
    "Hyper-SDXL-12steps-CFG-lora.safetensors": ("hyper", 12),
    "style.safetensors": None,
    "welcome.safetensors": None,
    "Hyper-FLUX.1-dev-8steps-lora.safetensors": None,
}


@pytest.mark.parametrize("name", MODE_NAMES)
def test_loras_of_few_steps_are_told_by_their_names(name: str) -> None:
    mode = mode_of("auto", name, SDXL)
    assert (mode and (mode.name, mode.steps)) == MODE_NAMES[name]


def test_a_mode_lasts_as_long_as_its_lora(sdxl: Model) -> None:
    engine, plain = sdxl.engine, sdxl.engine.spec
    tensors, _ = files.peft("unet.")(modules(sdxl.base, SDXL_ATTENTION, size=0.01))
    path, other = sdxl.file(tensors), sdxl.file(tensors)
    request: dict[str, Any] = {"seed": 0, "width": 64, "height": 64}
    try:
        engine.lora.set([LoRA(path, mode="lcm"), other])
        job = engine("a red circle", **request).job
        assert (job.num_inference_steps, job.scheduler, job.true_cfg_scale) == (4, "LCM", 1.0)
        assert (
            engine("a red circle", num_inference_steps=2, scheduler="K_EULER", **request).job.num_inference_steps == 2
        )
        engine.lora.set([LoRA(path, mode="lightning-2")])
        job = engine("a red circle", **request).job
        assert (job.num_inference_steps, job.scheduler, engine.spec.schedule.timestep_spacing) == (
            2,
            "K_EULER",
            "trailing",
        )  # pyright: ignore
        engine.lora.set([LoRA(path, 0.0, mode="lcm"), LoRA(path, mode=None)])
        assert engine.spec == plain
        for loras, message in (
            ([LoRA(path, mode="lcm"), LoRA(other, mode="hyper")], "only one LoRA sets the steps"),
            ([LoRA(path, mode="nonsense")], "mode is 'auto'"),
            ([LoRA(path, mode="lightning-0")], "1 to 50"),
            ([LoRA(path, mode="turbo-flux")], "is a mode of FLUX.1"),
        ):
            with pytest.raises(InvalidRequest, match=message):
                engine.lora.set(loras)
        assert engine.spec == plain
    finally:
        engine.lora.clear()
    assert engine.spec == plain
    assert sdxl.unchanged()


def test_a_file_is_told_without_a_model(
    flux: Model, sdxl: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names, write = FLUX_FAMILIES["kohya"]
    path = flux.file(write(modules(flux.base, names))[0], {"ss_network_dim": "4"})
    assert main(["lora", "inspect", str(path)]) == 0
    said = capsys.readouterr().out
    assert "kohya LoRA of rank 4 to 16, for FLUX.1" in said
    assert "alpha 2" in said
    assert "ss_network_dim: 4" in said
    names, write = SDXL_FAMILIES["kohya"]
    assert main(["lora", "inspect", str(sdxl.file(write(modules(sdxl.base, names))[0])), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights"] == len(names)
    assert main(["lora", "inspect", str(flux.file({"a.weight": torch.zeros(1)}))]) == 1
    assert "is no LoRA" in capsys.readouterr().err
    assert main(["lora", "inspect", str(tmp_path / "none")]) == 1


def test_loras_on_the_command_line(flux: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = flux.file(files.peft("transformer.")(modules(flux.base, FLUX_ALL))[0])
    out = tmp_path / "a.png"
    how = [
        "a red circle",
        "--model",
        "demo-dev",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--seed",
        "0",
        "--steps",
        "1",
    ]
    how += ["--steps", "1", "--width", "64", "--height", "64", "-o", str(out)]
    assert main(["generate", *how, "--lora", f"{path}:0.5"]) == 0
    flux.engine.lora.set([LoRA(path, 0.5)])
    wanted = flux.engine("a red circle", seed=0, num_inference_steps=1, width=64, height=64).images[0]
    flux.engine.lora.clear()
    with Image.open(out) as drawn:
        assert drawn.tobytes() == wanted.tobytes()
    assert main(["generate", *how, "--lora", str(tmp_path / "none.safetensors")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_loras_by_other_names(flux: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of a tar, a data URI and the hub's cache: the same weights, and nothing of the content in what is told."""
    path = flux.file(files.peft("transformer.")(modules(flux.base, FLUX_ATTENTION))[0])
    flux.engine.lora.set([path])
    wanted = flux.digest()
    tar = tmp_path / "trained.tar"
    with tarfile.open(tar, "w") as packed:
        packed.add(path, "output/lora.safetensors")
    content = base64.b64encode(path.read_bytes()).decode()
    cache = tmp_path / "hub"
    snapshot = cache / "models--someone--style" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "pytorch_lora_weights.safetensors").write_bytes(path.read_bytes())
    (cache / "models--someone--style" / "refs").mkdir()
    (cache / "models--someone--style" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    engine = flux_engine.load("demo-dev", dtype="float32", device="cpu", offline=True)
    for named in (tar, str(tar), f"data:application/octet-stream;base64,{content}", "someone/style"):
        engine.lora.clear()
        engine.lora.set([named])
        found = hashlib.sha256()
        for tensor in engine._pipeline.family.net.state_dict().values():
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
        assert found.hexdigest() == wanted, named[:40] if isinstance(named, str) else named
        assert content[:50] not in json.dumps(engine.describe())
    for named, message in (
        ("https://civitai.com/models/123", "nothing is fetched offline"),
        ("someone/other", "offline"),
    ):
        with pytest.raises(FluxEngineError, match=message):
            engine.lora.set([named])
    flux.engine.lora.clear()


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("huggingface.co/a/b/c.safetensors", "c.safetensors of the Hugging Face repository a/b at main"),
        ("https://civitai.com/models/123/x?modelVersionId=4", "version 4 of the CivitAI model 123"),
        ("https://x.org/a.safetensors?signature=secret", "the file at https://x.org/a.safetensors"),
        ("a/b", "Hugging Face repository a/b"),
    ],
)
def test_what_a_name_means_is_told_without_the_network(
    named: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["lora", "resolve", named, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert said in told
    assert "secret" not in told


def test_where_an_owner_and_a_name_are_looked_up_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["lora", "resolve", "a/b", "--dry-run", "--bare", "replicate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "replicate"
    assert main(["lora", "resolve", "a b"]) == 2
    assert "Understood are" in capsys.readouterr().err
    assert main(["generate", "x", "--model", "demo-dev", "--lora", "a b:0.5"]) == 2
    save_file({"a.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "a.safetensors")
    assert main(["lora", "resolve", str(tmp_path / "a.safetensors")]) == 0
    assert str(tmp_path / "a.safetensors") in capsys.readouterr().out


def control_lora(model: Model, rank: int = 4) -> dict[str, Tensor]:
    """As Black Forest Labs has FLUX.1 Canny as a LoRA: biases, norms in the place of others, img_in twice as wide."""
    net, generator = model.net, torch.Generator().manual_seed(5)
    tensors: dict[str, Tensor] = {}
    for name in ("img_in", "double_blocks.0.img_attn.qkv", "single_blocks.1.linear2", "final_layer.linear"):
        n, k = net.get_submodule(name).weight.shape
        k *= 2 if name == "img_in" else 1
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, k, generator=generator) * 0.2
        tensors[f"{name}.lora_B.weight"] = torch.randn(n, rank, generator=generator) * 0.2
        tensors[f"{name}.lora_B.bias"] = torch.randn(n, generator=generator) * 0.1
    for name in ("query_norm", "key_norm"):
        tensors[f"double_blocks.1.txt_attn.norm.{name}.scale"] = torch.rand(64, generator=generator) + 0.5
    return tensors


def test_a_control_lora_widens_the_first_layer(flux: Model, tmp_path: Path) -> None:
    tensors, path = control_lora(flux), tmp_path / "flux1-canny-dev-lora.safetensors"
    save_file(tensors, path)
    with pytest.raises(InvalidRequest, match="widened for that when it is loaded"):
        flux.engine.lora.set([path])
    assert flux.unchanged()

    engine = flux_engine.load("demo-dev", dtype="float32", device="cpu", loras=[path])
    net: Any = engine._pipeline.family.net
    base = flux.net.state_dict()
    for name in {name.split(".lora_")[0] for name in tensors if ".lora_" in name}:
        wanted = base[f"{name}.weight"]
        if name == "img_in":
            wanted = torch.cat((wanted, torch.zeros_like(wanted)), dim=1)
        wanted = wanted + tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"]
        assert torch.allclose(net.get_submodule(name).weight, wanted, atol=1e-6), name
        assert torch.allclose(net.get_submodule(name).bias, base[f"{name}.bias"] + tensors[f"{name}.lora_B.bias"])
    norm = "double_blocks.1.txt_attn.norm.query_norm.scale"
    assert torch.equal(net.get_parameter(norm), tensors[norm])

    spec = engine.spec
    assert (spec.reads, spec.structure, spec.guidance_scale, spec.controls) == ("structure", "canny", 30.0, ("canny",))
    edges, other = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), "white")
    edges.paste("white", (16, 16, 48, 48))
    small: dict[str, Any] = {"seed": 0, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent"}

    def latent(**fields: Any) -> Tensor:
        return engine("a red circle", **small | fields).image

    drawn = [latent(control=flux_engine.Control(kind="canny", image=each, preprocess=False)) for each in (edges, other)]
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2, "the control picture is not read"
    with pytest.raises(InvalidRequest, match="control"):
        latent()
    engine.lora.clear()
    assert engine.spec.controls == ()
    assert torch.allclose(latent(), flux.engine("a red circle", **small).image, atol=1e-4)
    with pytest.raises(InvalidRequest, match="control"):
        latent(control=flux_engine.Control(kind="canny", image=edges, preprocess=False))
    again = latent(loras=[path], control=flux_engine.Control(kind="canny", image=edges, preprocess=False))
    assert torch.equal(again, drawn[0])


def test_norms_by_diffusers_names(flux: Model) -> None:
    scales = {"transformer.transformer_blocks.0.attn.norm_q.weight": torch.full((64,), 0.5),
              "transformer.single_transformer_blocks.2.attn.norm_k.weight": torch.full((64,), 2.0)}  # fmt: skip
    flux.engine.lora.set([flux.file(scales)])
    assert (flux.net.double_blocks[0].img_attn.norm.query_norm.scale == 0.5).all()
    assert (flux.net.single_blocks[2].norm.key_norm.scale == 2.0).all()
    flux.engine.lora.clear()
    assert flux.unchanged()


@pytest.mark.parametrize("said", [{"lora_alpha": 2, "r": 4}, {"lora_alpha": 1, "use_rslora": True},
                                  {"lora_alpha": 99, "alpha_pattern": {"to_q": 2}}])  # fmt: skip
def test_an_adapter_of_peft_says_its_alpha_beside(flux: Model, tmp_path: Path, said: dict[str, Any]) -> None:
    made = modules(flux.base, ["transformer_blocks.0.attn.to_q"])
    tensors, _ = files.peft("base_model.model.")({name: (a, b / (files.ALPHA / RANK)) for name, (a, b) in made.items()})
    found: list[Tensor] = []
    for name in ("adapter_model", "other"):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(said))
        flux.engine.lora.set([path])
        found.append(flux.weights()["transformer_blocks.0.attn.to_q.weight"])
    flux.engine.lora.clear()
    base = flux.base["transformer_blocks.0.attn.to_q.weight"]
    assert torch.allclose(found[0] - base, (found[1] - base) / 2, atol=1e-6)
    for text in ("{", "[]", '{"lora_alpha": "x"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        save_file(tensors, tmp_path / "adapter_model.safetensors")  # else it is known already
        flux.engine.lora.set([tmp_path / "adapter_model.safetensors"])
        assert torch.equal(flux.weights()["transformer_blocks.0.attn.to_q.weight"], found[1])
    flux.engine.lora.clear()


def test_names_that_are_nearly_known(flux: Model) -> None:
    for named, said in (
        ("demo-dev-zorblinn", "did you mean 'demo-dev-zorblin'"),
        ("demo-dev-zorblin:0.5", r"a scale is said as LoRA\('demo-dev-zorblin', 0.5\)"),
        ("qwertz", "loras 'qwertz' is nothing that names weights"),
    ):
        with pytest.raises(InvalidRequest, match=said):
            flux.engine.lora.set([named])
