"""What the pack needs of ComfyUI, a test for each: where another version has moved something, the name of the test says what.

Names and calls are read from the source of `nodes/`; what it asks of MODEL, CLIP and VAE, and what the host must do, stands
below. Where versions differ, `nodes/host/compat.py` adapts.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections import defaultdict
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

SOURCES = Path(__file__).resolve().parents[2] / "nodes"
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "node_helpers", "nodes", "server"}


class Call(NamedTuple):
    """Of something of the host: the number of positional arguments, names of others, whether there may be more."""

    positional: int
    keywords: tuple[str, ...] = ()
    more: bool = False


def bound_names(tree: ast.Module) -> dict[str, str]:
    """Names in a module that stand for something of the host, and its path there."""
    bound = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {alias.asname or (top := alias.name.partition(".")[0]): alias.name if alias.asname else top
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and not node.level:
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return {name: path for name, path in bound.items() if path.partition(".")[0] in HOST}


def path_of(node: ast.AST, bound: dict[str, str]) -> str | None:
    """The path of ``comfy.utils.ProgressBar`` in the source, or None if it is not of the host."""
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    above = path_of(node.value, bound) if isinstance(node, ast.Attribute) else None
    return above and f"{above}.{node.attr}"


def uses(path: Path) -> Iterator[tuple[str, Call | None]]:
    """What a file uses of the host, and how it calls it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    bound = bound_names(tree)
    yield from ((name, None) for name in bound.values())
    for node in ast.walk(tree):
        if found := path_of(node, bound):
            yield found, None
        if isinstance(node, ast.Call) and (found := path_of(node.func, bound)):
            positional = [a for a in node.args if not isinstance(a, ast.Starred)]
            keywords = tuple(k.arg for k in node.keywords if k.arg)
            yield (
                found,
                Call(len(positional), keywords, len(positional) + len(keywords) < len(node.args + node.keywords)),
            )


def needs() -> dict[str, dict[str, set[Call | None]]]:
    """What the pack uses of the host: path → file → calls."""
    found: dict[str, dict[str, set[Call | None]]] = defaultdict(lambda: defaultdict(set))
    for path in sorted(SOURCES.rglob("*.py")):
        for name, call in uses(path):
            found[name][path.relative_to(SOURCES.parent).as_posix()].add(call)
    return dict(found)


def resolve(path: str) -> Any:
    """The object of a path, which may lead through modules, classes, instances."""
    parts = path.split(".")
    thing = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 2):
        if not hasattr(thing, part) and inspect.ismodule(thing):
            importlib.import_module(".".join(parts[:i]))
        thing = getattr(thing, part)
    return thing


def require_call(function: Any, call: Call) -> None:
    signature = inspect.signature(function)
    bind = signature.bind_partial if call.more else signature.bind
    bind(*[None] * call.positional, **dict.fromkeys(call.keywords))


NEEDS = needs()


def test_the_source_is_read():
    """As a sample: a function with a call, a name that is imported, one below an imported name."""
    assert Call(1, ("memory_required", "force_full_load")) in NEEDS["comfy.model_management.load_models_gpu"]["nodes/host/differentiable.py"]  # fmt: skip
    assert {"server.PromptServer", "comfy_api.latest.io.Int.Input", "folder_paths.models_dir"} <= NEEDS.keys()


@pytest.mark.parametrize("name", sorted(NEEDS))
def test_what_the_pack_names_and_calls(host, name):
    users = NEEDS[name]
    try:
        found = resolve(name)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"ComfyUI has no {name}, which {', '.join(users)} uses: {error}")
    for user, calls in users.items():
        for call in calls - {None}:
            try:
                require_call(found, call)
            except TypeError as error:
                pytest.fail(f"{name}{inspect.signature(found)} cannot be called as {user} does: {error}")


