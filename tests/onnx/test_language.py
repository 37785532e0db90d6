"""MatMamba language models in ONNX: one graph for prefill and decode, three forms, padding as exact no-ops."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.reference import ReferenceEvaluator

import matexport as mx
from matexport.dims import Dims
from matexport.graph.stateful import FORMS
from matexport.slice_table import Row
from matexport_plugins import ort_library
from support import language_checkpoint, language_config, matexport, write_checkpoint

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 12)))
LIBRARY = ort_library()
# the functions in the file, and our kernels in their place
WAYS = [*FORMS, pytest.param("kernels", marks=pytest.mark.skipif(LIBRARY is None, reason="built without a compiler"))]
STATES = ("states.conv", "states.scan")
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def exported(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("language")
    for form in FORMS:
        mx.export_onnx(mx.plan(language, ROW), folder / form, target="cpu", form=form)
    return folder


class Session:
    """A model with its states, as an application would hold it."""

    def __init__(self, exported: Path, way: str, batch: int):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if way == "kernels":
            options.register_custom_ops_library(str(LIBRARY))
        folder = exported / ("custom" if way == "kernels" else way)
        self.session = onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
        self.states = {
            i.name: np.zeros([batch, *i.shape[1:]], np.float32)
            for i in self.session.get_inputs()
            if i.name.startswith("past_key_values.")
        }

    def run(self, ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        mask = np.ones_like(ids) if mask is None else mask
        names = [output.name for output in self.session.get_outputs()]
        feed = {"input_ids": ids, "attention_mask": mask.astype(np.int64), **self.states}
        out = dict(zip(names, self.session.run(names, feed), strict=True))
        self.states = {name: out[name.replace("past_key_values", "present", 1)] for name in self.states}
        return out["logits"]


def ids(batch: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 101, (batch, length))


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= tolerance * np.abs(b).max())


@pytest.mark.parametrize("form", FORMS)
def test_verified(exported: Path, language: Path, form: str) -> None:
    report = mx.verify(exported / form, language)
    assert report.passed, report.to_markdown()
    kinds = {"onnx"} | ({"functions"} if form == "custom" and LIBRARY else set())  # with our kernels and without them
    compared = {(c.kind, c.name) for c in report.comparisons if c.kind in ("onnx", "functions")}
    assert compared == {
        (kind, name)
        for kind in kinds
        for name in ("logits", "decode@18.logits", *STATES, *(f"decode@18.{s}" for s in STATES))
    }
    steps = {c.name for c in report.comparisons if c.kind == "decode"}
    padded = {f"decode@{side}.logits" for side in ("left", "right")}
    assert steps == padded | {f"decode@{split}.{name}" for split in (1, 18, 36) for name in ("logits", *STATES)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [{"ngroups": 2}, {"dt_limit": [0.01, 0.1]}, {"d_conv": 3}, {"d_state": 16}],
    ids=lambda options: next(iter(options)),
)
def test_other_mixers(tmp_path: Path, form: str, options: dict[str, object]) -> None:
    source = language_checkpoint(tmp_path / "source", **options)
    mx.export_onnx(mx.plan(source, ROW), tmp_path / "out", target="cpu", form=form)
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()


@pytest.mark.parametrize("form", FORMS)
def test_what_a_file_needs(exported: Path, form: str) -> None:
    onnx.checker.check_model(exported / form / "model.onnx")
    model = onnx.load(exported / form / "model.onnx", load_external_data=False)
    domains = {node.domain for node in model.graph.node}
    assert domains == {"custom": {"", "ai.matexport"}, "contrib": {"", "com.microsoft"}, "stock": {""}}[form]
    functions = [(f.domain, f.name) for f in model.functions]
    attention = ("com.microsoft", "LinearAttention")
    ours = [("ai.matexport", "CausalConv1d"), ("ai.matexport", "Mamba2Scan")]
    assert functions == {"custom": [attention, *ours], "contrib": [attention], "stock": []}[form]
    assert model.ir_version == 10
    assert {entry.version for entry in model.opset_import if not entry.domain} == {21}
    names = [i.name for i in model.graph.input]
    states = ("conv_state", "recurrent_state")
    assert names == ["input_ids", "attention_mask", *(f"past_key_values.{i}.{s}" for i in range(2) for s in states)]
    embeddings = [i.name for i in model.graph.initializer if 104 in i.dims]
    assert embeddings == ["backbone.embeddings.weight"]  # tied: stored once
    assert "/layers.1/mixer/scan/Neg" in {node.name for node in model.graph.node}


def test_no_layer_in_standard_operators_computes_a_shape(exported: Path) -> None:
    """TensorRT's builds grow several times longer with a Reshape to sizes that are products of dynamic ones."""
    graph = onnx.load(exported / "stock" / "model.onnx", load_external_data=False).graph
    constants = {i.name for i in graph.initializer}
    reshapes = [n for n in graph.node if n.op_type == "Reshape"]
    inside = [n for n in reshapes if "/layers." in n.name]
    assert len(inside) > 10
    assert {n.input[1] for n in inside} <= constants
    assert not {n.input[1] for n in reshapes} <= constants  # before and after all layers there are some


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("length", "cuts"), [(21, [[1], [2, 3], [7, 8, 20]]), (137, [[1], [66], [5, 135]])])
def test_in_pieces_of_any_length(exported: Path, way: str, length: int, cuts: list[list[int]]) -> None:
    """Also of more tokens than a chunk has steps, and no multiple of anything."""
    tokens = ids(2, length)
    whole = Session(exported, way, 2).run(tokens)
    for cut in cuts:
        session = Session(exported, way, 2)
        pieces = [session.run(piece) for piece in np.split(tokens, cut, axis=1)]
        assert close(np.concatenate(pieces, 1), whole)
    lost = Session(exported, way, 2)  # negative control: a state that is not passed on
    lost.run(tokens[:, :7])
    lost.states = {name: np.zeros_like(state) for name, state in lost.states.items()}
    assert not close(lost.run(tokens[:, 7:]), whole[:, 7:], 1e-2)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("left", [(0, 0, 0), (3, 0, 9), (1, 2, 0)], ids=["right", "left", "both"])
