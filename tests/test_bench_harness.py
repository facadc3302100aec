"""The harness of the benchmarks: what it makes of candidates that run and fail, the report, and the rivals' cases."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import harness, plots, presets, report
from benchmarks.harness import Candidate, Failed
from benchmarks.machine import ROOT, machine
from benchmarks.rivals import cases, engines, environments, worker
from benchmarks.rivals.runners import ours, torch_


def prints(figures: str) -> list[str]:
    return [sys.executable, "-c", f"import json, os; print('noise'); print(json.dumps({figures}))"]


def test_candidates_run_in_turn_and_the_first_round_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    figures = f"{{'turn': open('{log}', 'a').write('NAME'), 'set': int(os.environ['SET'])}}"
    commands = {name: Candidate(prints(figures.replace("NAME", name)), {"SET": "7"}) for name in "AB"}
    first: dict[str, Any] = {}
    runs = harness.interleave(commands, repeats=2, first=first)
    assert log.read_text() == "ABBAAB"
    assert [len(each) for each in runs.values()] == [2, 2]
    assert first["A"]["set"] == runs["A"][0]["set"] == 7
    assert runs["B"][0]["wall"] > 0


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([sys.executable, "-c", "raise SystemExit('went wrong')"], "went wrong"),
        ([sys.executable, "-c", "print('no json')"], "no JSON object"),
        ([sys.executable, "-c", ""], "no JSON object"),
        (["/nothing/there"], "cannot be started"),
        (Candidate([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2), "did not end in 0.2 s"),
    ],
)
def test_a_candidate_that_fails(command: Any, words: str) -> None:
    with pytest.raises(Failed, match=words):
        harness.interleave({"bad": command}, repeats=1)
    failures: dict[str, str] = {}
    runs = harness.interleave({"bad": command, "good": prints("{'x': 1}")}, repeats=2, failures=failures)
    assert list(runs) == ["good"]
    assert len(runs["good"]) == 2
    assert words in failures["bad"]


def test_medians_and_spread_are_over_everything_that_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        "ours": [{"step": [1.0, 2.0, 3.0], "peak": 10}, {"step": [4.0, 5.0], "peak": 12}],
        "theirs": [{"step": [6.0], "peak": 22}, {"step": [6.0], "peak": 22}],
    }
    assert harness.medians(runs["ours"]) == {"step": 3.0, "peak": 11}
    line = harness.report("test", runs, "theirs")
    assert line["ratio"] == {"ours": {"step": 0.5, "peak": 0.5}}
    assert line["apart"]["ours"]["step"] == pytest.approx(2 / 3, abs=1e-4)
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["median"] == line["median"]
    assert "step" in out[1]


def test_many_candidates_are_shown_one_a_row() -> None:
    runs = {name: [{"step": 1.0 + n}] for n, name in enumerate("ABCD")}
    shown = harness.table(harness.summary("test", runs, "A")).splitlines()
    assert [row.split()[0] for row in shown[1:]] == list("ABCD")
    assert shown[-1].split()[-1] == "4.000"


def test_the_machine_is_told() -> None:
    told = machine()
    assert told["torch"] == torch.__version__
    assert told["versions"]["torch"]
    assert told["cores"] >= 1
    assert json.loads(json.dumps(told)) == told


def bench_line(**changes: Any) -> dict[str, Any]:
    step = {"median": 2.0, "low": 1.9, "high": 2.1, "least": 1.8, "most": 2.2, "count": 3}
    line = {
        "run": "synthetic flux 1+2", "device": "a card", "dtype": "bfloat16", "quantization": "int8", "width": 512,
        "height": 512, "batch": 1, "steps": 4, "seconds": {"step": step, "request": step}, "pictures_per_minute": None,
        "peak_bytes": 3e9, "weights_bytes": 2e9, "work": {"flops": 4e12}, "flops_per_second": 2e12,
        "share_of_floor": 0.91, "datasheet": {"card": "T4", "floor_seconds": None, "share_of_floor": None},
    }  # fmt: skip
    return line | changes


def test_a_report_of_every_kind_of_line(tmp_path: Path) -> None:
    runs = {"ours-int8": [{"step": 1.0, "cold first": 2.0}], "diffusers": [{"step": 2.0, "cold first": 3.0}]}
    compared = harness.summary("rivals test", runs, "diffusers") | {"failures": {"other": "no\nsuch <package>"}}
    sweep = {"sweep": "size", "run": "synthetic flux", "exponent": 1.1, "exponent_of_flops": 0.98,
             "points": [{"at": n, **bench_line()} for n in (256, 512)]}  # fmt: skip
    old = bench_line(share_of_floor=0.12)
    refused = {"run": "synthetic sdxl", "quantization": "none", "refused": "no room"}
    for line in (compared, sweep, old, bench_line(), refused, {"what": "is this"}):
        harness.save(line, "test", tmp_path)
    (tmp_path / "report-old.svg").write_text("stale")
    path = report.write(report.read(tmp_path), tmp_path)
    text = path.read_text()
    for said in ("## rivals test", "| ours-int8 | 1 | 2 | 0.5 |", "other did not run: `such <package>`", "| 0.91 |",
                 "with FLOP 0.980", "no room", "1 lines are of no kind"):  # fmt: skip
        assert said in text
    assert "0.12" not in text, "what was measured again is shown as it is now"
    drawn = sorted(file.name for file in tmp_path.glob("*.svg"))
    assert drawn == ["report-rivals-test-first.svg", "report-rivals-test.svg", "report-synthetic-flux-by-size-int8.svg"]
    for file in drawn:
        ET.parse(tmp_path / file)  # well formed
        assert f"({file})" in text


def test_every_machine_has_its_own_plot(tmp_path: Path) -> None:
    for device, step in (("slow", 4.0), ("fast", 1.0)):
        runs = {"ours": [{"step": step}], "theirs": [{"step": 2 * step}]}
        line = harness.summary("rivals test", runs, "theirs")
        harness.save({**line, "machine": {"device": device}}, "test", tmp_path)
    for _ in range(2):  # what is there already is written anew
        text = report.write(report.read(tmp_path), tmp_path).read_text()
    shown = re.findall(r"\((report-\S+\.svg)\)", text)
    assert shown == ["report-rivals-test.svg", "report-rivals-test-2.svg"]
    assert len({(tmp_path / file).read_text() for file in shown}) == len(list(tmp_path.glob("*.svg"))) == 2


def test_the_results_that_are_kept_make_a_report(tmp_path: Path) -> None:
    lines = report.read(ROOT / "benchmarks" / "results")
    assert "first_picture" in report.write(lines, tmp_path).read_text()


@pytest.mark.parametrize("text", ["{", "[1]", "3"])
def test_a_line_that_is_none_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{}\n" + text + "\n")
    with pytest.raises(ValueError, match=r"bad\.jsonl line 2"):
        report.read(tmp_path)


def test_plots() -> None:
    drawn = plots.bars("<a & b>", {"ours": 1.0, "theirs": 2.0, "broken": float("inf")}, "s", {"theirs": 0.1})
    assert ET.fromstring(drawn).tag.endswith("svg")
    assert drawn.index("ours") < drawn.index("theirs")
    assert "broken" not in drawn
    assert ET.fromstring(plots.growth("t", {"a": [(1, 2.0), (2, 4.0)], "b": [(1, 1.0)]}, "x", "y")) is not None
    for nothing in (lambda: plots.bars("t", {}, "s"), lambda: plots.growth("t", {"a": [(0, 1.0)]}, "x", "y")):
        with pytest.raises(ValueError, match="nothing to draw"):
            nothing()


def test_which_commands_the_presets_are() -> None:
    plain, swept = presets.commands("auto", False, ["--repeats", "5"]), presets.commands("T4", True, [])
    assert plain[0][-4:] == ["--preset", "auto", "--repeats", "5"]
    assert [line[line.index("--sweep") + 1] for line in swept[1:]] == ["size", "batch", "steps"]


def test_every_engine_has_what_it_needs() -> None:
    for name, engine in engines.ENGINES.items():
        assert (Path(ours.__file__).parent / f"{engine.runner}.py").is_file(), name
        if engine.environment is not None:
            assert "==" in environments.requirements_of(engine.environment)
    assert set(engines.DEFAULT) | {engines.BASELINE} <= set(engines.ENGINES)
    for path in environments.REQUIREMENTS.glob("*.txt"):
        for line in path.read_text().splitlines():
            assert line.startswith(("#", "-r ")) or "==" in line, f"{path.name}: {line} is not pinned"
    with pytest.raises(Failed, match="no environment 'nothing'"):
        environments.requirements_of("nothing")
    assert environments.python_of(None) == sys.executable


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cases of some hundred kilobytes, with their references."""
    folder = tmp_path_factory.mktemp("cases")
    for name in ("tiny-flux", "tiny-unet", "tiny-vae"):
        cases.make(cases.CASES[name], folder)
    return folder


