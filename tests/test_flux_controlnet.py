"""FLUX's ControlNet against diffusers', alone and with the transformer that it steers; its files in every layout."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import randomise, relative_error
from diffusers import FluxControlNetModel
from safetensors.torch import save_file
from test_checkpoints import shapes, source_of, under
from test_networks import FLUX_CONFIGS, TOLERANCE, flux_pair
from torch import Tensor

from flux_engine import WeightsError
from flux_engine.checkpoints import detect, export
from flux_engine.checkpoints.inspect import inspect
from flux_engine.checkpoints.keys import to_ours, to_theirs
from flux_engine.checkpoints.load import load_module
from flux_engine.checkpoints.source import WeightSource
from flux_engine.checkpoints.tables import FLUX_CONTROLNET_DIFFUSERS, FLUX_CONTROLNET_XLABS
from flux_engine.families.flux import image_ids
from flux_engine.models.flux import Flux
from flux_engine.models.flux_controlnet import FluxControlNet, spread
from flux_engine.models.layers import Residuals, add_residuals, scaled
from flux_engine.params import FluxControlNetParams, FluxParams

BASE = replace(FLUX_CONFIGS["schnell-like"], depth=5, depth_single_blocks=7)
PLAIN = FluxControlNetParams.of(BASE, depth=2, depth_single_blocks=3)
CONFIGS = {
    "plain": PLAIN,
    "guidance": replace(PLAIN, guidance_embed=True, depth_single_blocks=0),
    "union": replace(PLAIN, guidance_embed=True, num_modes=4, depth=3),
    "XLabs": replace(PLAIN, guidance_embed=True, hint_width=16, depth_single_blocks=0),
    "XLabs with single blocks": replace(PLAIN, hint_width=16, depth=3, depth_single_blocks=2),
    "deeper than its base": replace(PLAIN, depth=7, depth_single_blocks=9),
}
ROWS, COLUMNS, BATCH = 3, 4, 2


def pair(params: FluxControlNetParams) -> tuple[FluxControlNet, FluxControlNetModel]:
    ours = FluxControlNet(params)
    randomise(ours, 1)
    if params.hint_width:
        for layer in ours.input_hint_block[::2]:
            layer.weight.mul_(1.7)  # what SiLU takes
    config = export.flux_controlnet_config(params)
    del config["_class_name"]
    theirs = FluxControlNetModel(**config)
    theirs.load_state_dict(export.flux_controlnet_tensors(ours), strict=True)
    return ours, theirs.eval()


class Inputs:
    """What both are called with."""

    def __init__(self, params: FluxControlNetParams) -> None:
        torch.manual_seed(2)
        self.x = torch.randn(BATCH, ROWS * COLUMNS, params.in_channels)
        size = (3, 16 * ROWS, 16 * COLUMNS) if params.hint_width else (ROWS * COLUMNS, params.hint_channels)
        self.hint = torch.randn(BATCH, *size)
        self.context, self.pooled = torch.randn(BATCH, 7, params.context_in_dim), torch.randn(BATCH, params.vec_in_dim)
        self.guidance = torch.tensor([3.5, 1.0]) if params.guidance_embed else None
        self.mode = 2 if params.num_modes else None
        self.ids, self.times = image_ids(ROWS, COLUMNS), torch.tensor([1.0, 0.6])

    def samples(self, net: FluxControlNet, call: int, *, hint: Tensor | None = None) -> tuple[Tensor, ...]:
        statics = net.precompute(self.context, self.pooled, self.ids, self.times, self.guidance, self.mode)
        return net(self.x, net.embed_hint(self.hint if hint is None else hint), call, statics)

    def theirs(self, net: FluxControlNetModel, call: int) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        return net(
            hidden_states=self.x,
            controlnet_cond=self.hint,
            controlnet_mode=None if self.mode is None else torch.full((BATCH, 1), self.mode),
            encoder_hidden_states=self.context,
            pooled_projections=self.pooled,
            timestep=self.times[call].expand(BATCH),
            img_ids=self.ids,
            txt_ids=torch.zeros(7, 3),
            guidance=self.guidance,
            return_dict=False,
        )


@pytest.mark.parametrize("name", CONFIGS)
def test_every_sample_agrees_with_diffusers(name: str) -> None:
    params = CONFIGS[name]
    ours, theirs = pair(params)
    given = Inputs(params)
    with torch.inference_mode():
        for call in range(2):
            mine = given.samples(ours, call)
            double, single = given.theirs(theirs, call)
            reference = [*(double or ()), *(single or ())]
            assert len(mine) == len(reference) == params.depth + params.depth_single_blocks
            for a, b in zip(mine, reference, strict=True):
                assert a.shape == (BATCH, ROWS * COLUMNS, params.hidden_size)
                assert relative_error(a, b) <= TOLERANCE
        # Negative control: each sample says something of the hint.
        for a, b in zip(given.samples(ours, 0, hint=torch.zeros_like(given.hint)), given.samples(ours, 0), strict=True):
            assert relative_error(a, b) >= 1e-2


def test_a_union_is_told_what_its_hint_is() -> None:
    ours, _ = pair(CONFIGS["union"])
    given = Inputs(CONFIGS["union"])
    told = given.samples(ours, 0)
    given.mode = 0
    assert relative_error(given.samples(ours, 0)[-1], told[-1]) >= 1e-2
    for mode, words in ((None, "mode is None"), (4, "no mode 4: the network has 4"), (-1, "no mode -1")):
        given.mode = mode
        with pytest.raises(ValueError, match=words):
            given.samples(ours, 0)
    given = Inputs(PLAIN)
    given.mode = 0
    with pytest.raises(ValueError, match="mode is 0 for a network of 0 modes"):
        given.samples(pair(PLAIN)[0], 0)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_steered_transformer_agrees_with_diffusers(name: str) -> None:
    """Other counts of blocks than the base's five and seven, by both rules."""
    params = CONFIGS[name]
    controlnet, their_controlnet = pair(params)
    base, their_base = flux_pair(BASE)
    given = Inputs(params)
    repeat = params.hint_width > 0
    with torch.inference_mode():
        statics = base.precompute(given.context, given.pooled, given.ids, given.times, None)
        for call in range(2):
            double, single = given.theirs(their_controlnet, call)
            reference = their_base(
                hidden_states=given.x,
                encoder_hidden_states=given.context,
                pooled_projections=given.pooled,
                timestep=given.times[call].expand(BATCH),
                img_ids=given.ids,
                txt_ids=torch.zeros(7, 3),
                controlnet_block_samples=double,
                controlnet_single_block_samples=single,
                controlnet_blocks_repeat=repeat,
                return_dict=False,
            )[0]
            residuals = controlnet.residuals(given.samples(controlnet, call), BASE)
            mine = base(given.x, call, statics, residuals)
            assert relative_error(mine, reference) <= TOLERANCE
            # Negative controls: the residuals matter, and the hint does.
            assert relative_error(base(given.x, call, statics), mine) >= 1e-2
            blind = controlnet.residuals(given.samples(controlnet, call, hint=torch.zeros_like(given.hint)), BASE)
            assert relative_error(base(given.x, call, statics, blind), mine) >= 1e-2


