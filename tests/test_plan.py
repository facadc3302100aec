"""Plans: what is foretold of memory, against bytes that a dry run counts; which plan is picked; what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import planned
from flux_engine import OutOfMemory, UnsupportedError, hardware
from flux_engine.cli import main
from flux_engine.config import EngineConfig, parse_bytes
from flux_engine.footprint import Extent, sizes_of
from flux_engine.hardware import CARDS, card_of, processor
from flux_engine.plan import Room, TooLarge, plan
from flux_engine.request import Request
from flux_engine.specs import FLUX_DEV, FLUX_SCHNELL, SDXL, ModelSpec

GB = 10**9
HOST = 64 * GB

compiled = pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="a dry run needs a C++ compiler"
)


def job(spec: ModelSpec, extent: Extent) -> Any:
    return Request(
        prompt="x",
        seed=0,
        num_outputs=extent.pictures,
        num_inference_steps=extent.steps,
        output_type="pt",
        width=extent.width,
        height=extent.height,
    ).resolve(spec)


EXTENTS: dict[str, dict[str, int]] = {"one": {}, "small": {"width": 512, "height": 512}, "four": {"pictures": 4}}


@compiled
@pytest.mark.parametrize(
    ("extent", "spec", "scheme", "dtype"),
    [
        ("four", FLUX_SCHNELL, "none", "bfloat16"),
        ("one", SDXL, "none", "float16"),
        ("one", FLUX_SCHNELL, "int8", "float16"),
        *(
            pytest.param(extent, spec, scheme, dtype, marks=pytest.mark.full)
            for extent in EXTENTS
            for spec in (FLUX_SCHNELL, FLUX_DEV, SDXL)
            for scheme, dtype in (
                ("none", "bfloat16"), ("none", "float16"), ("int8", "bfloat16"), ("int8", "float16"),
                ("fp8", "bfloat16"), ("fp8-storage", "bfloat16"),
            )
        ),
    ],
    ids=lambda value: getattr(value, "name", value),
)  # fmt: skip
def test_what_a_request_takes_is_foretold(extent: str, spec: ModelSpec, scheme: str, dtype: str) -> None:
    """At the published models' true sizes: never too little, and too much by no more than a quarter of the largest."""
    asked = Extent.default(spec, **EXTENTS[extent])
    made = plan(spec, CARDS["H200"], precisions=[scheme], dtype=dtype, extent=asked)
    counted = planned.count(spec, made, job(spec, asked))
    assert not made.leaves and counted.looping == made.resident, "weights to the byte"
    foretold = planned.foretold(counted, spec, asked)
    assert all(work >= found for work, found in foretold.values()), foretold
    largest = max(found for _, found in foretold.values())
    assert all(work - found <= largest / 4 for work, found in foretold.values()), foretold


TIGHT = [
    (FLUX_DEV, "T4", "int8", None),
    (FLUX_SCHNELL, "A10", "none", None),
    (FLUX_SCHNELL, "RTX 4090", "fp8", 12 * GB),
    (SDXL, "T4", "none", 8 * GB),
]


@compiled
@pytest.mark.parametrize(
    ("spec", "card", "scheme", "memory"),
    [TIGHT[1], *(pytest.param(*one, marks=pytest.mark.full) for one in (TIGHT[0], *TIGHT[2:]))],
    ids=lambda value: str(getattr(value, "name", value)),
)
def test_what_has_no_room_leaves_and_the_rest_fits(spec: ModelSpec, card: str, scheme: str, memory: int | None) -> None:
    """The request path itself, on tensors without numbers, with weights that come and go."""
    counted = planned.on(spec, CARDS[card], scheme, host_memory=HOST, memory=memory)
    made = counted.plan
    assert made.leaves
    assert counted.peak <= made.capacity and counted.looping == made.resident
    assert counted.moved == made.moved > 0


@pytest.mark.parametrize(("scheme", "network"), [("none", 17.22), ("int8", 8.62), ("fp8", 8.62)])
def test_what_flux_has_in_the_loop(scheme: str, network: float) -> None:
    """With modulation and text gone: 17.3 GB in two bytes a number, 8.7 GB in one."""
    sizes = sizes_of(FLUX_DEV, "bfloat16", [scheme])
    assert sizes.parts["network"] / GB == pytest.approx(network, abs=0.01)
    tight = plan(FLUX_DEV, CARDS["H200"], precisions=[scheme], memory=int((network + 4) * GB), host_memory=HOST)
    assert {"text", "modulation"} <= set(tight.leaves)
    assert tight.resident / GB == pytest.approx(network, abs=0.6), "with the autoencoder and the encoders' tables"