@pytest.mark.parametrize(("lengths", "width"), [((11, 9, 2), 12), ((130, 66, 2), 131)], ids=["short", "long"])
def test_padding_is_no_step_at_all(
    exported: Path, way: str, left: tuple[int, ...], lengths: tuple[int, ...], width: int
) -> None:
    """Each padded row equals the same tokens alone, and so do the steps after it; long ones are of several chunks."""
    tokens, mask = ids(3, width, seed=1), np.zeros((3, width), np.int64)
    for row, (length, begin) in enumerate(zip(lengths, left, strict=True)):
        begin = min(begin, width - length)
        mask[row, begin : begin + length] = 1
    session = Session(exported, way, 3)
    logits = session.run(tokens, mask)
    after = session.run(ids(3, 1, seed=2), np.concatenate([mask, np.ones((3, 1), np.int64)], 1))
    wrong = Session(exported, way, 3)
    wrong.run(tokens)  # negative control: the padding taken for tokens
    for row in range(3):
        alone, real = Session(exported, way, 1), mask[row].astype(bool)
        want = alone.run(tokens[row : row + 1, real])
        assert close(logits[row, real], want[0])
        assert close(after[row], alone.run(ids(3, 1, seed=2)[row : row + 1])[0])
    assert not close(wrong.run(ids(3, 1, seed=2)), after, 1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_all_masked_leaves_the_states_as_they_were(exported: Path, way: str) -> None:
    session = Session(exported, way, 2)
    session.run(ids(2, 5))
    before = {name: state.copy() for name, state in session.states.items()}
    session.run(ids(2, 4), np.zeros((2, 9), np.int64))
    assert all(np.array_equal(session.states[name], state) for name, state in before.items())


@pytest.mark.parametrize("form", FORMS)
def test_the_reference_evaluator_agrees(exported: Path, form: str) -> None:
    """ONNX's own evaluator knows neither our ops nor the contrib ones: it runs the functions in the file."""
    model = onnx.load(exported / form / "model.onnx")
    session = Session(exported, form, 2)
    feed = {"input_ids": ids(2, 6), "attention_mask": np.ones((2, 6), np.int64), **session.states}
    feed["attention_mask"][1, 2] = 0
    got = ReferenceEvaluator(model).run(["logits"], feed)[0]
    assert close(got, session.run(feed["input_ids"], feed["attention_mask"]))


def test_an_untied_head(tmp_path: Path) -> None:
    from support import language_tensors

    config = {**language_config(), "tie_embeddings": False}
    tensors = language_tensors(config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][::-1].copy()
    source = write_checkpoint(tmp_path / "source", config, tensors)
    mx.export_onnx(mx.plan(source), tmp_path / "out", target="cpu")
    assert mx.verify(tmp_path / "out", source).passed


def test_the_command_line(language: Path, tmp_path: Path) -> None:
    for target, form in (("cpu", "custom"), ("portable", "stock")):
        chosen = [] if target == "cpu" else ["--target", target]
        assert matexport("onnx", "-m", language, "-o", tmp_path / target, *chosen).code == 0
        manifest = json.loads((tmp_path / target / "matexport.json").read_text())
        assert (manifest["target"], manifest["form"]) == (target, form)
        assert matexport("verify", "-m", tmp_path / target, "--source", language).code == 0
    result = matexport("onnx", "-m", language, "-o", tmp_path / "no", "--target", "portable", "--form", "custom")
    assert result.code == 2
    assert "cannot run form 'custom'" in result.stderr
    result = matexport("trt", "-m", tmp_path / "cpu", "-o", tmp_path / "engine")
    assert result.code == 4
    assert "--target portable" in result.stderr
