"""Calls that are captured: on a processor by a stand-in for a CUDA graph, which does again what it was shown, with the
numbers that lie in its memory by then; on a card by CUDA's own (tests/test_kernels_gpu.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flux_engine
from flux_engine import capture
from flux_engine.capture import CUDAGraphs, rebuilt, tensors_of
from flux_engine.engine import Engine
from flux_engine.models.layers import Stepwise

PROMPT = "a large red circle on a blue background"


class Shown:
    """Does it once; playing it back does it again, into the memory of the first result."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def __call__(self, do: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        result = do()

        def replay() -> None:
            self.replayed += 1
            for old, new in zip(tensors_of(result), tensors_of(do()), strict=True):
                old.copy_(new)

        for tensor in tensors_of(result):
            tensor.fill_(torch.nan)  # nobody may use what the capture itself gave
        return replay, result


def captured(model: str, **options: Any) -> tuple[Engine, CUDAGraphs, Shown]:
    engine = flux_engine.load(model, device="cpu", dtype="float32", **options)
    shown = Shown()
    graphs = CUDAGraphs(shown)
    graphs.attach(engine._pipeline.family.networks().values())
    return engine, graphs, shown


def latents(engine: Engine, **fields: Any) -> Tensor:
    return torch.stack(list(engine(fields.pop("prompt", PROMPT), output_type="latent", **fields)))


@pytest.mark.parametrize("model", ["demo-schnell", "demo-dev", "demo-sdxl"])
def test_what_is_played_back_is_what_is_called(model: str) -> None:
    """Other prompts, seeds, guidance, timesteps through the same memory; other sizes through memory of their own."""
    engine, graphs, shown = captured(model)
    plain = flux_engine.load(model, device="cpu", dtype="float32")
    size = {"width": 64, "height": 96}
    requests: list[dict[str, Any]] = [
        {"seed": 0, **size}, {"seed": 1, **size}, {"seed": 0, "prompt": "a small yellow star", **size},
        {"seed": 0, "width": 96, "height": 64}, {"seed": 0, "num_outputs": 2, **size}, {"seed": 0, **size},
        {"seed": 0, "negative_prompt": "a blue star", "num_outputs": 2, **size},
    ]  # fmt: skip
    for fields in requests:
        assert torch.equal(latents(engine, **fields), latents(plain, **fields)), fields
    assert shown.captured == len(graphs) <= 5
    assert shown.replayed > 2 * len(graphs)


def test_controlnets_are_played_back() -> None:
    control = flux_engine.Control(kind="canny", image=ring(), preprocess=False)
    for model in ("demo-schnell", "demo-sdxl"):
        engine, _, shown = captured(model, controlnets=["canny"])
        plain = flux_engine.load(model, device="cpu", dtype="float32", controlnets=["canny"])
        fields: dict[str, Any] = {"seed": 0, "width": 64, "height": 64, "control": [control]}
        assert torch.equal(latents(engine, **fields), latents(plain, **fields)), model
        assert shown.captured == 2
        assert torch.equal(latents(engine, seed=0, width=64, height=64), latents(plain, seed=0, width=64, height=64))
        assert shown.captured == 3  # the network without residuals


def test_loras_merge_into_what_is_captured_and_moved_weights_are_captured_anew() -> None:
    engine, graphs, shown = captured("demo-dev")
    plain = flux_engine.load("demo-dev", device="cpu", dtype="float32")
    fields = {"seed": 0, "width": 64, "height": 64, "num_inference_steps": 2}
    before = latents(engine, **fields)
    for each in (engine, plain):
        each.lora.set(["demo-dev-zorblin"])
    graphs.forget_moved()
    assert len(graphs) == 1 and shown.captured == 1
    merged = latents(engine, **fields)
    assert torch.equal(merged, latents(plain, **fields)) and not torch.equal(merged, before)
    assert shown.captured == 1
    net = engine._pipeline.family.net
    net.img_in.weight = torch.nn.Parameter(net.img_in.weight.clone(), requires_grad=False)
    graphs.forget_moved()
    assert len(graphs) == 0


def test_no_more_than_some_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "KEPT", 2)
    engine, graphs, shown = captured("demo-schnell")
    for side in (32, 48, 64, 48, 32):
        latents(engine, seed=0, width=side, height=64, num_inference_steps=1)
    assert len(graphs) == 2
    assert shown.captured == 4  # 48 was still there


def test_what_is_no_tensor_is_refused() -> None:
    net = flux_engine.load("demo-schnell", device="cpu")._pipeline.family.net
    with pytest.raises(TypeError, match="not a int"):
        CUDAGraphs(Shown())(net.predict, torch.zeros(1), 3)


def test_tensors_are_found_and_put_back() -> None:
    value = (torch.tensor(1.0), None, (torch.tensor(2.0), [torch.tensor(3.0)]))
    assert [float(t) for t in tensors_of(value)] == [1, 2, 3]
    doubled = rebuilt(value, lambda tensor: tensor * 2)
    assert doubled == (torch.tensor(2.0), None, (torch.tensor(4.0), [torch.tensor(6.0)]))
    assert Stepwise().call_step(lambda x: x, 4) == 4


def ring() -> Any:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (64, 64))
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), outline="white")
    return picture
