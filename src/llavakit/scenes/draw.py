"""A scene -> a picture: flat shapes with a soft shadow on a shaded ground, drawn large and reduced (no jagged edges).

Outlines are polygons in a unit frame, y down, turned by the thing's tilt and scaled by its radius. Rings and moons are
drawn on a mask (a disc with a disc taken away).
"""

from __future__ import annotations

import math
import random
from functools import cache, lru_cache

from PIL import Image, ImageDraw, ImageFont

from llavakit.scenes.world import LETTER, Scene, Sign, Thing

OVERSAMPLE = 2
RGB = {
    "red": (212, 38, 40), "orange": (245, 135, 22), "yellow": (248, 214, 34), "green": (38, 150, 62),
    "blue": (32, 92, 205), "purple": (122, 48, 160), "pink": (248, 138, 192), "black": (34, 34, 38),
}  # fmt: skip
GROUNDS = ((244, 241, 234), (232, 240, 244), (238, 244, 232), (246, 236, 236), (240, 236, 246), (226, 232, 236), (250, 248, 240))
INK, PLATE, RIM = (28, 28, 34), (253, 252, 247), (96, 96, 104)


def draw(scene: Scene, *, long_side: int | None = None) -> Image.Image:
    """The picture of a scene as RGB. ``long_side`` in pixels draws it at another resolution (default: the scene's own)."""
    scale = (long_side or scene.long_side) * OVERSAMPLE
    width = max(1, round(scene.width * scale / scene.long_side))
    height = max(1, round(scene.height * scale / scene.long_side))
    canvas = _ground(scene, width, height)
    for thing in scene.things:
        _draw_thing(canvas, thing, scale)
    for sign in scene.signs:
        _draw_sign(canvas, sign, scale)
    return canvas.reduce(OVERSAMPLE)


def blank(scene: Scene, *, long_side: int | None = None) -> Image.Image:
    """The same ground with nothing on it: what a model sees when it must guess."""
    scale = long_side or scene.long_side
    width = max(1, round(scene.width * scale / scene.long_side))
    return _ground(scene, width, max(1, round(scene.height * scale / scene.long_side)))


def box(thing: Thing, scene: Scene) -> tuple[int, int, int, int]:
    """The tight box of a thing in pixels of the scene's own size: left, top, right, bottom (exclusive), clipped to the picture."""
    side = max(8, round(2.2 * thing.radius * scene.long_side))
    edges = _mask(thing.shape, side, thing.radius * scene.long_side, thing.tilt).getbbox()
    assert edges is not None, thing
    left, top = round(thing.x * scene.width - side / 2), round(thing.y * scene.height - side / 2)
    x0, y0, x1, y1 = edges[0] + left, edges[1] + top, edges[2] + left, edges[3] + top
    return max(0, x0), max(0, y0), min(scene.width, x1), min(scene.height, y1)


def _ground(scene: Scene, width: int, height: int) -> Image.Image:
    """A pale ground, a little darker towards one edge."""
    rng = random.Random(scene.background)
    base = tuple(channel + rng.randint(-4, 4) for channel in rng.choice(GROUNDS))
    top, bottom = rng.randint(0, 10), rng.randint(0, 18)
    if rng.random() < 0.5:
        top, bottom = bottom, top
    strip = Image.new("RGB", (1, 2))
    strip.putpixel((0, 0), tuple(max(0, min(255, c - top)) for c in base))
    strip.putpixel((0, 1), tuple(max(0, min(255, c - bottom)) for c in base))
    return strip.resize((width, height), Image.Resampling.BILINEAR)


def _draw_thing(canvas: Image.Image, thing: Thing, scale: int) -> None:
    side = max(8, round(2.2 * thing.radius * scale))
    mask = _mask(thing.shape, side, thing.radius * scale, thing.tilt)
    left, top = round(thing.x * canvas.width - side / 2), round(thing.y * canvas.height - side / 2)
    shade, rng = max(1, round(0.012 * scale)), random.Random(round(thing.x * 1e6))
    color = tuple(max(0, min(255, c + rng.randint(-9, 9))) for c in RGB[thing.color])
    rim = tuple(int(c * 0.62) for c in color)
    canvas.paste((118, 118, 126), (left + shade, top + shade), mask.point(lambda v: v * 2 // 5))
    canvas.paste(rim, (left, top), mask)
    edge = max(1.0, 0.055 * thing.radius * scale)
    inner = _mask(thing.shape, side, thing.radius * scale - 1.6 * edge, thing.tilt, thickness=edge)
    canvas.paste(color, (left, top), inner)


def _mask(shape: str, side: int, radius: float, tilt: float, *, thickness: float = 0.0) -> Image.Image:
    """The area of a shape of ``radius`` pixels in a square of ``side`` pixels. ``thickness`` trims the hole of rings and moons."""
    mask = Image.new("L", (side, side))
    pen, centre = ImageDraw.Draw(mask), side / 2
    if shape in ("circle", "ring", "moon"):
        pen.ellipse(_disc(centre, centre, radius), fill=255)
        if shape == "ring":
            pen.ellipse(_disc(centre, centre, 0.55 * (radius + 1.6 * thickness) + thickness), fill=0)
        elif shape == "moon":
            turn = math.radians(tilt - 20)
            whole = radius + 1.6 * thickness
            at = centre + 0.45 * whole * math.cos(turn), centre + 0.45 * whole * math.sin(turn)
            pen.ellipse(_disc(*at, 0.78 * whole + thickness), fill=0)
        return mask
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    outline = [(centre + radius * (x * cos - y * sin), centre + radius * (x * sin + y * cos)) for x, y in _outline(shape)]
    pen.polygon(outline, fill=255)
    return mask


def _disc(x: float, y: float, radius: float) -> tuple[float, float, float, float]:
    return x - radius, y - radius, x + radius, y + radius


@cache
def _outline(shape: str) -> tuple[tuple[float, float], ...]:
    """The corners of a shape in the unit frame."""
    if shape == "square":
        return ((-0.82, -0.82), (0.82, -0.82), (0.82, 0.82), (-0.82, 0.82))
    if shape == "triangle":
        return ((0.0, -0.95), (0.92, 0.72), (-0.92, 0.72))
    if shape == "star":
        spokes = ((1.0 if i % 2 == 0 else 0.42, -math.pi / 2 + i * math.pi / 5) for i in range(10))
        return tuple((r * math.cos(a), r * math.sin(a)) for r, a in spokes)
    if shape == "cross":
        a, b = 0.32, 0.95
        return ((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a))
    assert shape == "heart", shape
    steps = [2 * math.pi * i / 40 for i in range(40)]
    heart = ((math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) for t in steps)
    return tuple((0.95 * x, -(y + 2.5) / 15.5) for x, y in heart)


def _draw_sign(canvas: Image.Image, sign: Sign, scale: int) -> None:
    half_w, half_h = (extent * scale for extent in sign.half_extent())
    x, y = sign.x * canvas.width, sign.y * canvas.height
    pen = ImageDraw.Draw(canvas)
    shade = max(1, round(0.008 * scale))
    box = (x - half_w, y - half_h, x + half_w, y + half_h)
    pen.rounded_rectangle([v + shade for v in box], radius=0.2 * half_h, fill=(150, 150, 156))
    pen.rounded_rectangle(box, radius=0.2 * half_h, fill=PLATE, outline=RIM, width=max(1, round(0.05 * half_h)))
    pen.text((x, y), sign.text.upper(), font=_font(round(LETTER[sign.type] * scale * 1.12)), fill=INK, anchor="mm")


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(max(6, size))
