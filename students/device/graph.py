"""One graph of an exported folder, compiled, with its weights in memory once.

OpenVINO maps a graph's file and packs each matrix into blocks of its own when it is first used, and then at most again
for another length of input. It never lets go of the mapped pages, so that a process holds every weight twice. Here the
mapping is ours, and its pages go back to the system while a graph packs; what is read again comes from the file again.

Knows no student and no names but a graph's own.
"""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import openvino as ov

SECONDS = 0.02  # between two times that pages go back: so much of a file is in memory as is packed meanwhile


class Graph:
    """A graph that answers.

    Args:
        core: OpenVINO's.
        path: the .xml; its weights are in the .bin beside it.
        properties: the properties of the compilation.
    """

    def __init__(self, core: ov.Core, path: Path, properties: Mapping[str, str]):
        with path.with_suffix(".bin").open("rb") as file:
            self.mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # OpenVINO takes no read-only memory
        self.weights = np.frombuffer(self.mapped, np.uint8)  # a tensor does not keep what it shares alive
        model = core.read_model(path.read_text(encoding="utf-8"), ov.Tensor(self.weights, shared_memory=True))
        self.compiled = core.compile_model(model, "CPU", dict(properties))
        self.request = self.compiled.create_infer_request()
        self.packed_for: list[tuple[int, ...]] = []

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The graph's one output, copied."""
        shapes = [x.shape for name, x in inputs.items() if name != "mask"]  # which grows with every step
        if shapes == self.packed_for:
            self.request.infer(inputs)
        else:
            with pages_given_back(self.mapped):
                self.request.infer(inputs)
            self.packed_for = shapes
        return self.request.get_output_tensor().data.copy()

    def reset(self) -> None:
        """Forget the state."""
        self.request.reset_state()

    def release(self) -> None:
        """Give back what the last run needed between its inputs and its output."""
        self.compiled.release_memory()


@contextmanager
def pages_given_back(mapped: mmap.mmap) -> Iterator[None]:
    """Drop a mapped file's pages from this process again and again, where the system knows how."""
    if not hasattr(mmap, "MADV_DONTNEED"):  # as Windows does not
        yield
        return
    is_over = Event()

    def give_back() -> None:
        while not is_over.wait(SECONDS):
            mapped.madvise(mmap.MADV_DONTNEED)

    thread = Thread(target=give_back, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        mapped.madvise(mmap.MADV_DONTNEED)
