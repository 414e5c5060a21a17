"""What every test shares: where `../shared` is, which tests need it, and one thread a process."""

import gc
import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # whatever the user's says: ranks are forks, and OpenMP's threads survive none
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# a killed process loses nothing that it wrote: only a power cut, which no test makes, would, and each wait for the disk
# is a test's time; who counts these calls counts on
os.fsync = lambda descriptor: None

# what a script's background job and nohup ignore, or no process that a test starts would hear it
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, handler)

SHARED = Path(os.environ.get("DISTILL_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def pytest_collection_modifyitems(items):
    import torch  # here, as what starts and waits for the processes that test would pay its seconds too

    for item in items:
        if item.get_closest_marker("shared") and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"{SHARED} is not here; set DISTILL_SHARED"))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_collection_finish():
    gc.freeze()  # what the imports left is not looked through again, by pytest's five collections at the end as little


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference numbers and recordings beside the checkout."""
    return SHARED


@pytest.fixture(scope="module")
def on_the_cpu():
    """For modules that fork processes, which a GPU in use would not survive."""
    from accelerate.state import AcceleratorState

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
