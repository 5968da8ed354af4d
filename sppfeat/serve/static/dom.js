// Small helpers for elements. Names of files are hostile: they become text and attributes here, never markup.

/** @param {string} id */
export const $ = (id) => document.getElementById(id);

/**
 * An element with properties, attributes (with a dash, or without a property of that name) and children.
 * Strings become text nodes.
 */
export function el(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (value === null || value === undefined) continue;
    if (key.includes("-") || !(key in made)) made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

/** 1 image, 2,000 images. */
export function count(number, one, many = `${one}s`) {
  return `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
}

/** Three decimals, or two digits of a smaller score: diffusion's are tiny. */
export function decimals(score) {
  return score !== 0 && Math.abs(score) < 0.001 ? score.toExponential(1) : score.toFixed(3);
}

/** Call after calls have paused for so many milliseconds. */
export function later(call, pause) {
  let timer = 0;
  const wait = (...values) => {
    clearTimeout(timer);
    timer = setTimeout(() => call(...values), pause);
  };
  wait.cancel = () => clearTimeout(timer);
  return wait;
}

/** Resolves after so many milliseconds, rejects when aborted. */
export function sleep(pause, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, pause);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

/** Offer text as a file. */
export function save(name, text, type = "text/plain") {
  const address = URL.createObjectURL(new Blob([text], { type: `${type};charset=utf-8` }));
  el("a", { href: address, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** Copy text; false if the browser does not let us. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages over plain HTTP from another machine have no clipboard API.
    const area = el("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

/** Show an error in words, in an element with role=alert; null clears it. */
export function tell(place, error, ...more) {
  place.replaceChildren();
  if (error === null || error?.name === "AbortError") return;
  place.append(el("div", { className: "note fault" }, el("p", {}, String(error?.message ?? error)), ...more));
}

/** An image that becomes a placeholder if it cannot be loaded. */
export function thumbnail(src, alt, there = true, lazy = true) {
  const gone = (why) => el("span", { className: "gone", role: "img", "aria-label": alt }, why);
  if (!there) return gone("Image not found");
  // Lazy before the address: the order matters to browsers.
  const image = el("img", { loading: lazy ? "lazy" : "eager", decoding: "async", alt, draggable: false });
  image.addEventListener("error", () => {
    image.replaceWith(gone("Image could not be shown"));
    document.dispatchEvent(new Event("image-failed")); // perhaps since the gallery was replaced
  }, { once: true });
  image.src = src;
  return image;
}
