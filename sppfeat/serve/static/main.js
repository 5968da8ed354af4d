// Views and the address. The state is in the address, so that back, forward and reload work.
import { $, count, el, tell } from "./dom.js";
import { getGallery, setGeneration } from "./api.js";
import * as duplicates from "./duplicates.js";
import * as map from "./map.js";
import * as search from "./search.js";

const views = { search, map, duplicates };
let current = null, gallery = null, shownHash = null, looked = 0;

/** Go to an address. quiet: what it says is shown already. */
function navigate(view, parameters, replace = false, quiet = false) {
  const kept = Object.entries(parameters).filter(([, value]) => value !== null && value !== undefined);
  const text = new URLSearchParams(kept.map(([key, value]) => [key, String(value)])).toString().replaceAll("%2C", ",");
  const hash = `#/${view}${text ? `?${text}` : ""}`;
  if (hash !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", hash);
  if (quiet) shownHash = hash;
  else show(true);
}

function show(again = false) {
  const hash = location.hash || "#/search";
  // Browsers tell of a step in the history twice: popstate and hashchange.
  if (!gallery || (hash === shownHash && !again)) return;
  shownHash = hash;
  const [, name, query] = /^#\/(\w*)\??(.*)$/.exec(hash) ?? [];
  const next = Object.hasOwn(views, name ?? "") ? name : "search";
  if (current && current !== next) views[current].leave();
  current = next;
  for (const one of Object.keys(views)) $(`view-${one}`).hidden = one !== next;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.dataset.view === next) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (next !== "search") document.title = `${next === "map" ? "Map" : "Duplicates"} · ${gallery.name}`;
  views[next].enter(new URLSearchParams(query));
}

/** Whether the gallery could be asked for; if it was replaced on disk, rows are numbered anew and everything shown is of the old one. */
async function look() {
  looked = Date.now();
  try {
    const found = await getGallery();
    tell($("fault"), null);
    describe(found);
    if (gallery?.generation === found.generation) return true;
    const before = gallery;
    gallery = found;
    setGeneration(found.generation);
    for (const view of Object.values(views)) view.setGallery(found);
    if (before) tell($("changed"), "The gallery was changed on disk. Rows have new numbers; an address that was kept may show another image.");
    show(true);
    return true;
  } catch (error) {
    const retry = el("button", { type: "button" }, "Try again");
    retry.addEventListener("click", look);
    tell($("fault"), error, retry);
    return false;
  }
}

function describe(found) {
  $("gallery-name").textContent = found.name;
  $("gallery-size").textContent = count(found.images, "image");
  $("about").textContent = `${found.backbone}, scales ${found.scales}, levels ${found.levels}, ${found.values} values, `
    + `index ${found.index}${found.exact ? ", exact" : ", approximate"}`;
  $("notes").replaceChildren(...found.notes.map((note) => el("p", { className: "note" }, note)));
}

/** A file from anywhere on the page becomes the query. */
function take(file) {
  if (!gallery) return;
  if (current !== "search") navigate("search", {});
  search.searchFile(file);
}

function setUpFiles() {
  const hasFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  let depth = 0;
  const mark = (change) => {
    depth = change === 0 ? 0 : Math.max(0, depth + change);
    document.body.classList.toggle("dropping", depth > 0);
  };
  document.addEventListener("dragenter", (event) => hasFiles(event) && mark(1));
  document.addEventListener("dragleave", (event) => hasFiles(event) && mark(-1));
  document.addEventListener("dragover", (event) => {
    if (hasFiles(event)) event.preventDefault();
  });
  document.addEventListener("drop", (event) => {
    if (!hasFiles(event)) return;
    event.preventDefault();
    mark(0);
    if (event.dataTransfer.files.length) take(event.dataTransfer.files[0]);
  });
  document.addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find((one) => one.type.startsWith("image/"));
    if (!file) return;
    event.preventDefault();
    take(file);
  });
}

for (const view of Object.values(views)) view.setUp(navigate, look);
setUpFiles();
window.addEventListener("popstate", () => show());
window.addEventListener("hashchange", () => show());
document.addEventListener("image-failed", () => {
  if (Date.now() - looked > 5_000) look();
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && Date.now() - looked > 10_000) look();
});
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address is the state
  $("main").focus();
});
look();
