"""Draws people: avataaars parts (by Pablo Stanley, as packaged in ``python_avatars``) moved, scaled and coloured.

Coordinates are the avataaars canvas (264 wide); the picture shows the square of ``VIEW`` units around ``CENTER``.
"""

import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import python_avatars
import resvg_py
from PIL import Image

from .people import CLOTHING_COLORS, GEOMETRY, RGB, WALLS, Context, Person
from .styles import apply_style

VIEW = 214.0
CENTER = (132.0, 134.0)

_PARTS = Path(python_avatars.__file__).parent / "avatar_parts"
_HAIR = {
    "short": "short_flat",
    "bob": "bob",
    "bun": "bun",
    "afro": "fro",
    "curly": "curly",
    "long": "straight_strand",
    "mullet": "shaggy_mullet",
    "quiff": "quiff",
}
_FACIAL_HAIR = {"beard": "beard_medium", "stubble": "beard_light", "moustache": "moustache_magnum"}
_CLOTHING = {"shirt": "shirt_crew_neck", "hoodie": "hoodie", "suit": "blazer_shirt", "overalls": "overall"}
_ACCESSORIES = {"glasses": "round", "sunglasses": "wayfarers"}
_EYES = {"laughing": "happy", "surprised": "surprised", "winking": "wink"}
_MOUTHS = {
    "neutral": "serious",
    "smiling": "smile",
    "laughing": "big_smile",
    "sad": "sad",
    "surprised": "disbelief",
    "winking": "twinkle",
}
_COLOR_GROUPS = ("Hair-Color", "Facial-Hair-Color", "Fabric-Color", "Color-Hair", "Skin-Color")
_BODY = (
    "M100,0 C130.9,0 156,25.07 156,56 L156,62.17 C161.68,63.12 166,68.05 166,74 L166,88 C166,94.05 161.52,99.06 "
    "155.69,99.88 C153.63,119.69 141.24,136.42 124,144.61 L124,163 L128,163 C167.76,163 200,195.24 200,235 L200,300 "
    "L0,300 L0,235 C0,195.24 32.24,163 72,163 L76,163 L76,144.61 C58.76,136.42 46.37,119.69 44.31,99.88 C38.48,99.06 "
    "34,94.05 34,88 L34,74 C34,68.05 38.32,63.12 44,62.17 L44,56 C44,25.07 69.07,0 100,0 Z"
)

_NECK = (
    "M44,94 C44,124.9 69.07,150 100,150 C130.9,150 156,124.9 156,94 L156,102 C156,132.9 130.9,158 100,158 "
    "C69.07,158 44,132.9 44,102 Z"
)


def _hex(color: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*color)


