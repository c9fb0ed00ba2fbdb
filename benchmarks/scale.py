"""What 15,000 people on SD 1.5 would take, and what 10 million photos would break: counted on paper, not measured.

``python dev.py bench scale`` writes ``scale.json`` and ``scale.md`` to ``benchmarks/results/``. Models of full size are
built without weights, their floating-point operations are counted layer by layer, and peak rates of GPUs with an assumed
utilisation turn these into hours. No GPU was involved.
"""

from __future__ import annotations

import argparse
import math
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hdb_core.adapters import attach
from hdb_core.basis import BasisRecipe
from hdb_core.hypernet import EncoderConfig, HyperNet, HyperNetConfig
from hdb_core.hypernet.encoder import PhotoEncoder
from hdb_core.layout import Layout, find_targets, layout_of
from hdb_core.train.ahead import AHEAD
from hdb_core.train.base.vision import HOST_ENCODERS
from hdb_core.train.data.photos import Person, Photo
from hdb_core.train.person_loss import TrainConfig
from hdb_core.train.predicted import CHUNK
from hdb_core.train.settings import NetSettings
from hdb_core.train.turns import RUN, RUNS

from .common.bench import RESULTS
from .common.files import write_json, write_text
from .common.report import number
from .common.studio import counted_flops


class Gpu(NamedTuple):
    """Dense peak rates, FLOP/s, of bfloat16 with float32 sums on tensor cores, and of plain float32."""

    name: str
    bf16: float
    float32: float


# Sources: NVIDIA A100 datasheet (SXM); NVIDIA Ada GPU Architecture whitepaper, appendix A; NVIDIA H100 datasheet (SXM;
# its 1,979 TFLOP/s are with sparsity).
GPUS = (Gpu("A100", 312e12, 19.5e12), Gpu("RTX 4090", 165.2e12, 82.6e12), Gpu("H100", 989e12, 67e12))
NUM_GPUS = (1, 8)
MANY_PHOTOS = 10_000_000
GROUP = 32  # people a file: the default of hdb_core.train
BLOCK_BYTES = 4096  # the least that a file takes in common file systems
DECODE_SECONDS = 0.04  # measured on one core: a JPEG of 1024 × 1024, decoded and made as small as an encoder takes it
ENCODER_SIZE = 224  # pixels, of ViT-H
FACE_CODE = 96  # numbers: the default of hdb_core.train
HALF, SINGLE = 2, 4  # bytes
UNITS = {1: "B", 10**3: "KB", 10**6: "MB", 10**9: "GB", 10**12: "TB"}


@dataclass(frozen=True)
class Counted:
    """One sample's floating-point operations, and sizes in values.

    Attributes:
        unet: forward of SD 1.5's UNet at 512 × 512: F.
        unet_sdxl: forward of SDXL's UNet at 1024 × 1024.
        text: forward of CLIP-L's text encoder.
        vae: encoding a photo of 512 × 512.
        vision: forward of CLIP ViT-H/14.
        denoise: forward of UNet and text encoder with a LiDB.
        fit_step: forward and backward of these, gradients only for activations and the LiDB.
        predict: forward of the hypernetwork, one refinement.
        learn: forward and backward of the hypernetwork, one refinement.
        learn_to_see: forward and backward of the ViT that is trained where there is no ViT-H.
        latents: values of a photo in the VAE.
        tokens: values of a photo behind ViT-H.
        person: values of a fitted person.
        core: values of the mean change of all people.
        hypernet: values of the hypernetwork, without the encoder.
    """

    unet: int
    unet_sdxl: int
    text: int
    vae: int
    vision: int
    denoise: int
    fit_step: int
    predict: int
    learn: int
    learn_to_see: int
    latents: int
    tokens: int
    person: int
    core: int
    hypernet: int


@dataclass(frozen=True)
class Workload:
    """A training, in numbers; what is not said here has the defaults of `hdb_core.train`."""

    people: int = 15_000
    photos: int = 1
    fit_steps: int = 40
    times_pretrained: int = 32
    times_seen: int = 40
    batch: int = TrainConfig().people
    max_photos: int = TrainConfig().max_photos
    max_iterations: int = TrainConfig().max_iterations
    held_out: float = 0.02

    @property
    def steps(self) -> int:
        """Steps of ``train`` until everybody was seen so often."""
        return math.ceil(self.people * self.times_seen / self.batch)

    @property
    def decoded(self) -> dict[str, float]:
        """Photos that stages read from their files for the ViT of ``pretrain``; every sample of ``train`` shows several."""
        shown = (1 + min(self.photos, self.max_photos)) / 2
        return {"pretrain": self.people * self.times_pretrained, "train": self.steps * self.batch * shown}


