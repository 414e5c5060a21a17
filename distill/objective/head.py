"""The output head of a LLM as the fused objective reads it: rows of one weight, and what the logits go through after.

Knows which modules hold such a weight and how a 4-bit one becomes floats a few rows at a time. Does not know any loss.

Shapes: S supervised positions, D width, C rows of the weight in one tile, K gathered rows a position.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from teachers.fourbit import bnb, check_unpacked
from teachers.logits import logit_transform

# One tile of logits has about so many elements: on a CPU it stays in the cache, on a GPU it fills the processors.
TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**25}
CPU_BLOCK = 96  # rows that one product sums over on a CPU: longer sums are slower there


@dataclass(frozen=True)
class Head:
    """What stands between the last hidden states and the logits.

    Attributes:
        weight_VD: the head's weight, from `head_weight`; a frozen one gets no gradient buffer, 4-bit is read in tiles.
        bias_V: added to the product, or None.
        logit_scale: multiplies the product and the bias.
        softcap: c of `c * tanh(logits / c)`, applied last, or None. Both from `logit_transform(config)`.
        vocab_size: number of tokens that teacher and student share, from `shared_vocab_size`; rows of a padded head
            beyond it take no part. None: all rows are tokens.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, llm: nn.Module, vocab_size: int | None = None) -> "Head":
        """The head of a causal LM of transformers.

        Raises:
            ValueError: it has no single weight to read.
        """
        module = llm.get_output_embeddings()
        transform = logit_transform(llm.config.get_text_config())
        return cls(head_weight(module), getattr(module, "bias", None), vocab_size=vocab_size, **transform)

    @property
    def trained(self) -> list[Tensor]:
        """Its tensors that may have a gradient; a 4-bit weight has none."""
        tensors = (None if is_quantized(self.weight_VD) else self.weight_VD, self.bias_V)
        return [x for x in tensors if x is not None and x.requires_grad]


def head_weight(module: nn.Module, name: str = "lm_head") -> Tensor:
    """The weight of an output head that is one matrix: full precision or bitsandbytes 4-bit, tied or not.

    Args:
        module: the head, as `get_output_embeddings()` returns it.
        name: what the error calls it.

    Raises:
        ValueError: the head carries LoRA, is 8-bit, or is no linear layer; it has no single weight to read.
    """
    kind = type(module).__name__
    if hasattr(module, "modules_to_save") and hasattr(module, "active_adapters"):
        return head_weight(module.modules_to_save[module.active_adapters[0]], name)
    if hasattr(module, "lora_A"):
        raise ValueError(
            f"{name} is {kind}, but the fused objective reads one weight and not an adapter beside it; take {name} "
            f"out of the LoRA targets, or train the whole of it with modules_to_save."
        )
    is_linear = type(module) in (nn.Linear, nn.Embedding) or kind == "Linear4bit"
    if not is_linear:
        raise ValueError(
            f"{name} is {kind}, but the fused objective reads nn.Linear or bitsandbytes Linear4bit; leave {name} out "
            f"of the quantized or wrapped modules (llm_int8_skip_modules)."
        )
    return module.weight


def choose_product_dtype(hidden_SD: Tensor, weight_VD: Tensor, dtype: torch.dtype) -> torch.dtype:
    """16 bits where a GPU multiplies and one side has no more; else the accumulation dtype, as CPUs are slow at 16."""
    stored = weight_VD.quant_state.dtype if is_quantized(weight_VD) else weight_VD.dtype
    narrow = [x for x in (stored, hidden_SD.dtype) if x in (torch.bfloat16, torch.float16)]
    return narrow[0] if hidden_SD.is_cuda and narrow else dtype


def is_quantized(weight: Tensor) -> bool:
    """True for a bitsandbytes 4-bit weight, whose own shape is that of its packed bytes."""
    return getattr(weight, "quant_state", None) is not None


class _Packed:
    """Rows of a bitsandbytes 4-bit matrix."""

    def __init__(self, weight: Tensor):
        state = weight.quant_state
        self.shape = torch.Size(state.shape)
        if self.shape[1] % state.blocksize:
            raise ValueError(
                f"width of the 4-bit head is {self.shape[1]}, but rows must hold whole blocks of {state.blocksize}; "
                f"keep the head in bfloat16."
            )
        check_unpacked(weight, "the 4-bit head")
        absmax = state.absmax
        if state.nested:
            absmax = bnb.functional.dequantize_blockwise(absmax, state.state2).float() + state.offset
        self.bytes_VX = weight.data.reshape(self.shape[0], -1)
        self.absmax_VX = absmax.reshape(self.shape[0], -1)
        self.state = state

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        packed_CX, absmax_CX = self.bytes_VX[rows], self.absmax_VX[rows]
        state = bnb.functional.QuantState(
            absmax=absmax_CX.reshape(-1),
            shape=torch.Size((len(packed_CX), self.shape[1])),
            code=self.state.code,
            blocksize=self.state.blocksize,
            quant_type=self.state.quant_type,
            dtype=self.state.dtype,
        )
        return bnb.functional.dequantize_4bit(packed_CX.reshape(-1, 1), state)