def test_every_slot_is_added() -> None:
    base, _ = flux_pair(BASE)
    given = Inputs(PLAIN)
    count = BASE.depth + BASE.depth_single_blocks
    with torch.inference_mode():
        statics = base.precompute(given.context, given.pooled, given.ids, given.times, None)
        plain = base(given.x, 0, statics)
        assert torch.equal(base(given.x, 0, statics, (None,) * count), plain)
        noise = torch.randn(BATCH, ROWS * COLUMNS, BASE.hidden_size)
        for slot in range(count):
            alone = tuple(noise if i == slot else None for i in range(count))
            assert relative_error(base(given.x, 0, statics, alone), plain) >= 1e-2, slot
        with pytest.raises(ValueError, match="11 residuals for a network of 12 blocks"):
            base(given.x, 0, statics, (None,) * (count - 1))


def numbers(residuals: Residuals) -> list[float | None]:
    return [None if residual is None else residual.item() for residual in residuals]


def test_samples_are_spread_over_the_blocks() -> None:
    a, b, c = torch.tensor([1.0, 2.0, 3.0])
    assert numbers(spread([a, b], [c], 5, 2)) == [1, 1, 1, 2, 2, 3, 3]
    assert numbers(spread([a, b], [c], 5, 2, repeat=True)) == [1, 2, 1, 2, 1, 3, 3]
    assert numbers(spread([a, b, c], [], 3, 4)) == [1, 2, 3, None, None, None, None]
    assert numbers(spread([], [a, b], 2, 3, repeat=True)) == [None, None, 1, 1, 2]
    # InstantX' five and ten, on the published transformer.
    found = spread(torch.arange(5.0).unbind(), torch.arange(10.0).unbind(), 19, 38)
    assert numbers(found) == [i // 4 for i in range(19)] + [i // 4 for i in range(38)]


def test_residuals_are_scaled_and_added() -> None:
    a, b = torch.tensor(1.0), torch.tensor(10.0)
    assert numbers(scaled((a, None, a, b), 0.5)) == [0.5, None, 0.5, 5]
    assert numbers(scaled((a, None), torch.tensor(3.0))) == [3, None]
    several = add_residuals([(a, None, a, None), (b, b, b, None), (None, None, a, None)])
    assert numbers(several) == [11, 10, 12, None]
    assert add_residuals([(a, None)]) == (a, None)
    # What is in several slots is made once, and none is changed.
    half = scaled((a, a), 0.5)
    assert half[0] is half[1]
    both = add_residuals([half, half])
    assert both[0] is both[1] and (a.item(), half[0].item()) == (1, 0.5)
    with pytest.raises(ValueError):
        add_residuals([(a,), (a, b)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["union", "XLabs"])
def test_a_batch_is_its_singles(name: str, dtype: torch.dtype) -> None:
    """Bit for bit, on through the transformer."""
    params = replace(CONFIGS[name], depth_single_blocks=2)
    net, base = pair(params)[0].to(dtype), flux_pair(BASE)[0].to(dtype)
    torch.manual_seed(3)
    rows, columns, count = 8, 8, 3
    x = torch.randn(count, rows * columns, 64)
    hint = torch.randn(count, *((3, 16 * rows, 16 * columns) if net.reads_picture else (rows * columns, 64)))
    context, pooled = torch.randn(count, 16, 40), torch.randn(count, 24)
    ids, times = image_ids(rows, columns), torch.tensor([1.0, 0.5])
    statics = [
        net.precompute(c, p, ids, times, torch.tensor([3.5]), 1 if params.num_modes else None)
        for c, p in zip(context.split(1), pooled.split(1), strict=True)
    ]
    steered = [base.precompute(c, p, ids, times, None) for c, p in zip(context.split(1), pooled.split(1), strict=True)]

    def run(which: list[int]) -> list[Tensor]:
        samples = net(x[which], net.embed_hint(hint[which]), 1, type(statics[0]).cat([statics[k] for k in which]))
        residuals = scaled(net.residuals(samples, BASE), 0.7)
        return [*samples, base(x[which], 1, type(steered[0]).cat([steered[k] for k in which]), residuals)]

    with torch.inference_mode():
        together, alone = run([0, 1, 2]), [run([k]) for k in range(count)]
    for number, made in enumerate(together):
        assert torch.equal(made, torch.cat([one[number] for one in alone])), number


def test_float16_stays_finite_where_the_residual_stream_overflows() -> None:
    base = flux_pair(BASE)[0].half()
    given = Inputs(PLAIN)
    statics = base.precompute(given.context, given.pooled, given.ids, given.times, None)
    large = torch.full((BATCH, ROWS * COLUMNS, BASE.hidden_size), 60_000.0, dtype=torch.float16)
    assert (large + large).isinf().all()  # the test bites
    assert base(given.x, 0, statics, (large,) * 12).isfinite().all()


# Files.

LAYOUTS = {
    "diffusers": (FLUX_CONTROLNET_DIFFUSERS, "transformer_blocks.1.attn.to_k.weight"),
    "XLabs": (FLUX_CONTROLNET_XLABS, "double_blocks.1.img_attn.qkv.weight"),
    "Black Forest Labs": ((), "double_blocks.1.img_attn.qkv.weight"),
}


def stored_as(layout: str, ours: dict[str, Tensor], width: int) -> dict[str, Tensor]:
    table, _ = LAYOUTS[layout]
    return to_theirs(ours, table, width=width) if table else ours


@pytest.mark.parametrize("prefix", ["", "controlnet."], ids=["plain", "prefixed"])
@pytest.mark.parametrize("name", ["plain", "union", "XLabs"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back(tmp_path: Path, layout: str, name: str, prefix: str) -> None:
    params = CONFIGS[name]
    ours = randomise(FluxControlNet(params), 1).state_dict()
    stored = stored_as(layout, ours, params.hidden_size)
    assert ("pos_embed_input.weight" in stored) == (layout == "XLabs")
    save_file(under(prefix, stored), tmp_path / "x.safetensors")
    with WeightSource.open(tmp_path / "x.safetensors") as file:
        (part,) = detect.parts_of(file)
        assert (part.kind, part.layout, part.prefix) == ("flux_controlnet", layout, prefix)
        source = detect.pick(file, "flux_controlnet")
        found = FluxControlNetParams.from_shapes(source.shapes)
        assert found == params
        cpu = torch.device("cpu")
        loaded = load_module(lambda: FluxControlNet(found), source, dtype=torch.float32, device=cpu).state_dict()
        with pytest.raises(WeightsError, match=r"is not a FLUX\.1 transformer: it holds a ControlNet for FLUX in the"):
            detect.pick(file, "flux")
    assert loaded.keys() == ours.keys()
    assert all(torch.equal(loaded[key], ours[key]) for key in ours)
    again = stored_as(layout, loaded, params.hidden_size)
    assert again.keys() == stored.keys() and all(torch.equal(again[key], stored[key]) for key in stored)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inspect_says_what_a_controlnet_lacks(tmp_path: Path, layout: str) -> None:
    params = CONFIGS["XLabs"]
    stored = stored_as(layout, FluxControlNet(params).state_dict(), params.hidden_size)
    missing = LAYOUTS[layout][1]
    del stored[missing]
    stored["stray.weight"] = torch.zeros(1)
    save_file(stored, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report["what"] == f"a ControlNet for FLUX in the layout of {layout}"
    assert report["parts"][0]["missing"] == [missing]
    assert report["parts"][0]["not known"] == ["stray.weight"]


def test_a_transformer_is_no_controlnet() -> None:
    with torch.device("meta"):
        ours = Flux(BASE).state_dict()
    for stored in (ours, to_theirs(ours, FLUX_CONTROLNET_DIFFUSERS, width=BASE.hidden_size)):
        assert [part.kind for part in detect.parts_of(source_of(stored))] == ["flux"]
        with pytest.raises(WeightsError, match=r"is not a ControlNet for FLUX: it holds a FLUX\.1 transformer"):
            detect.pick(source_of(stored), "flux_controlnet")


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ("controlnet_blocks.0.linear.weight", "MistoLine, a ControlNet for FLUX of its own kind"),
        ("controlnet_mode_embedder.fc.weight", "the alpha version of a ControlNet for FLUX"),
    ],
)
def test_controlnets_that_are_other_networks(sign: str, words: str) -> None:
    names = (sign, "double_blocks.0.img_attn.norm.key_norm.scale", "pos_embed_input.weight")
    source = source_of({name: torch.empty(8, device="meta") for name in names})
    assert detect.parts_of(source) == []
    assert words in detect.what_is(source)


def full_size(params: FluxControlNetParams) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    config = export.flux_controlnet_config(params)
    del config["_class_name"]
    with torch.device("meta"):
        return FluxControlNet(params).state_dict(), FluxControlNetModel(**config).state_dict()


# The bytes of the published file, where a manifest or the hub tells them: that is every name and shape, and bfloat16.
@pytest.mark.parametrize(
    ("params", "count", "size"),
    [
        (FluxControlNetParams(), 148, 3_583_232_168),
        (FluxControlNetParams(depth=6), 174, 4_281_779_224),
        (FluxControlNetParams(depth_single_blocks=10, num_modes=10), 249, 6_603_953_920),
        (FluxControlNetParams(depth=2, hint_width=16), 86, None),
        (FluxControlNetParams(guidance_embed=False), 144, None),
    ],
    ids=["InstantX, Jasper", "Union-Pro 2.0", "Union-Pro", "XLabs", "without guidance"],
)
def test_the_tables_at_full_size(params: FluxControlNetParams, count: int, size: int | None) -> None:
    ours, theirs = full_size(params)
    assert len(ours) == count
    assert shapes(to_theirs(ours, FLUX_CONTROLNET_DIFFUSERS, width=3072)) == shapes(theirs)
    assert to_ours(source_of(theirs), FLUX_CONTROLNET_DIFFUSERS).shapes == shapes(ours)
    assert detect.pick(source_of(theirs), "flux_controlnet").shapes == shapes(ours)
    assert FluxControlNetParams.from_shapes(shapes(ours)) == params
    if size:
        assert bytes_of(theirs) == size


def bytes_of(tensors: dict[str, Tensor]) -> int:
    """Of a safetensors file in bfloat16, as diffusers writes it."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(tensors):
        end = at + 2 * tensors[name].numel()
        header[name] = {"dtype": "BF16", "shape": list(tensors[name].shape), "data_offsets": [at, end]}
        at = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + length + -length % 8 + at


def xlabs() -> set[str]:
    """Names as XLabs-AI/x-flux, src/flux/controlnet.py, gives them: two double blocks and no single one."""
    linears = ["img_in", "txt_in", "pos_embed_input", "controlnet_blocks.0", "controlnet_blocks.1"]
    linears += [f"{name}.{layer}_layer" for name in ("time_in", "vector_in", "guidance_in") for layer in ("in", "out")]
    linears += [f"input_hint_block.{number}" for number in range(0, 15, 2)]
    streams = [f"double_blocks.{i}.{stream}" for i in range(2) for stream in ("img", "txt")]
    inside = ("mod.lin", "attn.qkv", "attn.proj", "mlp.0", "mlp.2")
    linears += [f"{stream}_{name}" for stream in streams for name in inside]
    norms = {f"{stream}_attn.norm.{name}_norm.scale" for stream in streams for name in ("query", "key")}
    return {f"{name}.{leaf}" for name in linears for leaf in ("weight", "bias")} | norms


def test_xlabs_own_names_at_full_size() -> None:
    ours, _ = full_size(FluxControlNetParams(depth=2, hint_width=16))
    stored = to_theirs(ours, FLUX_CONTROLNET_XLABS)
    assert stored.keys() == xlabs()
    assert stored["input_hint_block.14.weight"].shape == (16, 16, 3, 3)
    assert detect.pick(source_of(stored), "flux_controlnet").shapes == shapes(ours)


def test_a_hint_of_another_width_than_the_latent() -> None:
    """As of inpainting, where the mask is part of the hint; diffusers' class cannot hold it."""
    params = replace(PLAIN, hint_channels=68)
    net = randomise(FluxControlNet(params), 1)
    assert isinstance(net, FluxControlNet)
    given = Inputs(params)
    samples = given.samples(net, 0)
    for a, b in zip(given.samples(net, 0, hint=torch.zeros_like(given.hint)), samples, strict=True):
        assert relative_error(a, b) >= 1e-2
    source = source_of(export.flux_controlnet_tensors(net))
    assert FluxControlNetParams.from_shapes(detect.pick(source, "flux_controlnet").shapes) == params
    with pytest.raises(WeightsError, match="another width than its latent's"):
        export.flux_controlnet_config(params)


def test_params_of_a_base() -> None:
    made = FluxControlNetParams.of(FluxParams(guidance_embed=True), depth=5, depth_single_blocks=0)
    assert made == FluxControlNetParams()