class Stage(NamedTuple):
    """Samples through the UNet (of ``pretrain``, through the encoder), and floating-point operations at bfloat16 and at float32."""

    name: str
    samples: int
    bf16: float
    float32: float

    def hours(self, gpu: Gpu, gpus: int, utilisation: float) -> float:
        """At this part of the peak rates."""
        return (self.bf16 / gpu.bf16 + self.float32 / gpu.float32) / utilisation / gpus / 3600


def stages(counted: Counted, work: Workload) -> list[Stage]:
    """The stages of `hdb_core.train`. The frozen encoder computes at float32, everything else at bfloat16."""
    photos, fits = work.people * work.photos, work.people * work.fit_steps
    pretrained, learned = work.people * work.times_pretrained, work.steps * work.batch
    refinements = (1 + work.max_iterations) / 2  # drawn evenly
    held_out = max(1, round(work.held_out * work.people))
    settings = work.max_photos * work.max_iterations
    judged = 4 * held_out * settings  # own, mean, a stranger's, and the base model
    predicted = held_out * work.max_photos * sum(range(1, work.max_iterations + 1))
    train = learned * counted.fit_step + learned * refinements * counted.learn
    return [
        Stage("precompute", fits, fits * counted.fit_step + photos * counted.vae, photos * counted.vision),
        Stage("pretrain", pretrained, pretrained * counted.learn_to_see, 0),
        Stage("train", learned, train, 0),
        Stage("evaluate", judged, judged * counted.denoise + predicted * counted.predict, 0),
    ]


def disk_bytes(counted: Counted, people: int, photos: int) -> dict[str, int]:
    """What ``precompute`` writes, by kind."""
    return {
        "latents": photos * counted.latents * HALF,
        "fitted people": people * counted.person * SINGLE,
        "tokens of ViT-H": photos * counted.tokens * HALF,
    }


def object_bytes(count: int = 2000) -> float:
    """Memory of a person with one photo as `find_people` lists them, without pixels."""
    root = Path("/data/photos")
    tracemalloc.start()
    try:
        people = [
            Person(f"{i:08}", (Photo(root / f"{i:08}" / "0.jpg", "smiling, at the beach"),)) for i in range(count)
        ]
        names = {person.name: person for person in people}
        return tracemalloc.get_traced_memory()[0] / len(names)
    finally:
        tracemalloc.stop()


def many_photos(counted: Counted, work: Workload, photos: int, gpu: Gpu, utilisation: float) -> dict[str, float]:
    """The numbers of the section about many photos, one photo a person, on one node of 8 ``gpu``."""
    node = NUM_GPUS[-1]
    disk = disk_bytes(counted, photos, photos)
    sample = counted.fit_step + (1 + work.max_iterations) / 2 * counted.learn
    rate = node * gpu.bf16 * utilisation / sample
    fitted = HALF * (counted.latents + counted.person)
    full = fitted + HALF * counted.tokens
    lean = fitted + 3 * ENCODER_SIZE**2
    fits = Stage("fits", photos, photos * (work.fit_steps * counted.fit_step + counted.vae), 0)
    return {
        "photos": photos, "group files": 2 * math.ceil(photos / GROUP), "text blocks": photos * BLOCK_BYTES,
        "object bytes": photos * object_bytes(), "people in memory": disk["latents"] + disk["fitted people"],
        "held out": round(work.held_out * photos), "held out now": round(work.held_out * work.people),
        "samples a second": rate, "full": full, "read": rate * full, "read lean": rate * lean, "buffer": RUN * RUNS * full,
        "encode share": counted.vision / sample, "fit days": fits.hours(gpu, node, utilisation) / 24,
    }  # fmt: skip


