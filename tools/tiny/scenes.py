"""Procedural clips whose right answer is known: one coloured shape that moves straight where its nose points.

Axes: t frames, y rows (down), x columns (right). Lengths are pixels of a 64x64 frame, positions are measured from
the outer corner of the top left pixel, angles are radians from "right" towards "down", colours are RGB in [0, 1].

A heading can be seen in any single frame: a dark tapered tail trails behind the shape, a white nose leads it.
The speed cannot be seen, it is told: `speed(motion_bucket)` pixels per second. So image, fps and bucket fix the clip.
"""

from dataclasses import dataclass, replace

import numpy as np

SIZE = 64
FRAMES = 8
FPS = (6, 12)  # slowest and fastest playback that clips are made for
MARGIN = 11.0  # the shape's centre keeps this far from the border, whatever the bucket
REACH = 33.0  # longest path: the largest bucket, FRAMES frames, the slowest fps
TOP_SPEED = 28.0  # pixels per second at bucket 255

# name: (points, outer radius, inner radius, first point's angle), radii in units of the scene's radius: a star of
# that many points. A polygon is a star whose inner corners lie on its sides, and the circle has many sides.
SHAPES = {
    "circle": (32, 1.0, np.cos(np.pi / 32), 0.0),
    "square": (4, 1.22, 1.22 * np.cos(np.pi / 4), np.pi / 4),
    "triangle": (3, 1.4, 1.4 * np.cos(np.pi / 3), -np.pi / 2),
    "star": (5, 1.4, 0.62, -np.pi / 2),
}
COLOURS = {
    "red": (0.92, 0.16, 0.14),
    "orange": (0.98, 0.55, 0.08),
    "yellow": (0.97, 0.90, 0.20),
    "green": (0.20, 0.80, 0.25),
    "cyan": (0.20, 0.85, 0.92),
    "blue": (0.22, 0.40, 0.98),
    "purple": (0.62, 0.28, 0.92),
    "pink": (0.98, 0.50, 0.78),
}
TONES = {
    "navy": (0.12, 0.16, 0.34),
    "grey": (0.28, 0.29, 0.31),
    "brown": (0.32, 0.21, 0.14),
    "olive": (0.25, 0.27, 0.12),
    "plum": (0.28, 0.13, 0.25),
    "teal": (0.08, 0.27, 0.28),
}
BACKGROUNDS = ("gradient", "vignette", "horizon", "glow")
HEADINGS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
WHITE = np.ones(3, np.float32)
TAIL_SHADE = 0.45  # the tail's colour over the body's


@dataclass(frozen=True)
class Background:
    """A smooth two-tone backdrop: `near` and `far` colours, mixed along `angle` or around (x, y)."""

    kind: str
    tone: str
    near: tuple[float, float, float]
    far: tuple[float, float, float]
    angle: float
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    """One shape at its first position (x, y), pointing along `heading`, over a background.

    The defaults of the rest are those of every standard scene. `wobble` is what a hand does to an outline: waves
    (k, amplitude, phase) that multiply the radius at angle a by 1 + amplitude cos(k a + phase). `turn` rotates the
    shape, not its heading; `line` is the width of a line of colour `line_rgb` along the outline. `cues` is the opacity
    of nose and tail: where they can hardly be seen, the image does not say where the shape goes.
    """

    shape: str
    colour: str
    rgb: tuple[float, float, float]
    radius: float
    x: float
    y: float
    heading: float
    background: Background
    nose: bool = True
    tail: bool = True
    nose_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    turn: float = 0.0
    wobble: tuple[tuple[int, float, float], ...] = ()
    line: float = 0.0
    line_rgb: tuple[float, float, float] = (1.0, 1.0, 1.0)
    cues: float = 1.0


