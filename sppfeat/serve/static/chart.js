// The drawn map: points and thumbnails on a canvas, drawn when something changed, and the way between map and screen.

const MOST_SHEETS = 16; // a view that needs more shows points: their thumbnails would be megabytes for specks
const CELL = 36; // least screen pixels of a cell that shows a thumbnail; the most is twice that
const MOST_TILES = 600; // on large screens cells are larger instead of more
const DEEPER = 7; // levels below those of the grid of points: a view that deep holds an image or two

export class Chart {
  /** @param {HTMLCanvasElement} canvas */
  constructor(canvas, points, sheets) {
    Object.assign(this, { canvas, points, sheets, images: true, selected: null, path: null, hover: -1, cross: false });
    this.pen = canvas.getContext("2d");
    this.mark = new Uint8Array(points.length); // 1: selected
    this.camera = { x: 0.5, y: 0.5, scale: 0 }; // middle of the view, and screen pixels of the map's side
    this.onDraw = () => {};
    this.colors();
  }

  colors() {
    const style = getComputedStyle(document.documentElement);
    const value = (name) => style.getPropertyValue(name).trim();
    this.ink = { paper: value("--card"), accent: value("--accent"), soft: value("--point") };
    const number = (hex) => parseInt(hex.slice(5, 7) + hex.slice(3, 5) + hex.slice(1, 3), 16);
    this.pixel = { point: number(this.ink.soft), selected: number(this.ink.accent) };
    this.later();
  }

  resize() {
    const { clientWidth, clientHeight } = this.canvas;
    if (!clientWidth) return;
    this.dots = Math.min(2, window.devicePixelRatio || 1);
    this.width = clientWidth;
    this.height = clientHeight;
    this.canvas.width = Math.round(clientWidth * this.dots);
    this.canvas.height = Math.round(clientHeight * this.dots);
    this.raster = this.pen.createImageData(this.canvas.width, this.canvas.height);
    this.pixels = new Uint32Array(this.raster.data.buffer);
    this.cell = Math.max(CELL, Math.sqrt((clientWidth * clientHeight) / MOST_TILES));
    if (!this.camera.scale) this.fit();
    this.later();
  }

  get least() {
    return Math.min(this.width, this.height) * 0.94;
  }

  fit() {
    this.move({ x: 0.5, y: 0.5, scale: this.least });
  }

  move({ x = this.camera.x, y = this.camera.y, scale = this.camera.scale }) {
    const bound = (value) => Math.max(0, Math.min(1, value));
    this.camera = { x: bound(x), y: bound(y), scale: Math.max(this.least / 2, Math.min(CELL * 2 ** (this.points.level + DEEPER), scale)) };
    this.later();
  }

  /** Zoom so that what is at this place on the screen stays there. */
  zoom(factor, sx = this.width / 2, sy = this.height / 2) {
    const [x, y] = this.toMap(sx, sy);
    this.move({ scale: this.camera.scale * factor });
    const { scale } = this.camera;
    this.move({ x: x - (sx - this.width / 2) / scale, y: y - (sy - this.height / 2) / scale });
  }

  pan(dx, dy) {
    const { x, y, scale } = this.camera;
    this.move({ x: x - dx / scale, y: y - dy / scale });
  }

  toMap(sx, sy) {
    const { x, y, scale } = this.camera;
    return [x + (sx - this.width / 2) / scale, y + (sy - this.height / 2) / scale];
  }

  toScreen(x, y) {
    const { camera } = this;
    return [(x - camera.x) * camera.scale + this.width / 2, (y - camera.y) * camera.scale + this.height / 2];
  }

  get view() {
    const [x1, y1] = this.toMap(0, 0), [x2, y2] = this.toMap(this.width, this.height);
    return { x1, y1, x2, y2 };
  }

  select(rows) {
    this.mark.fill(0);
    for (const row of rows) this.mark[row] = 1;
    this.later();
  }

  /** The row shown at a place on the screen; -1: none. */
  at(sx, sy) {
    for (const one of this.drawn ?? []) {
      if (sx >= one.left && sy >= one.top && sx < one.left + one.side && sy < one.top + one.side) return one.row;
    }
    return this.points.nearest(...this.toMap(sx, sy), 12 / this.camera.scale);
  }

