"""Trains the nested MatMamba-Vision of this folder on the digits, at levels 1, 2, 4 and 8 jointly.

As in the MatMamba paper (arXiv 2410.06718, section 3.2) the loss is the mean over the levels; level l
is the first 64 / l heads of every layer. Settings were chosen on the validation digits; the held-out
ones are only reported. About ten minutes a seed and core:

    python examples/digits/train.py                     # seeds 0-4 into results.json, seed 0 into checkpoint/
    python examples/digits/train.py --seeds 0 --epochs 5 --tune
"""

import argparse
import json
import math
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
import torch.nn.functional as F
from data import HERE, load_split
from rich.progress import track
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from matexport.families.matmamba.modeling import MatMambaVisionConfig, MatMambaVisionForImageClassification

LEVELS = (1, 2, 4, 8)
HEADS = 64
# every key of MatMamba's released vision config.json, in its order
CONFIG = {
    "d_model": 64, "n_layer": 4, "d_intermediate": 0, "n_classes": 10, "patch_size": 2, "image_size": 8,
    "ssm_cfg": {"d_state": 16}, "attn_layer_idx": [], "attn_cfg": {}, "norm_epsilon": 1e-5, "rms_norm": False,
    "initializer_cfg": {}, "fused_add_norm": False, "residual_in_fp32": True, "drop_rate": 0.0,
    "drop_path_rate": 0.0, "proj_drop_rate": 0.0, "pool": "cls", "device": None, "dtype": None,
}  # fmt: skip


def submodel(level: int) -> list[tuple[int, range]]:
    return [(layer, range(HEADS // level)) for layer in range(CONFIG["n_layer"])]


def moved(images: torch.Tensor) -> torch.Tensor:
    """Each image shifted by up to a pixel, turned by up to 15 degrees, scaled by up to 15 %, sheared by up to 0.2."""
    count = len(images)
    angle, scale, shear, dx, dy = torch.rand(5, count) * 2 - 1
    angle, scale, shear = angle * math.radians(15), 1 + scale * 0.15, shear * 0.2
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos, shear - sin, dx / 4, sin, cos, dy / 4], -1)  # a pixel is 1/4: the image is 2 wide
    grid = F.affine_grid(rows.view(count, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in is background


@torch.no_grad()
def accuracy(model: MatMambaVisionForImageClassification, part: str) -> dict[int, float]:
    """Per level, the share of right predictions in per cent."""
    images, labels = (torch.from_numpy(a) for a in load_split(part))
    right = {level: model(images, submodel=submodel(level)).logits.argmax(-1) == labels for level in LEVELS}
    return {level: round(100 * hits.double().mean().item(), 2) for level, hits in right.items()}


def train(seed: int, epochs: int, lr: float, decay: float, batch: int) -> MatMambaVisionForImageClassification:
    torch.set_num_threads(1)  # the sums, and so the weights, do not depend on the number of cores
    torch.manual_seed(seed)
    model = MatMambaVisionForImageClassification(MatMambaVisionConfig(**CONFIG))
    images, labels = (torch.from_numpy(a) for a in load_split("train"))
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}], lr, (0.9, 0.99)
    )
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99))  # of about the last hundred steps
    steps = epochs * math.ceil(len(images) / batch)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warmup, 0.5 * (1 + math.cos(math.pi * s / steps)))
    )
    for _ in range(epochs):
        for index in torch.randperm(len(images)).split(batch):
            x, y = moved(images[index]), labels[index]
            losses = [
                F.cross_entropy(model(x, submodel=submodel(level)).logits, y, label_smoothing=0.1) for level in LEVELS
            ]
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average.update_parameters(model)
    return average.module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--decay", type=float, default=0.1, help="weight decay of the matrices")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--output", type=Path, default=HERE, help="folder for checkpoint/ and results.json")
    parser.add_argument("--tune", action="store_true", help="report validation accuracy only and write nothing")
    args = parser.parse_args()
    settings = {"epochs": args.epochs, "lr": args.lr, "decay": args.decay, "batch": args.batch}
    parts = ("validation",) if args.tune else ("validation", "heldout")
    results, models = {}, {}
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        runs = {pool.submit(train, seed, **settings): seed for seed in args.seeds}
        for run in track(as_completed(runs), f"training {len(runs)} seeds", total=len(runs)):
            seed, models[seed] = runs[run], run.result()
            results[seed] = {"seed": seed, **{part: accuracy(models[seed], part) for part in parts}}
            print(json.dumps(results[seed]), flush=True)
    if args.tune:
        return
    folder = args.output / "checkpoint"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(models[args.seeds[0]].state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # the library writes 0600 whatever the umask
    report = {"settings": settings, "accuracy_percent_by_level": [results[seed] for seed in args.seeds]}
    (args.output / "results.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
