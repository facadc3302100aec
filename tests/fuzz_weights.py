"""Read mutated weight files: only WeightsError may come of it, within bounded memory. Run by test_fuzz.py.

python tests/fuzz_weights.py structured 3000     mutations that know the format (hypothesis)
python tests/fuzz_weights.py covering 5000       bytes, guided by the code they reach (atheris, libFuzzer)
"""

from __future__ import annotations

import json
import random
import resource
import struct
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from safetensors.torch import save

MEMORY = 2**30
"""Bytes of address space beyond what the imports took."""
FOLDER = Path(tempfile.mkdtemp())


def seeds() -> list[bytes]:
    """Small files of each kind."""
    from flux_engine.checkpoints.keys import to_theirs
    from flux_engine.checkpoints.tables import FLUX_CONTROLNET_XLABS, FLUX_DIFFUSERS, vae_diffusers
    from flux_engine.models.flux import Flux
    from flux_engine.models.flux_controlnet import FluxControlNet
    from flux_engine.models.vae import AutoEncoder
    from flux_engine.params import FluxControlNetParams, FluxParams, VAEParams

    params = FluxParams(hidden_size=16, num_heads=1, depth=1, depth_single_blocks=1, axes_dim=(2, 6, 8), in_channels=8,
                        out_channels=8, context_in_dim=4, vec_in_dim=4)  # fmt: skip
    flux = {name: tensor.bfloat16() for name, tensor in Flux(params).state_dict().items()}
    control = FluxControlNetParams.of(params, depth=1, depth_single_blocks=0)
    control = FluxControlNet(replace(control, hint_width=2, hint_channels=8, num_modes=2)).state_dict()
    vae = AutoEncoder(VAEParams(channels=4, norm_groups=4, channel_multipliers=(1, 2), latent_channels=2)).state_dict()
    clip = {
        "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(12, 4),
        "positional_embedding": torch.zeros(7, 4),
        "text_projection": torch.zeros(4, 4),
    }
    return [
        save(tensors)
        for tensors in (
            {"a": torch.zeros(2, 3), "b": torch.zeros(0, 4, dtype=torch.float16), "c": torch.tensor(1)},
            flux,
            {f"model.diffusion_model.{name}": tensor for name, tensor in flux.items()} | clip,
            to_theirs(flux, FLUX_DIFFUSERS, width=16),
            to_theirs(control, FLUX_CONTROLNET_XLABS),
            vae,
            to_theirs(vae, vae_diffusers(2)),
            {"transformer.a.lora_A.weight": torch.zeros(1, 1)},
        )
    ]


def read(content: bytes) -> None:
    """All that the loader does with a file, and to whatever it holds."""
    from flux_engine.checkpoints.detect import parts_of, what_is
    from flux_engine.checkpoints.inspect import inspect
    from flux_engine.checkpoints.source import WeightSource
    from flux_engine.errors import WeightsError

    path = FOLDER / "x.safetensors"
    path.write_bytes(content)
    try:
        inspect(path, values=True)
        with WeightSource.open(path) as source:
            what_is(source)
            for part in parts_of(source):
                ours = part.of(source)
                for name, shape in ours.shapes.items():
                    ours.rows(name, dtype=torch.float32)
                    ours.rows(name, 0, min(1, shape[0]) if shape else 1)
    except WeightsError as error:
        assert len(str(error)) < 5000, "a message nobody can read"


numbers = st.one_of(st.integers(-2, 100), st.sampled_from([2**31, 2**47, 2**48 - 1, 2**62, 2**63, 2**64, 10**30]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), numbers, st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=6,
)
dtypes = st.sampled_from(["F32", "F16", "BF16", "F8_E4M3", "I64", "BOOL", "U8", "F64", "F4", ""])
shapes = st.lists(st.one_of(st.integers(0, 20), numbers), max_size=5)


@st.composite
def mutated(draw: st.DrawFn, files: list[bytes]) -> bytes:
    """A seed, its header or its bytes changed in some places."""
    content = draw(st.sampled_from(files))
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    data = content[8 + length :]
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(header))) if header else "a"
        entry = header.get(name)
        match draw(st.integers(0, 6)):
            case 0:
                header.pop(name, None)
            case 1:
                header[draw(st.one_of(st.text(max_size=20), st.just("__metadata__")))] = draw(values)
            case 2:
                header[name] = draw(values)
            case 3 if isinstance(entry, dict):
                entry[draw(st.sampled_from(["dtype", "shape", "data_offsets", "more"]))] = draw(values)
            case 4 if isinstance(entry, dict):  # what fits the data, as far as it goes
                entry["shape"], entry["dtype"] = draw(shapes), draw(dtypes)
            case 5:  # nothing at all, and much of it
                shape = draw(st.permutations([0, *draw(shapes)]))
                header["nothing"] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data)]}
            case _:
                header[draw(st.sampled_from(sorted(header))) if header else "b"] = entry
    text = json.dumps(header).encode()
    length = draw(st.one_of(st.just(len(text)), st.just(len(text)), st.integers(0, 2**64 - 1)))
    content = struct.pack("<Q", length) + text + data
    match draw(st.integers(0, 4)):
        case 0:
            content = content[: draw(st.integers(0, len(content)))]
        case 1:
            at = draw(st.integers(0, len(content) - 1))
            content = content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at + 1 :]
        case _:
            pass
    return content


def structured(count: int, files: list[bytes]) -> None:
    """Through hypothesis, which makes what fails small."""

    @hypothesis.settings(max_examples=count, deadline=None, database=None, derandomize=True,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(mutated(files))
    def run(content: bytes) -> None:
        read(content)

    run()


def covering(count: int, files: list[bytes]) -> None:
    """Through libFuzzer, which keeps what reaches new lines."""
    import atheris

    corpus = Path(tempfile.mkdtemp())
    for number, content in enumerate(files):
        (corpus / str(number)).write_bytes(content)
    arguments = [f"-runs={count}", "-seed=1", "-timeout=30", "-max_len=20000", "-rss_limit_mb=0", str(corpus)]
    atheris.Setup([sys.argv[0], *arguments], read)
    atheris.Fuzz()


def limit() -> None:
    """No more memory than now and a piece on top."""
    pages: Mapping[int, int] = dict(enumerate(map(int, Path("/proc/self/statm").read_text().split())))
    most = pages[0] * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def main() -> None:
    """Seeds first, which have to be read whole."""
    torch.set_num_threads(1)
    random.seed(1)
    how, count = sys.argv[1], int(sys.argv[2])
    if how == "covering":
        import atheris

        with atheris.instrument_imports(include=["flux_engine.checkpoints"]):
            import flux_engine.checkpoints.inspect  # noqa: F401
    files = seeds()
    for content in files:
        read(content)
    limit()
    {"structured": structured, "covering": covering}[how](count, files)
    sys.stdout.write("done\n")


if __name__ == "__main__":
    main()
