"""Graphs of torch.export in the files of other programs: `write` for each format, and the packages that it needs."""

import importlib
import io
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.export import ExportedProgram

# format -> packages that write and run it; its extra has the same name
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "pt2": (),
}
DTYPES = ("float32", "float16", "int8")
OUTPUTS = {"vision": "image_embeds", "condition": "condition"}


def check_packages(name: str) -> None:
    """Raise ImportError, with the command that installs it, if a package of a format is not installed."""
    for package in PACKAGES[name]:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"--format {name} needs {package}, which is not installed. Run: pip install 'kosmos-g-diffusers[{name}]'"
            ) from error


def write(name: str, graphs: "Mapping[str, ExportedProgram]", folder: Path, halve: bool = False) -> None:
    """Write graphs, by name, into a folder that is there.

    Args:
        name: of PACKAGES.
        halve: store float32 weights as float16 (OpenVINO alone, which computes as it likes whatever the file holds).
    """
    for graph, program in graphs.items():
        if name == "pt2":
            _write_pt2(program, folder / f"{graph}.pt2")
        elif name == "onnx":
            _write_onnx(program, folder / f"{graph}.onnx", OUTPUTS[graph])
        else:
            import openvino

            # not openvino.convert_model, which sends statistics
            with tempfile.TemporaryDirectory(dir=folder) as place:
                _write_onnx(program, Path(place) / "graph.onnx", OUTPUTS[graph])
                model = openvino.Core().read_model(Path(place) / "graph.onnx")
                openvino.save_model(model, folder / f"{graph}.xml", compress_to_fp16=halve)
                del model  # it reads the weights from the folder that is removed now


class _LateError(io.BufferedWriter):
    """A file whose first error of writing is `problem`, to be raised at the end: torch's writer ends the process where one is raised."""

    problem: OSError | None = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.problem = self.problem or error
            return len(data)


def _write_pt2(program, path):
    import torch

    with _LateError(io.FileIO(path, "wb")) as file:
        torch.export.save(program, file)
    if file.problem is not None:
        raise file.problem


def _write_onnx(program, path, output):
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copyreg and onnxscript, about each other
        # the optimiser would compute what int8 weights are multiplied with
        has_int8 = any(buffer.dtype == torch.int8 for buffer in program.buffers())
        model = torch.onnx.export(
            program, dynamo=True, verbose=False, optimize=not has_int8, output_names=[output]
        )
        model.save(path, external_data=True)
