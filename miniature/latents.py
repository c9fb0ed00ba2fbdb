"""The training pictures as latents of the trained VAE, once: ``python -m miniature.latents``.

Stored as float16 raw encoder outputs, a file a chunk, beside ``std.json``: the one number that scales them to unit
variance, which the expanded checkpoint carries as its ``vae_scale``.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny

from devtools.device import add_option
from hdb_core.files.atomic import replacing

from .packing import trained_weights
from .pictures import CHUNK, is_pair
from .training import to_device
from .vae import build_vae, to_tensor


def chunk_indices(chunk: int, pairs: bool) -> list[int]:
    """The picture indices behind the rows of a chunk file."""
    return [i for i in range(chunk * CHUNK, (chunk + 1) * CHUNK) if is_pair(i) == pairs]


@torch.inference_mode()
def encode(vae: AutoencoderTiny, pictures: np.ndarray, batch: int = 32) -> np.ndarray:
    """uint8 RGB (N, H, W, 3) to float16 raw latents (N, 4, H/8, W/8)."""
    device, parts = next(vae.parameters()).device, []
    for start in range(0, len(pictures), batch):
        pixels = to_device(to_tensor(pictures[start : start + batch]), device)
        parts.append(vae.encoder(pixels.to(torch.bfloat16, memory_format=torch.channels_last)).float())
    return torch.cat(parts).cpu().numpy().astype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, default=Path(".runs/pictures"))
    parser.add_argument(
        "--vae", type=Path, default=Path(".runs/vae"), help="its run, or weights/miniature_vae.safetensors"
    )
    parser.add_argument("--folder", type=Path, default=Path(".runs/latents"))
    add_option(parser)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    vae = build_vae()
    vae.load_state_dict(trained_weights(args.vae))
    vae = vae.to(args.device, torch.bfloat16).eval()
    for source in sorted(args.pictures.glob("singles_*.npy")):
        for name in (source.name.replace("singles", "pairs"), source.name):
            target = args.folder / name
            if not target.exists():
                with replacing(target) as partial, partial.open("wb") as file:
                    np.save(file, encode(vae, np.load(args.pictures / name)))
        if not (args.folder / "std.json").exists():
            first = np.load(args.folder / source.name).astype(np.float32)
            (args.folder / "std.json").write_text(json.dumps({"std": float(first.std()), "mean": float(first.mean())}))
        print(source.name, flush=True)


if __name__ == "__main__":
    main()
