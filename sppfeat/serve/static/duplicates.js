// Groups of copies, or of nearly equal images; which one to keep is chosen here, and the list exported. Nothing is deleted.
import { $, count, el, later, save, sleep, tell, thumbnail } from "./dom.js";
import { getDuplicates, imageUrl } from "./api.js";
import { shape } from "./heat.js";

const PAGE = 40; // groups in the document with each step
const DEFAULT = 0.95;
// threshold: null where images are compared. loaded: the threshold of the groups shown; undefined if none are.
let go = null, replaced = null, groups = [], keep = new Map(), shown = 0, running = null, threshold = null, loaded, soon = null, gallery = null;

export function setUp(navigate, look) {
  go = navigate;
  replaced = look;
  const chosen = () => {
    const value = Number($("threshold").value);
    if (value > 0.5 && value <= 1) go("duplicates", { threshold: value }, true);
    else tell($("duplicates-fault"), "Least similarity: expected a number above 0.5, at most 1.");
  };
  soon = later(chosen, 400); // each step of a slider would start a comparison of all images
  $("by").addEventListener("change", () => {
    soon.cancel();
    go("duplicates", { threshold: $("by").value === "images" ? null : DEFAULT }, true);
  });
  $("threshold").addEventListener("change", chosen);
  $("threshold-range").addEventListener("input", () => {
    $("threshold").value = $("threshold-range").value;
    soon();
  });
  $("more-groups").addEventListener("click", () => more(true));
  $("export").addEventListener("click", () => save("duplicates.csv", table(), "text/csv"));
}

export function setGallery(opened) {
  gallery = opened;
  groups = [];
  loaded = undefined;
}

export function leave() {
  running?.abort();
  soon.cancel();
}

export async function enter(parameters) {
  const asked = Number(parameters.get("threshold"));
  threshold = asked > 0.5 && asked <= 1 ? asked : null;
  $("by").value = threshold === null ? "images" : "descriptors";
  $("by-descriptors").hidden = threshold === null;
  $("threshold").value = $("threshold-range").value = threshold ?? DEFAULT;
  if (loaded === threshold) return; // choices made stay
  running?.abort();
  const mine = (running = new AbortController());
  loaded = undefined;
  groups = [];
  $("groups").replaceChildren();
  $("duplicates-notes").replaceChildren();
  $("export").disabled = $("more-groups").hidden = true;
  tell($("duplicates-fault"), null);
  $("duplicates-status").textContent = "Comparing images …";
  try {
    for (;;) {
      const answer = await getDuplicates(threshold, mine.signal);
      if (answer.state === "failed") throw new Error(answer.detail || "The images could not be compared.");
      if (answer.state === "ready" && answer.generation !== gallery.generation) return replaced();
      if (answer.state === "ready") return show(answer);
      $("duplicates-progress").hidden = false;
      $("duplicates-progress").value = answer.done || 0;
      await sleep(700, mine.signal);
    }
  } catch (error) {
    if (mine !== running || error.name === "AbortError") return;
    $("duplicates-status").textContent = "";
    tell($("duplicates-fault"), error);
  } finally {
    if (mine === running) $("duplicates-progress").hidden = true;
  }
}

function show(answer) {
  loaded = threshold;
  groups = answer.groups;
  keep = new Map();
  shown = 0;
  $("export").disabled = groups.length === 0;
  const removed = groups.reduce((sum, group) => sum + group.length - 1, 0);
  const left = answer.more ? ` The largest groups are shown; ${answer.more.toLocaleString("en")} more are not: \`sppfeat duplicates --csv\` lists all.` : "";
  const cut = answer.cut ? ` ${count(answer.cut, "image")} of very large groups are not listed.` : "";
  $("duplicates-status").textContent = groups.length
    ? `${count(groups.length, "group")}: one of each is kept, ${count(removed, "image")} marked to remove.${left}${cut}`
    : threshold === null ? "No copies." : "No groups at this similarity.";
  $("duplicates-notes").replaceChildren(...answer.notes.map((note) => el("p", { className: "note" }, note)));
  more();
}

function more(focus = false) {
  const first = shown;
  const part = groups.slice(first, first + PAGE);
  $("groups").append(...part.map((group, at) => fieldset(group, first + at)));
  shown += part.length;
  $("more-groups").hidden = shown >= groups.length;
  $("more-groups").textContent = `Show more groups (${(groups.length - shown).toLocaleString("en")} left)`;
  if (focus) $("groups").children[first]?.querySelector("input").focus();
}

function fieldset(group, at) {
  return el("fieldset", { className: "group" }, el("legend", {}, `Group ${at + 1}, ${count(group.length, "image")}`),
    el("div", { className: "twins" }, ...group.map((one, index) => {
      const radio = el("input", { type: "radio", name: `keep-${at}`, checked: (keep.get(at) ?? 0) === index });
      radio.addEventListener("change", () => keep.set(at, index));
      const frame = el("span", { className: "frame" }, thumbnail(imageUrl(one.row), "", one.there));
      shape(frame, one.width, one.height);
      return el("div", { className: "twin" },
        el("label", {}, frame, el("span", { className: "choice" }, radio, el("span", { className: "kept" }, "Keep"), el("span", { className: "removed" }, "Remove")),
          el("span", { className: "name", title: one.name, dir: "auto" }, one.name),
          el("span", { className: "soft small" }, `${one.width} × ${one.height}${index ? `, similarity ${one.score.toFixed(3)}` : ""}`)),
        el("a", { href: `#/search?query=r-${one.row}`, className: "small", "aria-label": `Search with ${one.name}` }, "Search"));
    })));
}

/** Columns group, action, name; quoted as RFC 4180 says, names exactly as they are. */
function table() {
  const quoted = (text) => (/[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);
  const lines = groups.flatMap((group, at) => group.map((one, index) =>
    `${at + 1},${index === (keep.get(at) ?? 0) ? "keep" : "remove"},${quoted(one.name)}`));
  return ["group,action,name", ...lines, ""].join("\r\n");
}
