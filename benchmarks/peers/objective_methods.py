"""The ways to compute a distillation loss that `objective.py` compares, on the same inputs.

Every method takes the hidden states of all positions and leaves their gradient; the head is frozen. Peers are the
installed packages (`pip install --no-deps trl liger-kernel`); a function whose module imports what is not installed is
taken out of the installed file as it stands.

Shapes: P positions, S supervised ones, D width, V vocabulary, K kept teacher tokens.
"""

import ast
import importlib
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from distill.objective.fused import fused_ce_kl
from distill.objective.head import Head
from distill.objective.losses import ce, dense_divergence, forward_kl
from shards.targets.distributions import Distribution

# Where each peer is installed, found before anything of it is imported; None where it is not.
PEERS = {package: find_spec(package) for package in ("trl", "liger_kernel")}
VOCAB_SIZE, NUM_POSITIONS, NUM_SUPERVISED, NUM_KEPT = 128_256, 512, 115, 64
IGNORE_INDEX = -100
TRL_CHUNK = 32768  # its own `_CHUNKED_LOGPROB_CHUNK_SIZE`


@dataclass
class Inputs:
    """A student and a teacher at every position, and what a cache keeps of the teacher at the supervised ones."""

    hidden_PD: Tensor
    weight_VD: Tensor
    teacher_hidden_PD: Tensor
    teacher_weight_VD: Tensor
    teacher_logits_PV: Tensor
    labels_P: Tensor
    positions_S: Tensor
    targets: Distribution

    @classmethod
    def build(cls, width: int, vocab_size: int = VOCAB_SIZE) -> "Inputs":
        """Answers of about a fifth of the positions; a teacher whose logits spread by some nats."""
        torch.manual_seed(0)
        weight_VD = torch.randn(vocab_size, width) * width**-0.5
        teacher_weight_VD = torch.randn(vocab_size, width) * 3 * width**-0.5
        teacher_hidden_PD = torch.randn(NUM_POSITIONS, width)
        teacher_logits_PV = teacher_hidden_PD @ teacher_weight_VD.T
        positions_S = torch.randperm(NUM_POSITIONS)[:NUM_SUPERVISED].sort().values
        labels_P = torch.full((NUM_POSITIONS,), IGNORE_INDEX)
        labels_P[positions_S] = teacher_logits_PV[positions_S].argmax(-1)
        targets = Distribution.from_logits(teacher_logits_PV[positions_S], NUM_KEPT)
        hidden_PD = torch.randn(NUM_POSITIONS, width).requires_grad_()
        return cls(hidden_PD, weight_VD, teacher_hidden_PD, teacher_weight_VD, teacher_logits_PV, labels_P,
                   positions_S, targets)  # fmt: skip

    @property
    def labels_S(self) -> Tensor:
        return self.labels_P[self.positions_S]


def ours(x: Inputs) -> None:
    share_S = torch.full((NUM_SUPERVISED,), 1 / NUM_SUPERVISED)
    fused = fused_ce_kl(x.hidden_PD[x.positions_S], Head(x.weight_VD), x.labels_S, x.targets.at(1.0), share_S,
                        share_S, 1.0)  # fmt: skip
    fused.loss_S.sum().backward()


def matmul(x: Inputs) -> None:
    """The two products without which no loss has a value and a gradient: logits, and their gradient times the head."""
    with torch.no_grad():
        logits_SV = x.hidden_PD[x.positions_S] @ x.weight_VD.T
        x.hidden_PD.grad = torch.zeros_like(x.hidden_PD).index_copy_(0, x.positions_S, logits_SV @ x.weight_VD)


def torch_all_rows(x: Inputs) -> None:
    """Cross-entropy and full KL of every position, masked afterwards."""
    logits_PV = x.hidden_PD @ x.weight_VD.T
    logprobs_PV, teacher_PV = logits_PV.log_softmax(-1), x.teacher_logits_PV.log_softmax(-1)
    kl_P = F.kl_div(logprobs_PV, teacher_PV, log_target=True, reduction="none").sum(-1)
    ce_P = F.cross_entropy(logits_PV, x.labels_P, ignore_index=IGNORE_INDEX, reduction="none")
    ((ce_P + kl_P * (x.labels_P != IGNORE_INDEX)).sum() / NUM_SUPERVISED).backward()


def torch_supervised_rows(x: Inputs) -> None:
    logits_SV = x.hidden_PD[x.positions_S] @ x.weight_VD.T
    kl_S = dense_divergence(logits_SV, x.teacher_logits_PV[x.positions_S], 1.0)
    (ce(logits_SV, x.labels_S) + kl_S).mean().backward()


def torch_top_64(x: Inputs) -> None:
    logits_SV = x.hidden_PD[x.positions_S] @ x.weight_VD.T
    kl_S = forward_kl(logits_SV, x.targets.at(1.0), 1.0)
    (ce(logits_SV, x.labels_S) + kl_S).mean().backward()


def trl_gkd(x: Inputs) -> None:
    """As `GKDTrainer.compute_loss` does: logits of all positions; those of the teacher are given and not counted."""
    _gkd_loss(x.hidden_PD @ x.weight_VD.T, x.teacher_logits_PV, labels=x.labels_P).backward()


def trl_gkd_with_teacher_head(x: Inputs) -> None:
    """The same with the teacher's logits computed, as its trainer, which has no cache, does at every step."""
    with torch.no_grad():
        teacher_logits_PV = x.teacher_hidden_PD @ x.teacher_weight_VD.T
    _gkd_loss(x.hidden_PD @ x.weight_VD.T, teacher_logits_PV, labels=x.labels_P).backward()