def test_every_card_has_a_plan_or_a_reason() -> None:
    for spec in (FLUX_DEV, FLUX_SCHNELL, SDXL):
        for card in CARDS.values():
            made = plan(spec, card, precisions=[card.best], host_memory=HOST)
            assert made.peak <= made.capacity < card.memory
            assert made.dtype == ("float16" if card.name == "T4" else "bfloat16")
            bare = plan(spec, card, precisions=[card.best], host_memory=0)
            assert set(bare.leaves.values()) <= {"file"} and bare.seconds >= made.seconds
    with pytest.raises(OutOfMemory, match=r"flux-dev in full precision does not fit T4: 1024x1024 takes 19.8 GB at a "
                       r"time, and 14.7 GB are free for it. It would fit with quantization='int8'"):  # fmt: skip
        plan(FLUX_DEV, CARDS["T4"], host_memory=HOST)
    with pytest.raises(OutOfMemory, match=r"It would fit a card as T4$"):
        plan(FLUX_DEV, CARDS["RTX 4090"], precisions=["int8", "fp8", "fp8-storage"], memory=9 * GB, host_memory=HOST)
    with pytest.raises(OutOfMemory, match="No card of the table would hold it"):
        huge = Extent.default(FLUX_DEV, pictures=400)
        plan(FLUX_DEV, CARDS["T4"], precisions=["int8", "fp8-storage"], extent=huge)


def test_the_cheapest_that_fits_is_picked() -> None:
    card = CARDS["A10"]
    assert plan(FLUX_DEV, card, precisions=["none", "int8"], host_memory=HOST).schemes == ("int8",)
    assert plan(SDXL, card, precisions=["none", "int8"], host_memory=HOST).schemes == ("none",)
    assert plan(FLUX_DEV, CARDS["T4"], precisions=["fp8", "int8"], host_memory=HOST).schemes == ("int8",), "T4 has none"


@pytest.mark.parametrize(
    ("card", "fast", "slow"),
    [
        ("T4", "int8, brought from the host", "int8, brought from the host"),
        ("A10", "int8, brought from the host", "none, brought from the host"),
        ("A100 40 GB", "int8, brought from the host", "none, resident"),
        ("H100", "fp8, resident", "none, resident"),
    ],
)
def test_which_precision_serves_whom(card: str, fast: str, slow: str) -> None:
    made = plan(FLUX_DEV, CARDS[card], precisions=[CARDS[card].best], both=True, host_memory=HOST)
    assert made.go_fast == {True: fast, False: slow}
    assert made.peak <= made.capacity


def test_full_precision_is_not_read_from_files_for_every_change() -> None:
    made = plan(FLUX_DEV, CARDS["A10"], precisions=["int8"], both=True, host_memory=0)
    assert made.schemes == ("int8",) and made.go_fast[False] == "int8, resident"


def test_room_lets_the_least_leave() -> None:
    room = Room(100, 10, {"a": 50, "b": 30, "c": 20, "d": 60})
    assert room.need(["a"], 5) == [] and room.need(["b"], 5) == []
    assert room.need(["c"], 5) == ["c"] or room.present == {"a", "c"}, "30 for 20"
    assert room.total() == 80
    before = set(room.present)
    with pytest.raises(TooLarge) as refused:
        room.need(["d"], 40)
    assert refused.value.lacking == 10 and room.present == before, "nothing changed"
    assert room.need(["d"], 0, held=["c"]) == ["a"]
    assert Room(None, 10, {"a": 50}).need(["a"], 10**12) == []


def test_a_processor_has_what_is_free() -> None:
    free = card_of(torch.device("cpu"))
    assert free.capability is None and 10**8 < free.memory < 10**13 and free.runs("fp8")
    assert processor(5).memory == 5


