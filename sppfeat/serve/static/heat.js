// Where a score comes from: a heat map over an image and numbered marks on linked bins.
import { el } from "./dom.js";

/** Place an element over a box (inclusive pixels) of an image of this size. */
export function place(element, box, width, height) {
  const [x1, y1, x2, y2] = box;
  element.style.left = `${(100 * x1) / width}%`;
  element.style.top = `${(100 * y1) / height}%`;
  element.style.width = `${(100 * (x2 - x1 + 1)) / width}%`;
  element.style.height = `${(100 * (y2 - y1 + 1)) / height}%`;
  return element;
}

/** One pixel per bin; the browser smooths it. Cold bins are veiled and hot ones glow, so that the image stays readable. */
function paint(grid) {
  const rows = grid.length, columns = grid[0].length;
  const canvas = el("canvas", { width: columns, height: rows, "aria-hidden": "true" });
  const pen = canvas.getContext("2d");
  const pixels = pen.createImageData(columns, rows);
  const top = Math.max(...grid.flat(), 1e-12);
  grid.flat().forEach((value, index) => {
    const heat = Math.max(0, value) / top;
    const warm = Math.min(1, heat * 1.6);
    pixels.data.set([12 + 243 * warm, 16 + 134 * warm, 24 * (1 - warm), 255 * (0.6 - 0.55 * warm + 0.4 * heat * heat)], 4 * index);
  });
  pen.putImageData(pixels, 0, 0);
  return canvas;
}

/**
 * A layer for a frame: the heat map of a grid, and numbers at its bins.
 * @param {number[][]} grid what each bin adds to the score
 * @param {number[][]} bins row and column of the linked bins; number i + 1 marks bin i
 * @param {{box: number[], width: number, height: number} | null} part the part of the image that the grid covers; null: all
 */
function heatLayer(grid, bins, part = null) {
  const layer = el("div", { className: "heat", "aria-hidden": "true" }, paint(grid));
  if (part?.box) place(layer, part.box, part.width, part.height);
  bins.forEach(([row, column], index) => {
    const mark = el("span", { className: "mark" }, String(index + 1));
    mark.style.left = `${(100 * (column + 0.5)) / grid[0].length}%`;
    mark.style.top = `${(100 * (row + 0.5)) / grid.length}%`;
    layer.append(mark);
  });
  return layer;
}

/** The two layers of a hit: over the query and over the hit. */
export function heatLayers(query, hit) {
  const links = hit.why.links;
  return {
    query: heatLayer(hit.why.query, links.map((link) => link.query), query.box && query),
    hit: heatLayer(hit.why.image, links.map((link) => link.image)),
  };
}

/** The outline of a box over an image. */
export function outline(box, width, height, text = "") {
  const made = place(el("span", { className: "outline", "aria-hidden": "true" }), box, width, height);
  if (text) made.append(el("span", { className: "tag" }, text));
  return made;
}

/** Give a frame the aspect ratio of an image. */
export function shape(frame, width, height) {
  frame.style.setProperty("--ratio", String(width && height ? width / height : 4 / 3));
}