def count(width: int, depth: int) -> Counted:
    """Build everything without weights and count.

    Args:
        width: of the hypernetwork's tokens.
        depth: of its decoder.
    """
    with torch.device("meta"):
        unet, text, vae, vision = _unet(), _text_encoder(), _vae(), _vision()
        pixels = {size: torch.empty(1, 3, size, size) for size in (ENCODER_SIZE, 512)}
        latents = vae.encode(pixels[512]).latent_dist.mode()
        tokens = vision(pixel_values=pixels[ENCODER_SIZE]).last_hidden_state
    modules = find_targets(dict(unet.named_modules()), {"text_encoder": dict(text.named_modules())}, "sd1")
    text.to("meta")
    layout = layout_of(modules, "sd1")
    net = _hypernet(layout, width, depth)
    trained = EncoderConfig()
    vit = PhotoEncoder(trained).to("meta")
    seen = torch.zeros(1, 3, trained.image_size, trained.image_size, device="meta")
    words, time = torch.zeros(1, 77, dtype=torch.long, device="meta"), torch.zeros(1, device="meta")

    def denoise() -> Tensor:
        with attach(modules, _factors(layout, net.config.rank)):
            return unet(latents, time, text(words).last_hidden_state).sample

    def predict() -> Tensor:
        return net(tokens, 1)[1]

    basis = net.config.basis
    return Counted(
        unet=counted_flops(lambda: unet(latents, time, torch.empty(1, 77, 768, device="meta"))),
        unet_sdxl=_sdxl_flops(),
        text=counted_flops(lambda: text(words)),
        vae=counted_flops(lambda: vae.encode(pixels[512])),
        vision=counted_flops(lambda: vision(pixel_values=pixels[ENCODER_SIZE])),
        denoise=counted_flops(denoise),
        fit_step=counted_flops(lambda: denoise().sum().backward()),
        predict=counted_flops(predict),
        learn=counted_flops(lambda: predict().sum().backward()),
        learn_to_see=counted_flops(lambda: vit(seen).sum().backward()),
        latents=latents.numel(),
        tokens=tokens.numel(),
        person=len(layout.layers) * basis.up_dim,
        core=len(layout.layers) * basis.up_dim * basis.down_dim,
        hypernet=sum(p.numel() for p in net.parameters()),
    )


def _unet() -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(cross_attention_dim=768).eval().requires_grad_(False)


def _text_encoder() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text = CLIPTextModel(CLIPTextConfig(**sizes)).eval().requires_grad_(False)
    for name, module in text.named_modules():
        if name.endswith("out_proj"):  # `find_targets` asks whether it is zero
            module.weight = nn.Parameter(torch.ones(module.weight.shape, device="cpu"), requires_grad=False)
    return text


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2,
    ).eval().requires_grad_(False)  # fmt: skip


def _vision() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    host = next(row for row in HOST_ENCODERS if row.name == "CLIP ViT-H/14")
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=host.width, intermediate_size=4 * host.width, num_hidden_layers=host.depth,
            num_attention_heads=16, image_size=host.image_size, patch_size=host.patch_size,
        )
    ).eval().requires_grad_(False)  # fmt: skip


def _hypernet(layout: Layout, width: int, depth: int) -> HyperNet:
    encoder = EncoderConfig("clip_vision", ENCODER_SIZE, 1280, num_tokens=257, name="CLIP ViT-H/14")
    config = HyperNetConfig(
        layout,
        BasisRecipe(),
        encoder,
        width,
        depth,
        heads=width // 64,
        code=FACE_CODE,
        predict_down=NetSettings.predict_down,
    )
    return HyperNet.create(config).to("meta")


def _sdxl_flops() -> int:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280), transformer_layers_per_block=[1, 2, 10], attention_head_dim=[5, 10, 20],
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
        added = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        given = (torch.empty(1, 4, 128, 128), torch.zeros(1), torch.empty(1, 77, 2048))
        return counted_flops(lambda: unet(*given, added_cond_kwargs=added))


def _factors(layout: Layout, rank: int) -> dict[str, tuple[Tensor, Tensor]]:
    """One person's paths, of which the up side is trained."""
    return {
        layer.name: (
            torch.empty(1, layer.out_features, rank, device="meta", requires_grad=True),
            torch.empty(1, rank, layer.in_features, device="meta"),
        )
        for layer in layout.layers
    }


