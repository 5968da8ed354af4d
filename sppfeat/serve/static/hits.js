// Hits as a grid: the located box on each, the heat map while one is hovered or focused, arrows between them.
import { decimals, el, thumbnail } from "./dom.js";
import { imageUrl } from "./api.js";
import { heatLayers, outline, shape } from "./heat.js";

/** A thumbnail in a mat of 4 to 3, as large as its shape allows. */
export function matted(src, alt, width, height, there, ...layers) {
  const frame = el("span", { className: "frame" }, thumbnail(src, alt, there), ...layers);
  const ratio = width && height ? width / height : 4 / 3;
  shape(frame, width, height);
  frame.style.width = `min(100%, ${75 * ratio}%)`;
  return el("span", { className: "mat" }, frame);
}

export class Hits {
  /**
   * @param {HTMLElement} list
   * @param {HTMLElement} stage the query's frame, which shows the other half of a heat map
   * @param {{search: (row: number) => void, compare: (index: number) => void}} actions
   */
  constructor(list, stage, actions) {
    this.list = list;
    this.stage = stage;
    this.actions = actions;
    this.layers = [];
    list.addEventListener("keydown", (event) => this.#key(event));
    for (const name of ["pointerover", "focusin"]) list.addEventListener(name, (event) => this.#heat(event.target));
    list.addEventListener("pointerleave", () => this.#heat(document.activeElement));
    list.addEventListener("focusout", (event) => this.#heat(event.relatedTarget));
  }

  show({ query, hits }) {
    this.#clear();
    this.query = query;
    this.hits = hits;
    this.list.replaceChildren(...hits.map((hit, index) => this.#card(hit, index)));
  }

  focus(index) {
    this.#rove(index);
    this.list.children[index]?.querySelector("button").focus();
  }

  #card(hit, index) {
    const tabIndex = index === 0 ? 0 : -1;
    const box = hit.box && hit.width && hit.height ? outline(hit.box, hit.width, hit.height) : null;
    const view = el("button", {
      type: "button", className: "view", tabIndex,
      "aria-label": `Hit ${hit.rank}: ${hit.name}, score ${decimals(hit.score)}. Space compares it with the query, Enter searches with it.`,
    }, matted(imageUrl(hit.row), "", hit.width, hit.height, hit.there, box));
    view.addEventListener("click", () => this.actions.compare(index));
    const next = el("button", {
      type: "button", className: "quiet", tabIndex, disabled: !hit.there, textContent: "Search",
      "aria-label": `Search with ${hit.name}`, title: "Search with this image",
    });
    next.addEventListener("click", () => this.actions.search(hit.row));
    return el("li", { "data-index": index }, view,
      el("span", { className: "caption" },
        el("span", { className: "score" }, decimals(hit.score)), next,
        el("span", { className: "name", title: hit.name, dir: "auto" }, hit.name)));
  }

  #clear() {
    this.layers.forEach((layer) => layer.remove());
    this.layers = [];
    this.hot = null;
  }

  /** Show the heat map of the hit that holds this element; none: clear it. */
  #heat(target) {
    const item = target instanceof Element ? target.closest("#hits > li") : null;
    if (item === this.hot) return;
    this.#clear();
    const hit = item && this.hits[Number(item.dataset.index)];
    if (!hit?.why) return;
    this.hot = item;
    const { query, hit: there } = heatLayers(this.query, hit);
    item.querySelector(".frame").append(there);
    this.stage.append(query);
    this.layers = [query, there];
  }

  /** Of two hundred hits one is in the tab order. */
  #rove(index) {
    [...this.list.children].forEach((item, at) => {
      for (const button of item.querySelectorAll("button")) button.tabIndex = at === index ? 0 : -1;
    });
  }

  #key(event) {
    const item = event.target.closest("li");
    if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
    const index = Number(item.dataset.index);
    if (event.key === "Enter" && event.target.matches(".view") && this.hits[index].there) {
      event.preventDefault();
      this.actions.search(this.hits[index].row);
      return;
    }
    const items = [...this.list.children];
    const top = items[0].offsetTop;
    const columns = Math.max(1, items.filter((one) => one.offsetTop === top).length);
    const to = {
      ArrowLeft: index - 1, ArrowRight: index + 1, ArrowUp: index - columns, ArrowDown: index + columns,
      Home: 0, End: items.length - 1,
    }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    if (to >= 0 && to < items.length) this.focus(to);
  }
}
