"""A student's ears and connector as ONNX graphs, and their error: `distill export RUN OUT --format onnx-ears`.

The graphs take and give what a device's do (docs/device.md); weights are float32, in one file beside each graph. What
is compared is what was written, as onnxruntime computes it.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.exporting.formats import HOW
from shards.files.write import write_atomically
from shards.sample import Sample
from shards.status import print_status
from students.device.modules import Piece, hushed, list_pieces
from teachers.qformer import WindowQFormer
from teachers.salmonn import Salmonn

OPSET = 17  # of 2022, which ONNX Runtime reads from 1.12 on
INLINE = 1024  # bytes; a smaller tensor stays in the graph's own file
GRAPHS = """`whisper.onnx`, `second.onnx` (where there is one) and `connector.onnx` take and give what the graphs of a
device's folder do: see "The files, for another language" in docs/device.md for their inputs and for how windows are
cut. Each reads its weights from the `.bin` beside it:
```python
import onnxruntime

whisper = onnxruntime.InferenceSession("whisper.onnx")
(frames,) = whisper.run(["frames"], {"mel": mel})  # [B, mels, frames], log-mel as students/device/frontend.py makes it
```"""


def write_ears(student: Salmonn, out: Path, samples: Sequence[Sample]) -> None:
    """Write the graphs, print their error, and say what to do with them."""
    text = write_onnx(student, out, samples)
    print_status(f"onnx-ears: {text}")
    write_atomically(
        out / HOW, f"# onnx-ears\n\nThe student's ears and connector. Against torch: {text}.\n\n{GRAPHS}\n"
    )


def write_onnx(student: Salmonn, out: Path, samples: Sequence[Sample]) -> str:
    """Write the graphs of a student into a folder; returns their errors on the samples, in one line."""
    student = student.float().eval()
    errors, given = [], list_inputs(student, samples)
    for piece in list_pieces(student):
        path = out / f"{piece.name}.onnx"
        convert(piece, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        found = max(relative_error(piece, session, inputs) for inputs in given[piece.name])
        errors.append(f"{piece.name} {found:.1e}")
    return f"outputs off by {', '.join(errors)} over {len(samples)} clips"


@torch.no_grad()
def convert(piece: Piece, path: Path) -> None:
    """One graph, its weights in `NAME.bin` beside it."""
    axes = {name: {axis: f"{name}_{axis}" for axis, size in enumerate(shape) if size < 0}
            for name, shape in zip(piece.inputs, piece.shapes)}  # fmt: skip
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, hushed():
        torch.onnx.export(
            piece.module.eval(), tuple(piece.inputs.values()), str(Path(folder) / "graph.onnx"), dynamo=False,
            input_names=list(piece.inputs), output_names=[piece.output], dynamic_axes=axes, opset_version=OPSET,
        )  # fmt: skip
        graph = onnx.load(Path(folder) / "graph.onnx")
    onnx.save_model(graph, path, save_as_external_data=True, all_tensors_to_one_file=True, size_threshold=INLINE,
                    location=path.with_suffix(".bin").name)  # fmt: skip


@torch.no_grad()
def list_inputs(student: Salmonn, samples: Sequence[Sample]) -> dict[str, list[tuple[Tensor, ...]]]:
    """What each graph is given of each sample, by its name: features, or the windows of both encoders' frames."""
    given: dict[str, list[tuple[Tensor, ...]]] = {"whisper": [], "second": [], "connector": []}
    for sample in samples:
        batch = student.collate([sample], with_answer=False)
        with seen(student.whisper, given["whisper"]), seen(student.second, given["second"]):
            frames = student.frames(batch.waveforms_BN, batch.num_samples_B)
        given["connector"].append(tuple(cut_windows(student.qformer, frames)))
    given["whisper"] = [args[:1] for args in given["whisper"]]  # beside how much of it is heard
    return given


@contextmanager
def seen(ear: nn.Module | None, calls: list[tuple]) -> Iterator[None]:
    """Note what an encoder is given while this is open."""
    if ear is None:
        yield
        return
    encode = ear.encode

    def note(*args: Tensor):
        calls.append(args)
        return encode(*args)

    ear.encode = note
    try:
        yield
    finally:
        del ear.encode


def cut_windows(qformer: WindowQFormer, frames: Sequence[Tensor]) -> Iterator[Tensor]:
    """The windows of each encoder's frames of one clip, zeros where it has no frame."""
    length = max(x_BRE.shape[1] for x_BRE in frames)
    for x_BRE in frames:
        x_BRE = F.pad(x_BRE, (0, 0, 0, length - x_BRE.shape[1]))
        if qformer.window_frames:
            x_BRE = x_BRE.unfold(1, qformer.window_frames, qformer.stride_frames).transpose(2, 3).flatten(0, 1)
        yield x_BRE.contiguous()


@torch.no_grad()
def relative_error(piece: Piece, session: onnxruntime.InferenceSession, inputs: tuple[Tensor, ...]) -> float:
    """How far a graph's output is from torch's, as a share of its norm."""
    (got,) = session.run([piece.output], {name: tensor.numpy() for name, tensor in zip(piece.inputs, inputs)})
    expected = piece.module(*inputs).numpy()
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
