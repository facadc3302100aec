"""The same weights in every layout people have, and the tables complete at full size."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_shards
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_engine import WeightsError, hub
from flux_engine.checkpoints import detect
from flux_engine.checkpoints.inspect import inspect
from flux_engine.checkpoints.keys import to_ours, to_theirs
from flux_engine.checkpoints.safetensors_file import SafetensorsFile, Stored
from flux_engine.checkpoints.source import HALVES, Piece, Recipe, WeightSource
from flux_engine.checkpoints.tables import FLUX_DIFFUSERS, clip_open_clip, unet_diffusers, unet_sgm, vae_diffusers
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import FluxParams, UNetParams, VAEParams
from flux_engine.specs import DEMO_DEV, SDXL_INPAINTING, SDXL_LCM, SDXL_REFINER, SDXLSpec

WIDTH = DEMO_DEV.transformer.hidden_size
Tensors = dict[str, Tensor]
PARTS = hub.find("demo-dev").obtain()


@pytest.fixture(scope="module")
def flux() -> Tensors:
    return load_file(PARTS["transformer"])


@pytest.fixture(scope="module")
def vae() -> Tensors:
    return load_file(PARTS["vae"])


def text(part: str) -> Tensors:
    return load_file(PARTS[part] / "model.safetensors")


def under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def one_file(path: Path, tensors: Tensors) -> Path:
    save_file(tensors, path / "x.safetensors")
    return path / "x.safetensors"


def all_in_one(path: Path, tensors: Tensors) -> Path:
    """As ComfyUI keeps them."""
    return one_file(
        path,
        under("model.diffusion_model.", tensors)
        | under("vae.", load_file(PARTS["vae"]))
        | under("text_encoders.clip_l.transformer.", text("text_encoder"))
        | under("text_encoders.t5xxl.transformer.", text("text_encoder_2")),
    )


def to_diffusers(tensors: Tensors) -> Tensors:
    return to_theirs(tensors, FLUX_DIFFUSERS, width=WIDTH)


LAYOUTS: dict[str, Callable[[Path, Tensors], Path]] = {
    "single file": one_file,
    "prefixed": lambda path, t: one_file(path, under("model.diffusion_model.", t)),
    "compiled": lambda path, t: one_file(path, under("_orig_mod.", t)),
    "all in one": all_in_one,
    "in shards": in_shards,
    "diffusers": lambda path, t: one_file(path, to_diffusers(t)),
    "diffusers in shards": lambda path, t: in_shards(path, to_diffusers(t)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_transformer_in_every_layout(tmp_path: Path, flux: Tensors, layout: str) -> None:
    with WeightSource.open(LAYOUTS[layout](tmp_path, flux)) as file:
        source = detect.pick(file, "flux")
        assert set(source.shapes) == set(flux)
        for name, tensor in flux.items():
            assert torch.equal(source.rows(name), tensor), name
            first, last = len(tensor) // 3, len(tensor) - len(tensor) // 4
            some = source.rows(name, first, last, dtype=torch.float32)
            assert torch.equal(some, tensor[first:last].float()), name


@pytest.mark.parametrize("layout", ["LDM", "diffusers"])
def test_the_same_autoencoder_in_every_layout(tmp_path: Path, vae: Tensors, layout: str) -> None:
    levels = len(DEMO_DEV.vae.channel_multipliers)
    stored = under("first_stage_model.", vae) if layout == "LDM" else to_theirs(vae, vae_diffusers(levels))
    with WeightSource.open(one_file(tmp_path, stored)) as file:
        source = detect.pick(file, "vae")
        assert set(source.shapes) == set(vae)
        assert all(torch.equal(source.rows(name), tensor) for name, tensor in vae.items())


def source_of(tensors: Mapping[str, Tensor]) -> WeightSource:
    """Names and shapes, with no file behind them."""
    recipes = {
        name: Recipe((Piece(None, name, 0, t.shape[0] if t.ndim else 1),), tuple(t.shape), t.dtype)  # pyright: ignore[reportArgumentType]
        for name, t in tensors.items()
    }
    return WeightSource(Path("meta"), recipes, ())


def shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@pytest.mark.parametrize(("guidance", "count"), [(True, 780), (False, 776)])
def test_the_transformer_at_full_size(guidance: bool, count: int) -> None:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        ours = Flux(FluxParams(guidance_embed=guidance)).state_dict()
        theirs = FluxTransformer2DModel(guidance_embeds=guidance).state_dict()
    assert len(ours) == count
    assert shapes(to_theirs(ours, FLUX_DIFFUSERS, width=3072)) == shapes(theirs)
    assert to_ours(source_of(theirs), FLUX_DIFFUSERS).shapes == shapes(ours)
    assert FluxParams.from_shapes(shapes(ours)) == FluxParams(guidance_embed=guidance)


def test_the_autoencoder_at_full_size() -> None:
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        ours = AutoEncoder(VAEParams()).state_dict()
        theirs = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            use_quant_conv=False, use_post_quant_conv=False,
        ).state_dict()  # fmt: skip
    assert len(ours) == 244
    assert shapes(to_theirs(ours, vae_diffusers(4))) == shapes(theirs)
    assert to_ours(source_of(theirs), vae_diffusers(4)).shapes == shapes(ours)


def sdxl_unet(**changed: Any) -> Tensors:
    """diffusers' UNet on the meta device; the base unless told otherwise."""
    from diffusers import UNet2DConditionModel

    base = {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "layers_per_block": 2,
        "cross_attention_dim": 2048,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    }
    with torch.device("meta"):
        return UNet2DConditionModel(**(base | changed)).state_dict()


