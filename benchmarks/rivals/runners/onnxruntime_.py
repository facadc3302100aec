"""ONNX Runtime on its CPU provider: float32, as it multiplies no bfloat16 on x86; or its dynamic int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.rivals.runners.openvino_ import names_of, wrapped


class ONNXRuntime:
    """A session with its inputs."""

    def __init__(self, session: Any, inputs: list[dict[str, Any]]) -> None:
        self.session, self.inputs = session, inputs

    def prompt(self) -> None:
        """Nothing is done once."""

    def step(self, call: int) -> Any:
        import torch

        return torch.from_numpy(self.session.run(None, self.inputs[call])[0])


def make(place: Path, case: dict[str, Any], options: set[str], cache: Path, threads: int) -> ONNXRuntime:
    """Convert what is not in the cache."""
    import onnxruntime
    from safetensors.torch import load_file

    told, names = load_file(place / "inputs.safetensors"), names_of(case["kind"])
    read = [[told["times"][call : call + 1] if name == "times" else told[name] for name in names]
            for call in range(case["calls"])]  # fmt: skip
    plain, small = cache / "model.onnx", cache / "int8" / "model.onnx"
    wanted = small if "int8" in options else plain
    if not wanted.is_file():
        import torch

        with torch.no_grad():
            torch.onnx.export(wrapped(place, case["kind"]), tuple(read[0]), plain, input_names=names, dynamo=True,
                              external_data=True)  # fmt: skip
        if "int8" in options:
            import onnx  # pyright: ignore[reportMissingImports]
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # The exporter's shapes of what lies between contradict those that the quantizer infers.
            model = onnx.load(plain)
            del model.graph.value_info[:]
            onnx.save(model, plain, save_as_external_data=True, location="plain.data")
            del model

            small.parent.mkdir(exist_ok=True)
            quantize_dynamic(plain, small, weight_type=QuantType.QInt8, per_channel=True, use_external_data_format=True)
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(wanted), settings, providers=["CPUExecutionProvider"])
    wants = [each.name for each in session.get_inputs()]
    inputs = [{name: tensor.numpy() for name, tensor in zip(names, one, strict=True)} for one in read]
    return ONNXRuntime(session, [{name: one[name] for name in wants} for one in inputs])
