"""Set mutated LoRA files and tars: only typed errors may come of it, the base stays, within bounded memory and time.

python tests/fuzz_loras.py 10000
"""

from __future__ import annotations

import io
import os
import random
import resource
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

MEMORY = 2**30
"""Bytes of address space beyond what the imports and the models took."""
LONGEST = 5.0
"""Seconds for one file."""
NUMBERS = (0.0, -1.0, 1e38, float("inf"), float("nan"))


def main(count: int) -> None:
    torch.set_num_threads(1)
    from test_lora import FLUX_FAMILIES, SDXL_FAMILIES, Model, modules

    from flux_engine import FluxEngineError

    folder = Path(tempfile.mkdtemp())
    os.environ |= {"FLUX_ENGINE_CACHE": str(folder / "cache"), "FLUX_ENGINE_LORA_CACHE": "200MB"}
    models = [
        (Model("demo-dev", folder, dtype="bfloat16"), FLUX_FAMILIES),
        (Model("demo-schnell", folder, dtype="float32", quantization="int8"), FLUX_FAMILIES),
        (Model("demo-sdxl", folder, dtype="float16"), SDXL_FAMILIES),
    ]
    rng = random.Random(0)
    seeds: list[tuple[Model, dict[str, Tensor], dict[str, str]]] = []
    for model, families in models:
        for names, write in families.values():
            some = [name for name in names if f"{name}.weight" in model.base]
            seeds.append((model, *write(modules(model.base, some))))
    for model, _ in models:
        stem = "lora_unet_conv_in" if "sdxl" in model.engine.spec.name else "transformer.transformer_blocks.0.attn.to_q"
        weight = model.base["conv_in.weight" if "sdxl" in model.engine.spec.name else f"{stem[12:]}.weight"]
        n, k = weight.shape[:2]
        extra = {"diff": torch.zeros(weight.shape), "dora_scale": torch.ones(n, *(1 for _ in weight.shape[1:]))}
        loha = {f"hada_w{i}_{x}": torch.ones(n, 2) if x == "a" else torch.ones(2, k) for i in (1, 2) for x in "ab"}
        lokr = {"lokr_w1": torch.ones(2, 2), "lokr_w2_a": torch.ones(n // 2, 2), "lokr_w2_b": torch.ones(2, k // 2)}
        seeds += [(model, {f"{stem}.{slot}": t for slot, t in parts.items()}, {}) for parts in (extra, loha, lokr)]

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    address = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address + MEMORY, address + MEMORY))
    read, refused, tars = 0, 0, 0
    for number in range(count):
        model, tensors, metadata = rng.choice(seeds)
        if rng.random() < 0.7:
            path = folder / "mutated.safetensors"
            path.write_bytes(mutated(dict(tensors), dict(metadata), rng))
        else:
            path = folder / "mutated.tar"
            path.write_bytes(packed(dict(tensors), dict(metadata), model.engine.spec.name, rng))
            tars += 1
        began = time.perf_counter()
        try:
            how = rng.choice(["auto", "merge", "side"])
            model.engine.lora.set([path], strict=rng.random() < 0.5, how=how)
            read += 1
        except FluxEngineError as error:
            assert len(str(error)) < 2000, "a message nobody can read"
            refused += 1
        assert time.perf_counter() - began < LONGEST, f"file {number} took {time.perf_counter() - began:.1f} s"
        if number % 50 == 49:
            for one, _ in models:
                one.engine.lora.clear()
                assert one.unchanged(), f"the base of {one.engine.spec.name} changed before file {number}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used) / 2**20
    sys.stdout.write(
        f"done: {count} files, {tars} of them tars, {read} set, {refused} refused, {grown:.0f} MB more at most\n"
    )


