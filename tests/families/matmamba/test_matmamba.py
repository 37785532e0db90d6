"""MatMamba-Vision: the oracle against the authors' rules, every slice against the oracle, the ops against float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import matexport as mx
from matexport.checkpoint import open_checkpoint
from matexport.dims import Dims
from matexport.errors import TableError
from matexport.families.matmamba.layout import leading_heads, mixer_views, read_model
from matexport.families.matmamba.modeling import causal_conv1d, ssd_scan
from matexport.families.matmamba.oracle import load_model
from matexport.planning import View
from matexport.slice_table import Row, parse_table
from matexport_plugins.causal_conv1d import reference as conv_reference
from matexport_plugins.mamba2_scan import reference as scan_reference
from strategies import row_of
from support import vision_checkpoint, vision_config, vision_tensors, write_checkpoint
from upstream import BROKEN
from upstream import vision as upstream_vision

RNG = np.random.default_rng(7)
PIXELS = RNG.standard_normal((3, 3, 12, 12)).astype(np.float32)


def relative(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


WIDTHS: list[list[int | None]] = [
    [64, 64, 64], [32, 32, 32], [16, 16, 16], [8, 8, 8],  # trained
    [1, 1, 1], [64, 1, 33], [5, 17, 64],  # any number of heads
    [32, None, 8], [None, None, 64], [16, 16, None],  # skipped layers
]  # fmt: skip


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_oracle_equals_the_authors_rules(vision: Path, dims: list[int | None]) -> None:
    planned = mx.plan(vision, row_of(dims))
    got = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)({"pixel_values": PIXELS})["logits"]
    config = vision_config()
    assert relative(got, upstream_vision(PIXELS, vision_tensors(config), config, dims)) < 1e-5


@pytest.mark.parametrize("broken", BROKEN)
def test_each_rule_matters(vision: Path, broken: str) -> None:
    """Negative controls: with one rule broken, the authors' forward is something else altogether."""
    config = vision_config()
    tensors = vision_tensors(config)
    right = upstream_vision(PIXELS, tensors, config, [16, 16, 16])
    assert relative(upstream_vision(PIXELS, tensors, config, [16, 16, 16], broken), right) > 1e-2


@pytest.mark.parametrize("dims", WIDTHS, ids=str)
def test_slices_equal_the_oracle_bit_for_bit(vision: Path, tmp_path: Path, dims: list[int | None]) -> None:
    planned = mx.plan(vision, row_of(dims))
    planned.write(tmp_path / "out")
    inputs = {"pixel_values": PIXELS}
    want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)(inputs)["logits"]
    got = planned.family.load_slice(open_checkpoint(tmp_path / "out"))(inputs)["logits"]
    assert np.array_equal(got, want)
    wrong = [layer if layer.width == 1 else type(layer)(layer.source, layer.width - 1) for layer in planned.plan.layers]
    if wrong != list(planned.plan.layers):
        other = planned.family.load_oracle(planned.checkpoint, wrong)(inputs)["logits"]
        assert not np.array_equal(got, other)


def test_every_multiple_of_a_head_is_legal(tmp_path: Path) -> None:
    """d_model 128: heads of 4 channels, so widths are even; all 32 pairs of them slice, one bit more does not."""
    source = vision_checkpoint(tmp_path / "c", d_model=128, n_layer=1)
    for heads in range(1, 65):
        plan = mx.plan(source, row_of([2 * heads])).plan
        assert plan.config["num_heads"] == [heads]
        assert plan.tensors["layers.0.mixer.D"].shape == (heads,)
    for width in (0, 1, 63, 130, 2**31):
        with pytest.raises(TableError, match=r"whole heads(.|\n)*legal widths: 2, 4, 6, ..., 126, 128"):
            mx.plan(source, row_of([width]))


def test_groups(tmp_path: Path) -> None:
    """Two groups of heads: the first heads of each are kept, the norm is over each group."""
    source = vision_checkpoint(tmp_path / "c", ngroups=2)
    planned = mx.plan(source, row_of([64, 6, 32]))
    assert planned.plan.tensors["layers.1.mixer.D"].view.ranges == (((0, 3), (32, 35)),)
    planned.write(tmp_path / "out")
    assert mx.verify(tmp_path / "out", source).passed
    with pytest.raises(TableError, match="legal widths: 2, 4"):
        mx.plan(source, row_of([64, 5, 32]))


