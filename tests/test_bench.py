"""`flux-engine bench`: its arithmetic against what torch counts, its statistics, what it prints and refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flux_engine import InvalidRequest, OutOfMemory, UnsupportedError, cli, hardware, work
from flux_engine.bench import ceilings, measuring, synthetic
from flux_engine.bench.ceilings import PEAKS, Ceiling, Sizes, datasheet_floor, floor, measure_ceilings
from flux_engine.bench.measure import begin_peak, peak, repeated
from flux_engine.bench.runs import PRESETS, SWEEPS, Run, find_preset, parse_depth, points_of, preset_for
from flux_engine.bench.statistics import Spread, fitted_exponent
from flux_engine.hardware import CARDS
from flux_engine.models.flux import Flux
from flux_engine.models.unet import UNet
from flux_engine.models.vae import AutoEncoder
from flux_engine.specs import DEMO_DEV, DEMO_SDXL, FLUX_DEV, FLUX_SCHNELL, SDXL, FluxSpec, ModelSpec, SDXLSpec
from flux_engine.work import Work

CPU = torch.device("cpu")


def counted(call: Callable[[], object]) -> dict[str, int]:
    """FLOPs by kind, as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        call()
    kinds = {"convolution": "convolution", "bmm": "attention"}
    found = {"linear": 0, "attention": 0, "convolution": 0}
    for operator, flops in counter.get_flop_counts()["Global"].items():
        name = str(operator)
        kind = next((kind for part, kind in kinds.items() if part in name or "attention" in name), "linear")
        found[kind] += flops
    return found


def by_kind(found: Work) -> dict[str, int]:
    return {"linear": found.linear + found.kept, "attention": found.attention, "convolution": found.convolution}


def read_in_a_step(net: Any) -> int:
    """Numbers in matrices and kernels that a call reads."""
    once = re.compile(net.precomputed)
    return sum(p.numel() for name, p in net.named_parameters() if p.dim() > 1 and not once.fullmatch(name))


SLICE = synthetic.with_depth(FLUX_SCHNELL, (2, 3))


@pytest.mark.parametrize(
    ("spec", "image", "text", "batch"),
    [
        (SLICE, 1024, 256, 1),
        (FLUX_DEV, 4096, 512, 2),
        (DEMO_DEV, 64, 24, 3),
    ],
    ids=["slice", "dev", "demo"],
)  # fmt: skip
def test_the_arithmetic_of_flux_is_what_torch_counts(spec: FluxSpec, image: int, text: int, batch: int) -> None:
    params = spec.transformer
    with torch.device("meta"):
        net = Flux(params).bfloat16()
        guidance = torch.empty(batch) if params.guidance_embed else None
        told = torch.empty(batch, text, params.context_in_dim), torch.empty(batch, params.vec_in_dim)
        statics = net.precompute(*told, torch.empty(image, 3), torch.empty(1), guidance)
    found = work.flux_step(params, image=image, text=text, batch=batch)
    x = torch.empty(batch, image, params.in_channels, device="meta")
    assert counted(lambda: net(x, 0, statics)) == by_kind(found)
    assert found.weights + found.weights_kept == read_in_a_step(net)


@pytest.mark.parametrize(
    ("spec", "h", "w", "batch"),
    [(SDXL, 64, 64, 2), (SDXL, 33, 40, 1), (DEMO_SDXL, 16, 24, 2)],
    ids=["sdxl", "odd", "demo"],
)
def test_the_arithmetic_of_sdxl_is_what_torch_counts(spec: SDXLSpec, h: int, w: int, batch: int) -> None:
    params = spec.unet
    with torch.device("meta"):
        net = UNet(params).bfloat16()
        pooled = torch.empty(batch, params.add_embed_dim - 6 * 256)
        text = torch.empty(batch, 77, params.cross_attention_dim)
        statics = net.precompute(text, pooled, torch.empty(batch, 6), torch.empty(1))
    found = work.unet_step(params, h=h, w=w, batch=batch)
    x = torch.empty(batch, params.in_channels, h, w, device="meta")
    assert counted(lambda: net(x, 0, statics)) == by_kind(found)
    assert found.weights + found.weights_kept == read_in_a_step(net)


@pytest.mark.parametrize("spec", [FLUX_DEV, SDXL, DEMO_SDXL], ids=lambda spec: spec.name)
def test_the_arithmetic_of_decoding_is_what_torch_counts(spec: ModelSpec) -> None:
    with torch.device("meta"):
        vae = AutoEncoder(spec.vae).bfloat16()
    found = work.decode(spec.vae, h=64, w=48, batch=2)
    latent = torch.empty(2, spec.vae.latent_channels, 64, 48, device="meta")
    assert counted(lambda: vae.decode(latent)) == by_kind(found)


