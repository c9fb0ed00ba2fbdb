"""The real ComfyUI in this process, on the CPU, with this pack loaded the way the host loads it."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from devtools.inprocess import boot

ROOT = Path(__file__).resolve().parents[2]
COMFYUI = Path(os.environ.get("HDB_COMFYUI", ROOT / ".comfyui" / "ComfyUI"))
CHECKPOINT = "hdb_miniature.safetensors"


@pytest.fixture(scope="session")
def base_directory(tmp_path_factory) -> Path:
    """models, input, output and temp of the host under test."""
    return tmp_path_factory.mktemp("host")


@pytest.fixture(scope="session")
def host(base_directory: Path, request):
    """ComfyUI's modules, and the pack's nodes by id."""
    extra = base_directory / "extra" / "people"
    extra_hypernets = base_directory / "extra" / "nets"
    for folder in (extra, extra_hypernets):
        folder.mkdir(parents=True)
    paths = base_directory / "extra_model_paths.yaml"
    paths.write_text(f"mine:\n  base_path: {extra.parent}\n  lidb: people\n  hyperdreambooth: nets\n")
    booted = boot(COMFYUI, base_directory, extra_paths=paths, device=request.config.getoption("--device"))
    return SimpleNamespace(
        folder_paths=booted.folder_paths,
        stock=booted.nodes,
        nodes={node_id: booted.nodes[node_id] for node_id in NODE_IDS},
        module=booted.module,
        package=booted.package,
        run=booted.run,
        extra=extra,
        extra_hypernets=extra_hypernets,
        load_file=lambda name: load_file(Path(__file__).with_name(name)),
    )


NODE_IDS = (
    "CropToFace",
    "PasteFace",
    "LoadHyperNet",
    "PredictLiDB",
    "EmptyLiDB",
    "FastFinetune",
    "FastFinetuneOptions",
    "ApplyLiDBToModel",
    "ApplyOptions",
    "SaveLiDB",
    "LoadLiDB",
    "BlendLiDB",
    "CompareLiDB",
    "SimilarityToPhoto",
    "LiDBHook",
    "SaveLiDBAsLoRA",
)


AS_LORA = {"strength_model": 1.0, "strength_clip": 1.0, "person_guidance": 1.0}
OPTIONS = {
    "rank",
    "learning_rate",
    "batch_size",
    "convolutions",
    "train_text_encoder",
    "prior_weight",
    "class_prompt",
    "class_images",
    "sample_every",
}


@pytest.fixture(autouse=True)
def inference_mode():
    """The executor runs every node in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def checkpoint(host, base_directory: Path) -> str:
    """Name of a random SD 1.x miniature in the checkpoints folder."""
    builder = host.load_file("random_checkpoint.py")
    builder.write_checkpoint(base_directory / "models" / "checkpoints" / CHECKPOINT)
    return CHECKPOINT


@pytest.fixture(scope="session")
def loaded(host, checkpoint):
    """MODEL, CLIP, VAE from the stock loader, as one object."""
    with torch.inference_mode():
        model, clip, vae = host.stock["CheckpointLoaderSimple"]().load_checkpoint(checkpoint)
    return SimpleNamespace(model=model, clip=clip, vae=vae)


@pytest.fixture(scope="session")
def sd2(host):
    """MODEL and CLIP of the SD 2.x family, random and small."""
    from comfy.supported_models import SD20
    from comfy.text_encoders import sd2_clip

    return host.load_file("random_checkpoint.py").random_models(
        SD20, {"context_dim": 1024}, sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel
    )


@pytest.fixture(scope="session")
def sdxl(host):
    """MODEL and CLIP of the SDXL family, random and small: two text encoders, and pooled text in the UNet."""
    from comfy import sdxl_clip
    from comfy.supported_models import SDXL

    return host.load_file("random_checkpoint.py").random_models(
        SDXL,
        {"context_dim": 2048, "num_classes": "sequential", "adm_in_channels": 2816},
        sdxl_clip.SDXLTokenizer,
        sdxl_clip.SDXLClipModel,
    )


