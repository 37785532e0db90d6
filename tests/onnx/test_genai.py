"""`--target genai`: onnxruntime-genai runs the folder as it is, and generates what our own loop does, every token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

import matexport as mx
from gemma import text_checkpoint
from matexport.dims import Dims
from matexport.runtimes.ort import load_onnx
from matexport.slice_table import Row
from matexport_plugins import ort_library
from support import language_checkpoint, matexport, vision_checkpoint

genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed: pip install '.[dev]'")

HALF = Row("half", skipped=(1,), mamba=Dims(head=(32, 32)))
LENGTHS, NEW = (1, 2, 7, 40), 12
# in a process of its own: it brings settings of ONNX Runtime that are the process's
CHILD = """
import json, sys
import numpy as np, onnxruntime_genai
model = onnxruntime_genai.Model(sys.argv[1])
found = []
for ids in json.loads(sys.argv[2]):
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(ids[0]) + int(sys.argv[3]), batch_size=len(ids))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(np.array(ids, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    found.append([generator.get_sequence(i)[len(row):].tolist() for i, row in enumerate(ids)])
print(json.dumps(found))
"""


def prompts(batch: int) -> list[list[list[int]]]:
    return [np.random.default_rng(n).integers(0, 101, (batch, n)).tolist() for n in LENGTHS]


def generate(folder: Path, batch: int) -> list[list[list[int]]]:
    command = [sys.executable, "-c", CHILD, str(folder), json.dumps(prompts(batch)), str(NEW)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def greedy(planned: mx.PlannedSlice, ids: list[list[int]], steps: int = NEW) -> list[list[int]]:
    """The oracle's own choice: the source in PyTorch with the slice applied, the whole sequence anew for each token."""
    forward = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)
    rows = np.array(ids)
    for _ in range(steps):
        padded = rows if rows.shape[1] > 1 else np.concatenate([rows, rows], 1)  # the oracle takes two tokens or more
        logits = forward({"input_ids": padded})["logits"][:, rows.shape[1] - 1]
        rows = np.concatenate([rows, logits.argmax(-1)[:, None]], 1)
    return rows[:, len(ids[0]) :].tolist()


@pytest.mark.parametrize("form", ["custom", "contrib"])
def test_it_generates_what_the_oracle_does(language: Path, tmp_path: Path, form: str) -> None:
    planned = mx.plan(language, HALF)
    mx.export_onnx(planned, tmp_path / "out", target="genai", form=form)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    library = config["model"]["decoder"]["session_options"].get("custom_ops_library")
    assert (library is not None) == (form == "custom" and ort_library() is not None)
    want = [greedy(planned, ids) for ids in prompts(2)]
    assert generate(tmp_path / "out", 2) == want
    assert len({tuple(row) for one in want for row in one}) > 4  # they differ: the comparison can fail
    report = mx.verify(tmp_path / "out", language)
    assert report.passed, report.to_markdown()


def test_it_runs_without_our_kernels_too(language: Path, tmp_path: Path) -> None:
    """The functions in the file: what a machine of another kind does with the folder, its config one line shorter."""
    planned = mx.plan(language, HALF)
    mx.export_onnx(planned, tmp_path / "out", target="genai")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    config["model"]["decoder"]["session_options"].pop("custom_ops_library", None)
    (tmp_path / "out" / "genai_config.json").write_text(json.dumps(config))
    assert generate(tmp_path / "out", 1) == [greedy(planned, ids) for ids in prompts(1)]


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"quantize": "int8-block"}, {"quantize": "int4-block"}], ids=str
)
def test_weights_in_fewer_bits(language: Path, tmp_path: Path, options: dict[str, str]) -> None:
    """Against our own loop over the same file: prefill, then one token after the other."""
    planned = mx.plan(language, HALF)
    mx.export_onnx(planned, tmp_path / "out", target="genai", **options)
    session_options = onnxruntime.SessionOptions()
    if library := ort_library():
        session_options.register_custom_ops_library(str(library))
    session = onnxruntime.InferenceSession(
        tmp_path / "out" / "model.onnx", session_options, providers=["CPUExecutionProvider"]
    )
    want = []
    for ids in prompts(2):
        rows, done = np.array(ids), 0
        past = {i.name: np.zeros([2, *i.shape[1:]], np.float32) for i in session.get_inputs()[2:]}
        for _ in range(NEW):
            feed = {"input_ids": rows[:, done:], "attention_mask": np.ones_like(rows), **past}
            logits, *present = session.run(None, feed)
            done, past = rows.shape[1], dict(zip(past, present, strict=True))
            rows = np.concatenate([rows, logits[:, -1].argmax(-1)[:, None]], 1)
        want.append(rows[:, len(ids[0]) :].tolist())
    assert generate(tmp_path / "out", 2) == want


