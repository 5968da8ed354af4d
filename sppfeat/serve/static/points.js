// Points of the map in a spatial grid: what is visible, what is near, what a polygon holds, and one image per cell to show.

/** A fixed random order of rows: the image that stands for a cell stands for it at the next zoom, too. */
function priority(row) {
  let mixed = Math.imul(row ^ 0x9e3779b9, 0x85ebca6b);
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
  return (mixed ^ (mixed >>> 16)) >>> 0;
}

export class Points {
  /** @param {Float32Array} xy x and y of each row, from 0 to 1 */
  constructor(xy) {
    this.xy = xy;
    this.length = xy.length / 2;
    // About 4 points per cell, and a power of 2, so that coarser cells are unions of finer ones.
    this.level = Math.max(0, Math.min(10, Math.round(Math.log2(Math.max(1, this.length / 4)) / 2)));
    this.side = 2 ** this.level;
    this.#sort();
    this.#pyramid();
  }

  #cell(value) {
    return Math.max(0, Math.min(this.side - 1, Math.floor(value * this.side)));
  }

  /** Counting sort by cell: rows of cell c are rows[starts[c]] to rows[starts[c + 1] - 1]. */
  #sort() {
    const { xy, length, side } = this;
    this.starts = new Uint32Array(side * side + 1);
    const cells = new Uint32Array(length);
    for (let row = 0; row < length; row++) {
      cells[row] = this.#cell(xy[2 * row + 1]) * side + this.#cell(xy[2 * row]);
      this.starts[cells[row] + 1]++;
    }
    for (let cell = 0; cell < side * side; cell++) this.starts[cell + 1] += this.starts[cell];
    const next = this.starts.slice();
    this.rows = new Uint32Array(length);
    for (let row = 0; row < length; row++) this.rows[next[cells[row]]++] = row;
  }

  /** For each level: the row of least priority in each cell, plus 1; 0: the cell is empty. */
  #pyramid() {
    const { side, level } = this;
    const better = (a, b) => (!a || (b && priority(b - 1) < priority(a - 1)) ? b : a);
    let finer = new Uint32Array(side * side);
    for (let cell = 0; cell < side * side; cell++) {
      for (let at = this.starts[cell]; at < this.starts[cell + 1]; at++) finer[cell] = better(finer[cell], this.rows[at] + 1);
    }
    this.first = [];
    this.first[level] = finer;
    for (let at = level - 1; at >= 0; at--) {
      const across = 2 ** at, coarser = new Uint32Array(across * across);
      for (let y = 0; y < 2 * across; y++) {
        for (let x = 0; x < 2 * across; x++) {
          const cell = (y >> 1) * across + (x >> 1);
          coarser[cell] = better(coarser[cell], finer[y * 2 * across + x]);
        }
      }
      this.first[at] = finer = coarser;
    }
  }

  /** Call with each row in a rectangle's grid cells: some lie a little outside of it. */
  around({ x1, y1, x2, y2 }, call) {
    if (x2 < 0 || y2 < 0 || x1 > 1 || y1 > 1) return;
    const left = this.#cell(x1), right = this.#cell(x2);
    for (let y = this.#cell(y1); y <= this.#cell(y2); y++) {
      const end = this.starts[y * this.side + right + 1];
      for (let at = this.starts[y * this.side + left]; at < end; at++) call(this.rows[at]);
    }
  }

  /** One row for each cell of a level (2 ** level cells along a side) that touches a rectangle: {x, y, row}. */
  cells(level, view) {
    const across = 2 ** level, found = [];
    const bound = (value) => Math.max(0, Math.min(across - 1, Math.floor(value * across)));
    if (level <= this.level) {
      for (let y = bound(view.y1); y <= bound(view.y2); y++) {
        for (let x = bound(view.x1); x <= bound(view.x2); x++) {
          const row = this.first[level][y * across + x];
          if (row) found.push({ x, y, row: row - 1 });
        }
      }
      return found;
    }
    const best = new Map();
    this.around(view, (row) => {
      const x = bound(this.xy[2 * row]), y = bound(this.xy[2 * row + 1]), key = y * across + x;
      const other = best.get(key);
      if (!other || priority(row) < priority(other.row)) best.set(key, { x, y, row });
    });
    return [...best.values()];
  }

  /** The row nearest to a place, at most so far away; -1: none. */
  nearest(x, y, far) {
    let best = -1, least = far * far;
    this.around({ x1: x - far, y1: y - far, x2: x + far, y2: y + far }, (row) => {
      const away = (this.xy[2 * row] - x) ** 2 + (this.xy[2 * row + 1] - y) ** 2;
      if (away <= least) [best, least] = [row, away];
    });
    return best;
  }

  /** Rows inside a rectangle. */
  inside(view) {
    const found = [];
    this.around(view, (row) => {
      const x = this.xy[2 * row], y = this.xy[2 * row + 1];
      if (x >= view.x1 && x <= view.x2 && y >= view.y1 && y <= view.y2) found.push(row);
    });
    return found;
  }

  /** Rows inside a polygon of [x, y] corners (even-odd rule). */
  within(polygon) {
    const xs = polygon.map(([x]) => x), ys = polygon.map(([, y]) => y);
    const bounds = { x1: Math.min(...xs), y1: Math.min(...ys), x2: Math.max(...xs), y2: Math.max(...ys) };
    return this.inside(bounds).filter((row) => {
      const x = this.xy[2 * row], y = this.xy[2 * row + 1];
      let odd = false;
      for (let at = 0, before = polygon.length - 1; at < polygon.length; before = at++) {
        const [ax, ay] = polygon[at], [bx, by] = polygon[before];
        if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) odd = !odd;
      }
      return odd;
    });
  }
}
