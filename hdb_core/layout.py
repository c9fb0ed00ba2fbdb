"""The layers that a LiDB adapts: their names, sizes and order, for every model family.

Names and order are part of the file format and never change. SD 1.x, SD 2.x and SDXL have neutral names; every other
model has the host's own paths (``diffusion_model.layers.0.attention.qkv``) in the order of its modules, which
`nodes.host.targets` finds.

Neutral names are those of diffusers with the component in front:
``unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q``,
``unet.down_blocks.0.resnets.0.conv1``, ``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``. ComfyUI uses the
names of the original checkpoints (``input_blocks.1.1.transformer_blocks.0.attn1.to_q``,
``input_blocks.1.0.in_layers.2``); this module maps both ways.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from .errors import LayoutError

FAMILIES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
HOST_PREFIX = "diffusion_model."  # of the names of all other families
FAMILY_BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl"}  # width of the text that the UNet reads

_TEXT_ENCODERS = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
# Of these encoders ComfyUI reads the last layer but one: the last one has no effect, and other programs leave it out.
_LAST_UNREAD = {("sd2", "clip_h"), ("sdxl", "clip_l")}
_SECTIONS = ("unet.down_blocks", "unet.mid_block", "unet.up_blocks", "text_encoder", "text_encoder_2")
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
# Of a residual block: neutral name → name in the original checkpoints.
_CONVOLUTIONS = {"conv1": "in_layers.2", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
_NEUTRAL_CONVOLUTIONS = {ldm: neutral for neutral, ldm in _CONVOLUTIONS.items()}

_ATTENTION_TAIL = r"transformer_blocks\.\d+\.attn[12]\.(?:to_q|to_k|to_v|to_out\.0)"
_LDM_UNET = re.compile(rf"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.1)?\.({_ATTENTION_TAIL})")
_LDM_CONVOLUTION = re.compile(
    rf"(input_blocks|middle_block|output_blocks)\.(\d+)(?:\.0)?\.({'|'.join(map(re.escape, _CONVOLUTIONS.values()))})"
)
_NEUTRAL_UNET = re.compile(
    r"(?:unet\.)?(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\."
    rf"(?:attentions\.(\d+)\.({_ATTENTION_TAIL})|resnets\.(\d+)\.({'|'.join(_CONVOLUTIONS)}))"
)
_TEXT = re.compile(r"(?:.*\.)?encoder\.layers\.(\d+)\.self_attn\.((?:q|k|v|out)_proj)")
_NEUTRAL_TEXT = re.compile(r"(text_encoder(?:_2)?)\.(text_model\.encoder\.layers\.\d+\.self_attn\.(?:q|k|v|out)_proj)")
_LDM_DOWNSAMPLE = re.compile(r"input_blocks\.(\d+)\.0\.op\b")
_LDM_INPUT = re.compile(r"input_blocks\.(\d+)\b")


@dataclass(frozen=True)
class Layer:
    """One adapted layer. Its weight is (out_features, in_features), that of a convolution flattened from the input on."""

    name: str
    in_features: int
    out_features: int

    @property
    def is_text(self) -> bool:
        """Whether the layer belongs to a text encoder."""
        return self.name.startswith("text_encoder")

    @property
    def block(self) -> str:
        """The part of the model that the layer belongs to: "text encoder", "down 1", "mid", "double_blocks"."""
        component, section, number, *_ = [*self.name.split("."), "", ""]
        if component == "unet":
            return " ".join(
                [section.removesuffix("_blocks").removesuffix("_block"), *([number] if number.isdigit() else [])]
            )
        return component.replace("_", " ") if self.is_text else section

    @property
    def kernel_size(self) -> int:
        """Side of a convolution's kernel, 0 for a linear layer."""
        if self.name.startswith(HOST_PREFIX):
            return 0
        tail = self.name.rsplit(".", 1)[-1]
        return {"conv1": 3, "conv2": 3, "conv_shortcut": 1}.get(tail, 0)


@dataclass(frozen=True)
class Layout:
    """The adapted layers of one model, in canonical order.

    Layouts are equal if their layers are, whatever the model calls itself.

    Attributes:
        family: a key of `FAMILIES`, or the host's class of the model.
        layers: in canonical order.
    """

    family: str = field(compare=False)
    layers: tuple[Layer, ...]

    @cached_property
    def hash(self) -> str:
        """SHA-256 over names, sizes and order, and a family of `FAMILIES`, as hex digits."""
        rows = [[layer.name, layer.in_features, layer.out_features] for layer in self.layers]
        family = self.family if self.family in FAMILIES else ""
        return hashlib.sha256(json.dumps([family, rows]).encode()).hexdigest()

    @property
    def has_convolutions(self) -> bool:
        """Whether convolutions are among the layers."""
        return any(layer.kernel_size for layer in self.layers)

    def without_convolutions(self) -> Layout:
        """The same without its convolutions."""
        return Layout(self.family, tuple(layer for layer in self.layers if not layer.kernel_size))

    def describe(self) -> str:
        """For example ``SD 1.x, 128 UNet + 48 text layers``, or ``Flux, 228 layers``."""
        if self.family not in FAMILIES:
            return f"{self.family}, {len(self.layers)} layers"
        text = sum(layer.is_text for layer in self.layers)
        return f"{FAMILIES[self.family]}, {len(self.layers) - text} UNet + {text} text layers"


