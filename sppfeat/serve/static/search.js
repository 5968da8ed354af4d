// The search view: the query and its options, the address, and answers. One search at a time; a new one ends the old.
import { $, count, el, later, tell, thumbnail } from "./dom.js";
import { getNames, imageUrl, queryUrl, search } from "./api.js";
import { BoxEditor } from "./box.js";
import { closeCompare, openCompare, setUpCompare } from "./compare.js";
import { Hits, matted } from "./hits.js";
import { shape } from "./heat.js";
import { objectsOf, offerObjects, setUpObjects } from "./objects.js";

const RERANK = { none: "None", bins: "Bins of the pyramid", expand: "Query expansion", reciprocal: "Reciprocal neighbors", diffuse: "Diffusion" };
const DEFAULTS = { k: 24, parts: false, rerank: "none" };
const SAMPLE = 24;

const view = $("view-search"), stage = $("stage");
let gallery = null, go = null, replaced = null;
let state = { query: null, box: null, ...DEFAULTS };
let running = null, shown = null, focusFirst = false, preview = null;
const answers = new Map(); // the last answers by address: back and forward are instant

const editor = new BoxEditor(stage, (box, how) => {
  if (how === "keys") return nudge(box);
  nudge.cancel();
  change(boxed(box));
});
const nudge = later((box) => change(boxed(box), state.box !== null), 400);
const hits = new Hits($("hits"), stage, { search: searchRow, compare: (index) => openCompare(shown, index, Boolean(gallery.grid)) });

/**
 * @param {(view: string, parameters: object, replace?: boolean, quiet?: boolean) => void} navigate
 * @param {() => void} look asks for the gallery again, and shows what the address says
 */
export function setUp(navigate, look) {
  go = navigate;
  replaced = look;
  setUpCompare(searchRow, (index) => hits.focus(index));
  setUpObjects(stage, (box) => change(boxed(box)));
  for (const button of document.querySelectorAll("[data-choose]")) button.addEventListener("click", () => $("file").click());
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) searchFile($("file").files[0]);
    $("file").value = ""; // the same file can be chosen again
  });
  $("add-box").addEventListener("click", () => editor.add());
  $("remove-box").addEventListener("click", () => {
    editor.remove();
    $("add-box").focus();
  });
  $("k").addEventListener("change", () => {
    const k = Math.round(Number($("k").value));
    if (k >= 1 && k <= 200) change({ k });
    else tell($("search-fault"), "Hits: expected a number from 1 to 200.");
  });
  $("rerank").addEventListener("change", () => change({ rerank: $("rerank").value }));
  // Parts are ordered by bins already: the server takes no re-ranking besides.
  $("parts").addEventListener("change", () => {
    $("rerank").disabled = $("parts").checked;
    if ($("parts").checked) $("rerank").value = "none";
    change({ parts: $("parts").checked, rerank: $("rerank").value });
  });
  $("other-sample").addEventListener("click", () => sample());
}

/** The gallery is known, or was replaced. */
export function setGallery(opened) {
  gallery = opened;
  answers.clear();
  $("sample-list").replaceChildren();
  $("rerank").replaceChildren(...opened.rerank.map((one) => el("option", { value: one }, RERANK[one] ?? one)));
  $("parts-label").hidden = !opened.grid;
  offerObjects(opened);
}

export function leave() {
  running?.abort();
  nudge.cancel();
  closeCompare();
}

/** Show what an address says. */
export function enter(parameters) {
  closeCompare();
  const box = (parameters.get("box") ?? "").split(",").map(Number);
  const k = Number(parameters.get("k"));
  state = {
    query: parameters.get("query") || null,
    box: box.length === 4 && box.every(Number.isFinite) ? box : null,
    k: Number.isInteger(k) && k >= 1 && k <= 200 ? k : DEFAULTS.k,
    parts: parameters.get("parts") === "1" && Boolean(gallery.grid),
    rerank: gallery.rerank.includes(parameters.get("rerank")) ? parameters.get("rerank") : DEFAULTS.rerank,
  };
  if (state.parts) state.rerank = DEFAULTS.rerank;
  nudge.cancel();
  $("rerank").disabled = state.parts;
  $("k").value = state.k;
  $("rerank").value = state.rerank;
  $("parts").checked = state.parts;
  run(state.query);
}

function searchRow(row) {
  focusFirst = $("hits").contains(document.activeElement) || document.activeElement === document.body;
  window.scrollTo({ top: 0 });
  go("search", address({ ...state, query: `r-${row}`, box: null }));
}

/** Search with a file; its id enters the address when the answer is there. */
export function searchFile(file) {
  if (file.size > gallery.max_upload) {
    const megabytes = (bytes) => `${(bytes / 2 ** 20).toLocaleString("en", { maximumFractionDigits: 1 })} MB`;
    return tell($("search-fault"), `${file.name}: expected at most ${megabytes(gallery.max_upload)}, found ${megabytes(file.size)}.`);
  }
  nudge.cancel();
  editor.detach();
  objectsOf(null);
  state = { ...state, query: null, box: null };
  if (preview) URL.revokeObjectURL(preview);
  preview = URL.createObjectURL(file);
  showQuery({ id: null, name: file.name || "Pasted image", box: null }, preview);
  run(file);
}

/** A new box is looked for as a part, if the gallery can: whoever does not want that takes the tick away. */
function boxed(box) {
  return box && !state.box && gallery.grid ? { box, parts: true, rerank: DEFAULTS.rerank } : { box };
}

function change(patch, replace = false) {
  const next = { ...state, ...patch };
  if (next.query) go("search", address(next), replace);
  else state = next; // nothing to search with yet: options count for the first query
}