def test_a_batch_reads_its_weights_once() -> None:
    one, four = (work.flux_step(DEMO_DEV.transformer, image=64, text=24, batch=n) for n in (1, 4))
    assert four.flops == 4 * one.flops
    assert four.bytes(2, quantized=False) == one.bytes(2, quantized=False) > one.bytes(2, quantized=True)


def test_published_figures() -> None:
    """What others computed of the same models, in TFLOP (diffusers' own benchmarks count linears alone)."""
    full = work.flux_step(FLUX_DEV.transformer, image=4096, text=512)
    assert full.flops / 1e12 == pytest.approx(74.4, abs=0.1)
    assert (full.linear + full.kept) / 1e12 == pytest.approx(59.5, abs=0.1)
    assert work.unet_step(SDXL.unet, h=128, w=128, batch=2).flops / 1e12 == pytest.approx(13.5, rel=0.02)
    assert work.decode(FLUX_DEV.vae, h=128, w=128).flops / 1e12 == pytest.approx(10.47, rel=0.01)


def test_spread() -> None:
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.median, spread.low, spread.high, spread.least, spread.most, spread.count) == (3, 2, 4, 1, 5, 5)
    assert spread.relative == pytest.approx(2 / 3)
    assert Spread.of([2.0]).relative == 0
    with pytest.raises(ValueError, match="nothing was measured"):
        Spread.of([])


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_an_exponent_is_found_again(exponent: float) -> None:
    xs = [1.0, 2.0, 4.0, 8.0]
    found, factor = fitted_exponent(xs, [3 * x**exponent for x in xs])
    assert (found, factor) == pytest.approx((exponent, 3))


@pytest.mark.parametrize(
    ("xs", "ys"), [([1.0], [1.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [0.0, 1.0]), ([1.0], [])]
)
def test_what_no_exponent_fits(xs: list[float], ys: list[float]) -> None:
    with pytest.raises(InvalidRequest, match="no exponent fits"):
        fitted_exponent(xs, ys)


def test_repeats_are_counted_without_warm_up() -> None:
    calls: list[int] = []
    took = repeated(lambda: calls.append(1), CPU, warm_up=2, repeats=3)
    assert len(calls) == 5
    assert len(took) == 3
    assert min(took) >= 0


def test_peak_memory_counts_what_is_taken_after_it_began() -> None:
    begin_peak(CPU)
    before = peak(CPU)
    taken = torch.ones(2**26)
    assert peak(CPU) - before > 0.9 * taken.nbytes


def test_a_floor_is_arithmetic_or_memory() -> None:
    made = Work(linear=800, kept=100, attention=100, convolution=0, weights=10, weights_kept=1)
    fast = {"linear": Ceiling(400, ""), "kept": Ceiling(100, ""), "attention": Ceiling(100, "")}
    assert floor(made, 2, "none", fast | {"bandwidth": Ceiling(1e9, "")}) == 4
    assert floor(made, 2, "none", fast | {"bandwidth": Ceiling(2, "")}) == 11
    assert floor(made, 2, "int8", fast | {"bandwidth": Ceiling(2, "")}) == 6


def test_datasheets() -> None:
    assert set(PEAKS) == set(CARDS)
    full = work.flux_step(FLUX_DEV.transformer, image=4096, text=512)
    floors = {
        card: datasheet_floor(full, dtype, scheme, PEAKS[card])
        for card, dtype, scheme in (
            ("H100", torch.bfloat16, "none"), ("A100 80 GB", torch.bfloat16, "int8"), ("T4", torch.float16, "none"),
        )
    }  # fmt: skip
    assert floors == pytest.approx({"H100": 0.0752, "A100 80 GB": 0.143, "T4": 1.144}, rel=0.01)
    assert datasheet_floor(full, torch.bfloat16, "none", PEAKS["T4"]) is None
    assert datasheet_floor(full, torch.bfloat16, "fp8", PEAKS["A100 80 GB"]) is None


@pytest.mark.parametrize("scheme", ["none", "int8", "fp8"])
def test_ceilings_are_measured_of_every_kind(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "COPIED", 2**16)
    sizes = Sizes(tokens=32, width=32, heads=2, length=32, head_dim=32, channels=32, h=8, w=8)
    found = measure_ceilings(sizes, CPU, torch.bfloat16, scheme, repeats=1)
    assert set(found) == {"linear", "kept", "attention", "convolution", "bandwidth"}
    assert all(one.per_second > 0 and one.by for one in found.values())


@pytest.mark.parametrize("name", list(synthetic.DTYPES)[:2])
@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize("spec", [DEMO_DEV, DEMO_SDXL], ids=lambda spec: spec.name)
def test_a_synthetic_network_runs(spec: ModelSpec, scheme: str, name: str) -> None:
    size = synthetic.Size(64, 64, batch=2, steps=2)
    with torch.inference_mode():
        made = synthetic.make(spec, size, CPU, getattr(torch, name), scheme)
        statics = made.prompt()
        outputs = [made.once(call, statics) for call in range(2)]
    assert all(len(one) == 2 and one.isfinite().all() and one.std() > 0.01 for one in outputs)


def test_what_does_not_fit_is_refused_before_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardware, "free_memory", lambda: 10**9)
    with pytest.raises(OutOfMemory, match=r"23\.8 GB.*--depth"):
        synthetic.make(FLUX_SCHNELL, synthetic.Size(1024, 1024), CPU, torch.bfloat16, "none")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic networks of the demo's widths, ceilings of nearly nothing."""
    monkeypatch.setattr(measuring, "SYNTHETIC", {"flux": DEMO_DEV, "sdxl": DEMO_SDXL, "vae": DEMO_DEV})
    monkeypatch.setattr(ceilings, "COPIED", 2**16)


