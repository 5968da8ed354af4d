// The HTTP interface. Every failure is an ApiError with a sentence for people, except an abort.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function ask(path, options = {}) {
  let answer;
  try {
    answer = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    // A file over the server's limit can look like this, too: the server hangs up before all of it was sent.
    const file = options.body instanceof FormData && options.body.has("image");
    throw new ApiError(0, file
      ? "The server did not answer. Either it stopped, or the file is too large for it."
      : "The server does not answer. Check that `sppfeat serve` is still running.");
  }
  if (answer.ok) return answer;
  let detail = "";
  try {
    detail = String((await answer.json()).detail ?? "");
  } catch (error) {
    if (error.name === "AbortError") throw error;
  }
  throw new ApiError(answer.status, detail || `The server answered with status ${answer.status}.`);
}

const json = async (...request) => (await ask(...request)).json();

// The gallery that rows are of: where it was replaced, the same numbers are other images.
let generation = "";
export const setGeneration = (of) => (generation = of);

export const getGallery = () => json("/api/gallery");
export const getMap = (signal) => json("/api/map", { signal });
export const startMap = () => json("/api/map", { method: "POST" });
export const getDuplicates = (threshold, signal) => json(`/api/duplicates${threshold === null ? "" : `?threshold=${threshold}`}`, { signal });
export const getBytes = async (path, signal) => (await ask(path, { signal })).arrayBuffer();

/** Names of rows, in their order. */
export async function getNames(rows, signal) {
  const body = JSON.stringify({ rows: Array.from(rows), of: generation });
  const headers = { "content-type": "application/json" };
  return (await json("/api/names", { method: "POST", body, headers, signal })).names;
}

export const imageUrl = (row, side = 320) => `/images/${row}?side=${side}&of=${generation}`;
export const queryUrl = (id, side = 1280) => `/queries/${encodeURIComponent(id)}?side=${side}&of=${generation}`;
export const sheetUrl = (number) => `/map/sheets/${number}?of=${generation}`;

// The last files that were sent, by id: one that the server no longer keeps is sent again without a word.
const sent = new Map();

function remember(id, file) {
  sent.delete(id);
  sent.set(id, file);
  if (sent.size > 8) sent.delete(sent.keys().next().value);
}

/** Post a form with a query id or a file. */
async function post(path, query, fields, signal) {
  const send = (image) => {
    const body = new FormData();
    if (image) body.set("image", image, image.name || "image");
    else body.set("query", query);
    for (const [key, value] of Object.entries(fields)) if (value !== null) body.set(key, String(value));
    return json(path, { method: "POST", body, signal });
  };
  if (typeof query !== "string") return send(query);
  try {
    return await send(null);
  } catch (error) {
    if (error.status !== 404 || !sent.has(query)) throw error;
    return send(sent.get(query));
  }
}

/**
 * @param {string | File} query an id of an earlier answer, or a file
 * @param {{box: number[] | null, k: number, parts: boolean, rerank: string}} options
 */
export async function search(query, { box, k, parts, rerank }, signal) {
  const answer = await post("/api/search", query, { box: box && box.join(","), k, parts, rerank }, signal);
  if (typeof query !== "string") remember(answer.query.id, query);
  return answer;
}

export const detect = (query, signal) => post("/api/detect", query, {}, signal);
export const classify = (query, signal) => post("/api/classify", query, {}, signal);
