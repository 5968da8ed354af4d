// The map's view: computed on request, loaded once per gallery, and its tools.
import { $, count, el, later, sleep, tell, thumbnail } from "./dom.js";
import { getBytes, getMap, getNames, imageUrl, startMap } from "./api.js";
import { Chart } from "./chart.js";
import { setUpGestures } from "./gestures.js";
import { Points } from "./points.js";
import { setUpSelection, showSelection } from "./selection.js";
import { Sheets } from "./sheets.js";

const canvas = $("map-canvas"), card = $("map-card");
let go = null, replaced = null, gallery = null, chart = null, waiting = null, lasso = false, wanted = null;

export function setUp(navigate, look) {
  go = navigate;
  replaced = look;
  const tools = { "zoom-in": () => chart.zoom(1.5), "zoom-out": () => chart.zoom(1 / 1.5), "zoom-fit": () => chart.fit() };
  for (const [id, call] of Object.entries(tools)) $(id).addEventListener("click", () => chart && call());
  $("lasso").addEventListener("click", () => setLasso(!lasso));
  $("select-view").addEventListener("click", () => chart && select(chart.points.inside(chart.view)));
  $("map-images").addEventListener("change", () => {
    if (!chart) return;
    chart.images = $("map-images").checked;
    chart.later();
  });
  $("map-compute").addEventListener("click", compute);
  setUpSelection(() => {
    chart?.select([]);
    canvas.focus();
  });
  setUpGestures(canvas, () => chart, {
    lasso: () => lasso,
    selected: (polygon) => {
      setLasso(false);
      select(chart.points.within(polygon));
    },
    open: (row) => go("search", { query: `r-${row}` }),
    hover: showCard,
    escape: () => (lasso ? setLasso(false) : select([])),
  });
  new ResizeObserver(() => chart?.resize()).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => chart?.colors());
}

export function setGallery(opened) {
  gallery = opened;
  chart = null;
  names.clear();
  showSelection([]);
}

export function leave() {
  waiting?.abort();
  showCard(-1, 0, 0);
}

export async function enter(parameters) {
  tell($("map-fault"), null);
  const at = (parameters.get("at") ?? "").split(",").map(Number);
  wanted = at.length === 3 && at.every(Number.isFinite) ? at : null;
  if (chart) return place();
  await follow(getMap);
}

/** Show the part of the map that the address says: its middle, and how much larger than all of it. */
function place() {
  chart.resize();
  if (wanted) chart.move({ x: wanted[0], y: wanted[1], scale: wanted[2] * chart.least });
}

const compute = () => follow(startMap);

/** Show the map's state until it is there. */
async function follow(ask) {
  waiting?.abort();
  const mine = (waiting = new AbortController());
  try {
    let answer = await ask(mine.signal);
    while (!mine.signal.aborted) {
      showState(answer);
      if (answer.generation !== gallery.generation) return replaced();
      if (answer.state === "ready") return await load(answer, mine.signal);
      if (answer.state !== "computing") return;
      await sleep(700, mine.signal);
      answer = await getMap(mine.signal);
    }
  } catch (error) {
    if (mine === waiting) tell($("map-fault"), error);
  }
}

function showState({ state, done, what, detail }) {
  const computing = state === "computing", ready = state === "ready";
  $("map-absent").hidden = ready;
  $("map-room").hidden = $("map-tools").hidden = $("map-help").hidden = !ready || !chart;
  $("map-compute").hidden = computing || state === "unavailable";
  $("map-progress").hidden = !computing;
  $("map-progress").value = done || 0;
  $("map-progress").setAttribute("aria-label", "Computing the map");
  $("map-lead").textContent = { absent: "There is no map of this gallery yet.", unavailable: "There is no map of this gallery, and none can be made here.", failed: "The map could not be computed." }[state] ?? "Computing the map …";
  $("map-detail").textContent = computing ? [what, `${Math.floor(100 * (done || 0))} %`].filter(Boolean).join(", ")
    : detail || `It places ${count(gallery.images, "image")} so that similar ones are near each other. This takes a while once; you can go on searching.`;
  $("map-status").textContent = ready ? "Loading the map …" : "";
}

async function load(shape, signal) {
  const [places, order] = await Promise.all([getBytes("/api/map/points", signal), getBytes("/api/map/order", signal)]);
  if (places.byteLength !== 8 * gallery.images || order.byteLength !== 4 * gallery.images) {
    throw new Error(`The map is of ${count(places.byteLength / 8, "image")}, the gallery has ${gallery.images.toLocaleString("en")}. Reload the page.`);
  }
  const points = new Points(new Float32Array(places));
  chart = new Chart(canvas, points, new Sheets(shape, new Uint32Array(order), () => chart?.later()));
  chart.images = $("map-images").checked;
  chart.onDraw = status;
  $("map-room").hidden = $("map-tools").hidden = $("map-help").hidden = false;
  place();
}

// In words, but not with every frame: a screen reader would never end.
const status = later(() => {
  if (!chart || $("view-map").hidden) return;
  const { x, y, scale } = chart.camera;
  const at = [x.toFixed(4), y.toFixed(4), (scale / chart.least).toFixed(2)].join();
  go("map", { at: at === "0.5000,0.5000,1.00" ? null : at }, true, true);
  const visible = chart.points.inside(chart.view).length;
  const hint = chart.images && chart.far ? ", zoom in to see them" : "";
  const failed = chart.sheets.failed ? ", some thumbnails could not be loaded" : "";
  $("map-status").textContent = `${count(visible, "image")} in view${hint}${failed}`;
}, 300);

function setLasso(on) {
  lasso = on;
  $("lasso").setAttribute("aria-pressed", String(on));
  canvas.classList.toggle("lasso", on);
}

function select(rows) {
  if (!chart) return;
  chart.select(rows);
  showSelection(rows);
  if (!rows.length) $("map-status").textContent = "No image selected";
}

// The image below the pointer, larger, with its name.
const names = new Map();
const fill = later(async (row) => {
  try {
    if (!names.has(row)) names.set(row, (await getNames([row]))[0]);
    if (names.size > 500) names.delete(names.keys().next().value);
  } catch {
    return; // the image alone says enough; a click tells of errors
  }
  if (chart?.hover !== row) return;
  card.replaceChildren(thumbnail(imageUrl(row), "", true, false), el("span", { className: "name" }, names.get(row)));
  card.hidden = false;
}, 120);

function showCard(row, x, y) {
  if (!chart || row === chart.hover) return;
  chart.hover = row;
  chart.later();
  canvas.style.cursor = row >= 0 && !lasso ? "pointer" : "";
  card.hidden = true;
  if (row < 0) return fill.cancel();
  card.classList.toggle("left", x > chart.width / 2);
  card.classList.toggle("top", y > chart.height / 2);
  fill(row);
}