def bench(capsys: pytest.CaptureFixture[str], *args: str) -> list[dict[str, Any]]:
    assert cli.main(["bench", "--json", *args]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return [json.loads(line) for line in captured.out.splitlines()]


@pytest.mark.parametrize(
    "args",
    [
        ("demo-schnell", "--steps", "3"),
        ("demo-sdxl-turbo", "--steps", "1"),
        ("--synthetic", "flux", "--quantization", "int8"),
        ("--synthetic", "sdxl", "--steps", "2"),
        ("--synthetic", "vae",),
    ],
    ids=" ".join,
)  # fmt: skip
def test_all_figures_are_there(args: tuple[str, ...], small: None, capsys: pytest.CaptureFixture[str]) -> None:
    (found,) = bench(capsys, *args, "--width", "128", "--height", "128", "--repeats", "2")
    step = found["seconds"]["step"]
    assert 0 < step["least"] <= step["median"] <= step["most"]
    assert found["seconds"]["request"]["count"] == 2
    assert found["peak_bytes"] > found["weights_bytes"] > 0
    assert found["flops_per_second"] == pytest.approx(found["work"]["flops"] / step["median"])
    assert found["share_of_floor"] == pytest.approx(found["floor_seconds"] / step["median"])
    assert found["share_of_floor"] > 0
    per_minute = 60 / found["seconds"]["request"]["median"]
    assert found["pictures_per_minute"] == (None if "vae" in args else pytest.approx(per_minute))
    if "--steps" in args:
        assert found["steps"] == int(args[-1])


def test_for_people(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "--synthetic", "flux", "--width", "128", "--height", "128", "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    for said in ("synthetic flux, 128x128", "step", "pictures", "peak memory", "TFLOP/s", "ceiling", "floor"):
        assert said in out


@pytest.mark.full
@pytest.mark.parametrize("sweep", SWEEPS)
def test_sweeps(sweep: str, small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flux_engine.bench.runs.SWEEPS", {"batch": (1, 2), "size": (128, 256), "steps": (1, 2)})
    size = () if sweep == "size" else ("--width", "128", "--height", "128")
    (found,) = bench(capsys, "--synthetic", "flux", "--sweep", sweep, "--repeats", "1", *size)
    assert [point["at"] for point in found["points"]] == ([128, 256] if sweep == "size" else [1, 2])
    assert isinstance(found["exponent"], float)
    assert isinstance(found["exponent_of_flops"], float)
    assert cli.main(["bench", "--synthetic", "flux", "--sweep", sweep, "--repeats", "1", *size]) == 0
    assert "to the power of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "name either a model or --synthetic"),
        (["demo-schnell", "--synthetic", "flux"], "not both"),
        (["--synthetic", "fluxx"], "--synthetic 'fluxx'"),
        (["--synthetic", "sdxl", "--depth", "2+4"], "--depth is for"),
        (["--synthetic", "flux", "--depth", "2"], "--depth '2' is not as 2+4"),
        (["--synthetic", "flux", "--depth", "0+0"], "--depth '0+0'"),
        (["--synthetic", "flux", "--depth=-1+2"], "--depth '-1+2'"),
        (["--synthetic", "flux", "--width", "200", "--height", "256"], "strict: width 200"),
        (["--synthetic", "flux", "--width", "128"], "width"),
        (["--synthetic", "flux", "--quantization", "int4"], "--quantization 'int4'"),
        (["--synthetic", "flux", "--quantization", "both"], "'both' is for models"),
        (["--synthetic", "flux", "--dtype", "int8"], "--dtype 'int8'"),
        (["--synthetic", "flux", "--steps", "0"], "--steps 0"),
        (["--synthetic", "flux", "--pictures", "0"], "--pictures 0"),
        (["--synthetic", "flux", "--repeats", "0"], "--repeats 0"),
        (["--synthetic", "flux", "--warm-up", "-1"], "--warm-up -1"),
        (["--synthetic", "flux", "--sweep", "sizes"], "did you mean 'size'"),
        (["--synthetic", "flux", "--sweep", "size", "--width", "256", "--height", "256"], "leave them out"),
        (["--synthetic", "flux", "--sweep", "batch", "--pictures", "2"], "leave them out"),
        (["--synthetic", "flux", "--sweep", "steps", "--steps", "2"], "leave them out"),
        (["--synthetic", "vae", "--sweep", "steps"], "decodes once"),
        (["demo-schnell", "--width", "99999", "--height", "64"], "width 99999"),
        (["demo-schnell", "--steps", "100000"], "num_inference_steps"),
        (["nothing-of-that-name"], "no model 'nothing-of-that-name'"),
        (["--preset", "T5"], "--preset 'T5'"),
        (["--preset", "cpu", "--dtype", "float32"], "leave out dtype"),
        (["--preset", "cpu", "--pictures", "1"], "leave out pictures"),
        (["demo-schnell", "--preset", "cpu"], "leave out model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line that says what is wrong, before anything is loaded or made."""
    monkeypatch.setattr(measuring, "make", lambda *args, **kwargs: pytest.fail("a network was made"))
    assert cli.main(["bench", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    told = captured.err.splitlines()[-1]
    assert told.startswith("flux-engine: ")
    assert words in captured.err


def test_a_preset_for_another_device(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    assert cli.main(["bench", "--preset", "h100"]) == 1
    assert "this is a processor: use --preset auto" in capsys.readouterr().err


def test_a_preset_goes_on_after_what_does_not_fit(
    small: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    size = {"width": 128, "height": 128}
    runs = (Run(synthetic="flux", **size), Run(synthetic="sdxl", **size))
    monkeypatch.setattr("flux_engine.cli.bench.find_preset", lambda name: runs)
    made = synthetic.make

    def full(spec: ModelSpec, *args: Any, **kwargs: Any) -> Any:
        if isinstance(spec, FluxSpec):
            raise OutOfMemory("no room")
        return made(spec, *args, **kwargs)

    monkeypatch.setattr(measuring, "make", full)
    first, second = bench(capsys, "--preset", "auto", "--device", "cpu", "--repeats", "1")
    assert first["refused"] == "no room"
    assert second["run"] == "synthetic sdxl"


@pytest.mark.parametrize(
    ("card", "preset"),
    [
        ("Tesla T4", "T4"), ("NVIDIA A40", "A40"), ("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A100-PCIE-40GB", "A100"),
        ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H200", "H100"), ("NVIDIA A10", "A40"), ("NVIDIA L4", "H100"),
        ("NVIDIA GeForce RTX 4090", "H100"), ("cpu", "cpu"),
    ],
)  # fmt: skip
def test_which_preset_a_card_has(card: str, preset: str) -> None:
    assert preset_for(card) == preset


def test_presets() -> None:
    """Every card's are of what it multiplies."""
    with pytest.raises(InvalidRequest, match="no preset is for 'Riva TNT'"):
        preset_for("Riva TNT")
    assert find_preset("h100") == PRESETS["H100"]
    for name, card in (("T4", "T4"), ("A40", "A40"), ("A100", "A100 80 GB"), ("H100", "H100")):
        for run in PRESETS[name]:
            assert CARDS[card].runs(run.quantization or "none")
            assert (run.dtype == "bfloat16") == CARDS[card].bf16
        assert {run.synthetic for run in PRESETS[name]} >= {"flux-dev", "sdxl", "vae"}


def test_points_of_a_sweep() -> None:
    run = Run(synthetic="flux", depth=parse_depth("1+2"))
    assert [(n, one.pictures) for n, one in points_of(run, "batch")] == [(n, n) for n in SWEEPS["batch"]]
    assert all(one.depth == (1, 2) and not one.ceilings for _, one in points_of(run, "size"))


def test_a_device_that_is_not_there() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(UnsupportedError, match="sees 0 CUDA devices"):
            measuring.measure(Run(synthetic="flux", depth=(0, 1), device="cuda"))
