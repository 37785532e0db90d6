"""MatMamba language models: the oracle against the authors' rules, slices and stock classes against the oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import matexport as mx
from matexport.checkpoint import open_checkpoint
from matexport.families.matmamba.modeling import MatMamba2, MatMambaForCausalLM
from matexport.families.matmamba.oracle import load_model
from strategies import row_of
from support import content, language_checkpoint, language_config, language_tensors, matexport, write_checkpoint
from upstream import BROKEN
from upstream import language as upstream_language

IDS = np.random.default_rng(5).integers(0, 104, (2, 21))


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


WIDTHS: list[list[int | None]] = [
    [64, 64, 64], [32, 32, 32], [16, 16, 16], [8, 8, 8], [1, 1, 1], [64, 1, 33], [32, None, 8], [None, None, 64],
]  # fmt: skip


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_oracle_equals_the_authors_rules(language: Path, dims: list[int | None]) -> None:
    planned = mx.plan(language, row_of(dims))
    got = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)({"input_ids": IDS})
    config = language_config()
    want = upstream_language(IDS, language_tensors(config), config, dims)
    assert relative(got["logits"], want) < 1e-5
    assert relative(got[f"decode@{IDS.shape[1] // 2}.logits"], want) < 1e-5


@pytest.mark.parametrize("broken", BROKEN)
def test_each_rule_matters(broken: str) -> None:
    config = language_config()
    tensors = language_tensors(config)
    right = upstream_language(IDS, tensors, config, [16, 16, 16])
    assert relative(upstream_language(IDS, tensors, config, [16, 16, 16], broken), right) > 1e-2


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_slices_are_verified(language: Path, tmp_path: Path, dims: list[int | None]) -> None:
    """Bit for bit in our class, within 1e-5 in transformers' own where it takes the slice."""
    mx.plan(language, row_of(dims)).write(tmp_path / "out")
    report = mx.verify(tmp_path / "out", language)
    assert report.passed, report.to_markdown()
    kinds = {comparison.kind for comparison in report.comparisons}
    uniform = len({dim for dim in dims if dim is not None}) == 1
    stock = uniform and max(dim or 0 for dim in dims) >= 32
    assert ("stock" in kinds) == stock
    assert {"checkpoint", "decode"} <= kinds
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == ("mamba2" if stock else "matmamba")
    assert ("modeling_matmamba.py" in content(tmp_path / "out")) == (not stock)


def test_the_container(language: Path, tmp_path: Path) -> None:
    planned = mx.plan(language, row_of([32, 32, 32]))
    assert "lm_head.weight" not in planned.plan.tensors  # tied: stored once
    assert planned.plan.tensors["backbone.embeddings.weight"].shape == (104, 64)  # the padded vocabulary is kept
    config = planned.plan.config
    assert (config["vocab_size"], config["n_groups"], config["expand"], config["num_heads"]) == (104, 1, 1, 32)
    assert config["tie_word_embeddings"] is True
    assert config["pad_token_id"] is None
    assert config["dtype"] == "float32"
    planned.write(tmp_path / "one")
    again = mx.plan(tmp_path / "one", row_of([8, None, 16]))  # a slice of a stock slice
    again.write(tmp_path / "two")
    mx.plan(language, row_of([8, None, 16])).write(tmp_path / "direct")
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "direct" / "model.safetensors"
    ).read_bytes()
    assert mx.verify(tmp_path / "two", tmp_path / "one").passed


def test_untied_heads(tmp_path: Path) -> None:
    config = {**language_config(), "tie_embeddings": False}
    tensors = language_tensors(config)
    tensors["lm_head.weight"] = tensors["lm_head.weight"][::-1].copy()
    source = write_checkpoint(tmp_path / "c", config, tensors)
    for dims in ([32, 32, 32], [8, 1, 64]):
        mx.plan(source, row_of(dims)).write(tmp_path / "out", force=True)
        report = mx.verify(tmp_path / "out", source)
        assert report.passed, report.to_markdown()
    tied = write_checkpoint(tmp_path / "tied", language_config(), tensors)
    mx.plan(tied, row_of([32, 32, 32])).write(tmp_path / "out", force=True)
    result = matexport("verify", "-m", tmp_path / "out", "--source", tied)
    assert result.code == 4
    assert "ties 'lm_head.weight' to the embedding, but they differ" in result.stderr


def test_groups_and_other_sizes(tmp_path: Path) -> None:
    source = language_checkpoint(tmp_path / "c", ngroups=2, d_conv=3, d_model=96)
    for dims in ([96, 96, 96], [48, 48, 48], [6, 96, 12]):
        mx.plan(source, row_of(dims)).write(tmp_path / "out", force=True)
        report = mx.verify(tmp_path / "out", source)
        assert report.passed, report.to_markdown()


