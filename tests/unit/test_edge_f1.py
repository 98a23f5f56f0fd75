"""Edge F1 and colour error: hand-made maps with scores worked out on paper, and a brute-force count of matches."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.evaluation.metrics.edges import colour_error, edge_f1, lines, mean_edge_f1, tolerance


def edges(*points: tuple[int, int], size: int = 8) -> np.ndarray:
    found = np.zeros((size, size), bool)
    for row, column in points:
        found[row, column] = True
    return found


def brute(found: np.ndarray, wanted: np.ndarray, reach: int) -> float:
    """The definition, pixel against pixel."""

    def share(of: np.ndarray, other: np.ndarray) -> float:
        others = np.argwhere(other)
        near = [min(max(abs(y - v), abs(x - u)) for v, u in others) <= reach for y, x in np.argwhere(of)]
        return float(np.mean(near))

    precision, recall = share(found, wanted), share(wanted, found)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_worked_out_by_hand() -> None:
    wanted = edges((2, 2), (2, 3), (2, 4), (2, 5))
    assert edge_f1(wanted, wanted) == 1.0
    assert edge_f1(edges((3, 2), (3, 3), (3, 4), (3, 5)), wanted) == 1.0  # one pixel off
    assert edge_f1(edges((4, 2), (4, 3), (4, 4), (4, 5)), wanted) == 0.0  # two pixels off
    assert edge_f1(edges((4, 2), (4, 3), (4, 4), (4, 5)), wanted, tolerance=2) == 1.0
    assert edge_f1(edges((1, 1)), edges((2, 2))) == 1.0  # a diagonal neighbour
    # Half of the found ones are near (precision 1/2), all wanted ones are found (recall 1).
    assert edge_f1(edges((2, 2), (2, 3), (2, 4), (2, 5), (7, 0), (7, 1), (7, 2), (7, 3)), wanted) == pytest.approx(2 / 3)
    # One of four is found; it covers itself and its neighbour (recall 1/2), precision 1.
    assert edge_f1(edges((2, 2)), wanted) == pytest.approx(2 / 3)


def test_blank_maps() -> None:
    blank, some = edges(), edges((1, 1))
    assert edge_f1(blank, blank) == 1.0
    assert edge_f1(blank, some) == edge_f1(some, blank) == 0.0


@pytest.mark.parametrize("reach", [1, 2, 3])
def test_against_brute_force(reach: int) -> None:
    rng = np.random.default_rng(reach)
    for density in (0.005, 0.02, 0.1):
        found, wanted = (rng.random((24, 24)) < density for _ in range(2))
        found[0, 0] = wanted[23, 23] = True
        assert edge_f1(found, wanted, reach) == pytest.approx(brute(found, wanted, reach))
        assert edge_f1(found, wanted, reach) == pytest.approx(edge_f1(wanted, found, reach))


def test_the_tolerance_grows_with_the_image() -> None:
    assert [tolerance(size) for size in (16, 32, 64, 96, 128, 512)] == [1, 1, 1, 2, 2, 8]


def square(size: int, low: int, high: int) -> np.ndarray:
    image = np.full((size, size, 3), 255, np.uint8)
    image[low:high, low:high] = (200, 30, 30)
    return image


def outline(size: int, low: int, high: int) -> np.ndarray:
    """Where a square begins: known without any edge detector."""
    drawn = np.zeros((size, size, 3), np.uint8)
    drawn[low, low:high] = drawn[high - 1, low:high] = drawn[low:high, low] = drawn[low:high, high - 1] = 255
    return drawn


def test_images_against_maps() -> None:
    images = np.stack([square(64, 16, 48), square(64, 16, 48), np.full((64, 64, 3), 90, np.uint8)])
    maps = np.stack([outline(64, 16, 48), outline(64, 4, 60), outline(64, 16, 48)])
    assert [mean_edge_f1(images[i : i + 1], maps[i : i + 1]) > 0.97 for i in range(3)] == [True, False, False]
    assert mean_edge_f1(images[1:], maps[1:]) == 0.0
    assert mean_edge_f1(images, maps) == pytest.approx(mean_edge_f1(images[:1], maps[:1]) / 3)


def test_lines_of_a_map_are_its_light_pixels() -> None:
    drawn = np.zeros((4, 4, 3), np.uint8)
    drawn[1, 2], drawn[0, 0] = 255, 40
    assert np.argwhere(lines(drawn)).tolist() == [[1, 2]]


def test_colours_are_of_blocks() -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    blocks = image[0].reshape(8, 4, 8, 4, 3).mean((1, 3))
    wanted = np.full((1, 32, 32, 3), 100, np.uint8)
    assert colour_error(image, wanted) == pytest.approx(np.abs(blocks - 100).mean(), abs=1e-3)
    exact = np.rint(blocks).astype(np.uint8).repeat(4, 0).repeat(4, 1)[None]
    assert colour_error(image, exact) < 0.5
    assert colour_error(wanted, wanted) == 0.0