@cache
def _part(path: str) -> str:
    """The inner SVG of a part, its ids made unique and metadata of drawing programs dropped."""
    svg = (_PARTS / f"{path}.svg").read_text(encoding="utf-8")
    svg = re.sub(r"<\?xml.*?\?>|<title.*?</title>|<desc.*?</desc>|<metadata.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?!xlink:)[a-z]+:[a-z-]+="[^"]*"', "", svg)
    svg = re.sub(r"<svg[^>]*>", "", svg, count=1).rsplit("</svg>", 1)[0]
    prefix = path.replace("/", "_")
    svg = re.sub(r'id="([^"]+)"', rf'id="{prefix}_\1"', svg)
    return re.sub(r"#((?:path|mask|filter|linearGradient|rect|clip)[\w-]*)", rf"#{prefix}_\1", svg)


def _colored(path: str, color: RGB) -> str:
    """A part with its colour group filled."""
    svg = _part(path)
    for group in _COLOR_GROUPS:
        svg = re.sub(rf'(<g id="\w*_{group}"[^>]*?)fill=""', rf'\1fill="{_hex(color)}"', svg)
    return svg


def _replace_colors(svg: str, colors: dict[str, RGB]) -> str:
    """Fixed colours of a drawing, as "#rrggbb", replaced."""
    for literal, color in colors.items():
        svg = re.sub(literal, _hex(color), svg, flags=re.IGNORECASE)
    return svg


def _group(transform: str, content: str) -> str:
    return f'<g transform="{transform}">{content}</g>'


def _about(x: float, y: float, sx: float, sy: float) -> str:
    return f"translate({x:.3f} {y:.3f}) scale({sx:.4f} {sy:.4f}) translate({-x:.3f} {-y:.3f})"


def _eyes(expression: str, spacing: float, size: float) -> str:
    """Two eyes, each the clipped half of the part, moved apart and scaled about its own centre (30|82, 22)."""
    art = _part(f"eyes/{_EYES.get(expression, 'default')}")
    sides = []
    for side, center in (("left", 30), ("right", 82)):
        shift = -spacing if side == "left" else spacing
        clipped = f'<g clip-path="url(#half_{side})">{art}</g>'
        sides.append(_group(f"translate({shift:.3f} 0) {_about(center, 22, size, size)}", clipped))
    return "".join(sides)


def _brows(tilt: float) -> str:
    art = _part("eyebrows/default")
    return "".join(
        _group(f"rotate({angle:.3f} {center} 12)", f'<g clip-path="url(#half_{side})">{art}</g>')
        for side, center, angle in (("left", 30, tilt), ("right", 82, -tilt))
    )


def _scaled(value: float, low: float, high: float) -> float:
    return low + (value + 1) / 2 * (high - low)


def _face_svg(shape: dict[str, float], expression: str) -> str:
    """Nose, mouth, eyes and brows, on the face's own origin."""
    nose = _scaled(shape["nose_size"], 0.65, 1.6)
    mouth = _about(54, 20, _scaled(shape["mouth_width"], 0.65, 1.45), _scaled(shape["mouth_width"], 0.85, 1.15))
    mouth_y = 52 + _scaled(shape["mouth_height"], -5, 6)
    eyes = _eyes(expression, _scaled(shape["eye_spacing"], -7, 7), _scaled(shape["eye_size"], 0.7, 1.5))
    brows = _brows(_scaled(shape["brow_tilt"], -16, 16))
    return (
        _group(f"translate(28 40) {_about(28, 10, nose, nose)}", _part("nose/default").replace("0.16", "0.34"))
        + _group(f"translate(2 {mouth_y:.3f}) {mouth}", _part(f"mouth/{_MOUTHS[expression]}"))
        + _group("translate(0 8)", eyes)
        + _group(f"translate(0 {_scaled(shape['brow_height'], -9, 4):.3f})", brows)
    )


def _head_svg(person: Person, context: Context) -> str:
    """Body, facial hair, face, mark, hair and glasses, from back to front."""
    shape = dict(zip(GEOMETRY, person.geometry, strict=True))
    body = f'<path d="{_BODY}" fill="{_hex(person.skin_rgb)}"/><path d="{_NECK}" fill="#000" fill-opacity="0.1"/>'
    x, y = 132 + _scaled(shape["mark_x"], -40, 40), _scaled(shape["mark_y"], 92, 152)
    head = [_group("translate(32 36)", body)]
    if person.facial_hair in _FACIAL_HAIR:
        beard = _colored(f"facial_hair/{_FACIAL_HAIR[person.facial_hair]}", person.hair_rgb)
        head.append(_group("translate(49 72)", beard))
    head.append(_group("translate(76 82)", _face_svg(shape, context.expression)))
    head.append(f'<circle cx="{x:.3f}" cy="{y:.3f}" r="4.6" fill="#3a1d16"/>')
    hair = _colored(f"top/hair/{_HAIR[person.hair_shape]}", person.hair_rgb)
    head.append(_replace_colors(hair, {"#724133": person.hair_rgb}))
    if context.accessory in _ACCESSORIES:
        glasses = _part(f"accessories/{_ACCESSORIES[context.accessory]}")
        width = _scaled(shape["eye_spacing"], 0.94, 1.1)
        head.append(_group(f"translate(62 85) {_about(71, 20, width, 1.0)}", glasses))
    return _group(_about(132, 120, _scaled(shape["face_width"], 0.86, 1.14), 1.0), "".join(head))


def _clothes_svg(clothing: str, color: RGB) -> str:
    path = f"clothes/{_CLOTHING[clothing]}"
    if clothing != "suit":
        return _colored(path, color)
    # White shirt, coloured jacket, darker lapels: all in one colour, a suit would look like a shirt.
    red, green, blue = (int(0.72 * value) for value in color)
    return _replace_colors(_colored(path, (244, 244, 244)), {"#3A4C5A": color, "#2F4351": (red, green, blue)})


def _person_svgs(person: Person, context: Context) -> tuple[str, str]:
    """The head, and the clothes in front of it."""
    clothes = _clothes_svg(context.clothing, CLOTHING_COLORS[context.clothing_color])
    place = _place(context)
    return _group(place, _head_svg(person, context)), _group(place, _group("translate(0 170)", clothes))


def _place(context: Context) -> str:
    (x, y), zoom = context.shift, context.scale
    return f"translate({x:.3f} {y:.3f}) rotate({context.tilt:.3f} 132 150) {_about(132, 130, zoom, zoom)}"


def _beach(x: float, y: float, band: Callable[[float, float, str], str]) -> str:
    sun = f'<circle cx="{x + 30}" cy="{y + 34}" r="17" fill="#fff3a8"/>'
    return band(0, 0.45, "#8fd3f4") + sun + band(0.45, 0.7, "#2a8fc7") + band(0.7, 1, "#f0d9a0")


def _tree(x: float, y: float, height: float) -> str:
    foot = y + 0.6 * height + 24
    return f'<polygon points="{x},{y + 18} {x - 26},{foot} {x + 26},{foot}" fill="#1f6b3a"/>'


def _house(x: float, y: float, height: float) -> str:
    top = x * 7 % 50
    windows = (
        f'<rect x="{x + 5 + 10 * i}" y="{y + 44 + 22 * j + top}" width="7" height="11" fill="#f8e08a"/>'
        for i in range(2)
        for j in range(6)
    )
    return f'<rect x="{x}" y="{y + 30 + top}" width="27" height="{height}" fill="#5d6a82"/>' + "".join(windows)


def _peak(x: float, y: float, height: float) -> str:
    foot = y + 0.6 * height + 14
    rock = f'<polygon points="{x},{y + 40} {x - 60},{foot} {x + 60},{foot}" fill="#8296b4"/>'
    return rock + f'<polygon points="{x},{y + 40} {x - 21},{y + 71} {x + 21},{y + 71}" fill="#ffffff"/>'


def _background_svg(background: str, x: float, y: float, width: float, height: float) -> str:
    def band(top: float, bottom: float, color: str) -> str:
        return (
            f'<rect x="{x}" y="{y + top * height}" width="{width}" height="{(bottom - top) * height}" fill="{color}"/>'
        )

    def row(step: float, shape: Callable[[float, float, float], str]) -> str:
        return "".join(shape(x + i * step, y, height) for i in range(int(width / step) + 2))

    match background:
        case "beach":
            return _beach(x, y, band)
        case "forest":
            return band(0, 0.7, "#bfe6c8") + row(38, _tree) + band(0.7, 1, "#4f7d3a")
        case "city":
            return band(0, 1, "#c9d4e4") + row(33, _house)
        case "snow":
            return band(0, 0.65, "#a9c6ee") + row(78, _peak) + band(0.65, 1, "#f4f8ff")
    return band(0, 1, _hex(WALLS[background.removesuffix(" wall")]))


_FACE = '<ellipse cx="132" cy="124" rx="58" ry="52"/>'
_ORIGIN = CENTER[0] - VIEW / 2, CENTER[1] - VIEW / 2
_CLIPS = ('<clipPath id="half_left"><rect x="-30" y="-40" width="86" height="140"/></clipPath>'
          '<clipPath id="half_right"><rect x="56" y="-40" width="86" height="140"/></clipPath>')  # fmt: skip


def draw(people: list[tuple[Person, Context]], background: str, style: str = "photo", size: int = 128) -> np.ndarray:
    """Draws zero or more people side by side on one background.

    Args:
        people: left to right; each takes a ``size`` x ``size`` square. None draws the empty scene, one square.
        size: side of a square in pixels.

    Returns:
        uint8 RGB, (size, size * max(1, len(people)), 3).
    """
    squares = max(1, len(people))
    figures = "".join(
        _group(f"translate({VIEW * i:.3f} 0)", "".join(_person_svgs(p, c))) for i, (p, c) in enumerate(people)
    )
    scene = _background_svg(background, *_ORIGIN, VIEW * squares, VIEW)
    return apply_style(np.asarray(_rendered(scene + figures, squares, size).convert("RGB")), style)


def _rendered(shapes: str, squares: int, size: int) -> Image.Image:
    x, y = _ORIGIN
    svg = (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'viewBox="{x} {y} {VIEW * squares} {VIEW}" width="{size * squares}" height="{size}" fill-rule="evenodd">'
           f"<defs>{_CLIPS}</defs>{shapes}</svg>")  # fmt: skip
    return Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))


