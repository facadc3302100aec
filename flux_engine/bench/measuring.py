"""Carry a run out: load or make the network, warm up, repeat, and hold what came out against the machine's floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

import flux_engine
from flux_engine import __version__, hardware, hub, kernels
from flux_engine.bench.ceilings import PEAKS, Ceiling, datasheet_floor, floor, measure_ceilings
from flux_engine.bench.measure import Marks, begin_peak, peak
from flux_engine.bench.runs import SYNTHETIC, Run, request_of
from flux_engine.bench.statistics import Spread
from flux_engine.bench.synthetic import Size, make, sizes_for, with_depth, work_of_step
from flux_engine.compiling import Graphs
from flux_engine.config import EngineConfig
from flux_engine.errors import InvalidRequest
from flux_engine.memory import memory_errors
from flux_engine.placing import extent_of
from flux_engine.request import Request
from flux_engine.specs import ModelSpec
from flux_engine.work import Work

Say = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """What a run runs on."""

    device: torch.device
    dtype: torch.dtype
    scheme: str
    compile: str

    @classmethod
    def of(cls, run: Run) -> Setting:
        """Raises UnsupportedError for what this machine cannot do."""
        config = EngineConfig.from_environment(
            device=run.device, dtype=run.dtype, quantization=run.quantization, memory=run.memory, compile=run.compile
        )
        device = hardware.pick_device(config.device)
        dtype = hardware.pick_dtype(config.dtype, device)
        return cls(device, dtype, hardware.pick_quantization(config.quantization, device), config.compile)


def measure(run: Run, say: Say = lambda line: None) -> dict[str, Any]:
    """All figures of a run, ready for JSON: seconds, bytes, FLOP.

    Raises InvalidRequest, UnsupportedError or OutOfMemory before anything is loaded, where that can be known.
    """
    setting = Setting.of(run)
    return _of_model(run, setting, say) if run.model else _of_network(run, setting, say)


def _of_network(run: Run, setting: Setting, say: Say) -> dict[str, Any]:
    """A network alone: a step is a call of it, and a request is what is done for a prompt and all its steps."""
    assert run.synthetic is not None
    spec, decoding = with_depth(SYNTHETIC[run.synthetic], run.depth), run.synthetic.endswith("vae")
    job = request_of(spec, run).resolve(spec)
    extent = extent_of(job)
    batch = extent.pictures if decoding else extent.pictures * extent.rows
    size = Size(job.width, job.height, batch, 1 if decoding else job.num_inference_steps)
    setting = replace(setting, scheme="none") if decoding else setting
    device = setting.device
    say(f"making {run.name}")
    began = time.perf_counter()
    graphs = None if setting.compile == "off" else Graphs(setting.compile)
    watched = graphs.watched() if graphs else nullcontext()
    with watched, torch.inference_mode(), memory_errors(f"{run.name}, {size.width}x{size.height}, batch {batch}"):
        network = make(spec, size, device, setting.dtype, setting.scheme, decoding=decoding, graphs=graphs)
        loaded = time.perf_counter() - began
        begin_peak(device)
        prompts: list[float] = []
        steps: list[list[float]] = []
        for turn in range(run.warm_up + run.repeats):
            marks = Marks(device)
            marks.mark()
            statics = network.prompt()
            marks.mark()
            for call in range(size.steps):
                network.once(call, statics)
                marks.mark()
            first, *rest = marks.seconds()
            prompts.append(first)
            steps.append(rest)
            say(f"{'warm-up' if turn < run.warm_up else turn - run.warm_up + 1}: {sum(rest) / len(rest):.3f} s a step")
        most = peak(device)
        weights = sum(p.nbytes for p in network.net.parameters())
        del network
    counted, read = steps[run.warm_up :], prompts[run.warm_up :]
    whole = [a + sum(rest) for a, rest in zip(read, counted, strict=True)]
    seconds = {
        "load": Spread.of([loaded]),
        "first": Spread.of([prompts[0] + steps[0][0]]),
        "prompt": Spread.of(read),
        "step": Spread.of([one for rest in counted for one in rest]),
        "request": Spread.of(whole),
    }
    found = _report(run, setting, spec.name, size, extent.pictures, seconds, most, weights)
    if run.depth is not None or decoding:
        found["pictures_per_minute"] = None  # of a slice of a model, that says nothing
    return found | _against_the_machine(run, setting, spec, size, seconds["step"].median, decoding)


def _of_model(run: Run, setting: Setting, say: Say) -> dict[str, Any]:
    """Whole requests: prompt, steps and pictures."""
    assert run.model is not None
    config = EngineConfig.from_environment()
    known = hub.spec_of(run.model, hub.manifests(config.weights))
    if known is not None:  # before gigabytes are read
        request_of(known, run)
    say(f"loading {run.model}")
    began = time.perf_counter()
    engine = flux_engine.load(
        run.model,
        device=run.device,
        dtype=run.dtype,
        quantization=run.quantization,
        memory=run.memory,
        compile=run.compile,
    )
    loaded = time.perf_counter() - began
    request = request_of(engine.spec, run)
    job = request.resolve(engine.spec)
    device = setting.device
    begin_peak(device)
    turns: list[list[float]] = []
    for turn in range(run.warm_up + run.repeats):
        turns.append(_times(engine, request, device))
        steps = turns[-1][1:-1]
        say(f"{'warm-up' if turn < run.warm_up else turn - run.warm_up + 1}: request {sum(turns[-1]):.3f} s, "
            f"{len(steps)} steps")  # fmt: skip
    most = peak(device)
    counted = turns[run.warm_up :]
    # The first step is with what comes before it, so where there are others these are the measure.
    steps = [each for times in counted for each in times[2:-1]] or [times[1] for times in counted]
    step = Spread.of(steps)
    seconds = {
        "load": Spread.of([loaded]),
        "first": Spread.of([sum(turns[0])]),
        "prompt": Spread.of([times[0] for times in counted]),
        "step": step,
        "decode": Spread.of([times[-1] for times in counted]),
        "request": Spread.of([sum(times) for times in counted]),
    }
    parts = engine.describe()["parts"]
    extent = extent_of(job)
    size = Size(job.width, job.height, extent.pictures * extent.rows, job.num_inference_steps)
    weights = sum(part["bytes"] for part in parts.values())
    found = _report(run, setting, engine.spec.name, size, extent.pictures, seconds, most, weights)
    return found | _against_the_machine(run, setting, engine.spec, size, step.median, False)


def _times(engine: Any, request: Request, device: torch.device) -> list[float]:
    """Of one request: until the first step begins, each step, and from the last one to the pictures.

    A callback hears of the end of a step only: where there are several, the first is taken to be as long as the second.
    """
    marks = Marks(device)
    marks.mark()
    result = engine.run(request, on_step=lambda step: marks.mark())
    marks.mark()
    before, *steps, decode = marks.seconds()
    first = steps[0] if steps else min(before, result.timings["denoise"])
    return [max(0.0, before - first), min(before, first), *steps, decode]


def _report(
    run: Run,
    setting: Setting,
    model: str,
    size: Size,
    pictures: int,
    seconds: Mapping[str, Spread],
    most: int,
    weights: int,
) -> dict[str, Any]:
    return {
        "run": run.name,
        "model": model,
        "device": hardware.describe(setting.device),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "quantization": setting.scheme,
        "compile": setting.compile,
        "kernels": kernels.describe(setting.device, setting.dtype),
        "width": size.width,
        "height": size.height,
        "pictures": pictures,
        "batch": size.batch,
        "steps": size.steps,
        "repeats": run.repeats,
        "warm_up": run.warm_up,
        "seconds": {name: asdict(spread) for name, spread in seconds.items()},
        "pictures_per_minute": 60 * pictures / seconds["request"].median,
        "peak_bytes": most,
        "weights_bytes": weights,
        "versions": {"flux_engine": __version__, "torch": torch.__version__},
    }


def _against_the_machine(
    run: Run, setting: Setting, spec: ModelSpec, size: Size, step: float, decoding: bool
) -> dict[str, Any]:
    """Arithmetic of a step, what was made of it, and what could be."""
    work: Work = work_of_step(spec, size, decoding=decoding)
    item, scheme = setting.dtype.itemsize, setting.scheme
    read = work.bytes(item, quantized=scheme != "none")
    found: dict[str, Any] = {
        "work": asdict(work) | {"flops": work.flops, "bytes": read},
        "flops_per_second": work.flops / step,
    }
    if run.ceilings:
        sizes = sizes_for(spec, size, decoding=decoding)
        ceilings: dict[str, Ceiling] = measure_ceilings(sizes, setting.device, setting.dtype, scheme)
        least = floor(work, item, scheme, ceilings)
        found |= {
            "ceilings": {name: asdict(one) for name, one in ceilings.items()},
            "floor_seconds": least,
            "share_of_floor": least / step,
        }
    card = _datasheet_of(setting.device)
    if card is not None:
        least = datasheet_floor(work, setting.dtype, scheme, PEAKS[card])
        found["datasheet"] = {"card": card, "floor_seconds": least, "share_of_floor": least and least / step}
    return found


def _datasheet_of(device: torch.device) -> str | None:
    """Whose datasheet speaks of a card; None for a processor and for cards that are not known."""
    if device.type != "cuda":
        return None
    words = torch.cuda.get_device_name(device).upper().replace("-", " ").split()
    names = sorted(PEAKS, key=len, reverse=True)
    if "A100" in words:
        return "A100 80 GB" if torch.cuda.get_device_properties(device).total_memory > 50e9 else "A100 40 GB"
    return next((name for name in names if all(word in words for word in name.upper().split())), None)


def check(run: Run) -> None:
    """Raises what `measure` would before it loads anything."""
    Setting.of(run)
    if run.model is not None:
        known = hub.spec_of(run.model, hub.manifests(EngineConfig.from_environment().weights))
        if known is not None:
            request_of(known, run)
        elif not run.model:
            raise InvalidRequest("a model's name is empty")
