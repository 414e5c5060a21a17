"""A graph's weights are in memory once and in the bits of the folder, and nothing is computed that no one asks for."""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset13 as op
from test_decoder import error, make_llm

from students.device.constants import SLICE, product
from students.device.decoder import build_decoder
from students.device.graph import Graph
from students.device.student import EXACT, ISA_LIMIT, find_properties
from students.quantize import to_4bit


def make_graph(weight: torch.Tensor | np.ndarray, inputs: int, kind: str, folder: Path) -> tuple[ov.Model, Graph]:
    """A graph that multiplies with one matrix, and the same read back."""
    states = op.parameter([-1, -1, inputs], ov.Type.f32, name="states")
    model = ov.Model([op.result(product(states, weight, "it", kind))], [states], "one")
    model.inputs[0].set_names({"states"})
    ov.save_model(model, folder / "one.xml", compress_to_fp16=False)
    return model, Graph(ov.Core(), folder / "one.xml", EXACT)


@pytest.fixture(params=["llama", "qwen3"])
def compiled(request, tmp_path):
    """A LLM in 4 bits with a head in 8, and what OpenVINO makes of its graph: kind, type and numbers of each node."""
    llm = make_llm(request.param)
    ov.save_model(build_decoder(llm, "int8"), tmp_path / "llm.xml", compress_to_fp16=False)
    nodes = Graph(ov.Core(), tmp_path / "llm.xml", EXACT).compiled.get_runtime_model().get_ordered_ops()
    infos = [(node, {key: value.astype(str) for key, value in node.get_rt_info().items()}) for node in nodes]
    constants = [(info["outputPrecisions"], int(np.prod(node.output(0).shape)))
                 for node, info in infos if info["layerType"] == "Const"]  # fmt: skip
    return llm, constants, Counter(info["layerType"] for _, info in infos)


def test_what_is_in_four_or_eight_bits_stays_so_in_memory(compiled):
    llm, constants, _ = compiled
    layers = [module.base_layer for module in llm.modules() if hasattr(module, "base_layer")]
    sizes = [layer.in_features * layer.out_features for layer in layers]
    assert sorted(size for kind, size in constants if kind == "nf4") == sorted(sizes)
    assert [size for kind, size in constants if kind == "i8"] == [llm.lm_head.weight.numel()]
    assert max(size for kind, size in constants if kind == "f32") <= 128 * llm.config.head_dim  # the table of rotations


def test_attention_is_openvinos_own_that_grows_by_a_position_a_step(compiled):
    """Written otherwise it becomes products whose code is compiled and kept anew for each length."""
    llm, _, kinds = compiled
    assert kinds["ScaledDotProductAttention"] == llm.config.num_hidden_layers == 2
    assert not {"MatMul", "Softmax"} & kinds.keys()


@pytest.mark.parametrize(("kind", "most"), [("nf4", 1e-6), ("int8", 1e-2)])
def test_many_inputs_are_multiplied_in_slices_and_the_product_is_the_matrixs(tmp_path, kind, most):
    torch.manual_seed(0)
    layer, states = torch.nn.Linear(2 * SLICE + 192, 8, bias=False), torch.randn(2, 3, 2 * SLICE + 192)
    if kind == "nf4":
        layer = to_4bit(layer, torch.float32)
    with torch.no_grad():
        expected = layer(states).numpy()
    model, graph = make_graph(layer.weight, layer.in_features, kind, tmp_path)
    products = [node for node in model.get_ops() if node.get_type_name() == "MatMul"]
    assert sorted(node.input_value(1).shape[1] for node in products) == [192, SLICE, SLICE]
    assert error(graph.run({"states": states.numpy()}), expected) < most


def test_a_graph_keeps_no_page_of_its_file(tmp_path):
    weight = np.random.default_rng(0).normal(size=(2048, 2048)).astype(np.float32)
    _, graph = make_graph(weight, 2048, "int8", tmp_path)
    for length in (1, 64, 300):
        states = np.ones((1, length, 2048), np.float32)
        assert error(graph.run({"states": states}), states @ weight.T) < 1e-2
        smaps = Path("/proc/self/smaps").read_text()
        found = re.findall(rf"{re.escape(str(tmp_path))}/one\.bin\n(?:.*\n)*?Rss: +(\d+) kB", smaps)
        assert found and sum(map(int, found)) < 100  # of 4,200


def test_the_head_is_asked_about_one_position_a_row():
    model = build_decoder(make_llm("qwen2"), "f32")
    head = model.outputs[0].get_node().input_value(0).get_node()
    assert head.get_type_name() == "MatMul"
    assert head.get_input_partial_shape(0).rank.get_length() == 2  # [B, D]: no dimension of positions


def test_a_head_in_half_floats_is_not_unfolded_when_a_graph_is_compiled(tmp_path):
    ov.save_model(build_decoder(make_llm("llama"), "f16"), tmp_path / "llm.xml", compress_to_fp16=False)
    converts = re.findall(r'type="Convert".*?</layer>', (tmp_path / "llm.xml").read_text(), re.DOTALL)
    halves = [text for text in converts if '<port id="0" precision="FP16"' in text]
    assert len(halves) == 1 and '<attribute name="decompression"' in halves[0]


@pytest.mark.parametrize(
    ("limit", "fast"),
    [(None, {}), ("DEFAULT", {}), ("AVX512_CORE_BF16", {}), ("AVX512_CORE_AMX", {}), ("AVX2", EXACT), ("avx2", EXACT)],
)
def test_fast_products_are_exact_where_no_kernel_may_use_bfloat16(monkeypatch, limit, fast):
    monkeypatch.delenv(ISA_LIMIT, raising=False)
    if limit is not None:
        monkeypatch.setenv(ISA_LIMIT, limit)
    assert find_properties("fast") == fast
    assert find_properties("exact") == EXACT
