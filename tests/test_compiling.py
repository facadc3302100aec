"""Compiled networks: how many graphs there are, that none is made unseen, and what is kept of them."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo
from conftest import latent_error
from PIL import Image
from torch._dynamo.utils import counters

import flux_engine
from flux_engine import InvalidRequest, LoRA, Request, UnsupportedError, cli, compiling
from flux_engine.config import EngineConfig
from flux_engine.engine import Engine
from flux_engine.examples import examples
from flux_engine.sizes import PUBLISHED_SIZES

# torch's own, at its own code.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
PROMPT = "a large red circle on a blue background"
BOUND = 0.02
"""Of latents in bfloat16, relative L2: a compiled block rounds elsewhere, and less often. One number can be 0.04 off
where there are no kernels of ours; of the two eager is then further from float32."""


@pytest.fixture(scope="module", autouse=True)
def without_traces() -> Iterator[None]:
    """torch writes all that a compiler does to a log which nobody reads, unless somebody listens, as pytest does."""
    trace = logging.getLogger("torch.__trace")
    trace.disabled = True
    yield
    trace.disabled = False


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def compiled(cache: Path) -> Iterator[Engine]:
    torch._dynamo.reset()
    engine = flux_engine.load("demo-dev", device="cpu", dtype="bfloat16", compile="default", compile_cache=cache)
    engine.warm_up()
    yield engine
    torch._dynamo.reset()


def graphs_of(engine: Engine) -> int:
    return engine.describe()["compile"]["graphs"]


def test_a_mixed_session_makes_no_graph(compiled: Engine) -> None:
    """All published sizes at both areas, custom ones, batches, guidance, LoRAs: what the warm-up made is enough."""
    assert graphs_of(compiled) == 5, "two kinds of block, for one row and for several, and a decoder, of one"
    counters.clear()
    fields = [{"aspect_ratio": ratio, "megapixels": size} for ratio in PUBLISHED_SIZES for size in ("1", "0.25")]
    assert len(fields) == 22
    fields += [{"width": w, "height": h} for w, h in ((80, 304), (32, 32), (512, 16 * 9), (48, 512))]
    fields += [{"num_outputs": 2}, {"num_outputs": 3, "width": 64, "height": 96}, {"negative_prompt": "a blue star"}]
    for each in fields:
        result = compiled(PROMPT, seed=0, num_inference_steps=1, output_type="latent", **each)
        assert not [note for note in result.notes if "compiled" in note], each
    for loras in (["demo-dev-zorblin"], [LoRA("demo-dev-haze", 0.5)], ["demo-dev-haze", LoRA("demo-dev-zorblin", 0.7)]):
        for count in (1, 2):
            compiled(PROMPT, seed=0, num_inference_steps=1, num_outputs=count, loras=loras)
    compiled.lora.clear()
    assert graphs_of(compiled) == 5
    assert counters["stats"]["unique_graphs"] == 0
    assert not counters["graph_break"]
    assert not counters["recompile_limit"] and not counters["unimplemented"]
    assert set(counters["frames"]) <= {"total", "ok"}


@pytest.mark.parametrize("fields", [{}, {"width": 96, "height": 64, "num_outputs": 2}])
def test_compiled_is_eager(compiled: Engine, fields: dict[str, int]) -> None:
    eager = flux_engine.load("demo-dev", device="cpu", dtype="bfloat16")
    mine, plain = (
        torch.stack(list(engine(PROMPT, seed=0, num_inference_steps=4, output_type="latent", **fields)))
        for engine in (compiled, eager)
    )
    assert latent_error(mine, plain) <= BOUND


@pytest.mark.full
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_a_mixed_session_of_sdxl(tmp_path: Path, scheme: str) -> None:
    """Odd sizes as well, a ControlNet, a refiner's ensemble would be one more network; int8."""
    engine, eager = (
        flux_engine.load(
            "demo-sdxl", device="cpu", dtype="bfloat16", quantization=scheme, controlnets=["canny"],
            compile=mode, compile_cache=tmp_path,
        )
        for mode in ("default", "off")
    )  # fmt: skip
    made = engine.warm_up()
    control = [flux_engine.Control(kind="canny", image=Image.new("RGB", (128, 96), "gray"), preprocess=False)]
    for fields in ({"width": 128, "height": 96}, {"width": 104, "height": 160}, {"num_outputs": 3, "guidance_scale": 1},
                   {"control": control}, {"control": control, "num_outputs": 2, "width": 72, "height": 200},
                   {"prompt_chunks": True}):  # fmt: skip
        request = Request(prompt=PROMPT, seed=0, num_inference_steps=2, output_type="latent", **fields)
        mine, plain = (torch.stack(list(each.run(request))) for each in (engine, eager))
        assert latent_error(mine, plain) <= BOUND, fields
    assert graphs_of(engine) == made


