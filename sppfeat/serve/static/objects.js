// Detections and classes of the query image.
import { $, count, el, tell } from "./dom.js";
import { classify, detect } from "./api.js";
import { outline } from "./heat.js";

let stage = null, current = null, running = null, pick = null, layers = [];

/**
 * @param {HTMLElement} frame the query image's frame
 * @param {(box: number[]) => void} onPick called with the box of a detection that becomes the box of the query
 */
export function setUpObjects(frame, onPick) {
  stage = frame;
  pick = onPick;
  $("detect").addEventListener("click", () => run("Finding objects", detect, showDetections));
  $("classify").addEventListener("click", () => run("Classifying", classify, showClasses));
}

export function offerObjects(gallery) {
  $("detect").hidden = !gallery.detector;
  $("classify").hidden = !gallery.classifier;
  $("models").hidden = !gallery.detector && !gallery.classifier;
}

/** Another image is shown, or the same: then what was found stays. */
export function objectsOf(id) {
  if (id === current) {
    stage.append(...layers);
    return;
  }
  current = id;
  running?.abort();
  clear();
}

function clear() {
  layers.forEach((layer) => layer.remove());
  layers = [];
  $("models-found").replaceChildren();
  $("models-status").textContent = "";
}

async function run(what, call, show) {
  if (current === null) return; // the image is on its way
  running?.abort();
  const mine = (running = new AbortController());
  clear();
  $("models-status").textContent = `${what} …`;
  try {
    const found = await call(current, mine.signal);
    if (mine !== running) return;
    show(found);
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    $("models-status").textContent = "";
    tell($("models-found"), error);
  }
}

function showDetections({ width, height, detections }) {
  $("models-status").textContent = detections.length ? `${count(detections.length, "object")} found` : "No objects found";
  layers = detections.map((one) => {
    const layer = outline(one.box, width, height, one.label);
    layer.classList.add("object");
    return layer;
  });
  stage.append(...layers);
  $("models-found").replaceChildren(el("ul", { className: "found" }, ...detections.map((one, at) => {
    const button = el("button", {
      type: "button", className: "row", "aria-label": `${one.label}, score ${one.score.toFixed(2)}. Search with this box.`,
    }, el("span", {}, one.label), el("span", { className: "score" }, one.score.toFixed(2)));
    const light = (on) => () => layers[at].classList.toggle("lit", on);
    for (const name of ["pointerenter", "focus"]) button.addEventListener(name, light(true));
    for (const name of ["pointerleave", "blur"]) button.addEventListener(name, light(false));
    button.addEventListener("click", () => pick([
      Math.max(0, Math.floor(one.box[0])), Math.max(0, Math.floor(one.box[1])),
      Math.min(width - 1, Math.ceil(one.box[2])), Math.min(height - 1, Math.ceil(one.box[3])),
    ]));
    return el("li", {}, button);
  })), detections.length ? el("p", { className: "soft small" }, "Click one to search with its box.") : null);
}

function showClasses({ classes }) {
  const most = 5;
  $("models-status").textContent = classes.length ? `Best class: ${classes[0].label}` : "No classes";
  const list = el("ol", { className: "found" }, ...classes.map((one, at) => el("li", { className: "row", hidden: at >= most },
    el("span", {}, one.label), el("span", { className: "score" }, one.score.toFixed(2)))));
  $("models-found").replaceChildren(list, el("p", { className: "soft small" }, "The highest score decides; where all are below 0, the image may be of no class."));
  if (classes.length <= most) return;
  const more = el("button", { type: "button", className: "quiet" }, `Show all ${classes.length}`);
  more.addEventListener("click", () => {
    for (const item of list.children) item.hidden = false;
    more.remove();
  });
  $("models-found").append(more);
}
