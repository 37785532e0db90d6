"""In headless Chromium: every form in onnxruntime-web, and `--target web` in transformers.js's own generate()."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import matexport as mx
from browser import MODULES, Browser, browser, missing
from gemma import multimodal_checkpoint, text_checkpoint
from matexport.dims import Dims
from matexport.families.rows import WHOLE
from matexport.graph.options import GraphOptions
from matexport.graph.stateful import FORMS
from matexport.onnx.export import slug
from matexport.runtimes.ort import load_onnx
from matexport.slice_table import Row
from matexport.targets import TARGETS

pytestmark = [
    pytest.mark.skipif(bool(missing()), reason=missing()),
    pytest.mark.xdist_group("browser"),
]

ROW = Row("mixed", skipped=(1,), mamba=Dims(head=(32, 12)))
ORT = "/npm/onnxruntime-web/dist/ort.wasm.min.mjs"
TRANSFORMERS = "/npm/@huggingface/transformers"
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


def run(chromium: Browser, folder: str, feeds: list[Arrays]) -> list[Arrays]:
    """A model in onnxruntime-web."""
    data = [path.name for path in sorted((chromium.root / folder).glob("model.onnx_data*"))]
    sent = [
        {name: {"type": a.dtype.name, "data": a.ravel().tolist(), "dims": a.shape} for name, a in feed.items()}
        for feed in feeds
    ]
    answer = chromium.call("runOrt", library=ORT, folder=f"/models/{folder}", data=data, feeds=sent)
    return [{n: np.array(v["data"], np.float32).reshape(v["dims"]) for n, v in one.items()} for one in answer]


def close(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() <= 1e-5 * np.abs(b).max())


def states(planned: mx.PlannedSlice, batch: int) -> Arrays:
    graph = planned.family.build_graph(planned.plan, GraphOptions())
    shapes = {str(value.name): tuple(value.shape or ())[1:] for value in graph.inputs[2:]}
    return {name: np.zeros((batch, *shape), np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("form", FORMS)
def test_language_models_in_every_form(chromium: Browser, language: Path, form: str) -> None:
    """Logits against the oracle; where our kernels cannot be, the functions in the file run."""
    planned = mx.plan(language, ROW)
    mx.export_onnx(planned, chromium.root / f"language-{form}", target="cpu", form=form)
    ids = np.random.default_rng(0).integers(0, 101, (2, 9))
    want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)({"input_ids": ids})["logits"]
    mask, zeros = np.ones_like(ids), states(planned, 2)
    feeds = [{"input_ids": ids, "attention_mask": mask, **zeros}]
    feeds.append({"input_ids": ids[:, :5], "attention_mask": mask[:, :5], **zeros})
    whole, first = run(chromium, f"language-{form}", feeds)
    assert close(whole["logits"], want)
    past = {name: first[name.replace("past_key_values", "present")] for name in zeros}
    (rest,) = run(chromium, f"language-{form}", [{"input_ids": ids[:, 5:], "attention_mask": mask, **past}])
    assert close(rest["logits"], want[:, 5:])
    (lost,) = run(chromium, f"language-{form}", [{"input_ids": ids[:, 5:], "attention_mask": mask, **zeros}])
    assert not close(lost["logits"], want[:, 5:])  # a state that is not passed on


@pytest.mark.parametrize("form", FORMS)
def test_vision_models_in_every_form(chromium: Browser, vision: Path, form: str) -> None:
    planned = mx.plan(vision, ROW)
    mx.export_onnx(planned, chromium.root / f"vision-{form}", target="cpu", form=form)
    inputs = planned.family.sample_inputs(planned.checkpoint.config, 3, 0)
    want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)(inputs)["logits"]
    (got,) = run(chromium, f"vision-{form}", [inputs])
    assert close(got["logits"], want)


def greedy(planned: mx.PlannedSlice, ids: list[list[int]], steps: int) -> list[list[int]]:
    """The oracle's own choice, the whole sequence anew for each token."""
    forward = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)
    rows = np.array(ids)
    for _ in range(steps):
        logits = forward({"input_ids": rows})["logits"][:, -1]
        rows = np.concatenate([rows, logits.argmax(-1)[:, None]], 1)
    return rows[:, len(ids[0]) :].tolist()


def generate(chromium: Browser, model: str, prompts: list[list[list[int]]], steps: int) -> Any:
    """Token ids from transformers.js's own generate()."""
    nested = f"{TRANSFORMERS}/node_modules/onnxruntime-web/dist/"
    bundled = MODULES / nested.removeprefix("/npm/")
    return chromium.call(
        "generate", library=f"{TRANSFORMERS}/dist/transformers.min.js",
        wasm=nested if bundled.is_dir() else "/npm/onnxruntime-web/dist/",
        models="/models/", model=model, prompts=prompts, steps=steps,
    )  # fmt: skip


