"""Small SDXL models with random weights in which every part matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from conftest import randomise
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from flux_engine.families.base import channels_last
from flux_engine.families.sdxl import SDXLFamily
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.params import UNetParams
from flux_engine.sizes import SizeTable
from flux_engine.specs import SDXL, SDXL_REFINER, SDXLSpec
from flux_engine.text.sdxl import Reader, SDXLTextEncoder

TOKENIZER = Path(__file__).parent.parent / "weights" / "demo" / "flux" / "tokenizer"
WIDTHS = (24, 40)
"""Of the two text encoders."""

BASE = replace(
    SDXL,
    name="small-sdxl",
    unet=UNetParams(
        block_out_channels=(32, 64, 96),
        transformer_depth=(0, 1, 2),
        mid_depth=2,
        head_dim=32,
        cross_attention_dim=sum(WIDTHS),
        add_embed_dim=WIDTHS[1] + 6 * 256,
    ),
    vae=replace(SDXL.vae, channels=8, channel_multipliers=(1, 1, 2, 2), norm_groups=4),
    sizes=SizeTable(divisor=8, multiple=8, min_side=32),
    num_inference_steps=4,
)
REFINER = replace(
    SDXL_REFINER,
    name="small-refiner",
    unet=UNetParams(
        block_out_channels=(32, 64, 96, 96),
        transformer_depth=(0, 1, 1, 0),
        mid_depth=1,
        head_dim=32,
        cross_attention_dim=WIDTHS[1],
        add_embed_dim=WIDTHS[1] + 5 * 256,
    ),
    vae=BASE.vae,
    sizes=BASE.sizes,
)


def clip(width: int, projection: bool, seed: int) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=width, intermediate_size=2 * width, projection_dim=width, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407 if not projection else 0,
    )  # fmt: skip
    model = (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)
    randomise(model, seed)
    with torch.no_grad():  # rows of a table have no fan-in
        generator = torch.Generator().manual_seed(seed)
        table = model.get_input_embeddings().weight
        table.copy_(torch.randn(table.shape, generator=generator))
    return model


def text_encoder() -> SDXLTextEncoder:
    tokenizers = CLIPTokenizer.from_pretrained(TOKENIZER), CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!")
    clips = clip(WIDTHS[0], False, 11), clip(WIDTHS[1], True, 12)
    return SDXLTextEncoder([Reader(*pair) for pair in zip(tokenizers, clips, strict=True)])


def family(spec: SDXLSpec = BASE) -> SDXLFamily:
    """The same weights for the same spec."""
    torch.manual_seed(0)
    net, vae = UNet(spec.unet), AutoEncoder(spec.vae)
    randomise(net, 1)
    randomise(vae, 2)
    if spec.aesthetic_score:  # to matter where there is hardly any noise left
        net.conv_out.weight.mul_(4)
    text = text_encoder()
    return SDXLFamily(spec, channels_last(net), channels_last(vae), text.second() if spec.aesthetic_score else text)