def our_unet(params: UNetParams) -> Tensors:
    with torch.device("meta"):
        return UNet(params).state_dict()


def test_the_unet_at_full_size() -> None:
    """1,680 tensors as published, both ways in both layouts; 1,470 of ours, 70 q, k, v and 70 k, v being joined."""
    ours, theirs, attention = our_unet(UNetParams()), sdxl_unet(), (False, True, True)
    assert (len(ours), len(theirs)) == (1680 - 70 * 3, 1680)
    assert sum(tensor.numel() for tensor in ours.values()) == 2_567_463_684
    assert shapes(to_theirs(ours, unet_diffusers(attention))) == shapes(theirs)
    assert shapes_of_unet(theirs) == shapes(ours)
    stored = to_theirs(ours, unet_sgm(attention))
    assert len(stored) == 1680
    assert stored["input_blocks.4.1.transformer_blocks.1.attn2.to_k.weight"].shape == (640, 2048)
    assert stored["output_blocks.5.2.conv.weight"].shape == (640, 640, 3, 3)
    source = source_of(under("model.diffusion_model.", stored))
    assert [(part.kind, part.prefix) for part in detect.parts_of(source)] == [("unet", "model.diffusion_model.")]
    assert detect.pick(source, "unet").shapes == shapes(ours)
    assert UNetParams.from_shapes(shapes(ours)) == UNetParams()


def shapes_of_unet(stored: Tensors) -> dict[str, tuple[int, ...]]:
    return detect.pick(source_of(stored), "unet").shapes


REFINER = {
    "block_out_channels": (384, 768, 1536, 1536), "cross_attention_dim": 1280, "attention_head_dim": (6, 12, 24, 24),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip


@pytest.mark.parametrize(
    ("spec", "changed"),
    [(SDXL_REFINER, REFINER), (SDXL_INPAINTING, {"in_channels": 9}), (SDXL_LCM, {"time_cond_proj_dim": 256})],
    ids=["refiner", "inpainting", "LCM"],
)
def test_other_unets_at_full_size(spec: SDXLSpec, changed: dict[str, Any]) -> None:
    ours, theirs = our_unet(spec.unet), sdxl_unet(**changed)
    attention = [depth > 0 for depth in spec.unet.transformer_depth]
    assert shapes(to_theirs(ours, unet_diffusers(attention))) == shapes(theirs)
    assert shapes_of_unet(theirs) == shapes(ours)
    stored = to_theirs(ours, unet_sgm(attention))
    assert len(stored) == len(theirs)
    assert detect.pick(source_of(under("model.diffusion_model.", stored)), "unet").shapes == shapes(ours)
    assert UNetParams.from_shapes(shapes(ours)) == spec.unet


def clip_l() -> Tensors:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    with torch.device("meta"):
        made = CLIPTextModel(config).state_dict()
    return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in made.items()}


