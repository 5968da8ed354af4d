// Images selected on the map: a bounded grid, their names to copy or to download.
import { $, copy, count, el, save, thumbnail } from "./dom.js";
import { getNames, imageUrl } from "./api.js";

const PAGE = 48, MOST = 480; // images shown at once and at most: a selection can hold all of the gallery
let rows = [], shown = 0, serial = 0;

/** @param {() => void} cleared called when nothing is selected any more */
export function setUpSelection(cleared) {
  $("clear-selection").addEventListener("click", () => {
    showSelection([]);
    cleared();
  });
  $("more-selection").addEventListener("click", more);
  $("copy-names").addEventListener("click", () => withNames(async (text) => {
    report(await copy(text) ? `${count(rows.length, "name")} copied` : "The browser does not allow copying here. Download the names instead.");
  }));
  $("download-names").addEventListener("click", () => withNames((text) => {
    save("names.txt", text);
    report(`${count(rows.length, "name")} saved`);
  }));
}

const report = (text) => ($("selection-status").textContent = text);

async function withNames(use) {
  const mine = serial;
  report("Fetching names …");
  try {
    const names = await getNames(rows);
    if (mine === serial) await use(names.map((name) => `${name}\n`).join(""));
  } catch (error) {
    if (mine === serial) report(error.message);
  }
}

export function showSelection(selected) {
  rows = selected;
  shown = 0;
  serial++;
  report("");
  $("selection").hidden = rows.length === 0;
  $("selection-count").textContent = `${count(rows.length, "image")} selected`;
  $("selection-list").replaceChildren();
  if (rows.length) more();
}

async function more() {
  const mine = serial, part = rows.slice(shown, Math.min(shown + PAGE, MOST));
  shown += part.length;
  const left = Math.min(MOST, rows.length) - shown;
  $("more-selection").hidden = left <= 0;
  try {
    const names = await getNames(part);
    if (mine !== serial) return;
    $("selection-list").append(...part.map((row, at) => el("li", {},
      el("a", { href: `#/search?query=r-${row}`, "aria-label": `Search with ${names[at]}`, title: names[at] }, thumbnail(imageUrl(row, 160), "")))));
    if (left <= 0 && rows.length > MOST) report(`The first ${MOST} are shown. The names are those of all ${rows.length.toLocaleString("en")}.`);
  } catch (error) {
    if (mine === serial) report(error.message);
  }
}