def test_any_set_of_heads(vision: Path) -> None:
    """Index sets, not only prefixes: the views of arbitrary heads are the oracle's narrowing by those indices."""
    checkpoint = open_checkpoint(vision)
    mixer = read_model(checkpoint).mixers[0]
    heads = [40, 3, 4, 63, 0]
    prefix = "layers.0.mixer."
    own = {name: checkpoint.tensors[prefix + name] for name in mixer.shapes(64)}
    cut = {name: view.of(checkpoint.read(prefix + name)) for name, view in mixer_views(own, mixer, heads).items()}
    want = load_model(checkpoint).layers[0].mixer.weights(heads)
    names = (
        "in_proj.weight",
        "conv1d.weight",
        "conv1d.bias",
        "dt_bias",
        "A_log",
        "D",
        "norm.weight",
        "out_proj.weight",
    )
    for name, tensor in zip(names, want, strict=True):
        assert np.array_equal(cut[name], tensor.detach().numpy()), name
    assert leading_heads(mixer, 5) != heads


def test_widths_come_from_shapes_not_from_assumptions(tmp_path: Path) -> None:
    """A checkpoint of 16 heads (head dim 8) slices like one of 64: nothing assumes a head dim."""
    config = vision_config()
    source = write_checkpoint(tmp_path / "c", config, vision_tensors(config, heads=16))
    planned = mx.plan(source, row_of([4, 8, 64]))
    assert planned.plan.config["num_heads"] == [1, 2, 16]
    planned.write(tmp_path / "out")
    assert mx.verify(tmp_path / "out", source).passed
    with pytest.raises(TableError, match="legal widths: 4, 8, 12"):
        mx.plan(source, row_of([5, 8, 64]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (Row("r", skipped=(3,)), r"layer 3 does not exist(.|\n)*0 to 2"),
        (Row("r", skipped=(1, 1)), "skipped twice"),
        (Row("r", skipped=(0, 1, 2)), "skips every layer"),
        (Row("r", layers=2), "declares 2 layers"),
        (Row("r", mamba=Dims(head=(8, 8))), "gives 2 widths for 3 kept layers"),
        (Row("r", mamba=Dims(head=(8,) * 4)), "gives 4 widths for 3 kept layers"),
        (Row("r", (1,), mamba=Dims(head=(8,) * 3)), "gives 3 widths for 2 kept layers"),
        (Row("r", ffn=Dims(fill=8192)), "not nested along 'FFN Hidden Dims'"),
        (Row("r", mamba=Dims(fill=65)), "at most 64 of 2 channels"),
    ],
)
def test_rows_that_do_not_fit(vision: Path, row: Row, message: str) -> None:
    with pytest.raises(TableError, match=message):
        mx.plan(vision, row)


def test_errors_name_file_row_and_column(vision: Path) -> None:
    table = parse_table('name,Mamba Dims\nfine,8\nodd,"[8, 8, 200]"\n', "mine.csv")
    with pytest.raises(TableError, match=r"mine.csv, line 3 \('odd'\), column 'Mamba Dims': width 200 of layer 2"):
        mx.plan(vision, "odd", table=table)


def test_untrained_widths_get_a_note(tmp_path: Path) -> None:
    source = vision_checkpoint(tmp_path / "c")
    assert mx.plan(source, row_of([7, 7, 7])).plan.notes == ()  # nothing is known of this model
    (source / "slices.csv").write_text('name,Mamba Dims\nhalf,32\nmix,"[32, 8, 8]"\n')
    assert mx.plan(source, "half").plan.notes == ()
    assert mx.plan(source, "mix").plan.notes == ("widths [8] were not trained (trained: [32, 64])",)
    assert "skipping [1] costs quality" in mx.plan(source, row_of([32, None, 32])).plan.notes[0]


@pytest.mark.parametrize("change", [{"rms_norm": True}, {"pool": "avg"}, {"norm_epsilon": 1e-3}])
def test_variants_of_the_architecture(tmp_path: Path, change: dict[str, object]) -> None:
    config = {**vision_config(), **change}
    source = write_checkpoint(tmp_path / "c", config, vision_tensors(config))
    planned = mx.plan(source, row_of([8, None, 64]))
    planned.write(tmp_path / "out")
    mx.export_onnx(planned, tmp_path / "onnx")
    assert mx.verify(tmp_path / "out", source).passed
    assert mx.verify(tmp_path / "onnx", source).passed