@dataclass(frozen=True)
class Track:
    """What `track` measured: positions [t, 2] as (x, y), nan where no shape was found; `rgb` and `shape` over all
    frames, `shapes` in each, None where none was found; `heading` in radians and `speed` in pixels per frame of the
    straight line through the positions."""

    positions: np.ndarray
    rgb: np.ndarray
    shape: str | None
    shapes: tuple[str | None, ...]
    heading: float
    speed: float


def speed(motion_bucket: float) -> float:
    """Pixels per second, linear in the bucket (0 to 255)."""
    return TOP_SPEED * motion_bucket / 255


def random_scene(rng: np.random.Generator) -> Scene:
    """A scene whose shape stays in frame for every bucket at every fps in `FPS`, over `FRAMES` frames."""
    heading = rng.uniform(-np.pi, np.pi)
    path = REACH * np.array([np.cos(heading), np.sin(heading)])
    x, y = rng.uniform(MARGIN - np.minimum(path, 0), SIZE - MARGIN - np.maximum(path, 0))
    colour = str(rng.choice(list(COLOURS)))
    tone = str(rng.choice(list(TONES)))
    near, far = np.array(TONES[tone]) * rng.uniform([[1.0], [0.35]], [[1.3], [0.65]])
    return Scene(
        shape=str(rng.choice(list(SHAPES))),
        colour=colour,
        rgb=_rgb(np.clip(np.array(COLOURS[colour]) + rng.uniform(-0.03, 0.03, 3), 0, 1)),
        radius=rng.uniform(7.0, 9.0),
        x=float(x),
        y=float(y),
        heading=heading,
        background=Background(
            kind=str(rng.choice(BACKGROUNDS)),
            tone=tone,
            near=_rgb(near),
            far=_rgb(far),
            angle=rng.uniform(-np.pi, np.pi),
            x=rng.uniform(0.2, 0.8) * SIZE,
            y=rng.uniform(0.3, 0.7) * SIZE,
        ),
    )


def random_drawing(rng: np.random.Generator) -> tuple[Scene, ...]:
    """What a hand might draw, one shape or two on one ground: the standard scenes, widened.

    Light, plain or many-coloured grounds, shapes of any colour that stands out, of other sizes, turned, wobbly and
    with an outline; of nose and tail, one may lack. Two shapes go their own ways, and may cross.
    """
    drawn, background = [], None
    for _ in range(1 + (rng.random() < 0.25)):
        scene = random_scene(rng)
        background = background or _random_ground(rng, scene.background)
        ground = (np.array(background.near) + background.far) / 2
        rgb = np.array(scene.rgb)
        while np.linalg.norm(rgb - ground) < 0.5:
            rgb = rng.uniform(0, 1, 3)
        tones = np.array([[1.0, 1.0, 1.0], [0.05, 0.05, 0.05], rng.uniform(0, 1, 3)])
        contrast = np.minimum(np.linalg.norm(tones - ground, axis=1), np.linalg.norm(tones - rgb, axis=1))
        line_rgb = tones[rng.integers(3)]
        waves = [(k, rng.uniform(0, 0.2 / k), rng.uniform(-np.pi, np.pi)) for k in (2, 3, 4, 5, 7)]
        cues = rng.integers(4)  # both in half of them
        drawn.append(
            replace(
                scene,
                rgb=_rgb(rgb),
                radius=rng.uniform(5.5, 10.0),
                background=background,
                nose=bool(cues != 0),
                tail=bool(cues != 1),
                nose_rgb=_rgb(tones[contrast.argmax()]),
                turn=float(rng.choice([0.0, rng.normal(0, 0.15), rng.uniform(-np.pi, np.pi)])),
                wobble=tuple(waves) if rng.random() < 0.6 else (),
                line=float(rng.uniform(1.0, 2.2)) if rng.random() < 0.3 else 0.0,
                line_rgb=_rgb(line_rgb),
            )
        )
    return tuple(drawn)