# -------------------------------------------------------------------------------------------- states
@pytest.fixture(scope="module")
def model(language: Path) -> MatMambaForCausalLM:
    found = load_model(open_checkpoint(language))
    assert isinstance(found, MatMambaForCausalLM)
    for layer in found.backbone.layers:
        layer.mixer.chunk_size = 8
    return found


NESTED = [(0, range(32)), (2, range(5))]


@torch.no_grad()
@pytest.mark.parametrize("split", range(1, 21))
def test_a_prefill_split_anywhere(model: MatMambaForCausalLM, split: int) -> None:
    """Logits, convolution states and scan states are those of one run, at a nested width."""
    ids = torch.from_numpy(IDS)
    whole = model(ids, submodel=NESTED)
    first = model(ids[:, :split], submodel=NESTED)
    second = model(ids[:, split:], cache_params=first.cache_params, submodel=NESTED)
    got = torch.cat([first.logits, second.logits], 1)
    assert relative(got.numpy(), whole.logits.numpy()) < 1e-5
    for index, _heads in NESTED:
        one, two = whole.cache_params.states[index], second.cache_params.states[index]
        assert relative(two.conv.numpy(), one.conv.numpy()) < 1e-5
        assert relative(two.scan.numpy(), one.scan.numpy()) < 1e-5
    stale = model(ids[:, split:], submodel=NESTED)  # without the state it is something else
    assert relative(stale.logits.numpy(), whole.logits[:, split:].numpy()) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right", "both", "inside"])
def test_padding_is_a_no_op(model: MatMambaForCausalLM, side: str) -> None:
    """Each padded row equals the same sequence run alone, and so do its states, at whichever side the padding is."""
    real = torch.from_numpy(IDS[:1, :9])
    pads = {"left": (5, 0), "right": (0, 5), "both": (2, 3), "inside": (0, 0)}[side]
    ids = torch.nn.functional.pad(real, pads, value=7)
    mask = torch.nn.functional.pad(torch.ones_like(real), pads)
    if side == "inside":
        ids = torch.cat([real[:, :4], torch.full((1, 3), 7), real[:, 4:]], 1)
        mask = torch.tensor([[1] * 4 + [0] * 3 + [1] * 5])
    before = model(torch.from_numpy(IDS[1:, :6])).cache_params  # something to continue from
    for cache in (None, before):
        alone = model(real, cache_params=copied(cache))
        padded = model(ids, attention_mask=mask, cache_params=copied(cache))
        kept = padded.logits[:, mask[0].bool()]
        assert relative(kept.numpy(), alone.logits.numpy()) < 1e-5
        for one, two in zip(padded.cache_params.states, alone.cache_params.states, strict=True):
            assert relative(one.conv.numpy(), two.conv.numpy()) < 1e-5
            assert relative(one.scan.numpy(), two.scan.numpy()) < 1e-5
        unmasked = model(ids, cache_params=copied(cache))
        if side != "right":
            assert relative(unmasked.logits[:, mask[0].bool()].numpy(), alone.logits.numpy()) > 1e-3


def copied(cache: object) -> object:
    import copy

    return copy.deepcopy(cache)


@torch.no_grad()
def test_masked_steps_leave_the_states_bit_for_bit() -> None:
    torch.manual_seed(0)
    mixer = MatMamba2(16, heads=4, head_dim=8, d_state=5, chunk_size=4)
    u = torch.randn(2, 11, 16)
    _, state = mixer(u)
    _, after = mixer(torch.randn(2, 3, 16), None, state, torch.zeros(2, 3, dtype=torch.bool))
    assert torch.equal(after.conv, state.conv)
    assert torch.equal(after.scan, state.scan)


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 7, 8, 9, 29])
def test_rows_of_different_lengths_in_a_batch(model: MatMambaForCausalLM, length: int) -> None:
    ids = torch.from_numpy(np.random.default_rng(length).integers(0, 104, (2, 29)))
    mask = torch.ones_like(ids)
    mask[0, : 29 - length] = 0
    got = model(ids, attention_mask=mask).logits
    assert relative(got[0, 29 - length :].numpy(), model(ids[:1, 29 - length :]).logits[0].numpy()) < 1e-5
    assert relative(got[1].numpy(), model(ids[1:]).logits[0].numpy()) < 1e-5