  /** The row shown nearest to the middle; -1: the view is empty. */
  middle() {
    const { x, y } = this.camera;
    const shown = this.at(this.width / 2, this.height / 2);
    return shown >= 0 ? shown : this.points.nearest(x, y, Math.min(this.width, this.height) / 2 / this.camera.scale);
  }

  later() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      if (this.width && this.canvas.isConnected) this.#draw();
    });
  }

  #draw() {
    this.#drawPoints();
    const { pen } = this;
    pen.setTransform(this.dots, 0, 0, this.dots, 0, 0);
    this.drawn = [];
    this.far = false;
    if (this.images) this.#drawTiles();
    if (this.path?.length > 1) this.#drawPath();
    if (this.cross) this.#drawCross();
    this.onDraw();
  }

  /** Points straight into pixels: a hundred thousand take a few milliseconds, as shapes they would take a hundred. */
  #drawPoints() {
    const { xy } = this.points, { dots, pixels, camera } = this, { width, height } = this.canvas;
    pixels.fill(0);
    const scale = camera.scale * dots, left = width / 2 - camera.x * scale, top = height / 2 - camera.y * scale;
    const crowd = this.points.length / (this.camera.scale / 2) ** 2; // points per 4 screen pixels
    const size = Math.round(dots * (crowd > 0.3 ? 1.5 : crowd > 0.03 ? 2 : 4));
    this.points.around(this.view, (row) => {
      const x = Math.round(left + xy[2 * row] * scale - size / 2), y = Math.round(top + xy[2 * row + 1] * scale - size / 2);
      if (x < 0 || y < 0 || x + size > width || y + size > height) return;
      const marked = this.mark[row], color = marked ? this.pixel.selected : this.pixel.point;
      for (let line = y; line < y + size; line++) {
        for (let at = line * width + x, end = at + size; at < end; at++) {
          // Where points meet they get denser; a selected one stays visible in a crowd.
          const alpha = pixels[at] >>> 24;
          if (marked || alpha !== 255) pixels[at] = (((marked ? 255 : Math.min(254, alpha + ((255 - alpha) >> 1))) << 24) | color) >>> 0;
        }
      }
    });
    this.pen.setTransform(1, 0, 0, 1, 0, 0);
    this.pen.putImageData(this.raster, 0, 0);
  }

  #drawTiles() {
    const { pen, camera } = this;
    const level = Math.max(0, Math.floor(Math.log2(camera.scale / this.cell)));
    const cells = this.points.cells(level, this.view);
    const wanted = new Map();
    for (const { row } of cells) {
      const number = this.sheets.number(row);
      wanted.set(number, (wanted.get(number) ?? 0) + 1);
    }
    this.far = wanted.size > MOST_SHEETS;
    if (this.far) return;
    this.sheets.want([...wanted.keys()].sort((a, b) => wanted.get(b) - wanted.get(a)));
    const cell = camera.scale / 2 ** level, side = cell * 0.94;
    for (const { x, y, row } of cells) {
      const [sx, sy] = this.toScreen((x + 0.5) / 2 ** level, (y + 0.5) / 2 ** level);
      const left = sx - side / 2, top = sy - side / 2;
      if (!this.sheets.draw(pen, row, left, top, side)) continue;
      this.drawn.push({ row, left, top, side });
      if (this.mark[row] || row === this.hover) {
        pen.strokeStyle = this.ink.accent;
        pen.lineWidth = 3;
        pen.strokeRect(left, top, side, side);
      }
    }
  }

  #drawPath() {
    const { pen } = this;
    pen.beginPath();
    for (const [x, y] of this.path) pen.lineTo(...this.toScreen(x, y));
    pen.closePath();
    pen.strokeStyle = pen.fillStyle = this.ink.accent;
    pen.globalAlpha = 0.15;
    pen.fill();
    pen.globalAlpha = 1;
    pen.lineWidth = 2;
    pen.stroke();
  }

  /** Where Enter looks, while the keyboard is used. */
  #drawCross() {
    const { pen } = this, x = this.width / 2, y = this.height / 2;
    for (const [color, width] of [[this.ink.paper, 5], [this.ink.accent, 2]]) {
      pen.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        pen.moveTo(x + 5 * dx, y + 5 * dy);
        pen.lineTo(x + 15 * dx, y + 15 * dy);
      }
      pen.strokeStyle = color;
      pen.lineWidth = width;
      pen.stroke();
    }
  }
}