def test_a_whole_sdxl_file() -> None:
    """2,515 tensors: UNet, autoencoder, CLIP-L as transformers keeps it, bigG as OpenCLIP does."""
    with torch.device("meta"):
        vae = AutoEncoder(VAEParams(latent_channels=4, quant_conv=True)).state_dict()
        clip = clip_l() | {"text_model.embeddings.position_ids": torch.empty(1, 77)}
        everything = (
            under("model.diffusion_model.", to_theirs(our_unet(UNetParams()), unet_sgm((False, True, True))))
            | under("first_stage_model.", vae)
            | under("conditioner.embedders.0.transformer.", clip)
            | under("conditioner.embedders.1.model.", open_clip(1280, 32))
        )
    assert (len(vae), len(clip), len(everything)) == (248, 197, 2515)
    parts = detect.parts_of(source_of(everything))
    assert [(part.kind, part.layout) for part in parts] == [
        ("unet", "SGM"), ("vae", "LDM"), ("clip", "transformers"), ("clip", "OpenCLIP"),
    ]  # fmt: skip
    counts = [len(part.of(source_of(everything)).shapes) for part in parts]
    assert counts == [1470, 248, 196, 517]


def test_t5_at_full_size() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
                      feed_forward_proj="gated-gelu")  # fmt: skip
    with torch.device("meta"):
        stored = T5EncoderModel(config).state_dict()
    for given in (stored, {n: t for n, t in stored.items() if n != "shared.weight"},
                  {n: t for n, t in stored.items() if n != "encoder.embed_tokens.weight"}):  # fmt: skip
        found = detect.pick(source_of(given), "t5").shapes
        assert len(found) == 219 and found["shared.weight"] == (32128, 4096)


def open_clip(width: int, layers: int, pieces: int = 49408) -> Tensors:
    """OpenCLIP's text tower, as SDXL's single files have it."""
    made: Tensors = {
        "positional_embedding": torch.empty(77, width),
        "token_embedding.weight": torch.empty(pieces, width),
        "text_projection": torch.empty(width, width),
        "logit_scale": torch.empty(()),
    }
    for name in ("ln_final.weight", "ln_final.bias"):
        made[name] = torch.empty(width)
    for i in range(layers):
        block = f"transformer.resblocks.{i}."
        for name, rows, columns in (
            ("attn.in_proj_", 3 * width, width),
            ("attn.out_proj.", width, width),
            ("mlp.c_fc.", 4 * width, width),
            ("mlp.c_proj.", width, 4 * width),
        ):
            made[f"{block}{name}weight"], made[f"{block}{name}bias"] = torch.empty(rows, columns), torch.empty(rows)
        for name in ("ln_1", "ln_2"):
            made[f"{block}{name}.weight"], made[f"{block}{name}.bias"] = torch.empty(width), torch.empty(width)
    return made


def test_the_second_text_encoder_of_sdxl_at_full_size() -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
    )
    with torch.device("meta"):
        theirs = open_clip(1280, 32)
        ours = CLIPTextModelWithProjection(config).state_dict()
    assert (len(theirs), len(ours)) == (390, 517)
    source = source_of(under("conditioner.embedders.1.model.", theirs))
    named = {name.removeprefix("text_model."): shape for name, shape in shapes(ours).items()}
    found = detect.pick(source, "clip").shapes
    assert {name.removeprefix("text_model."): shape for name, shape in found.items()} == named
    back = to_theirs({name: torch.empty(shape, device="meta") for name, shape in found.items()}, clip_open_clip())
    assert shapes(back) == {name: shape for name, shape in shapes(theirs).items() if name != "logit_scale"}