@pytest.fixture(scope="session")
def sd3_files(host, base_directory):
    """Names of the files of a tiny SD3 with the host's own CLIP and TAESD, for Load Diffusion Model, Load CLIP, Load VAE."""
    import comfy.clip_model
    import comfy.ops
    import comfy.taesd.taesd

    models, checkpoints = host.load_file("random_models.py"), host.load_file("random_checkpoint.py")
    generator = torch.Generator().manual_seed(0)
    wide = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": 64}}
    sizes = {"adm_in_channels": 2048, "context_size": 4096, "context_embedder_config": wide}
    unet = models.random_model("SD3", **sizes).model.diffusion_model.state_dict()
    ops = comfy.ops.disable_weight_init
    clip = lambda: comfy.clip_model.CLIPTextModel(checkpoints.CLIP_L, torch.float16, "meta", ops)
    vae = checkpoints.state_dict_of(lambda: comfy.taesd.taesd.TAESD(latent_channels=16), generator)
    files = {
        "diffusion_models/sd3.safetensors": {name: tensor.clone() for name, tensor in unet.items()},
        "text_encoders/clip_l.safetensors": checkpoints.state_dict_of(clip, generator),
        "vae/tiny.safetensors": {**vae, "vae_scale": torch.tensor(1.0).half(), "vae_shift": torch.tensor(0.0).half()},
    }
    for name, weights in files.items():
        path = base_directory / "models" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, path)
    return SimpleNamespace(model="sd3.safetensors", clip="clip_l.safetensors", vae="tiny.safetensors")


@pytest.fixture(scope="session")
def photo() -> torch.Tensor:
    """IMAGE (1, 128, 128, 3) in 0..1: a smooth random picture."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 8, 8, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=(128, 128), mode="bicubic").clamp(0, 1).movedim(1, -1)


def load_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)  # a dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(host):
    """Run a node of the pack by id, with its widgets' defaults, as the executor does; returns its outputs."""
    return host.run


@pytest.fixture
def said(host, monkeypatch):
    """What nodes write below themselves, in order."""
    texts = []
    for name, module in list(sys.modules.items()):
        if name.startswith(host.package) and hasattr(module, "send_text"):
            monkeypatch.setattr(module, "send_text", lambda text, node_id: texts.append(text))
    return texts


@pytest.fixture
def train(run, loaded, photo):
    """A short Fast Finetune of the photo on the miniature, text encoder included; returns the LIDB.

    Takes the inputs of Fast Finetune and those of its options.
    """

    def execute(**inputs):
        given = {"model": loaded.model, "clip": loaded.clip, "vae": loaded.vae, "image": photo, "steps": 2}
        given |= {"batch_size": 1, "train_text_encoder": True} | inputs
        (options,) = run("FastFinetuneOptions", **{name: given.pop(name) for name in OPTIONS & given.keys()})
        return run("FastFinetune", **given, options=options)[0]

    return execute


@pytest.fixture
def apply(run, loaded):
    """Apply LiDB to Model with Apply Options, a plain LoRA unless other numbers are given; returns MODEL and CLIP."""

    def execute(lidb, model=None, clip=None, strength=1.0, **numbers):
        (options,) = run("ApplyOptions", **AS_LORA | numbers)
        models = {"model": model or loaded.model, "clip": clip or loaded.clip}
        return run("ApplyLiDBToModel", **models, lidb=lidb, strength=strength, options=options)

    return execute


@pytest.fixture
def sample(host):
    """Latents (pictures, 4, 8, 8) from the stock KSampler: two steps of a prompt, at 64 pixels."""

    def execute(
        model, clip, prompt: str = "a [v] face", seed: int = 3, control=None, size: int = 64, pictures: int = 1
    ):
        encode = host.stock["CLIPTextEncode"]().encode
        positive, negative = encode(clip, prompt)[0], encode(clip, "")[0]
        if control is not None:
            positive, negative = control(positive, negative)
        latent = host.stock["EmptyLatentImage"]().generate(size, size, pictures)[0]
        sampler = host.stock["KSampler"]()
        return sampler.sample(model, seed, 2, 4.0, "euler", "normal", positive, negative, latent)[0]["samples"]

    return execute