def caption(scene: Scene) -> str:
    """`a red star moving up left over a navy gradient`: everything about a scene that has a name."""
    heading = HEADINGS[round(scene.heading / (np.pi / 4)) % 8]
    subject, backdrop = f"{scene.colour} {scene.shape}", f"{scene.background.tone} {scene.background.kind}"
    return f"{_article(subject)} {subject} moving {heading} over {_article(backdrop)} {backdrop}"


def path(scene: Scene, motion_bucket: float, fps: float, frames: int = FRAMES) -> np.ndarray:
    """The shape's true positions [t, 2] as (x, y): start + speed / fps * frame * (cos heading, sin heading)."""
    travelled = speed(motion_bucket) / fps * np.arange(frames)[:, None]
    return np.array([scene.x, scene.y]) + travelled * np.array([np.cos(scene.heading), np.sin(scene.heading)])


def render(scene: Scene, positions: np.ndarray) -> np.ndarray:
    """Frames [t, 3, 64, 64], uint8, of the scene's shape at positions [t, 2], anti-aliased over one pixel."""
    return render_together((scene,), [positions])


def render_together(drawn: tuple[Scene, ...], places: list[np.ndarray]) -> np.ndarray:
    """Frames [t, 3, 64, 64], uint8, of several scenes' shapes, each at its positions [t, 2], on the first's ground."""
    frames = np.broadcast_to(_backdrop(drawn[0].background), (len(places[0]), 3, SIZE, SIZE))
    for scene, positions in zip(drawn, places, strict=True):
        body, tail, nose = _coverage(scene, positions)
        rgb, nose_rgb = np.array(scene.rgb, np.float32), np.array(scene.nose_rgb, np.float32)
        for coverage, colour in ((tail, TAIL_SHADE * rgb), (body, rgb), (nose, nose_rgb)):
            frames = frames + coverage[:, None] * (colour[:, None, None] - frames)
            if scene.line and coverage is body:
                line_rgb = np.array(scene.line_rgb, np.float32)[:, None, None]
                frames = frames + _line(scene, positions)[:, None] * (line_rgb - frames)
    return np.round(255 * frames).astype(np.uint8)


def silhouette(scene: Scene, positions: np.ndarray) -> np.ndarray:
    """How much of each pixel body, tail or nose cover, [t, 64, 64] in [0, 1]."""
    return np.max(_coverage(scene, positions), axis=0)


def random_clip(rng: np.random.Generator) -> tuple[Scene, int, int, np.ndarray]:
    """A scene, its playback fps, its motion bucket, and the uint8 frames [t, 3, 64, 64] that they fix."""
    scene, fps, bucket = random_scene(rng), int(rng.integers(FPS[0], FPS[1] + 1)), int(rng.integers(256))
    return scene, fps, bucket, render(scene, path(scene, bucket, fps))


def to_unit(frames: np.ndarray) -> np.ndarray:
    """uint8 frames to float32 in [-1, 1]."""
    return frames.astype(np.float32) / 127.5 - 1


def track(frames: np.ndarray, scene: Scene) -> Track:
    """Measure the shape in frames [t, 3, 64, 64] (uint8, or floats in [0, 1]) of a scene whose look is known.

    A pixel is the body's when its colour is nearer to the body's than to the backdrop's, the tail's and the nose's.
    A frame's position is the body's centroid, corrected by what the same rule gives on the true first frame (where
    tail and nose hide a part of it). A frame with under a third of the body's area shows no shape. The shape is the
    class whose outline overlaps the body pixels best: over all frames, and in each frame alone.
    """
    frames = frames.astype(np.float32) / 255 if frames.dtype == np.uint8 else frames.astype(np.float32)
    start = np.array([[scene.x, scene.y]])
    truth = _body_mask(render(scene, start).astype(np.float32) / 255, scene)
    mask = _body_mask(frames, scene)
    positions = _centroids(mask) + start - _centroids(truth)
    found = mask.sum((1, 2)) > truth.sum() / 3
    positions[~found] = np.nan
    if not found.any():
        return Track(positions, np.full(3, np.nan), None, (None,) * len(frames), np.nan, np.nan)
    rgb = np.median(frames.transpose(0, 2, 3, 1)[mask & found[:, None, None]], axis=0)
    names = list(SHAPES)
    pixels = [_overlap(replace(scene, shape=shape), positions[found], mask[found]) for shape in names]
    both, either = np.array(pixels).transpose(1, 0, 2)  # [shapes, frames where one was found] each
    best = iter((both / either).argmax(axis=0))
    shapes = tuple(names[next(best)] if there else None for there in found)
    velocity = np.full(2, np.nan)
    if found.sum() > 1:
        velocity = np.polyfit(np.flatnonzero(found), positions[found], 1)[0]
    heading, pace = np.arctan2(velocity[1], velocity[0]), np.hypot(*velocity)
    shape = names[(both.sum(axis=1) / either.sum(axis=1)).argmax()]
    return Track(positions, rgb, shape, shapes, float(heading), float(pace))