def test_a_pad_id_that_is_a_token_is_not_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokenizers pad with the token that begins or ends a text: a prompt may end with it."""
    source = language_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "bos_token_id": 7, "pad_token_id": 7}))
    planned = mx.plan(source, HALF)
    mx.export_onnx(planned, tmp_path / "out", target="genai")
    monkeypatch.setitem(globals(), "prompts", lambda _: [[[5, 9, 3, 7]], [[7, 5, 9]]])
    want = [greedy(planned, ids) for ids in prompts(1)]
    assert generate(tmp_path / "out", 1) == want
    path = tmp_path / "out" / "genai_config.json"
    genai_config = json.loads(path.read_text())
    assert genai_config["model"]["bos_token_id"] == 7
    genai_config["model"]["pad_token_id"] = 7
    path.write_text(json.dumps(genai_config))
    assert generate(tmp_path / "out", 1) != want  # onnxruntime-genai leaves that token out


def test_special_tokens_and_tokenizer_go_along(tmp_path: Path) -> None:
    source = language_checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": 5, "bos_token_id": None}))
    (source / "tokenizer.json").write_text("{}")
    assert matexport("onnx", "-m", source, "-o", tmp_path / "out", "--target", "genai").code == 0
    model = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]
    assert model["eos_token_id"] == 5
    assert model["pad_token_id"] == 103  # no token: 101 are padded to 104
    assert "bos_token_id" not in model
    assert model["vocab_size"] == 104
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert matexport("verify", "-m", tmp_path / "out", "--source", source).code == 0
    again = matexport("onnx", "-m", source, "-o", tmp_path / "out", "--target", "genai", "--force")
    assert again.code == 0, again


@pytest.mark.parametrize("options", [{}, {"dtype": "float16"}, {"quantize": "int4-block"}], ids=str)
def test_gemma(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, str]) -> None:
    """Layers that share keys and values have no cache; in fewer bits, against our own loop over the same file."""
    source = text_checkpoint(tmp_path / "source", hidden_size_per_layer_input=32)
    planned = mx.plan(source, Row("mixed", skipped=(3, 8), ffn=Dims(fill=32)))
    mx.export_onnx(planned, tmp_path / "out", target="genai", **options)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    assert config["num_hidden_layers"] == 5  # of eight
    assert "custom_ops_library" not in config["session_options"]
    lengths, rng = (2, 7, 20), np.random.default_rng(5)
    chosen = [rng.integers(3, 97, (2, n)).tolist() for n in lengths]
    monkeypatch.setitem(globals(), "prompts", lambda _: chosen)
    if options:
        forward, want = load_onnx(tmp_path / "out" / "model.onnx"), []
        for rows in map(np.array, chosen):
            tokens = rows
            for _ in range(NEW):
                logits = forward({"input_ids": tokens})["logits"][:, -1]
                tokens = np.concatenate([tokens, logits.argmax(-1)[:, None]], 1)
            want.append(tokens[:, rows.shape[1] :].tolist())
    else:
        want = [greedy(planned, rows) for rows in chosen]
    assert generate(tmp_path / "out", 2) == want
    assert len({tuple(row) for one in want for row in one}) > 3
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()


def test_what_it_cannot_be(language: Path, tmp_path: Path) -> None:
    """A Mix'n'Match row, a model without states, a single file: refused with the reason, and nothing is written."""
    table = tmp_path / "t.csv"
    table.write_text('name,Mamba Dims\nmixed,"[64, 32, 16]"\n')
    command = ["onnx", "--target", "genai", "-o", tmp_path / "out"]
    result = matexport(*command, "-m", language, "-c", table, "-s", "mixed")
    assert result.code == 2
    assert "differ in width" in result.stderr
    result = matexport(*command, "-m", vision_checkpoint(tmp_path / "vision"))
    assert result.code == 2
    assert "writes language models, and this is none" in result.stderr
    result = matexport("onnx", "--target", "genai", "-m", language, "-o", tmp_path / "out.onnx")
    assert result.code == 2
    assert "a folder with one model" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.csv", "vision"]
