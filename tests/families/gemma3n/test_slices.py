"""Slices of Gemma 3n against transformers' own model with the slice applied at run time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, Gemma3nForCausalLM

import gemma
import matexport as mx
from matexport.dims import Dims
from matexport.parity.comparison import TOLERANCES
from matexport.slice_table import Row
from support import content, matexport

# first sharing layer 6; donors: sliding 5 (read by 7 and 8), full 4 (read by 6 and 9)
CASES = {
    "ffn only": ((), (32, 48, 64, 16, 32, 40, 64, 8, 24, 56)),
    "skipped shared": ((6, 7), (32, 48, 64, 16, 32, 40, 24, 56)),
    "skipped unshared": ((1, 2), (64, 8, 24, 56, 32, 40, 16, 48)),
    "mixed": ((2, 3, 7, 9), (16, 24, 32, 40, 48, 56)),
    "a donor with all its consumers": ((4, 6, 9), (33, 17, 64, 1, 31, 64, 5)),
    "all sharing layers": ((6, 7, 8, 9), (64, 32, 16, 8, 4, 2)),
}


def row_of(name: str) -> Row:
    skipped, widths = CASES[name]
    return Row(name, skipped=skipped, ffn=Dims(head=widths))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma.text_checkpoint(tmp_path_factory.mktemp("text") / "source")


@pytest.fixture(scope="module")
def multimodal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma.multimodal_checkpoint(tmp_path_factory.mktemp("multimodal") / "source")


# ------------------------------------------------------------------------------- an oracle of our own
class Bypass(nn.Module):
    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


def reference(folder: Path, row: Row, *, masked: bool = False) -> Any:
    """transformers' model of the whole source, loaded by its own loader, cut here and not by our oracle."""
    model = Gemma3nForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    kept = [i for i in range(10) if i not in row.skipped]
    assert row.ffn is not None
    with torch.no_grad():
        for i in row.skipped:
            model.model.layers[i] = Bypass()
        for width, i in zip(row.ffn.resolve(len(kept)) or (), kept, strict=True):
            mlp = model.model.layers[i].mlp
            if masked:
                mlp.gate_proj.weight[width:] = 0
                mlp.up_proj.weight[width:] = 0
                mlp.down_proj.weight[:, width:] = 0
            else:
                mlp.gate_proj.weight = nn.Parameter(mlp.gate_proj.weight[:width].clone())
                mlp.up_proj.weight = nn.Parameter(mlp.up_proj.weight[:width].clone())
                mlp.down_proj.weight = nn.Parameter(mlp.down_proj.weight[:, :width].clone())
            for parameter in model.model.layers[i].parameters():
                parameter.data = parameter.data.clone()
    return model


def token_ids() -> torch.Tensor:
    ids = torch.randint(3, 89, (2, 23), generator=torch.Generator().manual_seed(0))
    ids[0, 5] = 95  # above the per-layer table
    return ids