def test_a_hot_size_has_graphs_of_its_own_and_others_keep_theirs(compiled: Engine) -> None:
    hot = Request(prompt=PROMPT, seed=0, width=64, height=48, num_inference_steps=1, output_type="latent")
    before = compiled.run(hot).images[0]
    made = graphs_of(compiled)
    assert compiled.warm_up([], hot=[hot]) == 2  # the decoder is not called for latents
    assert compiled.warm_up([], hot=[hot]) == 0
    assert latent_error(compiled.run(hot).images[0], before) <= BOUND
    compiled.run(replace(hot, width=48, height=64))  # as many tokens
    compiled.run(replace(hot, width=64, height=64))
    compiled.run(replace(hot, num_outputs=2))
    assert graphs_of(compiled) == made + 2
    assert compiled.describe()["compile"]["hot sizes"] == 2


def test_what_is_compiled_on_the_way_is_told(cache: Path) -> None:
    engine = flux_engine.load("demo-dev", device="cpu", dtype="bfloat16", compile="default", compile_cache=cache)
    request = Request(prompt=PROMPT, seed=0, width=64, height=48, num_inference_steps=1)
    assert any("3 graphs were compiled on the way" in note for note in engine.run(request).notes)
    assert not engine.run(request).notes


def test_more_graphs_than_the_limit_are_an_error_and_the_engine_goes_on(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiling, "LIMIT", 1)
    engine = flux_engine.load("demo-dev", device="cpu", dtype="bfloat16", compile="default", compile_cache=cache)
    request = Request(prompt=PROMPT, seed=0, width=64, height=48, num_inference_steps=1)
    first = engine.run(request)
    with pytest.raises(UnsupportedError, match=r"torch\.compile: .* 1 graphs, .*limit.*compile='off'"):
        engine.run(replace(request, num_outputs=2))
    assert engine.run(request).images[0].tobytes() == first.images[0].tobytes()


def test_what_cannot_be_compiled_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = flux_engine.load("demo-dev", device="cpu", dtype="bfloat16", compile="default", compile_cache=tmp_path)
    block = engine._pipeline.family.net.double_blocks[0]
    monkeypatch.setattr(type(block), "forward", lambda self, *args: sys.stdout.write(str(args)))
    with pytest.raises(UnsupportedError, match=r"torch\.compile: "):
        engine(PROMPT, seed=0, width=64, height=48, num_inference_steps=1)


CHILD = """
import json, sys
import flux_engine, torch
from torch._dynamo.utils import counters
from torch._inductor import cpp_builder
built = []
run = cpp_builder.run_compile_cmd
def told(command, *args, **kwargs):
    if " -E " not in command:  # which only hashes torch's headers
        built.append(command)
    return run(command, *args, **kwargs)
cpp_builder.run_compile_cmd = told
engine = flux_engine.load("demo-dev", device="cpu", dtype=sys.argv[2], compile="default", compile_cache=sys.argv[1])
made = engine.warm_up()
found, missed = counters["inductor"]["fxgraph_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]
print(json.dumps({"made": made, "found": found, "missed": missed, "built": len(built)}))
"""