# ---------------------------------------------------------------------------------------- transformers
GENERATE = """
import sys
if sys.argv[1] == "with matexport":
    import matexport.hf
else:
    sys.modules["matexport"] = None
import torch
from transformers import AutoModelForCausalLM

def load(folder):
    options = {} if sys.argv[1] != "custom code" else {"trust_remote_code": True}
    return AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32, **options)

model, info = load(sys.argv[2])
assert not any(info.values()), info
ids = torch.tensor([[3, 5, 7, 9, 11, 13]])
greedy = dict(max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
tokens = model.generate(ids, **greedy)
assert tokens.shape == (1, 14)
assert torch.equal(model.generate(ids, use_cache=False, **greedy), tokens)
by_hand = ids
for _ in range(8):
    by_hand = torch.cat([by_hand, model(by_hand).logits[:, -1:].argmax(-1)], 1)
assert torch.equal(by_hand, tokens)
padded = torch.cat([torch.zeros(1, 3, dtype=ids.dtype), ids[:, :3]], 1)
batch, mask = torch.cat([ids, padded]), torch.tensor([[1] * 6, [0] * 3 + [1] * 3])
both = model.generate(batch, attention_mask=mask, **greedy)
assert torch.equal(both[0], tokens[0])
assert torch.equal(both[1, 6:], model.generate(ids[:, :3], **greedy)[0, 3:])
if "mamba2" != model.config.model_type:
    beams = model.generate(ids, num_beams=3, **greedy)
    assert beams.shape == (1, 14)
    long = model.generate(tokens, **greedy)
    cache = model(tokens[:, :-1]).cache_params
    assert torch.equal(model.generate(tokens, cache_params=cache, **greedy), long)
assert model(ids, labels=ids).loss.isfinite()
model.save_pretrained(sys.argv[3])
assert torch.equal(load(sys.argv[3])[0].generate(ids, **greedy), tokens)
"""


@pytest.mark.parametrize(
    ("how", "dims"),
    [
        ("with matexport", [32, 8, 1]),
        ("custom code", [16, 16, 16]),
        ("stock", [64, 64, 64]),
        ("stock", [32, 32, 32]),
    ],
    ids=str,
)
def test_generate(language: Path, tmp_path: Path, how: str, dims: list[int | None]) -> None:
    mx.plan(language, row_of(dims)).write(tmp_path / "slice")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", GENERATE, how, str(tmp_path / "slice"), str(tmp_path / "saved")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --------------------------------------------------------------------------------------------- inspect
@pytest.mark.parametrize(
    ("dims", "takes", "reason"),
    [
        ([64, 64, 64], "llama.cpp mamba_ssm matexport transformers vLLM", ""),
        ([32, 32, 32], "mamba_ssm matexport transformers vLLM", "must be 2"),
        ([16, 16, 16], "matexport", "inner width / d_model is 0.5, and it must be a whole number"),
        ([64, 32, 32], "matexport", "its layers differ in width"),
    ],
    ids=str,
)
def test_which_loaders_take_it(language: Path, tmp_path: Path, dims: list[int | None], takes: str, reason: str) -> None:
    mx.plan(language, row_of(dims)).write(tmp_path / "out")
    loaders = matexport("inspect", "-m", tmp_path / "out", "--format", "json").json["loaders"]
    assert sorted(entry["loader"].split()[0] for entry in loaders if entry["takes"]) == sorted(takes.split())
    assert any(reason in entry["reason"] for entry in loaders)
    assert "loads in:" in matexport("inspect", "-m", tmp_path / "out").stdout


def test_a_tokenizer_of_ones_own(language: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    end = {"id": 7, "content": "<end>", "special": True}
    (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": [end, {"id": 3, "content": "<pad>"}]}))
    names = {"eos_token": "<end>", "bos_token": {"content": "<end>"}, "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    (folder / "weights.bin").write_text("not copied")
    command = ["slice", "-m", language, "-o", tmp_path / "out", "--tokenizer"]
    assert matexport(*command, folder).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert [config[f"{kind}_token_id"] for kind in ("eos", "bos", "pad")] == [7, 7, 3]
    assert {"tokenizer.json", "tokenizer_config.json"} <= content(tmp_path / "out").keys()
    assert "weights.bin" not in content(tmp_path / "out")
    assert mx.verify(tmp_path / "out", language).passed
    result = matexport(*command, tmp_path / "nothing", "--force")
    assert result.code == 4
    assert "holds no tokenizer files" in result.stderr


def test_token_ids_out_of_range(language: Path, tmp_path: Path) -> None:
    mx.plan(language, row_of([8, 8, 8])).write(tmp_path / "out")
    for ids, code in (([[1, 2, 3]] * 4, 0), ([[1] * 90], 0), ([[104] * 37], 4), ([[-1] * 37], 4), ([[1]], 4)):
        np.savez(tmp_path / "ids.npz", input_ids=np.array(ids))
        command = ["verify", "-m", tmp_path / "out", "--source", language, "--inputs", tmp_path / "ids.npz"]
        assert matexport(*command).code == code