# --------------------------------------------------------------------------------------------- ops
@pytest.mark.parametrize("length", [1, 7, 8, 9, 3 * 8 + 5])
@pytest.mark.parametrize(("heads", "groups", "head_dim"), [(1, 1, 80), (8, 2, 3), (8, 8, 16), (6, 1, 2), (25, 1, 24)])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_against_float64(length: int, heads: int, groups: int, head_dim: int, with_state: bool) -> None:
    rng = np.random.default_rng(length * heads)
    b, n, chunk = 2, 5, 8
    x = rng.standard_normal((b, length, heads * head_dim))
    dt_raw = 3 * rng.standard_normal((b, length, heads))
    dt_raw[:, ::3] += 25  # softplus beyond 20, and decays that underflow
    A, D, bias = -rng.uniform(1, 16, heads), rng.standard_normal(heads), rng.standard_normal(heads)
    B, C = rng.standard_normal((2, b, length, groups * n))
    state = rng.standard_normal((b, heads, n, head_dim)) if with_state else None
    want, want_state = scan_reference.mamba2_scan(x, dt_raw, A, B, C, D, bias, state, groups=groups)

    def single(array: np.ndarray, *shape: int) -> torch.Tensor:
        return torch.tensor(array, dtype=torch.float32).reshape(shape or array.shape)

    y, final = ssd_scan(
        single(x, b, length, heads, head_dim),
        torch.nn.functional.softplus(single(dt_raw) + single(bias)),
        single(A), single(B, b, length, groups, n), single(C, b, length, groups, n), single(D), chunk,
        None if state is None else single(state),
    )  # fmt: skip
    assert relative(y.reshape(b, length, -1).numpy(), want) < 1e-5
    assert relative(final.numpy(), want_state) < 1e-5


def test_large_steps_give_finite_values_and_gradients() -> None:
    """dt * |A| = 480 a step: without the mask before exp, the gradient of the masked half is inf * 0 = NaN."""
    dt = torch.full((1, 40, 1), 30.0, requires_grad=True)
    B, C = torch.ones(2, 1, 40, 1, 3)
    y, state = ssd_scan(torch.ones(1, 40, 1, 4), dt, torch.tensor([-16.0]), B, C, torch.ones(1), 16)
    y.sum().backward()
    assert dt.grad is not None
    assert all(torch.isfinite(t).all() for t in (y, state, dt.grad))


@pytest.mark.parametrize("length", [1, 2, 3, 10])
@pytest.mark.parametrize("kernel", [2, 4])
def test_convolution_against_float64(length: int, kernel: int) -> None:
    rng = np.random.default_rng(length)
    x, weight, bias = rng.standard_normal((2, length, 5)), rng.standard_normal((5, 1, kernel)), rng.standard_normal(5)
    for state in (None, rng.standard_normal((2, 5, kernel - 1))):
        want, want_state = conv_reference.causal_conv1d(x, weight, bias, state)
        y, final = causal_conv1d(
            *(torch.tensor(v) for v in (x, weight, bias)), None if state is None else torch.tensor(state)
        )
        assert np.allclose(y.numpy(), want, atol=1e-12)
        assert np.array_equal(final.numpy(), want_state)


def test_masked_steps_are_no_ops_in_the_references() -> None:
    rng = np.random.default_rng(3)
    x, dt, B, C = (rng.standard_normal((1, 6, k)) for k in (8, 2, 3, 3))
    A, D, bias = -rng.uniform(1, 16, 2), *rng.standard_normal((2, 2))
    keep = [0, 2, 3, 5]
    mask = np.isin(np.arange(6), keep)[None]
    y, state = scan_reference.mamba2_scan(x, dt, A, B, C, D, bias, mask=mask)
    alone, alone_state = scan_reference.mamba2_scan(x[:, keep], dt[:, keep], A, B[:, keep], C[:, keep], D, bias)
    assert np.array_equal(state, alone_state)
    assert np.array_equal(y[:, keep], alone)
    weight, bias = rng.standard_normal((8, 1, 4)), rng.standard_normal(8)
    y, state = conv_reference.causal_conv1d(x, weight, bias, mask=mask)
    alone, alone_state = conv_reference.causal_conv1d(x[:, keep], weight, bias)
    assert np.array_equal(state, alone_state)
    assert np.array_equal(y[:, keep], alone)


def test_views_are_views(vision: Path) -> None:
    """The plan of the whole model takes everything, so that nothing is lost on the way."""
    planned = mx.plan(vision)
    for name, tensor in planned.plan.tensors.items():
        source = planned.checkpoint.tensors[name]
        assert tensor.view == View(name, source.shape, tuple(((0, n),) for n in source.shape), source.shape)


def test_sizes_that_the_config_leaves_out(tmp_path: Path) -> None:
    """`ssm_cfg: {}` with a state size and a kernel that are not the defaults: the slice says them, and loads."""
    config = vision_config(d_conv=3)
    tensors = vision_tensors(config)
    source = write_checkpoint(tmp_path / "c", {**config, "ssm_cfg": {}}, tensors)
    planned = mx.plan(source, row_of([8, 16, 32]))
    assert planned.plan.config["ssm_cfg"] == {"d_state": 8, "d_conv": 3}
    planned.write(tmp_path / "out")
    assert mx.verify(tmp_path / "out", source).passed