def test_open_clip_is_split_and_turned(tmp_path: Path) -> None:
    theirs = {name: torch.randn(tensor.shape) for name, tensor in open_clip(8, 2, pieces=20).items()}
    with WeightSource.open(one_file(tmp_path, theirs)) as file:
        source = detect.pick(file, "clip")
        attention = "text_model.encoder.layers.1.self_attn."
        joined = theirs["transformer.resblocks.1.attn.in_proj_weight"]
        assert torch.equal(source.rows(attention + "k_proj.weight"), joined[8:16])
        assert torch.equal(source.rows(attention + "v_proj.weight", 2, 5), joined[18:21])
        assert torch.equal(source.rows("text_projection.weight"), theirs["text_projection"].T)
        assert torch.equal(source.rows("text_projection.weight", 1, 3), theirs["text_projection"].T[1:3])
        back = to_theirs({name: source.rows(name) for name in source.recipes}, clip_open_clip())
    assert back.keys() == theirs.keys() - {"logit_scale"}
    assert all(torch.equal(back[name], theirs[name]) for name in back)


def test_what_is_missing_is_said_in_the_files_own_names(tmp_path: Path, flux: Tensors) -> None:
    from flux_engine.checkpoints.load import load_module

    stored = to_diffusers(flux)
    del stored["transformer_blocks.1.attn.to_k.weight"]
    stored["transformer_blocks.1.attn.extra.weight"] = torch.zeros(1)
    with WeightSource.open(one_file(tmp_path, under("model.", stored))) as file, pytest.raises(WeightsError) as caught:
        load_module(
            lambda: Flux(DEMO_DEV.transformer),
            detect.pick(file, "flux"),
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
    assert "1 missing: model.transformer_blocks.1.attn.to_k.weight" in str(caught.value)
    assert "1 not known: model.transformer_blocks.1.attn.extra.weight" in str(caught.value)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"input_blocks.0.0.weight": (320, 4, 3, 3)}, "a Stable Diffusion 1 or 2 UNet"),
        ({"joint_blocks.0.context_block.attn.qkv.weight": (1, 1)}, "a Stable Diffusion 3 transformer"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (4, 8)}, "a LoRA"),
        (
            {"double_blocks.0.img_attn.norm.key_norm.scale": (128,), "distilled_guidance_layer.in_proj.weight": (1, 1)},
            "a Chroma transformer",
        ),
        ({"a": (1,)}, "nothing known here, 1 tensors, the first of them 'a'"),
    ],
)
def test_other_models_are_called_by_name(names: dict[str, tuple[int, ...]], words: str) -> None:
    with torch.device("meta"):
        source = source_of({f"model.diffusion_model.{name}" if "lora" not in name and name != "a" else name:
                            torch.empty(shape) for name, shape in names.items()})  # fmt: skip
    with pytest.raises(WeightsError, match=f"is not a FLUX.1 transformer: it holds {words}"):
        detect.pick(source, "flux")


def test_folders_that_leave_open_what_is_meant(tmp_path: Path, flux: Tensors) -> None:
    with pytest.raises(WeightsError, match="holds no safetensors file"):
        WeightSource.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"only pytorch_model\.bin: pickles"):
        WeightSource.open(tmp_path)
    in_shards(tmp_path, flux)
    WeightSource.open(tmp_path).__exit__(None, None, None)
    save_file(flux, tmp_path / "y.fp16.safetensors")
    WeightSource.open(tmp_path).__exit__(None, None, None)  # the plain one
    save_file(flux, tmp_path / "y.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors\.index\.json, y\.safetensors: name"):
        WeightSource.open(tmp_path)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "[]",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
        '{"weight_map": {"a": 3}}',
        "[" * 10**5,
    ],
)
def test_indexes_that_are_none(tmp_path: Path, index: str) -> None:
    (tmp_path / "x.safetensors.index.json").write_text(index)
    with pytest.raises(WeightsError, match="is not an index of shards"):
        WeightSource.open(tmp_path)


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "shared.safetensors")
    save_file({"a": torch.full((2,), 7.0)}, tmp_path / "own.safetensors")
    index = tmp_path / "own.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "own.safetensors", "b": "shared.safetensors"}}))
    with WeightSource.open(index) as source:
        assert source.rows("a").tolist() == [7.0, 7.0]
        assert source.rows("b").tolist() == [1.0, 1.0]
    index.write_text(json.dumps({"weight_map": {"c": "own.safetensors", "b": "shared.safetensors"}}))
    with pytest.raises(WeightsError, match=r"tensor 'a' is in .*own\.safetensors and in .*shared\.safetensors"):
        WeightSource.open(index)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = one_file(tmp_path, {"a": torch.arange(12.0).view(4, 3)})
    with WeightSource.open(path) as source:
        save_file({"a": torch.zeros(4, 3)}, tmp_path / "other")
        (tmp_path / "other").replace(path)  # published by rename: the old file is still whole
        assert torch.equal(source.rows("a", 1, 2), torch.tensor([[3.0, 4.0, 5.0]]))
    with WeightSource.open(path) as source:
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(WeightsError, match="was changed while it was in use"):
            source.rows("a", dtype=torch.float16)