@torch.no_grad()
def logits(model: Any, **options: Any) -> torch.Tensor:
    return model(input_ids=token_ids(), **options).logits


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", ["text", "multimodal"])
def test_verify_is_bitwise(name: str, kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(kind)
    mx.plan(source, row_of(name)).write(tmp_path / "out")
    report = mx.verify(tmp_path / "out", source)
    assert report.passed, report.to_markdown()
    by_name = {c.name: c for c in report.comparisons}
    assert by_name["logits"].max_abs == 0
    assert by_name["decode.logits"].max_rel <= 1e-6


@pytest.mark.parametrize("name", CASES)
def test_bitwise_against_a_model_cut_by_hand(text: Path, name: str, tmp_path: Path) -> None:
    mx.plan(text, row_of(name)).write(tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    want = logits(reference(text, row_of(name)), use_cache=False)
    assert torch.equal(logits(model.eval(), use_cache=False), want)
    whole = logits(reference(text, Row("whole", ffn=Dims(fill=64))), use_cache=False)
    assert (want - whole).abs().max() > 0.1  # the slice is another function: equality above says something


@pytest.mark.parametrize("name", ["ffn only", "mixed", "a donor with all its consumers"])
def test_cached_greedy_decoding_is_cache_free(text: Path, name: str, tmp_path: Path) -> None:
    mx.plan(text, row_of(name)).write(tmp_path / "out")
    model = Gemma3nForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    ids = token_ids()
    got = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    want, oracle = ids, reference(text, row_of(name))
    with torch.no_grad():
        for _ in range(12):
            step = oracle(input_ids=want, use_cache=False).logits[:, -1:].argmax(-1)
            want = torch.cat([want, step], 1)
    assert torch.equal(got, want)


def test_masking_is_not_slicing_where_activations_are_sparse(text: Path) -> None:
    """Negative control: zeroed neurons change the mean and deviation that a sparse layer's threshold is made of."""
    sparse = Row("sparse", ffn=Dims(head=(32, 32, 32, *[64] * 7)))
    dense = Row("dense", ffn=Dims(head=(*[64] * 3, *[32] * 7)))
    for row, differs in ((sparse, True), (dense, False)):
        sliced, masked = (logits(reference(text, row, masked=masked), use_cache=False) for masked in (False, True))
        assert bool((sliced - masked).abs().max() > 0.1) is differs


def test_a_window_off_by_one_is_far_above_the_tolerance_of_decoding(text: Path) -> None:
    """Negative control: the smallest mistake that a cache can make."""
    right, wrong = (reference(text, Row("whole", ffn=Dims(fill=64))) for _ in range(2))
    wrong.config.sliding_window = 5
    for layer in wrong.model.layers:
        layer.self_attn.sliding_window = layer.self_attn.sliding_window and 5
    a, b = logits(right, use_cache=False), logits(wrong, use_cache=False)
    assert (a - b).abs().max() / a.abs().max() > 100 * TOLERANCES["decode gemma3n"]


def test_stale_layer_types_are_caught(text: Path, tmp_path: Path) -> None:
    """Negative control: the layer types of the first kept layers, of the right length but wrong."""
    mx.plan(text, row_of("mixed")).write(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    right = config["layer_types"]
    config["layer_types"] = json.loads((text / "config.json").read_text())["layer_types"][: len(right)]
    assert config["layer_types"] != right
    path.write_text(json.dumps(config))
    model = Gemma3nForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    want = logits(reference(text, row_of("mixed")), use_cache=False)
    assert (logits(model, use_cache=False) - want).abs().max() > 0.01
    result = matexport("verify", "-m", tmp_path / "out", "--source", text)
    assert result.code == 3
    assert "layer_types" in result.stdout


def test_a_wrong_slot_of_the_per_layer_table_is_caught(text: Path, tmp_path: Path) -> None:
    """Negative control: two layers' slots of the table exchanged."""
    mx.plan(text, row_of("mixed")).write(tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens_per_layer.weight"]
    table[:, :16] = np.concatenate([table[:, 8:16], table[:, :8]], 1)
    save_file(tensors, path, metadata={"format": "pt"})
    report = mx.verify(tmp_path / "out", text)
    assert not report.passed
    assert report.worst is not None
    assert report.worst.name == "model.embed_tokens_per_layer.weight"


# ------------------------------------------------------------------------------------------- layouts
def test_towers_and_companions_travel_unchanged(multimodal: Path, tmp_path: Path) -> None:
    mx.plan(multimodal, row_of("mixed")).write(tmp_path / "out")
    source: dict[str, np.ndarray] = {}
    for file in sorted(multimodal.glob("*.safetensors")):
        source |= load_file(file)
    written = load_file(tmp_path / "out" / "model.safetensors")
    for name in gemma.TOWERS:
        assert written[name].tobytes() == source[name].tobytes()
    config, old = (json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", multimodal))
    changed = {"num_hidden_layers", "num_kv_shared_layers", "layer_types", "activation_sparsity_pattern"}
    changed |= {"intermediate_size"}
    assert {k: v for k, v in config.items() if k != "text_config"} == {
        k: v for k, v in old.items() if k != "text_config"
    }
    assert {k for k, v in config["text_config"].items() if old["text_config"][k] != v} == changed
    assert list(config["text_config"]) == list(old["text_config"])
    assert all(type(p) is float for p in config["text_config"]["activation_sparsity_pattern"])
    files = content(tmp_path / "out")
    assert {"LICENSE", "NOTICE", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= files.keys()


def test_the_licence_travels(multimodal: Path, tmp_path: Path) -> None:
    (multimodal / "Notice").write_text("the source's own")
    try:
        mx.plan(multimodal, row_of("mixed")).write(tmp_path / "out")
    finally:
        (multimodal / "Notice").unlink()
    notice = (tmp_path / "out" / "NOTICE").read_text()
    assert notice.startswith("Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev")
    assert "These files were modified by matexport: config.json and every" in notice
    assert (tmp_path / "out" / "Notice.source").read_text() == "the source's own"
    mx.plan(tmp_path / "out").write(tmp_path / "again")  # of ours there is only one
    names = {path.name for path in (tmp_path / "again").iterdir() if "otice" in path.name.lower()}
    assert names == {"NOTICE", "Notice.source"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: gemma\n" in card.split("---")[1]
    with safe_open(tmp_path / "out" / "model.safetensors", "np") as f:
        assert "modified, by matexport" in f.metadata()["notice"]


def test_text_only(multimodal: Path, tmp_path: Path) -> None:
    options = ["-m", multimodal, "--text-only", "-o"]
    assert matexport("slice", *options, tmp_path / "whole").code == 0
    mx.plan(multimodal, row_of("mixed"), options=["text_only"]).write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "gemma3n_text"
    assert config["architectures"] == ["Gemma3nForCausalLM"]
    assert config["eos_token_id"] == [1, 3]
    assert "text_config" not in config
    names = load_file(tmp_path / "out" / "model.safetensors").keys()
    assert all(name.startswith("model.") and "tower" not in name and "language_model" not in name for name in names)
    assert type(AutoConfig.from_pretrained(tmp_path / "out")).__name__ == "Gemma3nTextConfig"
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    assert mx.verify(tmp_path / "out", multimodal).passed
    # cutting the text model of the whole gives the same weights, and proves its origin
    mx.plan(tmp_path / "whole", row_of("mixed")).write(tmp_path / "twice")
    assert load_bytes(tmp_path / "twice") == load_bytes(tmp_path / "out")
    assert mx.verify(tmp_path / "twice", multimodal).passed
    assert mx.verify(tmp_path / "twice", tmp_path / "whole").passed


def load_bytes(folder: Path) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in load_file(folder / "model.safetensors").items()}


def test_dead_keys_and_values(text: Path, tmp_path: Path) -> None:
    kept, dropped = mx.plan(text, row_of("mixed")), mx.plan(text, row_of("mixed"), options=["drop_dead_kv"])
    gone = kept.plan.tensors.keys() - dropped.plan.tensors.keys()
    parts = ("k_proj", "v_proj", "k_norm")
    assert gone == {f"model.layers.{i}.self_attn.{part}.weight" for i in (4, 5) for part in parts}
    assert "missed by transformers 4.57, transformers 4.53, vLLM, mistral.rs, llama.cpp" in dropped.plan.notes[-1]
    assert mx.plan(text, Row("none", skipped=(6, 7, 8, 9)), options=["drop_dead_kv"]).plan.notes[-1:] != (
        dropped.plan.notes[-1],
    )
    dropped.write(tmp_path / "out")
    assert mx.verify(tmp_path / "out", text).passed
    result = matexport("inspect", "-m", tmp_path / "out", "--format", "json")
    verdicts = {entry["loader"]: entry for entry in result.json["loaders"]}
    assert verdicts["transformers >= 5"]["takes"]
    assert not verdicts["mistral.rs"]["takes"]
    assert "2 of 2 sharing layers were left out" in verdicts["mistral.rs"]["reason"]
    mx.plan(tmp_path / "out", Row("again", ffn=Dims(fill=8))).write(tmp_path / "again")  # such a source is one too
    assert mx.verify(tmp_path / "again", tmp_path / "out").passed


def test_dtype(text: Path, tmp_path: Path) -> None:
    result = matexport("slice", "-m", text, "--dtype", "bf16", "-o", tmp_path / "out")
    assert result.code == 0, result
    source, written = load_file(text / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for name, array in written.items():
        assert array.dtype == ml_dtypes.bfloat16
        assert array.tobytes() == source[name].astype(ml_dtypes.bfloat16).tobytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    report = mx.verify(tmp_path / "out", text)
    assert report.passed, report.to_markdown()
    assert matexport("slice", "-m", text, "--dtype", "int8", "-o", tmp_path / "no").code == 2


def test_options_that_a_family_does_not_have(vision: Path, tmp_path: Path) -> None:
    for option in ("--text-only", "--drop-dead-kv", "--repair"):
        result = matexport("slice", "-m", vision, option, "-o", tmp_path / "out")
        assert result.code == 2
        assert "leave" in result.stderr


def test_a_slice_of_a_slice_is_the_slice_of_the_source(multimodal: Path, tmp_path: Path) -> None:
    mx.plan(multimodal, row_of("mixed")).write(tmp_path / "one")  # keeps 0 1 4 5 6 8
    again = Row("again", skipped=(0, 4), ffn=Dims(head=(24, 8, 30, 56)))
    mx.plan(tmp_path / "one", again).write(tmp_path / "two")
    direct = Row("again", skipped=(0, 2, 3, 6, 7, 9), ffn=Dims(head=(24, 8, 30, 56)))
    mx.plan(multimodal, direct).write(tmp_path / "direct")
    two, one = content(tmp_path / "two"), content(tmp_path / "direct")
    assert two["model.safetensors"] == one["model.safetensors"]
    assert two["config.json"] == one["config.json"]
    assert mx.verify(tmp_path / "two", multimodal).passed
    # the widths of a non-uniform source are its own, layer by layer
    wide = Row("wide", ffn=Dims(head=(16, 24, 33, 40, 48, 56)))
    with pytest.raises(mx.errors.TableError, match="width 33 of layer 2 is not between 1 and 32"):
        mx.plan(tmp_path / "one", wide)


def test_a_scalar_width_and_left_out_lists(tmp_path: Path) -> None:
    """A config.json as it was at launch, and as transformers writes what equals its defaults."""
    source = gemma.text_checkpoint(
        tmp_path / "source", "ssssf" * 2, shared=4, activation_sparsity_pattern=[0.0] * 10, intermediate_size=64
    )
    path = source / "config.json"
    config = json.loads(path.read_text())
    del config["layer_types"], config["activation_sparsity_pattern"]
    path.write_text(json.dumps(config))
    mx.plan(source, Row("half", skipped=(6,), ffn=Dims(fill=32))).write(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["intermediate_size"] == [32] * 9
    assert written["layer_types"] == [gemma.TYPES[t] for t in "ssssfsssf"]
    assert written["activation_sparsity_pattern"] == [0.0] * 9
    assert mx.verify(tmp_path / "out", source).passed


def test_a_checkpoint_that_others_cut_is_verified_by_its_row(text: Path, tmp_path: Path) -> None:
    """No manifest, no notice: tensors, config and logits are what counts."""
    mx.plan(text, row_of("mixed")).write(tmp_path / "out")
    for name in ("matexport.json", "NOTICE", "README.md"):
        (tmp_path / "out" / name).unlink()
    (tmp_path / "t.csv").write_text('name,FFN Hidden Dims,Layers Skipped\nmixed,"[16,24,32,40,48,56]","[2,3,7,9]"\n')
    verify = ["verify", "-m", tmp_path / "out", "--source", text, "-c", tmp_path / "t.csv", "-s", "mixed"]
    assert matexport(*verify).code == 0


def test_two_casts_are_told(text: Path, tmp_path: Path) -> None:
    mx.plan(text, Row("one", skipped=(8,)), dtype="bfloat16").write(tmp_path / "one")
    mx.plan(tmp_path / "one", dtype="float32").write(tmp_path / "two")
    assert mx.verify(tmp_path / "two", tmp_path / "one").passed
    result = matexport("verify", "-m", tmp_path / "two", "--source", text)
    assert result.code == 4
    assert "'one' as --source" in result.stderr


@pytest.mark.parametrize("widths", [[[1]] * 10, ["a", *[1] * 9], [64] * 9 + [None]], ids=["lists", "text", "null"])
def test_inspect_of_widths_that_are_none(tmp_path: Path, widths: list[Any]) -> None:
    source = gemma.text_checkpoint(tmp_path / "source")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": widths}))
    result = matexport("inspect", "-m", source)
    assert result.code == 4
    assert "intermediate_size" in result.stderr


def test_a_head_of_its_own(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3nForCausalLM"], **gemma.text_config()}
    tensors = gemma.tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = gemma.write_gemma(tmp_path / "tied", config, tensors)
    assert "lm_head.weight" not in mx.plan(source).plan.tensors  # it is the embedding
    config["tie_word_embeddings"] = False
    source = gemma.write_gemma(tmp_path / "untied", config, tensors)
    assert "lm_head.weight" in mx.plan(source).plan.tensors
    outer = {**gemma.multimodal_config(gemma.text_config()), "tie_word_embeddings": False}
    weights = gemma.tensors(outer)
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"][::-1].copy()
    source = gemma.write_gemma(tmp_path / "outer", outer, weights)
    planned = mx.plan(source, options=["text_only"])
    assert planned.plan.config["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"num_kv_shared_layers": 10}, "num_kv_shared_layers is 10 of 10 layers"),
        ({"num_kv_shared_layers": 12}, "num_kv_shared_layers is 12 of 10 layers"),
        ({"layer_types": ["sliding_attention"] * 9 + ["full_attention"]}, "share keys and values, but no layer"),
        ({"layer_types": ["sliding_attention"] * 9}, "layer_types has 9 entries"),
        ({"layer_types": ["linear_attention"] * 10}, "layer_types has 0 entries"),
        ({"activation_sparsity_pattern": [0.0] * 11}, "activation_sparsity_pattern 11"),
        ({"intermediate_size": [64] * 11}, "intermediate_size has 11 entries for 10 layers"),
        ({"intermediate_size": [64] * 9 + ["64"]}, "intermediate_size holds no widths"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": 128}, "has shape"),
        ({"quantization_config": {"bits": 4}}, "is quantised"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_contradicts_itself(tmp_path: Path, edit: dict[str, Any], words: str) -> None:
    source = gemma.text_checkpoint(tmp_path / "source")
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    result = matexport("slice", "-m", source, "-o", tmp_path / "out")
    assert result.code == 4, result
    assert words in result.stderr
    assert not (tmp_path / "out").exists()


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    config = gemma.text_config()
    tensors = gemma.tensors(config)
    tensors["model.layers.3.self_attn.q_bias"] = np.zeros(4, np.float32)
    del tensors["model.norm.weight"]
    result = matexport("inspect", "-m", gemma.write_gemma(tmp_path / "source", config, tensors))
    assert result.code == 4
    assert "missing ['model.norm.weight'], unknown ['model.layers.3.self_attn.q_bias']" in result.stderr


def test_the_published_example_works_as_written(tmp_path: Path) -> None:
    """mistral.rs' "Tiny": 15 of 35 layers, 4096 wide, on a model as deep and as wide as E4B in everything but d."""
    sparsity = [0.95] * 10 + [0.0] * 25
    config = gemma.text_config(
        "ssssf" * 7, shared=15, width=16384, hidden_size=8, head_dim=4, activation_sparsity_pattern=sparsity
    )
    source = gemma.write_gemma(tmp_path / "source", config, gemma.tensors(config, dtype=ml_dtypes.bfloat16))
    (tmp_path / "tiny.csv").write_text(gemma.TINY)
    result = matexport("slice", "-m", source, "-c", tmp_path / "tiny.csv", "-s", "Tiny", "-o", tmp_path / "tiny")
    assert result.code == 0, result
    written = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert written["num_hidden_layers"] == 15
    assert written["num_kv_shared_layers"] == 4
    assert written["intermediate_size"] == [4096] * 15
    report = mx.verify(tmp_path / "tiny", source)
    assert report.passed, report.to_markdown()
    shutil.rmtree(source)