def same_place(frames: np.ndarray, truth: np.ndarray, scene: Scene) -> np.ndarray:
    """[t]: intersection over union of the shape in frames [t, 3, 64, 64] and in the true ones, floats in [0, 1].

    A pixel is the shape's when its colour is nearer to the shape's than half-way to the backdrop's at that place.
    """
    rgb = np.array(scene.rgb, np.float32)[:, None, None]
    half_way = np.linalg.norm(rgb - _backdrop(scene.background), axis=0) / 2
    found, expected = (np.linalg.norm(clip - rgb, axis=1) < half_way for clip in (frames, truth))
    return (found & expected).sum((1, 2)) / (found | expected).sum((1, 2))


def angle_between(a: float, b: float) -> float:
    """The angle between two headings, radians in [0, pi]."""
    return abs((a - b + np.pi) % (2 * np.pi) - np.pi)


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def _rgb(values: np.ndarray) -> tuple[float, float, float]:
    r, g, b = (float(value) for value in values)
    return r, g, b


def _pixel_centres() -> tuple[np.ndarray, np.ndarray]:
    """x [1, 1, 64] and y [1, 64, 1]."""
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    return centres[None, None, :], centres[None, :, None]


def _star_distance(x: np.ndarray, y: np.ndarray, shape: str) -> np.ndarray:
    """Signed distance to the lines of a star's outline, outer radius as in `SHAPES`; negative inside."""
    points, outer, inner, first = SHAPES[shape]
    sector = np.pi / points
    angle = np.abs((np.arctan2(y, x) - first + sector) % (2 * sector) - sector)  # fold onto half a point
    rho = np.hypot(x, y)
    edge = np.array([inner * np.cos(sector) - outer, inner * np.sin(sector)])
    normal_x, normal_y = np.array([edge[1], -edge[0]]) / np.hypot(*edge)
    return normal_x * (rho * np.cos(angle) - outer) + normal_y * rho * np.sin(angle)


def _body_distance(scene: Scene, positions: np.ndarray) -> np.ndarray:
    """Signed distance to the body's outline in units of the radius, [t, 64, 64]; of a wobbly one, nearly."""
    grid_x, grid_y = _pixel_centres()
    centre_x, centre_y = positions.T.astype(np.float32)[:, :, None, None]
    x, y = (grid_x - centre_x) / scene.radius, (grid_y - centre_y) / scene.radius
    if scene.wobble:
        angle = np.arctan2(y, x)
        stretch = 1 + sum(amplitude * np.cos(k * angle + phase) for k, amplitude, phase in scene.wobble)
        x, y = x / stretch, y / stretch
    cos, sin = float(np.cos(scene.turn)), float(np.sin(scene.turn))
    return _star_distance(x * cos + y * sin, y * cos - x * sin, scene.shape)


def _line(scene: Scene, positions: np.ndarray) -> np.ndarray:
    """How much of each pixel the line along the outline covers, [t, 64, 64] in [0, 1]: it lies inside the body."""
    distance = scene.radius * _body_distance(scene, positions)
    return np.clip(0.5 - np.maximum(distance, -distance - scene.line), 0, 1).astype(np.float32)


