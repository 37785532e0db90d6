"""The digits data set (1,797 real 8x8 scans, bundled with scikit-learn) and its fixed split."""

import json
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

HERE = Path(__file__).parent


def load_split(part: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 3, 8, 8) float32 in [-1, 1] and labels (n,) int64 of "train", "validation" or "heldout"."""
    index = json.loads((HERE / "split.json").read_text())[part]
    digits = load_digits()
    images = (digits.images[index] / 8 - 1).astype(np.float32)
    return np.repeat(images[:, None], 3, axis=1), digits.target[index].astype(np.int64)


def write_split(seed: int = 0) -> None:
    """Draws the split: three fifths to train on, one fifth to tune on, one fifth held out, stratified by class."""
    target, rng = load_digits().target, np.random.default_rng(seed)
    split: dict[str, list[int]] = {"train": [], "validation": [], "heldout": []}
    for digit in range(10):
        index = rng.permutation(np.flatnonzero(target == digit)).tolist()
        fifth = round(len(index) / 5)
        split["heldout"] += index[:fifth]
        split["validation"] += index[fifth : 2 * fifth]
        split["train"] += index[2 * fifth :]
    text = json.dumps({part: sorted(index) for part, index in split.items()})
    (HERE / "split.json").write_text(text.replace('], "', '],\n "') + "\n")


if __name__ == "__main__":
    write_split()