def find_targets(
    unet_modules: Mapping[str, nn.Module],
    text_modules: Mapping[str, Mapping[str, nn.Module]],
    family: str,
    convolutions: bool = False,
) -> dict[str, nn.Module]:
    """Find the linear layers of every attention of a UNet and its CLIP text encoders.

    Text layers whose ``out_proj`` is zero are identities, get no gradient, and are left out; so is a last one that
    nothing reads.

    Args:
        unet_modules: all modules of the UNet (``dict(unet.named_modules())``), with the names of the original
            checkpoints, relative to ``diffusion_model``, or with those of diffusers.
        text_modules: the same for each text encoder, by ``clip_l``, ``clip_h``, ``clip_g``, ``text_encoder`` or
            ``text_encoder_2``; may be empty.
        family: a key of `FAMILIES`.
        convolutions: find those of the UNet's residual blocks, too.

    Returns:
        Neutral name → module, in canonical order: convolutions last.

    Raises:
        LayoutError: if the family is unknown or the UNet has no attention layers of the known form.
    """
    if family not in FAMILIES:
        known = ", ".join(FAMILIES.values())
        raise LayoutError(f"LiDB works on {known}, but the connected MODEL is {family!r}. Load such a checkpoint.")
    targets = _unet_targets(unet_modules, convolutions)
    if not targets:
        raise LayoutError(
            f"Expected a UNet with attention layers ({FAMILIES[family]}), found none in "
            f"{len(unet_modules)} modules. Connect the MODEL of an SD 1.x, SD 2.x or SDXL checkpoint."
        )
    for encoder, modules in text_modules.items():
        last_unread = (family, encoder) in _LAST_UNREAD
        targets.update(_text_targets(_TEXT_ENCODERS.get(encoder, encoder), modules, last_unread))
    return {name: targets[name] for name in sorted(targets, key=_canonical_key)}


def layout_of(targets: Mapping[str, Any], family: str) -> Layout:
    """The layout of what `find_targets` found."""
    return Layout(family, tuple(Layer(name, *_sizes(module)) for name, module in targets.items()))


def host_keys(layout: Layout) -> dict[str, str]:
    """Name → weight key of ComfyUI, for every layer of a model's layout.

    ``diffusion_model.….weight`` belongs to a MODEL, ``clip_l.…``, ``clip_h.…`` and ``clip_g.…`` to a CLIP.
    """
    num_res_blocks = _num_res_blocks_of_neutral(layer.name for layer in layout.layers)
    return {layer.name: host_key(layer.name, num_res_blocks, layout.family) for layer in layout.layers}


def host_key(name: str, num_res_blocks: int = 2, family: str = "sd1") -> str:
    """The weight key of ComfyUI for the name of a layer.

    Args:
        name: of a layer.
        num_res_blocks: residual blocks per UNet level (2 in SD 1.x, SD 2.x and SDXL).
        family: decides between CLIP-L and CLIP-H.

    Raises:
        LayoutError: if the name is not one of ours.
    """
    if name.startswith(HOST_PREFIX):
        return f"{name}.weight"
    if match := _NEUTRAL_TEXT.fullmatch(name):
        first = "clip_h" if family == "sd2" else "clip_l"
        return f"{first if match[1] == 'text_encoder' else 'clip_g'}.transformer.{match[2]}.weight"
    if not (match := _NEUTRAL_UNET.fullmatch(name)):
        raise LayoutError(f"Expected the name of an adapted layer, got {name!r}. Make the LiDB again with this pack.")
    kind, tail = ("attentions", match[4]) if match[4] else ("resnets", _CONVOLUTIONS[match[6]])
    block = ldm_block(match[1], int(match[2] or 0), kind, int(match[3] or match[5] or 0), num_res_blocks)
    return f"diffusion_model.{block}.{tail}.weight"


def ldm_block(section: str, level: int, kind: str, index: int, num_res_blocks: int) -> str:
    """Where the original checkpoints keep a residual block or an attention: ``input_blocks.1.0``, ``middle_block.1``.

    Args:
        section: ``down_blocks``, ``mid_block`` or ``up_blocks``, as diffusers has it.
        level: of the section; none in ``mid_block``.
        kind: ``resnets`` or ``attentions``.
        index: within the level.
        num_res_blocks: residual blocks per UNet level.
    """
    if section == "mid_block":  # two residual blocks with the attention between them
        return f"middle_block.{2 * index if kind == 'resnets' else 1}"
    number, slot = level * (num_res_blocks + 1) + index, 0 if kind == "resnets" else 1
    return f"input_blocks.{1 + number}.{slot}" if section == "down_blocks" else f"output_blocks.{number}.{slot}"


