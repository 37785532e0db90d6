from __future__ import annotations

import subprocess
import sys
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from matexport.checkpoint import Checkpoint, open_checkpoint
from matexport.errors import CheckpointError
from matexport.planning import View, part, whole
from matexport.streaming import Pool, read, stream, stream_transposed
from strategies import views

RNG = np.random.default_rng(0)
ARRAYS = {
    "cube": RNG.standard_normal((4, 5, 6)).astype(np.float32),
    "wide": RNG.standard_normal((40, 3000)).astype(np.float16),
    "scalar": np.array(3, np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("stream")
    (folder / "config.json").write_text("{}")
    save_file(ARRAYS, folder / "model.safetensors")
    return open_checkpoint(folder)


def joined(blocks: object) -> np.ndarray:
    return np.concatenate([block.copy() for block in blocks])  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ARRAYS)
def test_whole_tensors(checkpoint: Checkpoint, name: str) -> None:
    assert np.array_equal(read(checkpoint, whole(checkpoint.tensors[name])), ARRAYS[name])


@given(st.data(), st.sampled_from([16, 100, 1 << 20]))
@settings(deadline=None)
def test_any_view_in_any_block_size(checkpoint: Checkpoint, data: st.DataObject, block: int) -> None:
    name, shape = data.draw(st.sampled_from([("cube", (4, 5, 6)), ("cube", (20, 6)), ("wide", (40, 30, 100))]))
    view = data.draw(views(shape, name))
    got = [b.copy() for b in stream(checkpoint, view, block=block)]
    assert np.array_equal(np.concatenate(got), view.of(ARRAYS[name]).reshape(-1))


@given(st.data(), st.sampled_from([16, 120, 480]), st.integers(0, 400))
@settings(deadline=None)
def test_from_any_element(checkpoint: Checkpoint, data: st.DataObject, block: int, start: int) -> None:
    name, shape = data.draw(st.sampled_from([("cube", (4, 5, 6)), ("cube", (20, 6)), ("wide", (40, 30, 100))]))
    view = data.draw(views(shape, name))
    got = [b.copy() for b in stream(checkpoint, view, start=start, block=block)]
    want = view.of(ARRAYS[name]).reshape(-1)[start:]
    assert np.array_equal(np.concatenate([want[:0], *got]), want)


@given(st.data(), st.sampled_from([16, 120, 480]), st.integers(1, 4))
@settings(deadline=None)
def test_arrays_last_as_long_as_the_pool_says(
    checkpoint: Checkpoint, data: st.DataObject, block: int, count: int
) -> None:
    """Over several tensors, blocks that fill a buffer exactly among them: what hashes a block later sees that block."""
    pool, kept = Pool(count, block), deque[tuple[np.ndarray, np.ndarray]](maxlen=count)
    for _ in range(data.draw(st.integers(1, 4))):
        name, shape = data.draw(st.sampled_from([("cube", (4, 5, 6)), ("cube", (20, 6)), ("wide", (40, 30, 100))]))
        for array in stream(checkpoint, data.draw(views(shape, name)), pool=pool):
            kept.append((array, array.copy()))
            assert all(np.array_equal(now, then) for now, then in kept)


@pytest.mark.parametrize("columns", [((0, 1500),), ((100, 110), (2000, 3000)), ((7, 8),)])
def test_columns_directly_and_gathered(checkpoint: Checkpoint, columns: tuple[tuple[int, int], ...]) -> None:
    view = part(checkpoint.tensors["wide"], 1, columns)
    want = view.of(ARRAYS["wide"])
    assert np.array_equal(joined(stream(checkpoint, view, block=10_000)).reshape(view.shape), want)
    assert np.array_equal(joined(stream_transposed(checkpoint, view, block=10_000)).reshape(view.shape[::-1]), want.T)


def test_transposing_a_flattened_view(checkpoint: Checkpoint) -> None:
    view = View("cube", (4, 5, 6), (((1, 3),), ((0, 5),), ((0, 6),)), (10, 6))
    want = ARRAYS["cube"][1:3].reshape(10, 6).T
    assert np.array_equal(joined(stream_transposed(checkpoint, view, block=64)).reshape(6, 10), want)


def test_a_source_that_ends_early(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": np.ones(1000, np.float32)}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path)
    with (tmp_path / "model.safetensors").open("r+b") as f:
        f.truncate(2000)
    with pytest.raises(CheckpointError, match="inside a tensor"):
        list(stream(checkpoint, whole(checkpoint.tensors["a"])))
    with pytest.raises(CheckpointError, match="inside a tensor"):
        checkpoint.read("a")


def test_memory_does_not_grow_with_the_tensor(tmp_path: Path) -> None:
    """A 600 MB matrix, by columns and transposed, in under 150 MB. VmHWM: unlike ru_maxrss it is not inherited."""
    header = b'{"a":{"dtype":"F32","shape":[10000,15000],"data_offsets":[0,600000000]}}'
    (tmp_path / "config.json").write_text("{}")
    with (tmp_path / "model.safetensors").open("wb") as f:
        f.write(len(header).to_bytes(8, "little") + header)
        f.truncate(8 + len(header) + 600_000_000)  # sparse: no disk is used
    code = (
        "import sys\nfrom matexport.checkpoint import open_checkpoint\nfrom matexport.planning import part\n"
        "from matexport.streaming import stream, stream_transposed\n"
        "c = open_checkpoint(sys.argv[1])\n"
        "view = part(c.tensors['a'], 1, [(0, 500), (7000, 7900)])\n"
        "total = sum(b.nbytes for b in stream(c, view)) + sum(b.nbytes for b in stream_transposed(c, view))\n"
        "peak = [l for l in open('/proc/self/status') if l.startswith('VmHWM')][0].split()[1]\n"
        "print(total, peak)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    total, peak = map(int, done.stdout.split())
    assert total == 2 * 1400 * 10000 * 4
    assert peak < 150_000  # kB
