"""Annotations as PASCAL VOC writes them, for the tests of several rooms."""

from __future__ import annotations

OBJECT = (
    "<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{x1}</xmin><ymin>{y1}</ymin>"
    "<xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
)


def xml(
    *objects: tuple[str, float, float, float, float], size: tuple[int, int] | None = (80, 60), difficult: int = 0
) -> str:
    """An annotation; boxes as they stand in the file, from 1."""
    inside = f"<size><width>{size[0]}</width><height>{size[1]}</height></size>" if size else ""
    for name, x1, y1, x2, y2 in objects:
        inside += OBJECT.format(name=name, difficult=difficult, x1=x1, y1=y1, x2=x2, y2=y2)
    return f"<annotation>{inside}</annotation>"