@pytest.fixture
def person(host, loaded):
    """A random LIDB for the miniature whose effect is plainly visible; no training."""
    layout = host.module("hdb_core.layout")
    lidb = host.module("hdb_core.lidb")
    basis = host.module("hdb_core.basis").BasisRecipe()

    def make(seed: int, rank: int = 2, scale: float = 0.5, layers=None, convolutions: bool = False):
        modules, family = host.module("nodes.host.targets").target_modules(loaded.model, loaded.clip, convolutions)
        target = layout.layout_of(modules, family)
        generator = torch.Generator().manual_seed(seed)
        chosen = layout.Layout(family, target.layers if layers is None else target.layers[:layers])
        down = torch.randn(len(chosen.layers), rank, basis.down_dim, generator=generator) * scale
        up = torch.randn(len(chosen.layers), basis.up_dim, rank, generator=generator) * scale
        return lidb.LiDB(chosen, basis, down, up)

    return make


@pytest.fixture(scope="session")
def hypernet_config(host, loaded):
    """Sizes of a small hypernetwork for the random miniature."""
    hypernet, layout = host.module("hdb_core.hypernet"), host.module("hdb_core.layout")
    modules, family = host.module("nodes.host.targets").target_modules(loaded.model, loaded.clip)
    encoder = hypernet.EncoderConfig(image_size=64, token_width=32, patch_size=16, stem=((16, 1),), depth=2, heads=2)
    return hypernet.HyperNetConfig(layout.layout_of(modules, family), encoder=encoder, width=32, depth=2, heads=2)


@pytest.fixture(scope="session")
def write_hypernet(host, base_directory):
    """Saves an untrained hypernetwork of a config into models/hyperdreambooth; returns its name."""

    def execute(config, name="net.safetensors"):
        folder = base_directory / "models" / "hyperdreambooth"
        folder.mkdir(parents=True, exist_ok=True)
        net = host.module("hdb_core.hypernet").HyperNet.create(config)
        host.module("hdb_core.files.hypernet").save(net, folder / name, {})
        return name

    return execute


@pytest.fixture
def fingerprint(loaded, sample):
    """Everything of the host's MODEL, CLIP and VAE that a node could leave changed, and a sampled picture.

    The host itself replaces parameters when it patches weights; after training they must be the same objects, too.
    """

    def execute(same_objects: bool = True):
        # First of all: it makes the host take out patches that an earlier sampling has left in place.
        digest = hashlib.sha256(sample(loaded.model, loaded.clip).cpu().contiguous().view(torch.uint8).numpy())
        roots = (loaded.model.model, loaded.clip.cond_stage_model, loaded.vae.first_stage_model)
        for root in roots:
            for name, tensor in root.state_dict(keep_vars=True).items():
                digest.update(f"{name} {tensor.dtype} {id(tensor) if same_objects else ''}".encode())
                digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
            for module in root.modules():
                digest.update(f"{len(module._forward_hooks)} {'forward' in module.__dict__} {module.training}".encode())
        digest.update(f"{loaded.model.patches} {loaded.clip.patcher.patches} {loaded.model.model_options}".encode())
        digest.update(f"{loaded.clip.layer_idx} {torch.is_inference_mode_enabled()}".encode())
        return digest.hexdigest()

    return execute


@pytest.fixture
def newer_patchers(monkeypatch):
    """A function that lets patchers clone as those of newer hosts on a GPU: a clone is of a model that is read anew."""

    def execute() -> None:
        patchers = sys.modules["comfy.model_patcher"].ModelPatcher
        clone_of_the_same = patchers.clone

        def clone(self, disable_dynamic=False):
            if disable_dynamic and "force_deepcopy" in inspect.signature(clone_of_the_same).parameters:
                return clone_of_the_same(self, force_deepcopy=True)
            made = clone_of_the_same(self)
            if disable_dynamic:  # older hosts do not know how
                made.model, made.backup, made.object_patches_backup = copy.deepcopy(self.model), {}, {}
                made.model.model_loaded_weight_memory, made.model.current_weight_patches_uuid = 0, None
            return made

        monkeypatch.setattr(patchers, "clone", clone)

    return execute
