// Sprite sheets of thumbnails, loaded on demand, the last used kept.
import { sheetUrl } from "./api.js";

const KEPT = 24; // sheets: decoded, one takes 9 MB
const AT_ONCE = 4;

export class Sheets {
  /**
   * @param {{tile: number, columns: number}} shape pixels of a tile, tiles along a side
   * @param {Uint32Array} order row of each tile
   * @param {() => void} arrived called when a sheet was loaded
   */
  constructor({ tile, columns }, order, arrived) {
    this.tile = tile;
    this.columns = columns;
    this.arrived = arrived;
    this.places = new Uint32Array(order.length);
    order.forEach((row, place) => (this.places[row] = place));
    this.sheets = new Map(); // number -> {image, state}; the last used is the last
    this.loading = 0;
    this.failed = 0;
  }

  number(row) {
    return Math.floor(this.places[row] / this.columns ** 2);
  }

  /** Ask for these sheets, the most wanted first; others that wait are forgotten. */
  want(numbers) {
    for (const number of numbers) {
      const known = this.sheets.get(number);
      if (known) {
        this.sheets.delete(number);
        this.sheets.set(number, known);
      } else if (this.loading < AT_ONCE) this.#load(number);
    }
    for (const [number, { state }] of this.sheets) {
      if (this.sheets.size <= KEPT) break;
      if (state !== "loading") this.sheets.delete(number);
    }
  }

  async #load(number) {
    const entry = { image: new Image(), state: "loading" };
    this.sheets.set(number, entry);
    this.loading++;
    try {
      entry.image.src = sheetUrl(number);
      await entry.image.decode();
      entry.state = "ready";
    } catch {
      entry.state = "failed";
      this.failed++;
    }
    this.loading--;
    this.arrived();
  }

  /** Draw a row's thumbnail; false: it is not loaded. */
  draw(pen, row, x, y, side) {
    const place = this.places[row], sheet = this.sheets.get(this.number(row));
    if (sheet?.state !== "ready") return false;
    const at = place % this.columns ** 2, { tile, columns } = this;
    pen.drawImage(sheet.image, (at % columns) * tile, Math.floor(at / columns) * tile, tile, tile, x, y, side, side);
    return true;
  }
}