def test_of_a_container_its_limit_counts_and_files_that_were_read_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "CGROUP", str(tmp_path))
    whole = hardware.free_memory()
    for limit, used, files, free in (("max", 5, 0, whole), (70_000, 50_000, 30_000, 50_000), (10, 20, 0, 0)):
        (tmp_path / "memory.max").write_text(f"{limit}\n")
        (tmp_path / "memory.current").write_text(f"{used}\n")
        (tmp_path / "memory.stat").write_text(f"anon 7\ninactive_file {files - 10_000 if files else 0}\n"
                                              f"active_file {10_000 if files else 0}\nfile_mapped 3\n")  # fmt: skip
        assert hardware.free_memory() == pytest.approx(free, rel=0.1)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    monkeypatch.setattr(hardware, "MEMINFO", str(meminfo))
    (tmp_path / "memory.max").unlink()
    assert hardware.free_memory() == 5 * 1024


@pytest.mark.parametrize(
    ("said", "size"), [("12GB", 12 * GB), (" 1.5 gib", 1610612736), ("800000", 800_000), (7, 7), ("2 kb", 2000)]
)
def test_sizes_are_read(said: str | int, size: int) -> None:
    assert parse_bytes(said) == size and EngineConfig(memory=said).bytes_of_memory() == size


@pytest.mark.parametrize("said", ["12 GX", "", "GB", "-1GB", "0", 0, True, 1.5, None, "1e9", "nan", [1]])
def test_what_is_no_size_is_refused(said: Any) -> None:
    with pytest.raises(UnsupportedError, match="is not one of auto, resident, evict, and no size as '12GB'"):
        EngineConfig(memory=said)


def test_from_the_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "flux-dev", "--card", "t4", "--quantization", "auto", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    (made,) = said["plans"]
    assert made["quantization"] == "int8" and "text" in made["leaves"] and made["peak"] < made["capacity"]
    assert main(["plan", "flux-dev", "--memory", "16GB"]) == 0
    out = capsys.readouterr().out
    assert out.count("does not fit") == len(CARDS) and "It would fit with quantization='fp8'" in out
    assert main(["plan", "demo-schnell", "--card", "cpu", "--memory", "40MB", "--dtype", "float32"]) == 0
    assert "waits in the file" in capsys.readouterr().out
    assert main(["plan", "flux-dev", "--quantization", "both", "--card", "A10"]) == 0
    assert "go_fast: int8, brought from the host; otherwise: none" in capsys.readouterr().out
    for arguments, words in (
        (["flux-dev", "--card", "h10"], "no card 'h10'; did you mean 'A10'?"),
        (["flux-dev", "--card", "cpu"], "say --memory"),
        (["flux-dev", "--memory", "much"], "--memory 'much' is no size"),
        (["flux-dew"], "no model 'flux-dew'"),
        (["flux-dev", "--width", "64"], "height is missing"),
        (["flux-dev", "--width", "-5", "--height", "64"], "width -5 is outside"),
        (["flux-dev", "--num-outputs", "9000"], "num_outputs 9000 is outside"),
    ):
        assert main(["plan", *arguments]) in (1, 2)
        assert words in capsys.readouterr().err


def test_a_scheme_that_a_card_lacks_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "sdxl", "--card", "T4", "--quantization", "fp8"]) == 0
    assert "multiplies it" in capsys.readouterr().out


def test_a_larger_request_takes_more() -> None:
    def peak(**changes: int) -> int:
        return plan(FLUX_DEV, CARDS["H200"], extent=Extent.default(FLUX_DEV, **changes)).peaks["denoise"]

    assert peak() < peak(pictures=2) < peak(pictures=4) and peak() < peak(reference=4096) < peak(rows=2, pictures=2)
    assert peak() < peak(controlnets=1) and peak() < peak(width=1440, height=1440)
    assert replace(Extent.default(SDXL)).rows == 2, "classifier-free guidance"


@pytest.mark.parametrize("spec", [FLUX_DEV, FLUX_SCHNELL], ids=lambda spec: spec.name)
def test_a_host_of_16_gb_does_for_a_t4(spec: ModelSpec) -> None:
    """What waits there is bounded; the rest stays in its file, and comes from it some rows at a time."""
    made = plan(spec, CARDS["T4"], precisions=["int8"], host_memory=int(0.8 * 15 * GB))
    assert 0 < made.host <= 12 * GB
    small = plan(spec, CARDS["T4"], precisions=["int8"], host_memory=4 * GB)
    assert small.host <= 4 * GB and "file" in small.leaves.values()
