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
_FITTED = f"{_TRAIN} --photos .runs/fitted --folder .runs/regression"
_FACES = f"{_TRAIN} --photos .runs/faces --convolutions --precomputed .runs/latents_of_faces"
_ENCODER = f"{_FACES} --folder .runs/encoder"
_HYPERNET = f"{_FACES} --folder .runs/hypernet"
_LEARNED = f"{_FACES} --folder .runs/basis"
_NARROW = f"{_FACES} --folder .runs/narrow --down-dim 25 --up-dim 12"
_CHECK = f"{_FACES} --folder .runs/check --overfit 16"
_LEVELS = "--min-timestep 0.05 --max-timestep 0.95"
_DIFFUSION = f"--rank 4 --depth 2 --warmup 20 --max-photos 2 {_LEVELS} --sample-every 0"
_SAME_ENCODER = f"--encoder .runs/hypernet/encoder.safetensors {_DIFFUSION}"
STAGES = {
    "pictures": "miniature.pictures",
    "vae": "miniature.vae",
    "latents": "miniature.latents",
    "text": "miniature.text",
    "base": "miniature.base",
    "judge_a": "miniature.judge --architecture a",
    "judge_b": "miniature.judge --architecture b",
    "pack": "miniature.checkpoint pack",
    "diffusers": "miniature.checkpoint diffusers",
    "faces": "miniature.photos --folder .runs/faces --people 13400 --photos 4 --masks face",
    "latents_of_faces": f"hdb_core.train precompute {_ENCODER}",
    "encoder": f"hdb_core.train pretrain {_ENCODER} --portraits --pretrain-steps 8000 --pretrain-people 32",
    "pretrain": f"hdb_core.train pretrain {_HYPERNET} --portraits --pretrain-steps 2800 "
    "--encoder .runs/encoder/encoder.safetensors",
    "hypernet": f"hdb_core.train train {_HYPERNET} {_DIFFUSION} --steps 1000",
    "evaluate": f"hdb_core.train evaluate {_HYPERNET} --max-photos 3 {_LEVELS}",
    "pack_hypernet": "miniature.checkpoint pack",
    # Of no shipped file, for the benchmarks: a check on sixteen people, fitted people, and hypernetworks in a learned
    # basis and in a narrow one.
    "check": f"hdb_core.train train {_CHECK} {_SAME_ENCODER} --people 16 --steps 200",
    "evaluate_check": f"hdb_core.train evaluate {_CHECK} --max-photos 1 {_LEVELS}",
    "fitted": "miniature.photos --folder .runs/fitted --people 384 --photos 4",
    "precompute": f"hdb_core.train precompute {_FITTED} --fit-steps 40 --min-timestep 0.15",
    "people": "miniature.photos --folder .runs/people --people 3400 --photos 4",
    "basis": f"hdb_core.train basis {_TRAIN} --photos .runs/people --folder .runs/basis --convolutions --draws 4 "
    "--min-timestep 0 --max-timestep 0.8 --held-out 0.005",
    "hypernet_in_basis": f"hdb_core.train train {_LEARNED} {_SAME_ENCODER} --steps 1000",
    "hypernet_in_narrow_basis": f"hdb_core.train train {_NARROW} {_SAME_ENCODER} --steps 1000",
}
MADE_BY = {
    "miniature_vae.safetensors": ("pictures", "vae", "latents", "pack"),
    "miniature_base.safetensors": ("pictures", "vae", "latents", "text", "base", "pack"),
    "miniature_hypernet.safetensors": (
        *("diffusers", "faces", "latents_of_faces", "encoder", "pretrain", "hypernet", "evaluate", "pack_hypernet"),
    ),
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