def neutral_unet_name(name: str, num_res_blocks: int) -> str | None:
    """The neutral name of a UNet module, or None if it is not one of the layers that can be adapted.

    Args:
        name: original (ldm) name relative to ``diffusion_model``, or the name in diffusers.
        num_res_blocks: residual blocks per UNet level.
    """
    if _NEUTRAL_UNET.fullmatch(name):
        return name if name.startswith("unet.") else f"unet.{name}"
    attention = _LDM_UNET.fullmatch(name)
    if not (match := attention or _LDM_CONVOLUTION.fullmatch(name)):
        return None
    section, number = match[1], int(match[2])
    kind, tail = ("attentions", match[3]) if attention else ("resnets", _NEUTRAL_CONVOLUTIONS[match[3]])
    if section == "middle_block":
        return f"unet.mid_block.{kind}.{0 if attention else number // 2}.{tail}"
    level, index = divmod(number - 1 if section == "input_blocks" else number, num_res_blocks + 1)
    return f"unet.{'down_blocks' if section == 'input_blocks' else 'up_blocks'}.{level}.{kind}.{index}.{tail}"


def require_layers(wanted: Layout, available: Layout, maker: str = "This LiDB") -> None:
    """Check that every layer of `wanted` exists with the same sizes in `available`.

    Args:
        wanted: the layers that something was made for.
        available: the layers of the connected model.
        maker: what was made, the first words of the message.

    Raises:
        LayoutError: in plain words, if not.
    """
    sizes = {layer.name: layer for layer in available.layers}
    missing = sum(sizes.get(layer.name) != layer for layer in wanted.layers)
    if not missing:
        return
    raise LayoutError(
        f"{maker} was made for another model ({wanted.describe()}) than the connected MODEL and CLIP "
        f"({available.describe()}): {missing} of its {len(wanted.layers)} layers are missing or of another size. "
        "Connect the MODEL and CLIP of a matching checkpoint, or make a new LiDB with this one."
    )


def is_linear(module: nn.Module) -> bool:
    """Whether a module has the sizes of a linear layer, whatever its class and the form of its weight."""
    # Quantised linear layers of the host are not nn.Linear, but they do carry their sizes.
    return hasattr(module, "in_features") and hasattr(module, "out_features")


def _sizes(module: Any) -> tuple[int, int]:
    """in_features, out_features of an adapted layer."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels * math.prod(module.kernel_size), module.out_channels
    return int(module.in_features), int(module.out_features)


def _unet_targets(modules: Mapping[str, nn.Module], convolutions: bool) -> dict[str, nn.Module]:
    num_res_blocks = _num_res_blocks_of_ldm(modules)
    named = ((neutral_unet_name(name, num_res_blocks), module) for name, module in modules.items())
    return {
        name: module
        for name, module in named
        if name and (is_linear(module) or (convolutions and isinstance(module, nn.Conv2d)))
    }


def _text_targets(encoder: str, modules: Mapping[str, Any], last_unread: bool) -> dict[str, nn.Module]:
    linears = {name: module for name, module in modules.items() if is_linear(module)}
    found = {(match[1], match[2]): m for name, m in linears.items() if (match := _TEXT.fullmatch(name))}
    live = {i for (i, projection), m in found.items() if projection == "out_proj" and bool(m.weight.float().any())}
    if last_unread:
        live.discard(max((i for i, _ in found), key=int, default=""))
    prefix = f"{encoder}.text_model.encoder.layers"
    return {f"{prefix}.{i}.self_attn.{projection}": m for (i, projection), m in found.items() if i in live}


def _num_res_blocks_of_ldm(names: Iterable[str]) -> int:
    names = list(names)
    downsamples = [int(match[1]) for name in names if (match := _LDM_DOWNSAMPLE.match(name))]
    if downsamples:
        return min(downsamples) - 1
    return max((int(match[1]) for name in names if (match := _LDM_INPUT.match(name))), default=1)


def _num_res_blocks_of_neutral(names: Iterable[str]) -> int:
    matches = [match for name in names if (match := _NEUTRAL_UNET.fullmatch(name))]
    down = [int(match[3] or match[5]) + 1 for match in matches if match[1] == "down_blocks"]
    up = [int(match[3] or match[5]) for match in matches if match[1] == "up_blocks"]
    return max(down + up, default=2)


def _canonical_key(name: str) -> tuple[bool, int, list[int], int]:
    tails = (*_PROJECTIONS, *_CONVOLUTIONS)
    tail = next(t for t in tails if name.endswith(f".{t}"))
    section = max((s for s in _SECTIONS if name.startswith(s + ".")), key=len)
    numbers = re.findall(r"\d+", name.removesuffix(tail))
    return tail in _CONVOLUTIONS, _SECTIONS.index(section), [int(n) for n in numbers], tails.index(tail)