def child(folder: Path, dtype: str) -> dict[str, int]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR")}
    clean["OMP_NUM_THREADS"] = str(torch.get_num_threads())  # code for processors is for a number of threads
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), dtype], capture_output=True, text=True, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_another_process_builds_nothing(compiled: Engine, cache: Path) -> None:
    assert child(cache, "bfloat16") == {"made": 5, "found": 5, "missed": 0, "built": 0}


def test_what_is_kept_is_for_this_model_dtype_and_these_versions(compiled: Engine, cache: Path) -> None:
    family = compiled._pipeline.family
    folder = compiling._folder(EngineConfig(compile="default", compile_cache=cache), family)
    assert folder is not None and folder.parent == cache
    told = json.loads((folder / compiling.MADE_FOR).read_text())
    assert told == compiling.made_for(family, "default")
    assert told["torch"] == torch.__version__ and "demo-dev" in told["model"]
    assert told["device"].endswith(f"{torch.get_num_threads()} threads")
    for config in (EngineConfig(compile="max-autotune", compile_cache=cache),):
        assert compiling._folder(config, family) != folder
    other = flux_engine.load("demo-schnell", device="cpu", dtype="bfloat16")._pipeline.family
    assert compiling._folder(EngineConfig(compile="default", compile_cache=cache), other) != folder
    wide = flux_engine.load("demo-dev", device="cpu", dtype="float32")._pipeline.family
    assert compiling._folder(EngineConfig(compile="default", compile_cache=cache), wide) != folder


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(flux_engine.OutputError, match="file"):
        flux_engine.load("demo-dev", device="cpu", compile="default", compile_cache=tmp_path / "file")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"compile": "fast"}, "compile 'fast' is not one of off, default, max-autotune"),
        ({"compile": True}, "compile True is not one of"),
        ({"cuda_graphs": True}, "cuda_graphs asked for, but the device is cpu"),
        ({"cuda_graphs": "yes"}, "cuda_graphs 'yes' is neither True nor False"),
    ],
)
def test_settings_that_cannot_be(fields: dict[str, object], said: str) -> None:
    with pytest.raises(UnsupportedError, match=said):
        flux_engine.load("demo-dev", device="cpu", **fields)  # type: ignore[arg-type]


def test_hot_sizes_need_graphs() -> None:
    engine = flux_engine.load("demo-dev", device="cpu")
    with pytest.raises(InvalidRequest, match="compile='default'"):
        engine.warm_up([], hot=[Request(prompt=PROMPT)])
    assert engine.warm_up() == 0
    assert engine.describe()["compile"] == "off"


@pytest.mark.parametrize("model", ["demo-dev", "demo-sdxl", "demo-fill"])
def test_examples_are_requests_of_the_model(model: str) -> None:
    engine = flux_engine.load(model, device="cpu")
    found = examples(engine.spec)
    assert len(found) == 2
    for request in found:
        assert len(engine.run(request).images) == request.num_outputs


def test_both_precisions_are_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = flux_engine.load("demo-dev", device="cpu", quantization="both")
    run, ran = engine.run, list[bool | None]()
    monkeypatch.setattr(engine, "run", lambda request, **how: (ran.append(request.go_fast), run(request, **how)))
    engine.warm_up()
    assert ran == [None, None, False, False]


def test_without_compile_dynamo_is_not_used() -> None:
    code = "import sys, flux_engine; flux_engine.load; print('torch._inductor.compile_fx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_command_fills_a_folder(compiled: Engine, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dtype", "bfloat16", "--device", "cpu", "--save", str(cache), "--json"]
    assert cli.main(["warmup", "demo-dev", *options]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["graphs"] == 5
    assert told["compile"]["cache"] == compiled.describe()["compile"]["cache"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hot", "large"], "--hot 'large' is neither as 1024x1024 nor one of 1:1"),
        (["--compile", "off"], "nothing to warm up"),
        (["--compile", "fast"], "'fast' is not one of off, default"),
        (["--hot", "4000x4000"], "4000"),
        (["--hot", "1:1", "--num-outputs", "0"], "num_outputs 0"),
    ],
)
def test_the_command_refuses(options: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["warmup", "demo-dev", "--device", "cpu", *options]) != 0
    assert said in capsys.readouterr().err
