"""LoRAs beside the weights: what they draw, what is left alone, and graphs that hold."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lora_files as files
import pytest
import torch
from lora_files import modules
from test_lora import FLUX_ALL, FLUX_ATTENTION, SDXL_LINEARS, Model, of
from torch import Tensor, nn

import flux_engine
from flux_engine import InvalidRequest, LoRA
from flux_engine.lora import side
from flux_engine.quantization.linears import QuantizedLinear

flux = of("demo-dev", dtype="float32")
flux_int8 = of("demo-dev", dtype="float32", quantization="int8")
sdxl = of("demo-sdxl", dtype="float32")
REQUEST: dict[str, Any] = {
    "seed": 0, "num_inference_steps": 2, "width": 64, "height": 64, "output_type": "latent", "prompt": "a red circle",
}  # fmt: skip


def kept(model: Model) -> int:
    """Bytes that stay whatever leaves."""
    return model.engine._pipeline.family.residents._room.always


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Iterator[Model]:
    found: Model = request.getfixturevalue(request.param)
    before = kept(found)
    yield found
    found.engine.lora.clear()
    found.engine.lora.reserve(0)
    assert kept(found) == before
    assert found.unchanged(), "the base did not come back"
    assert not branches(found.net)


def branches(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if type(module) in side.PLAIN]


def latent(engine: flux_engine.Engine, **fields: Any) -> Tensor:
    return engine(**REQUEST | fields).images[0]


def lora(model: Model, seed: int = 0, names: list[str] | None = None, size: float = 0.15) -> Path:
    sdxl = "unet" in model.engine._pipeline.family.networks()
    names = names or (SDXL_LINEARS if sdxl else FLUX_ALL)
    return model.file(files.peft("unet." if sdxl else "transformer.")(modules(model.base, names, seed, size))[0])


@pytest.mark.parametrize("model", ["flux", "sdxl"], indirect=True)
def test_beside_draws_what_merged_does(model: Model) -> None:
    """Some rows of a joined linear, several LoRAs, scales of either sign."""
    engine = model.engine
    chosen = [LoRA(lora(model, 0), 0.7), LoRA(lora(model, 1), -0.4)]
    base = latent(engine)
    engine.lora.set(chosen, how="merge")
    merged = latent(engine)
    engine.lora.set(chosen, how="side")
    beside = latent(engine)
    assert model.unchanged(), "a weight changed"
    assert branches(model.net)
    assert (merged - base).norm() > 0.02 * base.norm(), "the LoRA has to be seen"
    assert (beside - merged).abs().max() <= 2e-4 * merged.abs().max()
    assert all(lora["beside"] == lora["parameters"] for lora in engine.describe()["loras"])
    engine.lora.clear()
    assert not branches(model.net)
    assert torch.equal(latent(engine), base)


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_what_is_no_low_rank_pair_of_a_linear_is_merged(model: Model) -> None:
    name = "single_blocks.0.linear2"
    n, k = model.net.get_submodule(name).weight.shape
    a, b = (torch.randn(shape, generator=torch.Generator().manual_seed(3)) * 0.05 for shape in ((4, k), (n, 4)))
    tensors = {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    whole = {f"{name}.diff": torch.full((n, k), 0.01), f"{name}.diff_b": torch.full((n,), 0.1)}
    pair, difference = model.file(tensors), model.file(whole)
    norm = "double_blocks.0.img_attn.norm.query_norm"
    scale = model.file({f"{norm}.scale": torch.full((64,), 0.5)})
    model.engine.lora.set([pair, difference, scale], how="side")
    assert (model.net.get_submodule(norm).scale == 0.5).all()
    linear = model.net.get_submodule(name)
    assert [each["beside"] for each in model.engine.describe()["loras"]] == [1, 0, 0]
    assert torch.equal(linear.weight, model.bits[f"transformer.{name}.weight"] + 0.01)
    x = torch.randn(3, k)
    wanted = x @ (model.bits[f"transformer.{name}.weight"] + 0.01 + b @ a).T + linear.bias
    assert (linear(x) - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("model", ["flux_int8"], indirect=True)
def test_auto_merges_where_the_source_is_exact(model: Model) -> None:
    model.engine.lora.set([lora(model)])
    assert not branches(model.net)
    assert model.engine.describe()["loras"][0]["beside"] == 0


@pytest.mark.parametrize("scheme", ["int8", "fp8"])
def test_what_was_saved_in_8_bits_is_not_rounded_again(scheme: str, tmp_path: Path, flux: Model) -> None:
    flux_engine.quantize("demo-dev", tmp_path / "saved", scheme=scheme)
    engine = flux_engine.load(tmp_path / "saved", dtype="float32", device="cpu")
    net: Any = engine._pipeline.family.net
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    eight = {name for name, module in net.named_modules() if isinstance(module, QuantizedLinear)}
    path = lora(flux)
    flux.engine.lora.set([path])
    exact = {name: flux.net.get_submodule(name).weight.clone() for name in eight}
    flux.engine.lora.clear()
    plain = latent(engine)

    def error(name: str) -> float:
        """Of what a linear multiplies by."""
        module = net.get_submodule(name)
        weight = module.dequantized()
        if type(module) in side.PLAIN:
            weight = weight + module.side_up @ module.side_down
        return float((weight - exact[name]).norm())

    engine.lora.set([path])
    changed = {name for name in eight if type(net.get_submodule(name)) in side.PLAIN}
    assert len(changed) > 10
    for name, tensor in net.state_dict().items():
        assert name.rpartition(".")[0] not in eight or torch.equal(tensor, before[name]), f"{name} changed"
    beside = {name: error(name) for name in changed}
    engine.lora.set([path], how="merge")
    assert not branches(net)
    assert all(beside[name] < 0.9 * error(name) for name in changed), "rounding once more loses nothing"
    engine.lora.clear()
    assert torch.equal(latent(engine), plain)


@pytest.mark.parametrize("model", ["flux", "flux_int8"], indirect=True)
def test_room_that_is_reserved_stays_where_it_is(model: Model) -> None:
    engine, base = model.engine, latent(model.engine)
    eight, before = engine.describe()["quantization"] != "none", kept(model)
    engine.lora.reserve(32)
    linears = [m for m in model.net.modules() if isinstance(m, nn.Linear | QuantizedLinear)]
    assert len(branches(model.net)) == len(linears)
    assert kept(model) - before == sum(buffer.nbytes for buffer in model.net.buffers()) > 0
    empty = latent(engine)  # tokens of 8 bits make much of the last bits
    assert (empty - base).norm() <= (0.02 if eight else 0) * base.norm()
    where = [(m.side_down.data_ptr(), m.side_up.data_ptr()) for m in linears]  # pyright: ignore
    drawn: list[Tensor] = []
    for chosen in ([lora(model, 0)], [lora(model, 1, FLUX_ATTENTION)], [], [lora(model, 0)]):
        engine.lora.set(chosen)
        assert [(m.side_down.data_ptr(), m.side_up.data_ptr()) for m in linears] == where  # pyright: ignore
        assert model.unchanged()
        drawn.append(latent(engine))
    assert torch.equal(drawn[0], drawn[3])
    assert torch.equal(drawn[2], empty)
    with pytest.raises(InvalidRequest, match="clear them first"):
        engine.lora.reserve(0)
    engine.lora.reserve(64)  # what stands there already has to move along
    assert (latent(engine) - drawn[0]).norm() <= (0.02 if eight else 1e-5) * drawn[0].norm()


@pytest.mark.parametrize("rank", [-1, 257, True, 1.5, "16", None])
def test_ranks_that_are_none_are_refused(rank: Any, flux: Model) -> None:
    with pytest.raises(InvalidRequest, match="ranks of 0 to 256"):
        flux.engine.lora.reserve(rank)
    with pytest.raises(InvalidRequest, match="auto, merge, side"):
        flux.engine.lora.set([], how="beside")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_what_there_is_no_room_for_is_merged(model: Model) -> None:
    """A branch has a rank of 256 at most."""
    paths = [model.file({"img_in.lora_A.weight": torch.ones(100, 64) / 100,
                         "img_in.lora_B.weight": torch.ones(192, 100) / 100}) for _ in range(3)]  # fmt: skip
    model.engine.lora.set(paths, how="side")
    assert [each["beside"] for each in model.engine.describe()["loras"]] == [1, 1, 0]
    assert torch.equal(model.net.img_in.weight, model.bits["transformer.img_in.weight"] + torch.ones(192, 100) / 100
                       @ (torch.ones(100, 64) / 100))  # fmt: skip


@pytest.mark.parametrize("after", range(4))
@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_what_is_interrupted_leaves_what_was(model: Model, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [lora(model, 0, FLUX_ALL[:9]), lora(model, 1, FLUX_ALL[:12])]
    model.engine.lora.set([paths[0]], how="side")
    before = latent(model.engine)
    fill, left = side.fill, [after]

    def interrupted(*arguments: Any) -> None:
        if left[0] == 0:
            left[0] = -1
            raise KeyboardInterrupt
        left[0] -= 1
        fill(*arguments)

    monkeypatch.setattr(side, "fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.engine.lora.set([paths[1]], how="side")
    assert model.engine.lora.active == (LoRA(paths[0]),)
    assert torch.equal(latent(model.engine), before)


@pytest.mark.parametrize("model", ["flux"], indirect=True)
def test_what_the_weights_do_not_hold_is_not_exported(model: Model, tmp_path: Path) -> None:
    model.engine.lora.set([lora(model)], how="side")
    with pytest.raises(InvalidRequest, match="how='merge'"):
        model.engine.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["merge", "reserved"])
@pytest.mark.parametrize("model", ["flux", "sdxl"], indirect=True)
def test_graphs_hold_whatever_is_set(model: Model, how: str) -> None:
    """The network is traced once as a whole, and never again."""
    traced: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        traced.append(graph)
        return graph.forward

    engine, calls, first = model.engine, list[Tensor](), 0
    few = FLUX_ATTENTION if "transformer" in engine._pipeline.family.networks() else SDXL_LINEARS[:4]
    both = [lora(model, 0), lora(model, 1, few)]
    if how == "reserved":
        engine.lora.reserve(16)
    torch._dynamo.reset()
    net = model.net
    plain = type(net).forward
    compiled = torch.compile(plain, backend=backend, fullgraph=True)
    try:
        type(net).forward = compiled
        for chosen in ([], [both[0]], [both[1]], [], [both[0]]):
            engine.lora.set(chosen)
            calls.append(latent(engine, num_inference_steps=1))
            first = first or len(traced)
        assert first > 0
        assert len(traced) == first, f"traced {len(traced) - first} times more"
    finally:
        type(net).forward = plain
        torch._dynamo.reset()
    assert torch.equal(calls[0], calls[3])
    assert torch.equal(calls[1], calls[4])
    assert not torch.equal(calls[0], calls[1])
    assert (calls[1] - latent(engine, num_inference_steps=1)).abs().max() <= 1e-5 * calls[1].abs().max()


def test_a_linear_with_a_branch_is_still_what_it_was(flux: Model) -> None:
    linear = copy.deepcopy(flux.net.img_in)
    names = list(linear.state_dict())
    side.reserve(linear, 3, torch.float32, torch.device("cpu"))
    assert isinstance(linear, nn.Linear)
    assert linear.side_down.shape == (16, 64)
    assert list(linear.state_dict()) == names
    side.remove(linear)
    assert type(linear) is nn.Linear
    assert not list(linear.buffers())