PATCHER, MODEL = "comfy.model_patcher.ModelPatcher", "comfy.model_base.BaseModel"
METHODS = [  # their objects come over wires; the first argument is the object
    (f"{PATCHER}.clone", Call(1)),
    (f"{PATCHER}.add_patches", Call(3)),
    (f"{PATCHER}.add_wrapper_with_key", Call(4)),
    (f"{PATCHER}.add_callback_with_key", Call(4)),
    (f"{PATCHER}.get_model_object", Call(2)),
    (f"{MODEL}.apply_model", Call(3, ("transformer_options",))),
    (f"{MODEL}.process_latent_in", Call(2)),
    (f"{MODEL}.get_dtype", Call(1)),
    ("comfy.sd.CLIP.clone", Call(1)),
    ("comfy.sd.CLIP.add_patches", Call(3)),
    ("comfy.sd.CLIP.tokenize", Call(2)),
    ("comfy.sd1_clip.SD1ClipModel.set_clip_options", Call(2)),
    ("comfy.sd1_clip.SD1ClipModel.reset_clip_options", Call(1)),
    ("comfy.sd1_clip.SD1ClipModel.encode_token_weights", Call(2)),
    ("comfy.sd.VAE.encode", Call(2)),
    ("comfy.sd.VAE.spacial_compression_encode", Call(1)),
    ("comfy.clip_vision.ClipVisionModel.encode_image", Call(2)),
    ("comfy.model_sampling.EPS.noise_scaling", Call(4)),
    ("comfy.conds.CONDCrossAttn.concat", Call(2)),
    ("comfy.conds.CONDCrossAttn.process_cond", Call(1, ("batch_size", "area"))),
    ("comfy.utils.ProgressBar.update_absolute", Call(4)),
    ("server.PromptServer.send_progress_text", Call(3)),
]


@pytest.mark.parametrize(("method", "call"), METHODS, ids=[method for method, _ in METHODS])
def test_methods(host, method, call):
    require_call(resolve(method), call)


ATTRIBUTES = (
    "model.load_device",
    "model.model_options",
    "model.model.diffusion_model",
    "model.model.latent_format.latent_channels",
    "model.model.model_config.unet_config",
    "clip.layer_idx",
    "clip.patcher.forced_hooks",
    "clip.patcher.model",
    "clip.cond_stage_model.clip_l.transformer",
    "vae.first_stage_model",
)


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_attributes(loaded, attribute):
    attrgetter(attribute)(loaded)


def test_the_noise_schedule(loaded):
    assert (loaded.model.get_model_object("model_sampling").sigmas.diff() > 0).all()


def test_a_lora_is_a_patch(loaded):
    """``up @ down``, at a strength; `add_patches` answers which keys it knows."""
    from comfy.lora import calculate_weight
    from comfy.weight_adapter import LoRAAdapter

    up, down, weight = torch.randn(6, 2), torch.randn(2, 4), torch.randn(6, 4)
    adapter = LoRAAdapter(set(), (up, down, None, None, None, None))
    patched = calculate_weight([(0.5, adapter, 1.0, None, None)], weight.clone(), "a.weight")
    torch.testing.assert_close(patched, weight + 0.5 * up @ down)
    known = "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert list(loaded.model.clone().add_patches({known: adapter, "unknown": adapter}, 1.0)) == [known]


def test_text_layers_are_those_that_we_compute(host, loaded):
    """Out of place, for autograd."""
    from comfy.ldm.modules.attention import optimized_attention_for_device

    layer = loaded.clip.cond_stage_model.clip_l.transformer.text_model.encoder.layers[0]
    x, attention = torch.randn(1, 77, 768), optimized_attention_for_device(torch.device("cpu"), mask=True)
    ours = host.module("nodes.host.restore").clip_layer_forward(layer.float(), x, None, attention)
    assert torch.equal(ours, layer(x.clone(), None, attention))