def result_of(counted: Counted, work: Workload, utilisation: float, hypernet: Mapping[str, int]) -> dict[str, Any]:
    """Everything for JSON; ``hypernet`` is the width and depth that were counted."""
    done = stages(counted, work)
    hours = {f"{gpus} × {gpu.name}": {stage.name: stage.hours(gpu, gpus, utilisation) for stage in done}
             for gpu in GPUS for gpus in NUM_GPUS}  # fmt: skip
    return {
        "hypernet": dict(hypernet), "counted": asdict(counted), "workload": asdict(work) | {"steps": work.steps}, "utilisation": utilisation,
        "gpus": [gpu._asdict() for gpu in GPUS], "stages": [stage._asdict() for stage in done], "hours": hours,
        "decoded": work.decoded, "disk": disk_bytes(counted, work.people, work.people * work.photos),
        "many photos": many_photos(counted, work, MANY_PHOTOS, GPUS[0], utilisation),
    }  # fmt: skip


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def size(value: float) -> str:
    """ "1.2 GB"."""
    unit = max((u for u in UNITS if u <= value), default=1)
    return f"{number(value, unit)} {UNITS[unit]}"


def text_of(result: Mapping[str, Any]) -> str:
    """The Markdown report."""
    c, work, disk = result["counted"], result["workload"], result["disk"]
    counted = [
        ("UNet of SD 1.5, 512 × 512, forward: F", c["unet"]), ("UNet of SDXL, 1024 × 1024, forward", c["unet_sdxl"]),
        ("text encoder CLIP-L, forward", c["text"]), ("VAE, encoding 512 × 512", c["vae"]),
        ("CLIP ViT-H/14, forward", c["vision"]), ("UNet and text encoder with a LiDB, forward", c["denoise"]),
        ("the same, forward and backward to the LiDB", c["fit_step"]),
        ("hypernetwork, one refinement, forward", c["predict"]),
        ("the same, forward and backward", c["learn"]),
        ("the ViT of `pretrain`, forward and backward", c["learn_to_see"]),
    ]  # fmt: skip
    stage_rows = [[s["name"], f"{s['samples']:,}", number(s["bf16"], 1e15), number(s["float32"], 1e15)]
                  for s in result["stages"]]  # fmt: skip
    names = [s["name"] for s in result["stages"]]
    decoding = " and ".join(
        f"{n * DECODE_SECONDS / 3600:.0f} hours of a core in `{s}`" for s, n in result["decoded"].items()
    )
    hour_rows = [[gpus, *(number(h[n]) for n in names), number(sum(h.values()))] for gpus, h in result["hours"].items()]
    disk_rows = [[kind, size(value), size(value / work["people"])] for kind, value in disk.items()]
    disk_rows.append(["together", size(sum(disk.values())), size(sum(disk.values()) / work["people"])])
    peaks = ", ".join(f"{g['name']} {g['bf16'] / 1e12:.0f} and {g['float32'] / 1e12:.1f}" for g in result["gpus"])
    return "\n\n".join([
        "Counted on models without weights and computed; **nothing here was measured on a GPU**.",
        "## Cost of one sample",
        markdown(["", "TFLOP", "in F"], [[name, f"{v / 1e12:.4f}", f"{v / c['unet']:.3f}"] for name, v in counted]),
        (f"The hypernetwork is {result['hypernet']['width']} wide with {result['hypernet']['depth']} decoder layers (the paper "
        f"names 2 layers and no width). It has {c['hypernet'] / 1e6:.1f} M values ({size(c['hypernet'] * HALF)} at float16) beside ViT-H."),
        f"## {work['people']:,} people",
        (f"{work['photos']} photo(s) of each; {work['fit_steps']} steps of fitting, which may be left out; `pretrain`, which a frozen ViT-H does "
        f"without, sees everybody {work['times_pretrained']} times, as the miniature's did; {work['steps']:,} steps of {work['batch']} "
        f"people, so that everybody is seen {work['times_seen']} times: an assumption, the time "
        f"is proportional to it. {work['held_out']:.0%} of the people are judged."),
        markdown(["stage", "samples", "PFLOP, bfloat16", "PFLOP, float32"], stage_rows),
        (f"Hours at {result['utilisation']:.0%} of the peak rates, in TFLOP/s of bfloat16 and of float32: {peaks}. Reading and "
        "decoding photos is not counted, and eight GPUs are taken to be eight times as fast as one."),
        markdown(["hours", *names, "together"], hour_rows),
        "The frozen image encoder computes at float32, as `hdb_core` runs it, everything else at bfloat16.",
        (f"With the ViT of `pretrain`, photos are decoded at every step, on all cores beside each other, while the GPU waits: "
        f"at {1000 * DECODE_SECONDS:.0f} ms for a JPEG of 1024 × 1024, {decoding}. Smaller photos make it less; the tokens of "
        "a frozen encoder are computed once."),
        markdown(["on disk", "", "a person"], disk_rows),
        "Latents and fitted people are mapped from their files, and read as steps need them.",
        prose(result["many photos"], result["utilisation"]),
    ]) + "\n"  # fmt: skip