def mutated(tensors: dict[str, Tensor], metadata: dict[str, str], rng: random.Random) -> bytes:
    for _ in range(rng.randint(1, 4)):
        name = rng.choice(list(tensors)) if tensors else "a"
        tensor = tensors.get(name, torch.zeros(1))
        match rng.randrange(9):
            case 0:
                tensors.pop(name, None)
            case 1:
                at = rng.randrange(len(name))
                tensors[name[:at] + rng.choice("._0179abw\u00e9 ") + name[at + rng.randint(0, 1) :]] = tensor
            case 2:
                tensors[name] = reshaped(tensor, rng)
            case 3:
                kinds = (torch.int32, torch.bool, torch.float8_e4m3fn, torch.float64, torch.float16, torch.uint8)
                tensors[name] = tensor.to(rng.choice(kinds))
            case 4:
                tensors[name] = torch.full_like(tensor.float(), rng.choice(NUMBERS))
            case 5:
                stem = name.rsplit(".", 2)[0]
                tensors[f"{stem}.alpha"] = torch.full(rng.choice([(), (1,), (2,), (0,)]), rng.choice((*NUMBERS, 2.0)))
            case 6:
                ends = (".lora_A.weight", ".lora_up.weight", ".lora_mid.weight", ".dora_scale", ".diff", ".diff_b",
                        ".lokr_w1", ".lokr_t2", ".hada_t1", ".lora_magnitude_vector", ".lora_B.bias")  # fmt: skip
                tensors[name.rsplit(".", 2)[0] + rng.choice(ends)] = tensor
            case 7:
                said = ('{"transformer.lora_alpha": "x"}', "[" * 5000, "{}", '{"transformer.lora_alpha": 1e400}',
                        '{"unet.alpha_pattern": {"": -3}}', "nonsense", '{"transformer.lora_alpha": true}')  # fmt: skip
                metadata["lora_adapter_metadata"] = rng.choice(said)
            case _:
                other = rng.choice(list(tensors)) if tensors else "a"
                tensors[name] = tensors.get(other, tensor)
    data = bytearray(save({name: t.clone().contiguous() for name, t in tensors.items()}, metadata))
    match rng.randrange(8):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 4)):
                data[rng.randrange(min(len(data), 400))] = rng.randrange(256)
        case _:
            pass
    return bytes(data)


def packed(tensors: dict[str, Tensor], metadata: dict[str, str], model: str, rng: random.Random) -> bytes:
    """As a trainer on Replicate leaves it, but for what is wrong with it."""
    said = rng.choice(('{"TOK": "<s0><s1>"}', "[]", '{"TOK": 3}', "nonsense", '{"": "<s0>"}', '{"TOK": "<s9>"}'))
    rows = [torch.zeros(2, width) for width in rng.choice(((64, 32), (64, 32), (64, 32), (32, 64), (0, 1)))]
    pti = save({f"text_encoders_{i}": table for i, table in enumerate(rows)})
    lora = mutated(tensors, metadata, rng) if rng.random() < 0.5 else save(
        {name: t.clone().contiguous() for name, t in tensors.items()}, metadata
    )  # fmt: skip
    members = {"output/lora.safetensors": lora, "config.yaml": b"steps: 1000"}
    if "sdxl" in model:
        members |= {"embeddings.pti": mutated({}, {}, rng) if rng.random() < 0.2 else pti,
                    "special_params.json": said.encode()}  # fmt: skip
    match rng.randrange(10):
        case 0:
            members["unet.safetensors"] = lora
        case 1:
            members["../up.safetensors"] = lora
        case 2:
            del members["output/lora.safetensors"]
        case _:
            pass
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        if rng.random() < 0.1:
            member = tarfile.TarInfo(rng.choice(("link.safetensors", "lora.safetensors")))
            member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.BLKTYPE))
            member.linkname = "/etc/passwd"
            tar.addfile(member)
    data = bytearray(out.getvalue())
    match rng.randrange(6):
        case 0:
            del data[rng.randrange(len(data)) :]
        case 1:
            for _ in range(rng.randint(1, 4)):
                data[512 * rng.randrange(len(data) // 512) + rng.randrange(200)] = rng.randrange(256)
        case _:
            pass
    return bytes(data)


def reshaped(tensor: Tensor, rng: random.Random) -> Tensor:
    match rng.randrange(6):
        case 0:
            return tensor.T if tensor.ndim == 2 else tensor[..., None]
        case 1:
            return tensor.flatten()
        case 2:
            return tensor.flatten()[:0]
        case 3:
            return tensor.flatten()[0] if tensor.numel() else tensor
        case 4:
            return torch.cat((tensor, tensor)) if tensor.ndim else tensor[None]
        case _:
            return tensor[:1] if tensor.ndim else tensor


if __name__ == "__main__":
    main(int(sys.argv[1]))
