// Mouse, touch and keys on the map.

const STILL = 5; // screen pixels: a press that moves less is a click

/**
 * @param {HTMLCanvasElement} canvas
 * @param {() => import("./chart.js").Chart | null} chart
 * @param {{lasso: () => boolean, selected: (polygon: number[][]) => void, open: (row: number) => void,
 *          hover: (row: number, x: number, y: number) => void, escape: () => void}} actions
 */
export function setUpGestures(canvas, chart, actions) {
  const held = new Map(); // pointers that are down
  let path = null, moved = 0, touched = 0;
  const at = (event) => {
    const area = canvas.getBoundingClientRect();
    return [event.clientX - area.left, event.clientY - area.top];
  };

  canvas.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || !chart()) return;
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, at(event));
    touched = Math.max(held.size, held.size === 1 ? 1 : touched);
    actions.hover(-1, 0, 0);
    chart().cross = false;
    if (held.size === 1) {
      moved = 0;
      path = event.shiftKey || actions.lasso() ? [chart().toMap(...at(event))] : null;
    } else path = chart().path = null; // a second finger: pinch
  });

  canvas.addEventListener("pointermove", (event) => {
    if (!chart()) return;
    const now = at(event), before = held.get(event.pointerId);
    if (!before) {
      if (event.pointerType !== "touch") actions.hover(chart().at(...now), ...now);
      return;
    }
    const [dx, dy] = [now[0] - before[0], now[1] - before[1]];
    moved += Math.hypot(dx, dy);
    if (held.size === 2) {
      const other = [...held].find(([id]) => id !== event.pointerId)[1];
      const far = (place) => Math.hypot(place[0] - other[0], place[1] - other[1]);
      chart().zoom(far(now) / Math.max(1, far(before)), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      chart().pan(dx / 2, dy / 2);
    } else if (path) {
      path.push(chart().toMap(...now));
      chart().path = path;
      chart().later();
    } else if (moved > STILL) chart().pan(dx, dy);
    held.set(event.pointerId, now);
  });

  const end = (event) => {
    if (!held.delete(event.pointerId) || !chart()) return;
    const drawn = path;
    path = chart().path = null;
    chart().later();
    if (event.type === "pointercancel" || held.size || touched > 1) {
      if (!held.size) touched = 0;
      return;
    }
    touched = 0;
    if (drawn && moved > STILL) actions.selected(drawn);
    else if (moved <= STILL) {
      const row = chart().at(...at(event));
      if (row >= 0) actions.open(row);
    }
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("pointerleave", () => actions.hover(-1, 0, 0));

  canvas.addEventListener("wheel", (event) => {
    if (!chart()) return;
    event.preventDefault();
    // Lines and pages become pixels; a pinch on a touchpad comes as small steps with Ctrl.
    const pixels = event.deltaY * [1, 30, 300][event.deltaMode] * (event.ctrlKey ? 5 : 1);
    actions.hover(-1, 0, 0);
    chart().zoom(Math.exp(-Math.max(-200, Math.min(200, pixels)) / 400), ...at(event));
  }, { passive: false });

  canvas.addEventListener("keydown", (event) => {
    const map = chart();
    if (!map || event.ctrlKey || event.metaKey || event.altKey) return;
    const step = Math.min(map.width, map.height) / 8;
    const call = {
      ArrowLeft: () => map.pan(step, 0), ArrowRight: () => map.pan(-step, 0),
      ArrowUp: () => map.pan(0, step), ArrowDown: () => map.pan(0, -step),
      "+": () => map.zoom(1.5), "=": () => map.zoom(1.5), "-": () => map.zoom(1 / 1.5), "0": () => map.fit(),
      Enter: () => {
        const row = map.middle();
        if (row >= 0) actions.open(row);
      },
      Escape: actions.escape,
    }[event.key];
    if (!call) return;
    event.preventDefault();
    map.cross = true;
    map.later();
    call();
  });
  canvas.addEventListener("focus", () => {
    if (!chart()) return;
    chart().cross = canvas.matches(":focus-visible");
    chart().later();
  });
  canvas.addEventListener("blur", () => {
    if (!chart()) return;
    chart().cross = false;
    chart().later();
  });
}