def prose(m: Mapping[str, float], utilisation: float) -> str:
    """What many photos break, and the data layer that would hold them."""
    node = f"{NUM_GPUS[-1]} {GPUS[0].name}"
    return f"""## {m["photos"]:,.0f} photos, one a person

What holds so many, in `hdb_core.train`:

- **Shards.** A photo, and a text beside it, would be {2 * m["photos"]:,.0f} files; the texts alone would take \
{size(m["text blocks"])} in blocks of {BLOCK_BYTES} bytes. `hdb_core.train.photos --shards 1000` writes tar files in the form \
of webdataset instead. They are listed at every start, by their headers, and photos are read at their places.
- **Latents stay on disk.** The {size(m["people in memory"])} of latents and fitted people are mapped and not held; what is \
computed of everybody, such as the energy of a layer, takes {CHUNK} people at a time.
- **Turns.** Everybody has a turn before anyone has another. Runs of {RUN} people who stand side by side in files are shuffled, \
and then the people of {RUNS} runs, which with tokens hold {size(m["buffer"])}: a disk reads what lies together. Who has a turn \
follows from the seed and the step, so that a run resumes from its weights and its step number alone, on any number of \
processes, of which each reads its own part.
- **Reading ahead.** What the next {AHEAD} parts of steps need is read while the present one is computed.

What breaks, in the order in which it is met:

- **The list of people.** Names, words and places as Python objects take {size(m["object bytes"])} in every process.
- **{GROUP} people a file.** {m["group files"]:,.0f} files of people and tokens in two folders, each opened at every start \
to compare its settings, and again to learn who is in it; Linux maps 65,530 of them in a process unless it is told otherwise \
(`vm.max_map_count`). `--set group=1024` makes them fewer.
- **Bandwidth.** On {node} at {utilisation:.0%}, `train` takes {m["samples a second"]:,.0f} samples a second: {size(m["read"])}/s of \
tokens, latents and fits. Computing tokens anew from photos of {ENCODER_SIZE} pixels would cost \
{m["encode share"]:.0%} more operations a sample, at {size(m["read lean"])}/s; this is not built.
- **Fitting everybody.** {m["fit days"]:,.0f} days on {node}. The regression is a warm start, and the diffusion loss alone \
needs no fits.
- **Judging.** `evaluate` keeps the predictions of all {m["held out"]:,.0f} people who were kept from training (of \
{m["held out now"]:,.0f} in the table above); lower `held_out`."""


def main() -> None:
    options = argparse.ArgumentParser(
        prog="dev.py bench scale", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    defaults = Workload()
    for name in (
        "people",
        "photos",
        "fit_steps",
        "times_pretrained",
        "times_seen",
        "batch",
        "max_photos",
        "max_iterations",
    ):
        options.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name))
    options.add_argument("--utilisation", type=float, default=0.4, help="part of the peak rates that is reached")
    options.add_argument("--width", type=int, default=1024, help="of the hypernetwork's tokens, a multiple of 64")
    options.add_argument("--depth", type=int, default=2, help="of its decoder (the paper's: 2)")
    options.add_argument("--results", type=Path, default=RESULTS)
    args = options.parse_args()
    given = {name: getattr(args, name) for name in asdict(defaults) if hasattr(args, name)}
    hypernet = {"width": args.width, "depth": args.depth}
    result = result_of(count(**hypernet), Workload(**given), args.utilisation, hypernet)
    text = text_of(result)
    print(text)
    write_json(args.results / "scale.json", result)
    write_text(args.results / "scale.md", text)


if __name__ == "__main__":
    main()
