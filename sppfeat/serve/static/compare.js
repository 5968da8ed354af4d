// A hit beside the query: larger, with the heat map, the links of bins, and steps to the other hits.
import { $, decimals, el, thumbnail } from "./dom.js";
import { imageUrl, queryUrl } from "./api.js";
import { heatLayers, outline, shape } from "./heat.js";

const dialog = $("compare");
let answer = null, index = 0, search = null, closed = null, bins = false;

/**
 * @param {(row: number) => void} onSearch called with the row that becomes the next query
 * @param {(index: number) => void} onClose called with the hit shown last
 */
export function setUpCompare(onSearch, onClose) {
  search = onSearch;
  closed = onClose;
  $("compare-close").addEventListener("click", () => dialog.close());
  $("compare-before").addEventListener("click", () => show(index - 1));
  $("compare-next").addEventListener("click", () => show(index + 1));
  $("compare-heat").addEventListener("change", () => show(index));
  $("compare-search").addEventListener("click", () => {
    const row = answer.hits[index].row;
    dialog.returnValue = "search";
    dialog.close("search");
    search(row);
  });
  dialog.addEventListener("close", () => {
    if (dialog.returnValue !== "search") closed(index);
    dialog.returnValue = "";
  });
  dialog.addEventListener("click", (event) => {
    const { left, top, right, bottom } = dialog.getBoundingClientRect();
    const outside = event.clientX < left || event.clientX > right || event.clientY < top || event.clientY > bottom;
    if (event.target === dialog && outside) dialog.close(); // the backdrop
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") show(index - 1);
    if (event.key === "ArrowRight") show(index + 1);
  });
}

/** keepsBins: whether the gallery keeps bins, which a score can be explained by. */
export function openCompare(found, at, keepsBins) {
  answer = found;
  bins = keepsBins;
  show(at);
  dialog.showModal();
  $("compare-close").focus();
}

export function closeCompare() {
  if (dialog.open) dialog.close("search");
}

function show(at) {
  if (at < 0 || at >= answer.hits.length) return;
  index = at;
  const { query } = answer, hit = answer.hits[at];
  $("compare-title").textContent = `Hit ${hit.rank} of ${answer.hits.length}, score ${decimals(hit.score)}`;
  $("compare-before").disabled = at === 0;
  $("compare-next").disabled = at === answer.hits.length - 1;
  $("compare-search").disabled = !hit.there;
  fill($("compare-query"), thumbnail(queryUrl(query.id), `Query: ${query.name}`, true, false), query);
  fill($("compare-hit"), thumbnail(imageUrl(hit.row, 1280), `Hit: ${hit.name}`, hit.there, false), hit);
  $("compare-query-name").textContent = `Query: ${query.name}`;
  $("compare-hit-name").textContent = hit.name;
  $("compare-open").href = imageUrl(hit.row, 1280);
  $("compare-open").hidden = !hit.there;
  $("compare-heat-label").hidden = !hit.why;
  const heat = hit.why && $("compare-heat").checked;
  if (heat) {
    const layers = heatLayers(query, hit);
    $("compare-query").append(layers.query);
    $("compare-hit").append(layers.hit);
  }
  $("compare-why").replaceChildren(heat ? links(hit.why.links)
    : el("p", { className: "soft small" }, hit.why ? "" : reason()));
}

/** Why a hit has no heat map. */
function reason() {
  if (answer.hits.some((one) => one.why)) return "The server explains the scores of the first hits only.";
  return bins ? "To see where a score comes from, search for parts or re-rank with bins."
    : "Where a score comes from can be shown only for a gallery that keeps bins: `sppfeat index --keep-bins` builds one.";
}

function fill(frame, image, { box, width, height }) {
  shape(frame, width, height);
  frame.replaceChildren(image);
  if (box && width && height) frame.append(outline(box, width, height));
}

function links(found) {
  return el("ol", { className: "links", "aria-label": "Linked bins and what they add to the score" },
    ...found.map((link, at) => el("li", {},
      el("span", { className: "mark still", "aria-hidden": "true" }, String(at + 1)),
      el("span", { className: "unseen" }, `Row ${link.query[0] + 1}, column ${link.query[1] + 1} of the query; row ${link.image[0] + 1}, column ${link.image[1] + 1} of the hit: `),
      `+${decimals(link.score)}`)));
}