@pytest.mark.parametrize("name", ["tiny-flux", "tiny-unet", "tiny-vae"])
def test_ours_and_theirs_agree_on_a_case(name: str, small: Path, tmp_path: Path) -> None:
    """Both read the same file, and are as near to float32 as bfloat16 is; without the text nothing is."""
    place = small / name
    case = json.loads((place / cases.CASE).read_text())
    assert case["control"] > 0.01
    made = {
        "diffusers": torch_.make(place, case, set(), tmp_path, 1),
        "ours": ours.make(place, case, {"none"}, tmp_path, 1),
    }
    if case["kind"] != "vae":
        made["int8"] = ours.make(place, case, {"int8"}, tmp_path, 1)
    for which, runner in made.items():
        runner.prompt()
        outputs = {str(call): runner.step(call).float().contiguous() for call in cases.COMPARED}
        save_file(outputs, tmp_path / which)
        found = cases.errors(place, tmp_path / which)
        assert 0 < found["error L2"] < 0.03, (which, found)
        assert found["error"] < 0.05, (which, found)


def test_who_computes_less_is_found_out(small: Path, tmp_path: Path) -> None:
    place = small / "tiny-flux"
    reference = load_file(place / "reference.safetensors")
    assert cases.errors(place, place / "reference.safetensors") == {"error": 0, "error L2": 0}
    first = str(cases.COMPARED[0])
    bad = {
        "repeats itself": dict.fromkeys(reference, reference[first]),
        "leaves out": {first: reference[first]},
        "is cut": {call: tensor[:, 1:] for call, tensor in reference.items()},
        "ran over": {call: tensor * torch.inf for call, tensor in reference.items()},
    }
    for how, outputs in bad.items():
        save_file({call: tensor.clone().contiguous() for call, tensor in outputs.items()}, tmp_path / "bad")
        assert cases.errors(place, tmp_path / "bad")["error"] > 0.05, how


