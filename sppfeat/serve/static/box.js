// The box on the query image: drawn, moved and resized with mouse, touch and keys. Coordinates are pixels of the image.
import { el } from "./dom.js";
import { place } from "./heat.js";

const LEAST = 8; // screen pixels: less is a click, not a box
const STEPS = 50; // key presses from one side of the image to the other

export class BoxEditor {
  /**
   * @param {HTMLElement} frame the element that the image fills
   * @param {(box: number[] | null, how: "drag" | "keys") => void} changed called when a drag ends and with each key
   */
  constructor(frame, changed) {
    this.frame = frame;
    this.changed = changed;
    this.width = this.height = 0;
    this.box = null;
    this.handle = el("div", {
      className: "box", tabIndex: 0, hidden: true, role: "application", "aria-roledescription": "box on the image",
      "aria-describedby": "box-help",
    }, ...["nw", "ne", "sw", "se"].map((corner) => el("i", { className: `corner ${corner}` })));
    // What is outside of the box is veiled, inside of the image only.
    this.hole = el("span");
    this.veil = el("span", { className: "veil", hidden: true, "aria-hidden": "true" }, this.hole);
    this.handle.addEventListener("keydown", (event) => this.#key(event));
    frame.addEventListener("pointerdown", (event) => this.#begin(event));
  }

  /** Show the editor over an image of this size. */
  attach(width, height) {
    this.width = width;
    this.height = height;
    if (this.handle.parentElement !== this.frame) this.frame.append(this.veil, this.handle); // again would take the focus away
  }

  /** The image is not known yet: nothing can be drawn on it. */
  detach() {
    this.width = this.height = 0;
    this.set(null);
  }

  set(box) {
    this.box = box;
    this.handle.hidden = this.veil.hidden = box === null;
    if (!box || !this.width) return;
    for (const one of [this.handle, this.hole]) place(one, box, this.width, this.height);
    const [x1, y1, x2, y2] = box;
    this.handle.setAttribute("aria-label", `Box from ${x1}, ${y1} to ${x2}, ${y2}. Arrows move it, Shift and arrows resize it, Escape removes it.`);
  }

  /** A box in the middle, focused. */
  add() {
    const { width, height } = this;
    this.set(this.#fit([width / 4, height / 4, (3 * width) / 4, (3 * height) / 4]));
    this.handle.focus();
    this.changed(this.box, "drag");
  }

  remove() {
    this.set(null);
    this.changed(null, "drag");
  }

  /** Whole pixels inside of the image, at least one. */
  #fit([x1, y1, x2, y2]) {
    const inside = (value, most) => Math.max(0, Math.min(most, Math.round(value)));
    const left = inside(Math.min(x1, x2), this.width - 1), top = inside(Math.min(y1, y2), this.height - 1);
    return [left, top, Math.max(left, inside(Math.max(x1, x2), this.width - 1)), Math.max(top, inside(Math.max(y1, y2), this.height - 1))];
  }

  /** The box moved, as far as the image reaches. */
  #moved([x1, y1, x2, y2], dx, dy) {
    const right = Math.max(-x1, Math.min(this.width - 1 - x2, Math.round(dx)));
    const down = Math.max(-y1, Math.min(this.height - 1 - y2, Math.round(dy)));
    return [x1 + right, y1 + down, x2 + right, y2 + down];
  }

  #begin(event) {
    if (!this.width || event.button !== 0 || !event.isPrimary) return;
    const area = this.frame.getBoundingClientRect();
    const at = (one) => [((one.clientX - area.left) * this.width) / area.width, ((one.clientY - area.top) * this.height) / area.height];
    const start = at(event), before = this.box;
    const corner = event.target.closest(".corner"), inside = !corner && event.target.closest(".box");
    // The corner across stays where it is.
    const fixed = corner && before
      ? [before[corner.matches(".nw, .sw") ? 2 : 0], before[corner.matches(".nw, .ne") ? 3 : 1]] : start;
    event.preventDefault();
    this.frame.setPointerCapture(event.pointerId);
    const move = (one) => {
      const now = at(one);
      this.set(inside ? this.#moved(before, now[0] - start[0], now[1] - start[1]) : this.#fit([...fixed, ...now]));
    };
    const stop = () => {
      for (const [name, call] of Object.entries(calls)) this.frame.removeEventListener(name, call);
      window.removeEventListener("keydown", escape, true);
    };
    const end = (one) => {
      stop();
      const far = Math.hypot(one.clientX - event.clientX, one.clientY - event.clientY);
      if (far < LEAST && !corner) {
        this.set(before);
        if (inside) this.handle.focus();
        return;
      }
      move(one);
      this.handle.focus({ preventScroll: true });
      this.changed(this.box, "drag");
    };
    const cancel = () => {
      stop();
      this.set(before);
    };
    const escape = (one) => {
      if (one.key !== "Escape") return;
      one.stopPropagation();
      cancel();
    };
    const calls = { pointermove: move, pointerup: end, pointercancel: cancel };
    for (const [name, call] of Object.entries(calls)) this.frame.addEventListener(name, call);
    window.addEventListener("keydown", escape, true);
  }

  #key(event) {
    if (event.key === "Escape" || event.key === "Delete" || event.key === "Backspace") {
      event.preventDefault();
      this.remove();
      return;
    }
    const [right, down] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [0, 0];
    if ((!right && !down) || event.altKey || event.metaKey) return;
    event.preventDefault();
    const step = event.ctrlKey ? 1 : Math.max(1, Math.round(Math.max(this.width, this.height) / STEPS));
    const [x1, y1, x2, y2] = this.box;
    this.set(event.shiftKey
      ? this.#fit([x1, y1, Math.max(x1, x2 + right * step), Math.max(y1, y2 + down * step)])
      : this.#moved(this.box, right * step, down * step));
    this.changed(this.box, "keys");
  }
}