def photo(person: Person, context: Context, size: int = 128) -> np.ndarray:
    """One person's photo: uint8 RGB, (size, size, 3)."""
    return draw([(person, context)], context.background, context.style, size)


def head_mask(person: Person, context: Context, size: int = 128) -> np.ndarray:
    """Where `photo` shows the head and not clothes or background: uint8 (size, size), 255 inside."""
    head, clothes = (np.asarray(_rendered(part, 1, size).getchannel("A")) for part in _person_svgs(person, context))
    return np.where(clothes > 0, 0, head)


def silhouette(person: Person, context: Context, size: int = 128) -> np.ndarray:
    """Where `photo` shows the person, head and clothes: uint8 (size, size), 255 inside."""
    return np.array(_rendered("".join(_person_svgs(person, context)), 1, size).getchannel("A"))


def face_mask(person: Person, context: Context, size: int = 128) -> np.ndarray:
    """How much of a person each place of `photo` shows: uint8 (size, size), 255 from brows to mouth, 77 on the rest of
    the head, 0 elsewhere."""
    face = _group(_place(context), _FACE)
    inside = np.asarray(_rendered(face, 1, size).getchannel("A")) / 255
    return np.round(head_mask(person, context, size) * (0.3 + 0.7 * inside)).astype(np.uint8)


@cache
def face_place(size: int = 128) -> np.ndarray:
    """Where nearly every face is, from brows to mouth, whoever it is and however they hold their head: uint8 (size, size)."""
    return np.array(_rendered(_FACE, 1, size).getchannel("A"))