def test_attention_can_be_replaced(loaded):
    """Back ends without a backward pass have to be."""
    calls = []

    def override(attention, *args, **kwargs):
        calls.append(attention)
        return attention(*args, **kwargs)

    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, 768)
    options = {"optimized_attention_override": override}
    loaded.model.model.apply_model(x, torch.ones(1), c_crossattn=text, transformer_options=options)
    assert calls


def test_wrappers_know_cfg_model_and_passes(loaded, sample):
    from comfy.patcher_extension import WrappersMP

    seen = {}

    def outer(executor, x, *args, **kwargs):
        guider = executor.class_obj
        seen["cfg"], seen["patcher"] = guider.cfg, guider.model_patcher
        seen["names"] = {cond["uuid"]: name for name, conds in guider.conds.items() for cond in conds}
        return executor(x, *args, **kwargs)

    def inner(executor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs):
        seen.update(model=executor.class_obj, parts=transformer_options["uuids"])
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    model = loaded.model.clone()
    model.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", outer)
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", inner)
    sample(model, loaded.clip)
    parts = sorted(seen["names"][part] for part in seen["parts"])
    assert (seen["cfg"], seen["model"], parts) == (4.0, model.model, ["negative", "positive"])
    assert seen["patcher"].patches == model.patches


# -- what differs between versions ---------------------------------------------------------------------------------


def test_arguments_that_this_host_does_not_know_are_left_out(host):
    if_known = host.module("nodes.host.compat").if_known
    assert if_known(lambda first, second=0: 0, second=1, third=2) == {"second": 1}


def test_newer_hosts_find_every_node_by_other_words(host):
    """And hide what few people need."""
    from comfy_api.latest import io

    schemas = {name: node.GET_SCHEMA() for name, node in host.nodes.items()}
    if "search_aliases" in inspect.signature(io.Schema).parameters:
        assert [name for name, schema in schemas.items() if not schema.search_aliases] == []
    if "advanced" in inspect.signature(io.Int.Input).parameters:
        hidden = [f"{name}.{slot.id}" for name, schema in schemas.items() for slot in schema.inputs if slot.advanced]
        assert hidden == ["FastFinetune.resolution", "SaveLiDB.rank"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_fine_tune_tells_the_host_that_it_trains(train, host, monkeypatch, fails):
    import comfy.model_management as management

    if not hasattr(management, "in_training"):  # before 0.18
        monkeypatch.setattr(management, "in_training", False, raising=False)
    denoiser, seen = host.module("nodes.host.denoiser").HostDenoiser, []
    denoise = denoiser.denoise

    def watched(*args):
        seen.append(management.in_training)
        if fails:
            raise RuntimeError("out of memory, as it were")
        return denoise(*args)

    monkeypatch.setattr(denoiser, "denoise", watched)
    if fails:
        with pytest.raises(RuntimeError, match="as it were"):
            train(steps=1)
    else:
        train(steps=1)
    assert seen and all(seen) and management.in_training is False


def test_kernels_without_a_backward_pass_are_replaced(host):
    kernels = pytest.importorskip("comfy_kitchen")
    training = host.module("nodes.host.compat").training
    names = [name for name in kernels.__all__ if "rope" in name or "adaln" in name]
    before = [getattr(kernels, name) for name in names]
    with torch.inference_mode(False), torch.enable_grad():
        x, scale = torch.randn(1, 2, 3, 8, requires_grad=True), torch.randn(8)
        rotation = torch.randn(1, 1, 3, 4, 2, 2)
        arguments = (x, x, rotation, scale, scale)
        with pytest.raises(RuntimeError, match="backward through comfy_kitchen"):
            kernels.rms_rope_split_half(*arguments)[0].sum().backward()
        with training():
            q, k = kernels.rms_rope_split_half(*arguments)
            (q + k).sum().backward()
    assert x.grad.abs().sum() > 0
    torch.testing.assert_close((q, k), kernels.rms_rope_split_half(*arguments))
    assert [getattr(kernels, name) for name in names] == before