def _trl_chunked(x: Inputs, hidden: Tensor, teacher_hidden: Tensor, weight: Tensor) -> None:
    function = _trl_module("kernels.chunked_divergence").ChunkedDivergenceFunction
    kl, _ = function.apply(hidden, x.weight_VD, None, teacher_hidden, x.teacher_weight_VD, None, 0.0)
    (kl * weight).sum().backward()


def trl_chunked_all_rows(x: Inputs) -> None:
    """As its trainer calls it without Triton: every position, masked afterwards; forward KL."""
    _trl_chunked(x, x.hidden_PD, x.teacher_hidden_PD, (x.labels_P != IGNORE_INDEX) / NUM_SUPERVISED)


def trl_chunked_supervised_rows(x: Inputs) -> None:
    """The supervised positions alone, as its trainer calls it with Triton; forward KL."""
    share_S = torch.full((NUM_SUPERVISED,), 1 / NUM_SUPERVISED)
    _trl_chunked(x, x.hidden_PD[x.positions_S], x.teacher_hidden_PD[x.positions_S], share_S)


def trl_chunked_and_ce_supervised_rows(x: Inputs) -> None:
    """The same terms as ours from TRL's parts: its chunked KL, and cross-entropy from its chunked log-probabilities."""
    hidden_SD = x.hidden_PD[x.positions_S]
    kl = _trl_module("kernels.chunked_divergence").ChunkedDivergenceFunction
    logprob = _trl_module("kernels.chunked_logprob").ChunkedLogProbFunction
    kl_S, _ = kl.apply(hidden_SD, x.weight_VD, None, x.teacher_hidden_PD[x.positions_S], x.teacher_weight_VD, None, 0.0)
    logprobs_S = logprob.apply(hidden_SD, x.weight_VD, None, x.labels_S, 1.0, TRL_CHUNK, None, 1.0, ())[0]
    (kl_S - logprobs_S).mean().backward()


def _liger(x: Inputs, rows: slice | Tensor) -> None:
    jsd = importlib.import_module("liger_kernel.chunked_loss.jsd_loss").LigerFusedLinearJSDLoss(
        beta=0.0, compiled=False
    )
    jsd(x.hidden_PD[rows], x.weight_VD, x.teacher_hidden_PD[rows], x.teacher_weight_VD, x.labels_P[rows]).backward()


def liger_jsd_all_rows(x: Inputs) -> None:
    """Cross-entropy and forward KL of every position, not compiled (a compiler is not counted on)."""
    _liger(x, slice(None))


def liger_jsd_supervised_rows(x: Inputs) -> None:
    _liger(x, x.positions_S)


METHODS: dict[str, Callable[[Inputs], None]] = {
    "matmul": matmul,
    "ours": ours,
    "torch_top_64": torch_top_64,
    "torch_supervised_rows": torch_supervised_rows,
    "torch_all_rows": torch_all_rows,
    "trl_gkd": trl_gkd,
    "trl_gkd_with_teacher_head": trl_gkd_with_teacher_head,
    "trl_chunked_supervised_rows": trl_chunked_supervised_rows,
    "trl_chunked_and_ce_supervised_rows": trl_chunked_and_ce_supervised_rows,
    "trl_chunked_all_rows": trl_chunked_all_rows,
    "liger_jsd_supervised_rows": liger_jsd_supervised_rows,
    "liger_jsd_all_rows": liger_jsd_all_rows,
}
PEERS_ON_SUPERVISED_ROWS = ("trl_chunked_supervised_rows", "liger_jsd_supervised_rows")  # the first has no CE
PEERS_OF_SAME_TERMS = ("trl_chunked_and_ce_supervised_rows", "liger_jsd_supervised_rows")


def _missing() -> dict[str, str]:
    missing = {"liger_triton": "its kernels need a GPU"}
    for package, spec in PEERS.items():
        prefix = package.split("_")[0] + "_"
        if spec is None:
            missing |= {name: f"{package} is not installed" for name in METHODS if name.startswith(prefix)}
    return missing


MISSING = _missing()  # method to why it cannot run here


def _trl_folder() -> Path:
    return Path(PEERS["trl"].submodule_search_locations[0])


def _function(path: Path, name: str, names: dict) -> Callable:
    """One function of a file, compiled as it stands, without running the file."""
    tree = ast.parse(path.read_text())
    (node,) = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    node.decorator_list = []
    exec(compile(ast.Module([node], []), str(path), "exec"), names)
    return names[name]


def _gkd_loss(student_logits: Tensor, teacher_logits: Tensor, labels: Tensor) -> Tensor:
    path = _trl_folder() / "experimental" / "gkd" / "gkd_trainer.py"
    function = _function(path, "generalized_jsd_loss", {"torch": torch, "F": F})
    return function(student_logits, teacher_logits, labels=labels, beta=0.5)


def _trl_module(name: str) -> types.ModuleType:
    """A module of TRL, whose package and trainers import data sets and pandas, which a loss does not need."""
    root = _trl_folder()
    for package, path in (("trl", root), ("trl.trainer", root / "trainer")):
        if package not in sys.modules:
            sys.modules[package] = types.ModuleType(package)
            sys.modules[package].__path__ = [str(path)]
    if "trl.trainer.utils" not in sys.modules:
        utils = sys.modules["trl.trainer.utils"] = types.ModuleType("trl.trainer.utils")
        names = {"torch": torch, "nullcontext": importlib.import_module("contextlib").nullcontext}
        utils.maybe_gather_lm_head_ctx = _function(root / "trainer" / "utils.py", "maybe_gather_lm_head_ctx", names)
    return importlib.import_module(f"trl.{name}")
