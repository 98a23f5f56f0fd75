"""Maps of condition images, each against what can be said of it without the code that makes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from skimage import measure, morphology

from sdxs.control import TYPES, Control, extract, map_of
from sdxs.control.sketch import thinned
from sdxs.errors import InvalidRequest, PreconditionFailed
from trainer.strokes import hand_drawn

SIZE = 64
label: Any = measure.label
thin: Any = morphology.thin
WHITE, BLACK = (255, 255, 255), (0, 0, 0)


def pieces(mask_HW: np.ndarray) -> int:
    return int(label(mask_HW > 0, connectivity=2).max())


def holes(mask_HW: np.ndarray) -> int:
    """Pieces of paper, the one around everything included."""
    return int(label(np.pad(mask_HW == 0, 1, constant_values=True), connectivity=1).max())


def square(size: int, contrast: int) -> np.ndarray:
    """A square on black, from a quarter to three quarters of each side."""
    image = np.zeros((size, size, 3), np.uint8)
    image[size // 4 : -size // 4, size // 4 : -size // 4] = contrast
    return image


@pytest.mark.parametrize("pixels", [SIZE, 4 * SIZE])
def test_edges_of_a_square_are_its_contour(pixels: int) -> None:
    edges = extract(square(pixels, 255), "edge", SIZE)
    assert edges.shape == (SIZE, SIZE, 3) and set(np.unique(edges)) == {0, 255}
    assert (edges == edges[..., :1]).all()
    found = edges[..., 0] > 0
    assert (pieces(found), holes(found)) == (1, 2)
    inside = np.zeros((SIZE, SIZE), bool)
    inside[16:48, 16:48] = True
    to_contour = np.where(inside, distance_transform_edt(inside), distance_transform_edt(~inside))
    assert to_contour[found].max() <= 1.5  # one of the two pixels that the contour runs between, cut corners included
    assert 4 * 32 - 8 <= found.sum() <= 4 * 34  # once around, one pixel wide


def test_an_edge_is_four_times_a_step() -> None:
    """Sobel's weights are 1, 2, 1: a step of 51 is a gradient of 204, above the threshold of 200; one of 49 is 196, below it."""
    half = np.zeros((SIZE, SIZE, 3), np.uint8)
    for step, lines in ((49, 0), (51, 1)):
        half[:, SIZE // 2 :] = step
        assert pieces(extract(half, "edge", SIZE)[..., 0]) == lines


def blobs(rng: np.random.Generator) -> np.ndarray:
    noise = cv2.GaussianBlur(rng.normal(size=(SIZE, SIZE)).astype(np.float32), (0, 0), rng.uniform(0.6, 4))
    mask: np.ndarray = (noise > noise.std() * rng.uniform(0, 1.2)).astype(np.uint8)
    return mask


def test_thinning_is_scikit_images() -> None:
    for seed in range(40):
        mask = blobs(np.random.default_rng(seed))
        lines = thinned(mask)
        np.testing.assert_array_equal(lines, thin(mask > 0) * np.uint8(255))
        assert (pieces(lines), holes(lines)) == (pieces(mask), holes(mask))
        assert not (lines[mask == 0]).any()


@pytest.mark.parametrize("diameter", range(1, 16))
def test_a_dot_stays(diameter: int) -> None:
    """A face has eyes."""
    y, x = np.mgrid[0:32, 0:32] - 15.5 - diameter % 2 / 2
    for mask in (x**2 + y**2 <= diameter**2 / 4, np.maximum(abs(x), abs(y)) <= diameter / 2):
        assert pieces(thinned(mask.astype(np.uint8))) == 1


def face(size: int = 512, ink: Any = BLACK, paper: Any = WHITE, pen: int = 6) -> np.ndarray:
    """Four strokes, drawn with a pen of `pen` 512ths of the page."""
    page = np.full((size, size, 3), paper, np.uint8)

    def at(value: int) -> int:
        return round(value * size / 512)

    width = max(1, at(pen))
    cv2.circle(page, (at(256), at(256)), at(180), ink, width, cv2.LINE_AA)
    for x in (190, 320):
        cv2.circle(page, (at(x), at(200)), at(10), ink, -1, cv2.LINE_AA)
    cv2.ellipse(page, (at(256), at(280)), (at(100), at(70)), 0, 20, 160, ink, width, cv2.LINE_AA)
    return page


def apart(one_HW: np.ndarray, other_HW: np.ndarray) -> float:
    """Pixels from any stroke of one drawing to the nearest of the other, at the most (Hausdorff distance)."""
    return max(float(distance_transform_edt(a == 0)[b > 0].max()) for a, b in ((one_HW, other_HW), (other_HW, one_HW)))


DRAWINGS: dict[str, dict[str, Any]] = {
    "blue ballpoint": {"ink": (30, 60, 200)}, "yellow marker": {"ink": (250, 220, 60)}, "pencil": {"ink": (150, 150, 150)},
    "chalk": {"ink": WHITE, "paper": BLACK}, "white on navy": {"ink": WHITE, "paper": (20, 20, 60)},
    "cream paper": {"paper": (245, 235, 210)},
    "large": {"size": 2048}, "small": {"size": 128, "pen": 8}, "as small as the model": {"size": 64, "pen": 10},
    "thick pen": {"pen": 16}, "thin pen": {"pen": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_sketch_is_its_strokes_whatever_pen_and_paper(name: str) -> None:
    reference = extract(face(), "sketch", SIZE)[..., 0]
    assert pieces(reference) == 4 and set(np.unique(reference)) == {0, 255}
    found = extract(face(**DRAWINGS[name]), "sketch", SIZE)
    assert found.shape == (SIZE, SIZE, 3) and (found == found[..., :1]).all()
    assert pieces(found[..., 0]) == 4
    assert apart(found[..., 0], reference) <= 2
    assert (found > 0).mean() == pytest.approx((reference > 0).mean(), abs=0.01)


def test_an_inverted_drawing_is_the_same_drawing() -> None:
    np.testing.assert_array_equal(extract(255 - face(), "sketch", SIZE), extract(face(), "sketch", SIZE))


def test_shadow_and_grain_are_not_ink() -> None:
    reference, shade = extract(face(), "sketch", SIZE)[..., 0], np.linspace(0.5, 1, 512)[None, :, None]
    grain = np.random.default_rng(0).normal(0, 2, (512, 512, 3))
    found = extract((face() * shade + grain).clip(0, 255).astype(np.uint8), "sketch", SIZE)[..., 0]
    assert pieces(found) == 4 and apart(found, reference) <= 1
    assert not extract((255 * shade + grain).clip(0, 255).astype(np.uint8), "sketch", SIZE).any()


@pytest.mark.parametrize("size", [64, 256, 512])
def test_strokes_are_as_thick_at_any_size(size: int) -> None:
    found = extract(face(), "sketch", size)[..., 0]
    assert pieces(found) == 4
    assert (found > 0).mean() == pytest.approx((extract(face(), "sketch", SIZE) > 0).mean(), abs=0.015)


@pytest.mark.parametrize("kind", ["edge", "sketch"])
@pytest.mark.parametrize("shade", [0, 100, 128, 255])
def test_a_blank_page_gives_a_blank_map(kind: str, shade: int) -> None:
    for height, width in ((64, 64), (1, 300), (3, 2), (700, 50)):
        found = extract(np.full((height, width, 3), shade, np.uint8), kind, SIZE)
        assert found.shape == (SIZE, SIZE, 3) and not found.any()


def test_a_colour_map_is_means_of_blocks() -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 128, 3), dtype=np.uint8)
    means = image.reshape(8, 8, 8, 16, 3).mean(axis=(1, 3))
    found = extract(image, "colour", 32)
    np.testing.assert_array_equal(found, np.repeat(np.repeat(found[::4, ::4], 4, 0), 4, 1))
    assert np.abs(found[::4, ::4] - means).max() <= 0.5 + 1e-3


def test_maps_are_as_trained() -> None:
    """Training makes them of images of the model's size, clients send any size: the same map of the same picture."""
    image = square(SIZE, 200)
    np.testing.assert_array_equal(extract(image, "colour", SIZE)[0, 0], [0, 0, 0])
    large = np.repeat(np.repeat(image, 4, 0), 4, 1)
    np.testing.assert_array_equal(extract(large, "colour", SIZE), extract(image, "colour", SIZE))
    assert apart(extract(large, "edge", SIZE)[..., 0], extract(image, "edge", SIZE)[..., 0]) <= 1


def ring() -> np.ndarray:
    image = np.full((SIZE, SIZE, 3), 255, np.uint8)
    cv2.circle(image, (32, 32), 20, (40, 90, 200), -1, cv2.LINE_AA)
    return image


def test_hand_drawn_lines_follow_from_the_generator() -> None:
    drawn = [hand_drawn(ring(), np.random.default_rng(seed)) for seed in (0, 0, 1, 2)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len({one.tobytes() for one in drawn}) == 3
    assert drawn[0].shape == (SIZE, SIZE, 3) and set(np.unique(drawn[0])) == {0, 255}
    assert not hand_drawn(np.full((SIZE, SIZE, 3), 255, np.uint8), np.random.default_rng(0)).any()


@pytest.mark.parametrize("size", [64, 256])
def test_hand_drawn_lines_lie_near_the_edges(size: int) -> None:
    """Displaced, stretched and broken, but of the shape: here a circle whose radius is 20 of 64 pixels."""
    image = cv2.resize(ring(), (size, size), interpolation=cv2.INTER_CUBIC)
    y, x = np.mgrid[0:size, 0:size] * (64 / size) - 32
    off, covered = [], []
    for seed in range(12):
        drawn = hand_drawn(image, np.random.default_rng(seed))[..., 0] > 0
        off.append(np.abs(np.hypot(x, y)[drawn] - 20))
        angles = np.arctan2(y, x)[drawn]
        covered.append(len(np.unique((angles * 36 / np.pi).astype(int))) / 72)
        assert 0.02 < drawn.mean() < 0.12  # a line about two pixels wide at 64 pixels
    assert np.median(np.concatenate(off)) < 2 and np.quantile(np.concatenate(off), 0.98) < 6
    assert np.mean(covered) > 0.8


@pytest.mark.parametrize("kind", ["depth", "lineart", "pose"])
def test_what_is_missing_is_said_with_what_to_install(kind: str) -> None:
    with pytest.raises(PreconditionFailed, match=rf"'{kind}' needs controlnet-aux: pip install \"sdxs\[annotators\]\""):
        extract(face(), kind, SIZE)


def test_an_unknown_type_names_the_field() -> None:
    with pytest.raises(InvalidRequest, match=r"controls\[1\]\.type: got 'crayon'.*edge, sketch, colour, depth, lineart, pose"):
        extract(face(), "crayon", SIZE, "controls[1].type")
    assert TYPES == ("edge", "sketch", "colour", "depth", "lineart", "pose")


def test_a_preprocessed_map_is_only_resized() -> None:
    map_HWC = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    data = cv2.imencode(".png", map_HWC[..., ::-1])[1].tobytes()
    np.testing.assert_array_equal(map_of(Control(data, "depth", preprocessed=True), SIZE, "controls[0]"), map_HWC)


# As controlnet-aux 0.0.10 has them, its sides in multiples of 64 included.
ANNOTATORS = """
import numpy as np

CALLS = []


def _sides(image, resolution):
    scale = resolution / min(image.shape[:2])
    height, width = (int(np.round(side * scale / 64)) * 64 for side in image.shape[:2])
    assert 0 < height <= 1024 and 0 < width <= 1024, "cv2.resize would refuse it, or take gigabytes"
    return height, width


class _Detector:
    @classmethod
    def from_pretrained(cls, pretrained_model_or_path, filename=None, cache_dir=None, local_files_only=False):
        CALLS.append([cls.__name__, pretrained_model_or_path])
        if MISSING:
            raise FileNotFoundError("not in the cache, and no network")
        return cls()

    def _run(self, input_image, detect_resolution, image_resolution, output_type):
        assert isinstance(input_image, np.ndarray) and input_image.dtype == np.uint8 and input_image.shape[2] == 3
        CALLS.append([type(self).__name__, list(input_image.shape), detect_resolution, image_resolution, output_type])
        _sides(input_image, detect_resolution)
        return np.full((*_sides(input_image, image_resolution), 3), 77, np.uint8)


class MidasDetector(_Detector):
    def __call__(self, input_image, a=6.28, bg_th=0.1, depth_and_normal=False, detect_resolution=512, image_resolution=512,
                 output_type=None):
        assert not depth_and_normal
        return self._run(input_image, detect_resolution, image_resolution, output_type)


class LineartDetector(_Detector):
    def __call__(self, input_image, coarse=False, detect_resolution=512, image_resolution=512, output_type="pil", **kwargs):
        assert not kwargs
        return self._run(input_image, detect_resolution, image_resolution, output_type)


class OpenposeDetector(_Detector):
    def __call__(self, input_image, detect_resolution=512, image_resolution=512, include_body=True, include_hand=False,
                 include_face=False, hand_and_face=None, output_type="pil", **kwargs):
        assert hand_and_face is None and not kwargs
        return self._run(input_image, detect_resolution, image_resolution, output_type)
"""
ASK = """
import json, sys
import numpy as np
from sdxs.control import extract
from sdxs.errors import SdxsError
found = []
for kind in ("depth", "lineart", "pose"):
    for height, width in ((20, 30), (2, 3000)):
        try:
            map_HWC = extract(np.zeros((height, width, 3), np.uint8), kind, 96)
            found.append([kind, list(map_HWC.shape), str(map_HWC.dtype), int(map_HWC.min()), int(map_HWC.max())])
        except SdxsError as error:
            found.append([kind, type(error).__name__, str(error)])
print(json.dumps([found, sys.modules["controlnet_aux"].CALLS]))
"""


def asked(folder: Path, missing: bool) -> Any:
    """What `extract` gives and what the library was called with, in a process that has one of that interface."""
    (folder / "controlnet_aux.py").write_text(ANNOTATORS + f"\n\nMISSING = {missing}\n")
    root = Path(__file__).parents[2]
    code = f"import sys; sys.path[:0] = [{str(folder)!r}, {str(root)!r}]\n{ASK}"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def test_annotators_are_called_as_documented_and_loaded_once(tmp_path: Path) -> None:
    found, calls = asked(tmp_path, missing=False)
    kinds = {"depth": "MidasDetector", "lineart": "LineartDetector", "pose": "OpenposeDetector"}
    assert found == [[kind, [96, 96, 3], "uint8", 77, 77] for kind in kinds for _ in range(2)]
    expected: list[Any] = []
    for name in kinds.values():
        expected += [[name, "lllyasviel/Annotators"], *[[name, [512, 512, 3], 512, 512, "np"]] * 2]
    assert calls == expected


def test_annotators_without_weights_are_a_precondition(tmp_path: Path) -> None:
    found, _ = asked(tmp_path, missing=True)
    assert {one[1] for one in found} == {"PreconditionFailed"}
    assert "weights of lllyasviel/Annotators" in found[0][2]