def columns_in_tile(ids: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
    """Columns of ids in a tile, and whether they are in it: those that are not stand at its border."""
    return (ids - start).clamp(0, stop - start - 1), (ids >= start) & (ids < stop)


class TiledHead:
    """Logits of one tile of the vocabulary, and sums of weight rows, in the accumulation dtype.

    Args:
        head: the head, whose weight is never copied as a whole.
        hidden_SD: the states that enter it. Accumulated is in float32 (float64 stays), and so is what is returned;
            what enters the matrix products is that too, or 16 bits on a GPU, which adds up in float32.

    Raises:
        ValueError: `vocab_size` is larger than the head.
    """

    def __init__(self, head: Head, hidden_SD: Tensor):
        weight_VD, bias_V = head.weight_VD, head.bias_V
        self.dtype = torch.promote_types(hidden_SD.dtype, torch.float32)
        self.product_dtype = choose_product_dtype(hidden_SD, weight_VD, self.dtype)
        self.rows = _Packed(weight_VD) if is_quantized(weight_VD) else weight_VD.detach()
        self.bias_V = None if bias_V is None else bias_V.detach()
        self.scale, self.softcap = head.logit_scale, head.softcap
        num_rows, num_tokens = self.rows.shape[0], head.vocab_size
        if num_tokens is not None and not 0 < num_tokens <= num_rows:
            raise ValueError(
                f"vocab_size is {num_tokens}, but the head has {num_rows} rows; give the tokenizer's number of tokens."
            )
        self.num_tokens = num_rows if num_tokens is None else num_tokens

    def tiles(self, num_positions: int, device_type: str):
        """Ranges of rows, each of whose logits fit in one tile."""
        elements = TILE_ELEMENTS["cuda" if device_type == "cuda" else "cpu"]
        size = max(1024, elements // max(num_positions, 1))
        return [(start, min(start + size, self.num_tokens)) for start in range(0, self.num_tokens, size)]

    def tile(self, start: int, stop: int) -> Tensor:
        """Rows of the weight as the matrix products take them."""
        return self.rows[start:stop].to(self.product_dtype)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`, added up and returned in the accumulation dtype."""
        a, b = a.to(self.product_dtype), b.to(self.product_dtype)
        return a @ b if self.product_dtype == self.dtype else torch.mm(a, b, out_dtype=self.dtype)

    def product(self, hidden_SD: Tensor, tile_CD: Tensor) -> Tensor:
        """`hidden @ tile.T`; on a CPU the transpose of `tile @ hidden.T`, which is faster for few positions."""
        if hidden_SD.is_cuda:
            return self.matmul(hidden_SD, tile_CD.T)
        return self.matmul(tile_CD, hidden_SD.T.contiguous()).T

    def add_product_(self, out_SD: Tensor, weights_SC: Tensor, tile_CD: Tensor) -> None:
        """`out += weights @ tile`."""
        if out_SD.is_cuda:
            out_SD += self.matmul(weights_SC, tile_CD)
            return
        for start in range(0, len(tile_CD), CPU_BLOCK):
            out_SD.addmm_(weights_SC[:, start : start + CPU_BLOCK], tile_CD[start : start + CPU_BLOCK])

    def logits(self, hidden_SD: Tensor, tile_CD: Tensor, start: int) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile, and their slope in the bare product where a soft cap bends it, else None."""
        logits_SC = self.product(hidden_SD, tile_CD)
        if self.bias_V is not None:
            logits_SC += self.bias_V[start : start + len(tile_CD)]
        if self.scale != 1:
            logits_SC *= self.scale
        if self.softcap is None:
            return logits_SC, None
        logits_SC.div_(self.softcap).tanh_()
        slope_SC = 1 - logits_SC**2
        return logits_SC.mul_(self.softcap), slope_SC.mul_(self.scale)

    def slope(self, logits: Tensor) -> Tensor | float:
        """The slope again, from the finished logits."""
        if self.softcap is None:
            return self.scale
        return self.scale * (1 - (logits / self.softcap) ** 2)

    def add_rows_(self, out_SD: Tensor, ids_SK: Tensor, coefficients_SK: Tensor) -> None:
        """Add to each position the sum of its rows times their coefficients, a few positions at a time."""
        num_kept, width = ids_SK.shape[1], out_SD.shape[1]
        if num_kept > self.num_tokens // 16:
            return self._add_many_rows_(out_SD, ids_SK, coefficients_SK)
        step = max(1, 2**20 // max(1, num_kept * width))
        for start in range(0, len(ids_SK), step):
            part = slice(start, start + step)
            rows_KD = self.rows[ids_SK[part].reshape(-1)].to(self.dtype)
            rows_SKD = rows_KD.view(-1, num_kept, width)
            out_SD[part] += torch.bmm(coefficients_SK[part].unsqueeze(1), rows_SKD).squeeze(1)

    def _add_many_rows_(self, out_SD: Tensor, ids_SK: Tensor, coefficients_SK: Tensor) -> None:
        """The same as matrix products with the tiles: reading a large part of the rows for each position is slower."""
        for start, stop in self.tiles(len(out_SD), out_SD.device.type):
            columns_SK, is_inside_SK = columns_in_tile(ids_SK, start, stop)
            tile_SC = out_SD.new_zeros(len(out_SD), stop - start)
            tile_SC.scatter_add_(1, columns_SK, coefficients_SK * is_inside_SK)
            self.add_product_(out_SD, tile_SC, self.tile(start, stop))
