"""Pixels of a synthetic clip, and its H.264 file."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from synthetic.clips import COLOURS, DURATION_S, FPS, SIDE_PX, Clip, Shape

if TYPE_CHECKING:  # numpy and av are imported where they are used: --help answers at once
    import numpy as np
    from numpy.typing import NDArray


def write_clip(clip: Clip, folder: Path) -> None:
    """Encode one clip. The file appears when it is complete."""
    import av

    final = folder / f"{clip.name}.mp4"
    partial_file = final.with_suffix(".part")
    # x264's output depends on the number of threads, and with mbtree on memory it did not write.
    options = {"preset": "veryfast", "crf": "20", "threads": "1", "x264-params": "mbtree=0"}
    with av.open(str(partial_file), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.width = stream.height = SIDE_PX
        stream.pix_fmt = "yuv420p"
        for image in draw(clip):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    os.replace(partial_file, final)


def draw(clip: Clip) -> Iterator["NDArray[np.uint8]"]:
    """Yield the frames in order, [112, 112, 3] RGB."""
    import numpy as np

    rows, columns = np.mgrid[:SIDE_PX, :SIDE_PX].astype(np.float32)
    background = draw_background(np.random.default_rng(clip.seed), clip.noise)
    for index in range(DURATION_S * FPS):
        image = background.copy()
        for shape in clip.shapes:
            if shape.interval_s[0] <= index / FPS < shape.interval_s[1]:
                colour = np.array(COLOURS[shape.colour]) * shape.brightness
                image[covered(shape, index, rows, columns)] = colour.clip(0, 255)
        yield image


def draw_background(rng: "np.random.Generator", noise: float) -> "NDArray[np.uint8]":
    """Return a dim colour with grey noise in cells of 4 px, one pixel each at 28x28 px."""
    import numpy as np

    cells = SIDE_PX // 4
    texture = rng.normal(0, noise, (cells, cells, 1)).repeat(4, 0).repeat(4, 1)
    return (rng.uniform(20, 60, 3) + texture).clip(0, 255).astype(np.uint8)


def covered(shape: Shape, index: int, rows: Any, columns: Any) -> Any:
    """Return the mask [112, 112] of the pixels that the shape covers in frame `index`."""
    radius = shape.radius_px
    x, y = (
        bounced(start + index * step, radius)
        for start, step in zip(shape.start_px, shape.step_px, strict=True)
    )
    right, down = columns - x, rows - y
    reach = abs(right).clip(abs(down))  # distance from the centre in the maximum norm
    if shape.kind == "square":
        return reach <= 0.886 * radius  # the circle's area
    if shape.kind == "circle":
        return right**2 + down**2 <= radius**2
    if shape.kind == "triangle":
        return (down <= radius) & (down >= 2 * abs(right) - radius)
    return (reach <= radius) & (abs(right).clip(max=abs(down)) <= radius / 3)  # cross


def bounced(place: float, radius: float) -> float:
    """Return the position on a straight path that is reflected at the borders."""
    span = SIDE_PX - 2 * radius
    return radius + span - abs((place - radius) % (2 * span) - span)