function address({ query, box, k, parts, rerank }) {
  return {
    query, box: box && box.join(","), k: k === DEFAULTS.k ? null : k, parts: parts ? 1 : null,
    rerank: rerank === DEFAULTS.rerank ? null : rerank,
  };
}

async function run(query) {
  running?.abort();
  const mine = (running = new AbortController());
  tell($("search-fault"), null);
  $("search-notes").replaceChildren();
  if (query === null) return showEmpty();
  const known = answers.get(JSON.stringify(address(state)));
  if (typeof query === "string" && known) return showAnswer(known);
  if (typeof query === "string" && shown?.query.id === query) showQuery({ ...shown.query, box: state.box });
  view.dataset.state = "query";
  view.setAttribute("aria-busy", "true");
  $("status").textContent = "Searching …";
  const asked = state;
  try {
    const answer = await search(query, asked, mine.signal);
    if (mine !== running) return;
    if (asked !== state) return change({ query: answer.query.id }); // options were changed meanwhile
    if (answer.generation !== gallery.generation) { // its rows are other images than the page knows
      if (!await replaced()) throw new Error("The gallery was changed, and the server does not say how. Try again.");
      if (typeof query !== "string") searchFile(query); // the address does not name it yet
      return;
    }
    state = { ...state, query: answer.query.id };
    answers.set(JSON.stringify(address(state)), answer);
    if (answers.size > 30) answers.delete(answers.keys().next().value);
    if (typeof query !== "string") go("search", address(state), false, true);
    showAnswer(answer);
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    showFailure(error, query);
  } finally {
    if (mine === running) view.removeAttribute("aria-busy");
  }
}

function showAnswer(answer) {
  view.removeAttribute("aria-busy");
  view.dataset.state = "query";
  shown = answer;
  showQuery(answer.query);
  hits.show(answer);
  const { describe, search: searched } = answer.milliseconds;
  $("status").textContent = `${count(answer.hits.length, "hit")} in ${Math.max(1, Math.round(describe + searched))} ms`;
  $("search-notes").replaceChildren(...answer.notes.map((note) => el("p", { className: "note" }, note)));
  $("results-title").hidden = $("hits").hidden = false;
  $("hits-help").hidden = answer.hits.length === 0;
  $("sample").hidden = true;
  document.title = `${answer.query.name} · ${gallery.name}`;
  if (focusFirst && answer.hits.length) hits.focus(0);
  focusFirst = false;
}

/** Show the query image; the image element stays while the query does, so that nothing flickers. */
function showQuery({ id, name, width, height, box }, src = null) {
  view.dataset.state = "query";
  $("drop").hidden = true;
  $("asked").hidden = false;
  stage.hidden = false;
  const source = src ?? queryUrl(id);
  if (stage.dataset.source !== source) {
    stage.dataset.source = source;
    const image = thumbnail(source, `Query: ${name}`, true, false);
    image.addEventListener("load", () => {
      if (!width) shape(stage, image.naturalWidth, image.naturalHeight);
    });
    stage.replaceChildren(image);
  }
  $("query-name").textContent = name;
  $("query-size").textContent = width ? `${width} × ${height}` : "";
  if (width) {
    shape(stage, width, height);
    editor.attach(width, height);
  }
  editor.set(width ? box : null);
  $("add-box").hidden = box !== null;
  $("add-box").disabled = !width;
  $("remove-box").hidden = box === null;
  const whole = gallery.grid ? "" : " The gallery keeps no bins (sppfeat index --keep-bins), so it is compared with whole images, and not outlined.";
  $("box-help").textContent = box === null ? `Drag on the image to search with a part of it.${whole}`
    : matchMedia("(hover: none)").matches ? "Drag the box or its corners." : "Arrows move the box, with Shift they resize it, with Ctrl by one pixel. Escape removes it.";
  if (id) objectsOf(id);
}

function showFailure(error, query) {
  focusFirst = false;
  hits.show({ query: null, hits: [] });
  $("hits-help").hidden = true;
  $("status").textContent = "";
  const expired = error.status === 404 && typeof query === "string" && query.startsWith("u-");
  if (expired || shown?.query.id !== query) {
    shown = null;
    stage.dataset.source = "";
    $("asked").hidden = true;
    $("drop").hidden = false;
  }
  if (expired) {
    tell($("search-fault"), "The server no longer keeps this image. Images that you send stay in its memory only for a while. "
      + "Choose, drop or paste the image again to repeat the search.");
  } else tell($("search-fault"), error);
}

function showEmpty() {
  view.dataset.state = "empty";
  view.removeAttribute("aria-busy");
  shown = null;
  stage.dataset.source = "";
  $("asked").hidden = true;
  $("drop").hidden = false;
  $("results-title").hidden = $("hits").hidden = $("hits-help").hidden = true;
  $("status").textContent = "";
  $("sample").hidden = gallery.images === 0;
  document.title = `${gallery.name} · sppfeat`;
  if (!$("sample-list").children.length) sample();
}

/** Some images of the gallery, at random, to start with. */
async function sample() {
  const rows = new Set();
  while (rows.size < Math.min(SAMPLE, gallery.images)) rows.add(Math.floor(Math.random() * gallery.images));
  try {
    const names = await getNames(rows);
    $("sample-list").replaceChildren(...[...rows].map((row, at) => {
      const link = el("a", { href: `#/search?query=r-${row}`, className: "view", "aria-label": `Search with ${names[at]}`, draggable: false },
        matted(imageUrl(row), "", 4, 3, true));
      link.querySelector(".mat").classList.add("cover");
      return el("li", {}, link, el("span", { className: "caption" }, el("span", { className: "name", title: names[at], dir: "auto" }, names[at])));
    }));
  } catch (error) {
    tell($("search-fault"), error);
  }
}
