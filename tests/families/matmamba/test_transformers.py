"""The slice as a transformers user meets it: Auto classes, with matexport or with the custom code alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import matexport as mx
from support import DIGITS, content

SCRIPT = """
import sys
if sys.argv[1] == "with matexport":
    import matexport.hf
else:
    sys.modules["matexport"] = None  # as if it were not installed
import numpy as np, torch
from transformers import AutoModelForImageClassification

def load(folder):
    options = {} if sys.argv[1] == "with matexport" else {"trust_remote_code": True}
    return AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True, **options)

model, info = load(sys.argv[2])
assert not any(info.values()), info
pixels = torch.from_numpy(np.load(sys.argv[3]))
logits = model(pixel_values=pixels).logits.detach()
model.save_pretrained(sys.argv[4])
assert torch.equal(load(sys.argv[4])[0](pixels).logits, logits)
assert model.config.num_labels == 10 and model.config.hidden_size == 64
assert model(pixels, labels=torch.zeros(len(pixels), dtype=torch.int64)).loss.isfinite()
np.save(sys.argv[5], logits.numpy())
"""


@pytest.mark.parametrize("how", ["with matexport", "custom code"])
def test_auto_model(tmp_path: Path, how: str) -> None:
    planned = mx.plan(DIGITS, "narrowing")
    planned.write(tmp_path / "slice")
    pixels = planned.family.sample_inputs(planned.checkpoint.config, 5, 0)["pixel_values"]
    np.save(tmp_path / "pixels.npy", pixels)
    paths = [str(tmp_path / name) for name in ("slice", "pixels.npy", "saved", "logits.npy")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, how, *paths], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    want = planned.family.load_oracle(planned.checkpoint, planned.plan.layers)({"pixel_values": pixels})["logits"]
    assert np.abs(np.load(tmp_path / "logits.npy") - want).max() < 1e-5
    saved = content(tmp_path / "saved")
    assert any(name.startswith("modeling") for name in saved)  # saved again, it still loads without matexport


def test_the_custom_code_is_self_contained(tmp_path: Path) -> None:
    mx.plan(DIGITS, "eighth").write(tmp_path / "out")
    code = (tmp_path / "out" / "modeling_matmamba.py").read_text()
    assert "import matexport" not in code
    assert "from matexport" not in code