def test_a_case_is_written_once_and_anew_when_it_changes(small: Path, tmp_path: Path) -> None:
    case = cases.CASES["tiny-vae"]
    file = cases.make(case, tmp_path) / cases.WEIGHTS
    assert file.read_bytes() == (small / case.name / cases.WEIGHTS).read_bytes(), "the same numbers each time"
    before = file.stat().st_mtime_ns
    cases.make(case, tmp_path)
    assert file.stat().st_mtime_ns == before
    cases.make(replace(case, config={**case.config, "layers_per_block": 1}), tmp_path)
    assert file.stat().st_mtime_ns > before


def test_a_worker_tells_all_figures(small: Path, tmp_path: Path) -> None:
    outputs = tmp_path / "out.safetensors"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rivals.worker", "ours", str(small / "tiny-flux"), str(outputs), "--cache",
         str(tmp_path / "cache"), "--options", "none", "--walks", "2", "--threads", "1"],
        capture_output=True, text=True, check=True, cwd=ROOT, timeout=120,
    )  # fmt: skip
    figures = json.loads(done.stdout.splitlines()[-1])
    assert 0 < figures["loaded"] <= figures["first"]
    assert len(figures["step"]) == 2 * cases.CALLS
    assert len(figures["walk"]) == len(figures["prompt"]) == 2
    assert 50 < figures["peak MB"] < 5000
    assert cases.errors(small / "tiny-flux", outputs)["error"] < 0.05
    assert worker.since_process_start() > 0


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["nothing"], "no case 'nothing'"),
        (["tiny-flux", "--engines", "nobody"], "no engine 'nobody'"),
        (["tiny-vae", "--engines", "ours-int8"], "ours-int8 runs flux, unet, and tiny-vae is vae"),
        (["tiny-flux", "--rounds", "0"], "at least 1"),
    ],
)
def test_bad_input(args: list[str], words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.rivals", *args], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.returncode == 2
    assert words in done.stderr


def test_without_a_card_the_gpu_script_says_what_it_takes() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = subprocess.run([str(ROOT / "scripts" / "gpu")], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 3
    assert "compute capability 7.5" in done.stderr