def _coverage(scene: Scene, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much of each pixel body, tail and nose cover, [t, 64, 64] in [0, 1]."""
    r = scene.radius
    grid_x, grid_y = _pixel_centres()
    centre_x, centre_y = positions.T.astype(np.float32)[:, :, None, None]
    x, y = (grid_x - centre_x) / r, (grid_y - centre_y) / r
    cos, sin = np.cos(scene.heading), np.sin(scene.heading)
    along, across = x * cos + y * sin, y * cos - x * sin
    tail_end, tail_width = -2.5, 0.75  # a wedge from the centre to its tip
    tail = np.maximum(np.abs(across) - tail_width * (along - tail_end) / -tail_end, along)
    nose = np.hypot(along - 0.8, across) - 0.36
    distances = (_body_distance(scene, positions), tail, nose)
    body, tail, nose = (np.clip(0.5 - r * distance, 0, 1).astype(np.float32) for distance in distances)
    return body, scene.cues * scene.tail * tail, scene.cues * scene.nose * nose


def _random_ground(rng: np.random.Generator, dark: Background) -> Background:
    """A ground for drawings: as it is in one of three, else light or of any colour; in half of those, plain."""
    kind = rng.integers(3)
    if kind == 0:
        return dark
    near = rng.uniform(0.75, 1.0) * np.ones(3) - rng.uniform(0, 0.12, 3) if kind == 1 else rng.uniform(0, 1, 3)
    plain = rng.random() < 0.5
    far = near if plain else np.clip(near * rng.uniform(0.6, 1.0) + rng.uniform(-0.05, 0.05, 3), 0, 1)
    white = kind == 1 and plain and rng.random() < 0.5
    near, far = (np.ones(3), np.ones(3)) if white else (near, far)
    return replace(dark, near=_rgb(near), far=_rgb(far))


def _backdrop(background: Background) -> np.ndarray:
    """[3, 64, 64]: far + mix * (near - far), the mix in [0, 1] by the background's kind."""
    x, y = (grid[0] / SIZE - 0.5 for grid in _pixel_centres())
    rho = np.hypot(x - background.x / SIZE + 0.5, y - background.y / SIZE + 0.5)
    mix = {
        "gradient": np.clip(0.5 + 0.75 * (x * np.cos(background.angle) + y * np.sin(background.angle)), 0, 1),
        "vignette": np.clip(1.1 - 1.3 * rho, 0, 1),
        "horizon": np.clip(background.y - SIZE * (y + 0.5) + 0.5 + 0 * x, 0, 1),
        "glow": np.exp(-((rho / 0.22) ** 2)),
    }[background.kind]
    near, far = (np.array(colour, np.float32)[:, None, None] for colour in (background.near, background.far))
    return (far + mix * (near - far)).astype(np.float32)


def _body_mask(frames: np.ndarray, scene: Scene) -> np.ndarray:
    """[t, 64, 64], true where the body's colour is the nearest of the four that the scene has there."""
    rgb = np.array(scene.rgb, np.float32)[:, None, None]
    candidates = (rgb, _backdrop(scene.background), TAIL_SHADE * rgb, WHITE[:, None, None])
    return np.argmin([((frames - colour) ** 2).sum(1) for colour in candidates], axis=0) == 0


def _centroids(mask: np.ndarray) -> np.ndarray:
    """[t, 2] as (x, y); (0, 0) for an empty mask."""
    area = np.maximum(mask.sum((1, 2)), 1)
    return np.stack([(mask * grid).sum((1, 2)) / area for grid in _pixel_centres()], axis=1)


def _overlap(scene: Scene, positions: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [t] of intersection and union of `mask` with the body mask of a true render at these positions."""
    expected = _body_mask(render(scene, positions).astype(np.float32) / 255, scene)
    return (mask & expected).sum((1, 2)), (mask | expected).sum((1, 2))