@pytest.mark.parametrize("row", [ROW, WHOLE], ids=lambda row: row.name)
def test_transformers_js_generates_what_the_oracle_does(
    chromium: Browser, language: Path, monkeypatch: pytest.MonkeyPatch, row: Row
) -> None:
    """Layers of one width and of two, weights in several files, prompts of several lengths, a batch."""
    monkeypatch.setitem(TARGETS, "web", replace(TARGETS["web"], max_file=90_000))
    planned, steps, name = mx.plan(language, row), 12, f"lm-{slug(row.name)}"
    mx.export_onnx(planned, chromium.root / name, target="web")
    files = sorted(path.name for path in (chromium.root / name / "onnx").iterdir())
    assert files[:3] == ["model.onnx", "model.onnx_data", "model.onnx_data_1"]
    rng = np.random.default_rng(1)
    prompts = [rng.integers(1, 101, (batch, length)).tolist() for batch, length in ((1, 2), (1, 7), (2, 20))]
    want = [greedy(planned, rows, steps) for rows in prompts]
    assert generate(chromium, name, prompts, steps) == want
    assert len({tuple(row) for rows in want for row in rows}) > 2  # they differ: the comparison can fail
    report = mx.verify(chromium.root / name, language)
    assert report.passed, report.to_markdown()


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"quantize": "int8-block"}, {"quantize": "int4-block"}], ids=str
)
def test_weights_in_fewer_bits(chromium: Browser, language: Path, options: dict[str, str]) -> None:
    """transformers.js generates what the same file gives in onnxruntime."""
    name, steps = f"lm-{'-'.join(options.values())}", 8
    mx.export_onnx(mx.plan(language, ROW), chromium.root / name, target="web", **options)
    forward = load_onnx(chromium.root / name / "onnx" / "model.onnx")
    prompts = [[[3, 1, 4, 1, 5]], [[9, 2], [6, 5]]]
    want = []
    for rows in map(np.array, prompts):
        tokens = rows
        for _ in range(steps):
            tokens = np.concatenate([tokens, forward({"input_ids": tokens})["logits"][:, -1].argmax(-1)[:, None]], 1)
        want.append(tokens[:, rows.shape[1] :].tolist())
    assert generate(chromium, name, prompts, steps) == want


def test_gemma_in_two_graphs(chromium: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers.js's own class has them, without towers; a row with skipped layers, weights in several files."""
    monkeypatch.setitem(TARGETS, "web", replace(TARGETS["web"], max_file=60_000))
    source = multimodal_checkpoint(tmp_path / "source")
    planned = mx.plan(source, Row("mixed", skipped=(3, 8), ffn=Dims(fill=32)))
    name, steps = "gemma", 10
    mx.export_onnx(planned, chromium.root / name, target="web")
    files = sorted(path.name for path in (chromium.root / name / "onnx").glob("*.onnx"))
    assert files == ["decoder_model_merged.onnx", "embed_tokens.onnx"]
    assert (chromium.root / name / "onnx" / "decoder_model_merged.onnx_data_1").is_file()
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 97, (batch, length)).tolist() for batch, length in ((1, 2), (1, 9), (2, 20))]
    want = [greedy(planned, rows, steps) for rows in prompts]
    assert generate(chromium, name, prompts, steps) == want
    assert len({tuple(row) for rows in want for row in rows}) > 2
    report = mx.verify(chromium.root / name, source)
    assert report.passed, report.to_markdown()


@pytest.mark.parametrize("options", [{"dtype": "float16"}, {"quantize": "int4-block"}], ids=str)
def test_gemma_in_fewer_bits(chromium: Browser, tmp_path: Path, options: dict[str, str]) -> None:
    """transformers.js generates what the same files give in onnxruntime."""
    source = text_checkpoint(tmp_path / "source", hidden_size_per_layer_input=32)
    name, steps = f"gemma-{'-'.join(options.values())}", 8
    mx.export_onnx(mx.plan(source), chromium.root / name, target="web", **options)
    graphs = ("embed_tokens", "decoder_model_merged")
    forward = load_onnx(*(chromium.root / name / "onnx" / f"{graph}.onnx" for graph in graphs))
    prompts, want = [[[3, 14, 15, 92, 65]], [[35, 89], [79, 32]]], []
    for rows in map(np.array, prompts):
        tokens = rows
        for _ in range(steps):
            tokens = np.concatenate([tokens, forward({"input_ids": tokens})["logits"][:, -1].argmax(-1)[:, None]], 1)
        want.append(tokens[:, rows.shape[1] :].tolist())
    assert generate(chromium, name, prompts, steps) == want


def test_what_it_needs_of_config_json(chromium: Browser, language: Path) -> None:
    """Negative control: under its own model type, transformers.js does not know how to run it."""
    mx.export_onnx(mx.plan(language, ROW), chromium.root / "own", target="web")
    config = json.loads((chromium.root / "own" / "config.json").read_text())
    (chromium.root / "own" / "config.json").write_text(json.dumps({**config, "model_type": "mamba2"}))
    with pytest.raises(RuntimeError, match=r"past_conv|mamba2|[Mm]issing"):
        generate(chromium, "own", [[[1, 2, 3]]], 2)
