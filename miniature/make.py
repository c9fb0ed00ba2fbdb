"""Makes every file of ``weights/`` again: ``python -m miniature.make``, or one of its stages by name.

Stages resume where they were stopped. At the end ``weights/manifest.json`` says of each file how it was made.
"""

import argparse
import hashlib
import json
import shlex
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

from safetensors import safe_open

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights"
RUNS = ROOT / ".runs"
_TRAIN = "--model .runs/diffusers --image-size 128"
_FACES = f"{_TRAIN} --photos .runs/faces"
_SHARED = "--set precomputed=.runs/latents_of_faces"
_LEVELS = "train.noise=[0.05,0.95] evaluate.noise=[0.05,0.95]"
_NET = f"net.depth=2 net.predict_down=false train.warmup=20 {_LEVELS} samples.every=0"
_DIFFUSION = f"{_NET} train.max_photos=2"
_SAME_ENCODER = f"{_DIFFUSION} begin_with=.runs/hypernet/encoder.safetensors pretrain.steps=0"
STAGES = {
    "pictures": "miniature.pictures",
    "vae": "miniature.vae",
    "text": "miniature.text",
    "base": "miniature.base",
    "judge_a": "miniature.judge --architecture a",
    "judge_b": "miniature.judge --architecture b",
    "pack": "miniature.checkpoint pack",
    "diffusers": "miniature.checkpoint diffusers",
    "faces": "miniature.photos --folder .runs/faces --people 13400 --photos 4 --masks face",
    "encoder": f"hdb_core.train .runs/encoder {_FACES} --steps 0 {_SHARED} pretrain.portraits=true "
    "pretrain.steps=8000 pretrain.people=32",
    "hypernet": f"hdb_core.train .runs/hypernet {_FACES} --rank 4 --steps 1000 {_SHARED} pretrain.portraits=true "
    f"pretrain.steps=2800 begin_with=.runs/encoder/encoder.safetensors {_DIFFUSION} evaluate.photos=3",
    # From there, so that the token alone means the person. The last of the same people: who is held out, is so in both.
    "other_faces": "miniature.photos --folder .runs/other_faces --after 7400 --people 6000 --photos 4 --masks face",
    "token": f"hdb_core.train .runs/token {_TRAIN} --photos .runs/other_faces --rank 4 --steps 500 --set pretrain.steps=0 "
    f"begin_with=.runs/hypernet/hypernet.safetensors {_NET} train.max_photos=3 train.learning_rate=5e-4 "
    "train.class_weight=1 evaluate.photos=3",
    "pack_hypernet": "miniature.checkpoint pack",
    "control": "miniature.control",
    "pack_control": "miniature.checkpoint pack",
    # Of no shipped file, for the benchmarks: a check on sixteen people, a learned basis, and a hypernetwork in a narrow one.
    "check": f"hdb_core.train .runs/check {_FACES} --overfit 16 --rank 4 --people 16 --steps 200 {_SHARED} "
    f"{_SAME_ENCODER}",
    "people": "miniature.photos --folder .runs/people --people 3400 --photos 4",
    "basis": f"hdb_core.train .runs/basis {_TRAIN} --photos .runs/people --stage basis --set basis.learn_from=64 "
    "held_out=0.005",
    "hypernet_in_narrow_basis": f"hdb_core.train .runs/narrow {_FACES} --rank 4 --steps 1000 {_SHARED} {_SAME_ENCODER} "
    "basis.down_dim=25 basis.up_dim=12",
}
MADE_BY = {
    "miniature_vae.safetensors": ("pictures", "vae", "pack"),
    "miniature_base.safetensors": ("pictures", "vae", "text", "base", "pack"),
    "miniature_hypernet.safetensors": (
        *("diffusers", "faces", "encoder", "hypernet", "other_faces", "token", "pack_hypernet"),
    ),
    "miniature_control.safetensors": ("control", "pack_control"),
    "judge_a.safetensors": ("pictures", "judge_a"),
    "judge_b.safetensors": ("pictures", "judge_b"),
}
LOGS = {
    "log.csv": "{}.csv",
    "pretrain.csv": "{}_encoder.csv",
    "evaluation.json": "{}_evaluation.json",
    "basis.json": "{}.json",
}
LICENCES = {
    "code and weights": "Apache-2.0",
    "drawings": "avataaars by Pablo Stanley, free for personal and commercial use, as packaged in python_avatars (MIT)",
}


def command(stage: str) -> str:
    """The command line of a stage, from the root of the repository."""
    return f"python -m {STAGES[stage]}"


def describe(path: Path) -> dict:
    """A file's entry in the manifest: bytes, hash, number of values, the stages that made it."""
    with safe_open(path, "pt") as file:
        values = sum(file.get_tensor(name).numel() for name in list(file.keys()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size, "values": values,
            "made_by": [command(stage) for stage in MADE_BY[path.name]]}  # fmt: skip


def write_manifest(weights: Path = WEIGHTS, runs: Path = RUNS) -> None:
    """Writes ``manifest.json`` and copies the logs of the trainings, in the folders of their stages, beside it."""
    (weights / "logs").mkdir(exist_ok=True)
    for stage, (log, copy) in product(STAGES, LOGS.items()):
        if (runs / stage / log).exists():
            shutil.copy(runs / stage / log, weights / "logs" / copy.format(stage))
    files = {name: describe(weights / name) for name in MADE_BY}
    (weights / "manifest.json").write_text(json.dumps({"files": files, "licences": LICENCES}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "stages", nargs="*", metavar="STAGE", help=f"of {', '.join([*STAGES, 'manifest'])}; all by default"
    )
    wanted = parser.parse_args().stages or [*STAGES, "manifest"]
    if unknown := set(wanted) - {*STAGES, "manifest"}:
        parser.error(f"no such stage: {', '.join(sorted(unknown))}")
    for stage in wanted:
        if stage == "manifest":
            write_manifest()
        else:
            print(command(stage), flush=True)
            subprocess.run([sys.executable, "-m", *shlex.split(STAGES[stage])], cwd=ROOT, check=True)


if __name__ == "__main__":
    main()