def test_a_pickle_is_told_from_a_broken_file(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match="is a pickle, which can run code"):
        WeightSource.open(tmp_path / "x.safetensors")


def test_tensors_of_every_dtype_and_odd_place(tmp_path: Path) -> None:
    """Of the dtypes safetensors writes; after an odd number of bytes a tensor cannot be mapped."""
    made = {
        name: torch.arange(6).view(2, 3).to(dtype)
        for name, dtype in {"f16": torch.float16, "bf16": torch.bfloat16, "i8": torch.int8, "e4m3": torch.float8_e4m3fn,
                            "bool": torch.bool, "f64": torch.float64}.items()
    } | {"a": torch.tensor(7, dtype=torch.uint8), "z": torch.tensor(2.5), "empty": torch.empty(0, 4)}  # fmt: skip
    path = one_file(tmp_path, made)
    with SafetensorsFile(path) as file:
        assert file.tensors["z"] == Stored(torch.float32, (), *(file.tensors["z"].begin + n for n in (0, 4)))
    with WeightSource.open(path) as source:
        for name, tensor in made.items():
            assert source.rows(name).dtype == tensor.dtype
            assert torch.equal(source.rows(name).float(), tensor.float()), name
            assert torch.equal(source.rows(name, dtype=torch.float32), tensor.float()), name


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16, torch.float32])
def test_every_number_is_converted_as_torch_does(tmp_path: Path, stored: torch.dtype, asked: torch.dtype) -> None:
    """All 65,536 halves, over several buffers and a rest; a NaN stays one."""
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    numbers = {torch.float8_e4m3fn: halves.view(torch.uint8).view(stored), torch.float32: halves.view(torch.bfloat16)}
    given = numbers.get(stored, halves.view(stored if stored in HALVES else torch.bfloat16)).to(stored)
    given = given.repeat(25)[: -(2**16) // 3].contiguous()
    with WeightSource.open(one_file(tmp_path, {"a": given})) as source:
        found = source.rows("a", dtype=asked)
    assert found.dtype == asked and torch.equal(found.float().nan_to_num(7), given.to(asked).float().nan_to_num(7))


def test_inspecting_a_file_with_everything_in_it(tmp_path: Path, flux: Tensors) -> None:
    flux = {name: tensor.clone() for name, tensor in flux.items() if name != "img_in.bias"}
    flux["txt_in.bias"][3] = torch.nan
    path = all_in_one(tmp_path, flux | {"stray.weight": torch.zeros(1)})
    report = inspect(path, values=True)
    assert [(part["what"], part["prefix"]) for part in report["parts"]] == [
        ("a FLUX.1 transformer", "model.diffusion_model."),
        ("an autoencoder", "vae."),
        ("a CLIP text encoder", "text_encoders.clip_l.transformer."),
        ("a T5 text encoder", "text_encoders.t5xxl.transformer."),
    ]
    transformer, autoencoder = report["parts"][:2]
    assert transformer["missing"] == ["model.diffusion_model.img_in.bias"]
    assert transformer["not known"] == ["model.diffusion_model.stray.weight"]
    assert autoencoder["missing"] == autoencoder["not known"] == []
    assert report["not finite"] == ["model.diffusion_model.txt_in.bias"]
    assert report["rest"] == []


def test_inspect_names_what_a_text_encoder_lacks(tmp_path: Path) -> None:
    stored = load_file(PARTS["text_encoder_2"] / "model.safetensors")
    assert inspect(one_file(tmp_path, stored))["parts"][0]["missing"] == []
    del stored["encoder.block.1.layer.0.SelfAttention.k.weight"]
    (part,) = inspect(one_file(tmp_path, stored))["parts"]
    assert part["missing"] == ["encoder.block.1.layer.0.SelfAttention.k.weight"]
