"use strict";
/* Ranks on one axis (trainsys.profiler.timeline): wheel or + and - zoom, dragging or the arrows move, 0 shows all. */
function drawTimeline(place, T, hue, words, showTip, hideTip) {
  const add = (parent, tag, attrs, text) => {
    const node = document.createElement(tag);
    for (const [k, v] of Object.entries(attrs ?? {})) node.setAttribute(k, v);
    if (text) node.textContent = text;
    parent.append(node);
    return node;
  };
  const lanes = T.lanes.map((lane) => ({ ...lane, tracks: lane.tracks.map((flat) => {
    const n = flat.length / 3, from = new Float64Array(n), to = new Float64Array(n), kind = new Uint8Array(n);
    for (let i = 0, at = 0; i < n; i++) { from[i] = at += flat[3 * i]; to[i] = at += flat[3 * i + 1]; kind[i] = flat[3 * i + 2]; }
    return { from, to, kind };
  }) }));
  const two = T.tracks.length > 1, lead = lanes.filter((l) => l.note).length || Math.min(2, lanes.length);
  const plain = lanes.length <= 16 ? 22 : lanes.length <= 40 ? 16 : 12, HEAD = 34;
  const tall = (i) => (i < lead ? 30 : plain) + (i === lead - 1 && lanes.length > lead ? 8 : 0), tops = [HEAD];
  lanes.forEach((_, i) => tops.push(tops[i] + tall(i)));
  const high = tops[lanes.length] + 4;
  const time = (ticks, digits) => { const s = ticks * T.tick_s; return s >= 1 ? s.toFixed(digits ?? 3) + " s" : s >= 1e-3 ? (1e3 * s).toFixed(digits ?? 2) + " ms" : (1e6 * s).toFixed(digits ?? 1) + " µs"; };

  const tools = add(place, "div", { class: "tools timeline-tools" });
  const legend = add(place, "div", { class: "legend" });
  T.kinds.forEach((k, i) => {
    if (!lanes.some((l) => l.tracks.some((t) => t.kind.includes(i)))) return;
    const item = add(legend, "span");
    add(item, "i", { style: `background:var(${hue(k)})` });
    item.append(words(k));
  });
  const cv = add(place, "canvas", { class: "timeline", tabindex: "0", role: "img", style: `height:${high}px`,
    "aria-label": `Timeline of ${lanes.length} ranks over ${time(T.length)}. Plus and minus zoom, arrows move, 0 shows all.` });
  const hint = "Drag to move; wheel after a click, or Ctrl and wheel, to zoom; keys + − ← → 0";
  const view = { from: 0, to: T.length };
  const shown = add(tools, "span", { class: "note timeline-view" });
  for (const [label, name, act] of [["+", "zoom in", () => zoom(0.5)], ["−", "zoom out", () => zoom(2)], ["←", "earlier", () => move(-0.25)], ["→", "later", () => move(0.25)], ["all", "show all", () => set(0, T.length)]])
    add(tools, "button", { type: "button", "aria-label": name, title: name }, label).addEventListener("click", act);
  add(tools, "span", { class: "note" }, hint);
  let gutter = 100, wide = 0;

  function set(from, to) {
    const span = Math.max(Math.min(20, T.length), Math.min(T.length, to - from));
    view.from = Math.max(0, Math.min(T.length - span, from));
    view.to = view.from + span;
    paint();
  }
  function zoom(by, at) {
    const middle = at ?? (view.from + view.to) / 2;
    set(middle - (middle - view.from) * by, middle + (view.to - middle) * by);
  }
  function move(by) { const d = by * (view.to - view.from); set(view.from + d, view.to + d); }
  const tickAt = (x) => view.from + ((x - gutter) / (wide - gutter)) * (view.to - view.from);

  function paint() {
    wide = cv.clientWidth || 1100;
    gutter = wide < 600 ? 58 : 112;
    const dense = devicePixelRatio || 1, g = cv.getContext("2d"), style = getComputedStyle(document.documentElement);
    const ink = (name) => style.getPropertyValue(name).trim();
    cv.width = wide * dense; cv.height = high * dense;
    g.scale(dense, dense);
    g.font = "11px " + getComputedStyle(document.body).fontFamily;
    const span = view.to - view.from, scale = (wide - gutter) / span, X = (t) => gutter + (t - view.from) * scale;
    const fills = T.kinds.map((k) => ink(hue(k)));
    /* the axis: round times, and the ends of steps */
    const rough = (span * T.tick_s) / Math.max(2, (wide - gutter) / 110), power = 10 ** Math.floor(Math.log10(rough));
    const every = [1, 2, 5, 10].map((k) => k * power).find((k) => k >= rough) / T.tick_s, digits = Math.max(0, -Math.floor(Math.log10((every * T.tick_s * (span * T.tick_s >= 1 ? 1 : span * T.tick_s >= 1e-3 ? 1e3 : 1e6)) || 1)));
    const unit = span * T.tick_s >= 1 ? [1, "s"] : span * T.tick_s >= 1e-3 ? [1e3, "ms"] : [1e6, "µs"];
    g.fillStyle = ink("--soft"); g.strokeStyle = ink("--line"); g.lineWidth = 1;
    g.textAlign = "left";
    g.fillText(unit[1], 2, 12);
    for (let t = Math.ceil(view.from / every) * every; t <= view.to; t += every) {
      const x = X(t), label = (t * T.tick_s * unit[0]).toFixed(digits);
      g.beginPath(); g.moveTo(x + 0.5, 16); g.lineTo(x + 0.5, high); g.stroke();
      g.textAlign = x > wide - 30 ? "right" : x < gutter + 10 ? "left" : "center";
      g.fillText(label, Math.min(x, wide), 12);
    }
    /* rows */
    lanes.forEach((lane, i) => {
      const top = tops[i], room = (i < lead ? 30 : plain) - 2;
      g.textAlign = "right";
      if (room >= 9) {
        g.fillStyle = ink(i < lead ? "--ink" : "--soft");
        const named = i < lead && lane.note;
        g.fillText(`rank ${lane.rank}`, gutter - 8, top + (named ? 11 : room / 2 + 4));
        if (named) { g.fillStyle = ink("--soft"); g.fillText(lane.note, gutter - 8, top + 24); }
      }
      g.fillStyle = ink("--hover");
      g.fillRect(gutter, top, wide - gutter, room);
      lane.tracks.forEach((t, which) => {
        const y = top + (two && which ? Math.round(room * 0.55) : 0), tall = two ? (which ? room - Math.round(room * 0.55) : Math.round(room * 0.55)) : room;
        let lo = 0, hi = t.to.length;
        while (lo < hi) { const m = (lo + hi) >> 1; if (t.to[m] <= view.from) lo = m + 1; else hi = m; }
        for (let k = lo; k < t.from.length && t.from[k] < view.to; k++) {
          const a = Math.max(gutter, X(t.from[k])), b = Math.min(wide, X(t.to[k]));
          g.fillStyle = fills[t.kind[k]];
          g.fillRect(a, y, Math.max(b - a, 0.6), tall);
        }
      });
    });
    g.fillStyle = ink("--ink"); g.strokeStyle = ink("--ink");
    g.setLineDash([3, 3]);
    let free = -1e9;
    for (const [number, end] of T.steps) {
      const x = X(end);
      if (x < gutter || x > wide + 1) continue;
      g.beginPath(); g.moveTo(Math.min(x, wide - 0.5), HEAD - 6); g.lineTo(Math.min(x, wide - 0.5), high); g.stroke();
      const label = `end of step ${number}`, short = `${number}`, w = g.measureText(label).width;
      const said = x - w - 6 > Math.max(free, gutter) ? label : x - g.measureText(short).width - 6 > Math.max(free, gutter) ? short : "";
      g.textAlign = "right";
      if (said) { g.fillText(said, x - 3, 28); free = x; }
    }
    g.setLineDash([]);
    shown.textContent = `${time(view.from)} to ${time(view.to)} of ${time(T.length)}`;
  }

  let held = null;
  cv.addEventListener("wheel", (e) => {
    if (document.activeElement !== cv && !e.ctrlKey && !e.metaKey) return;
    e.preventDefault();
    if (Math.abs(e.deltaX) > Math.abs(e.deltaY)) move(e.deltaX / 800);
    else zoom(Math.exp(Math.max(-1, Math.min(1, e.deltaY / 300))), tickAt(e.offsetX));
  }, { passive: false });
  cv.addEventListener("pointerdown", (e) => { held = { x: e.offsetX, from: view.from, to: view.to }; cv.setPointerCapture(e.pointerId); cv.focus({ preventScroll: true }); });
  cv.addEventListener("pointerup", () => { held = null; });
  cv.addEventListener("pointercancel", () => { held = null; });
  cv.addEventListener("dblclick", (e) => zoom(0.4, tickAt(e.offsetX)));
  cv.addEventListener("pointermove", (e) => {
    if (held) {
      const d = ((held.x - e.offsetX) / (wide - gutter)) * (held.to - held.from);
      set(held.from + d, held.to + d);
      return hideTip();
    }
    const i = tops.findIndex((_, n) => n < lanes.length && e.offsetY >= tops[n] && e.offsetY < tops[n + 1]), at = tickAt(e.offsetX);
    if (i < 0 || e.offsetX < gutter) return hideTip();
    const room = (i < lead ? 30 : plain) - 2, which = two && e.offsetY - tops[i] >= room * 0.55 ? 1 : 0, t = lanes[i].tracks[which];
    const k = t.from.findIndex((from, n) => from <= at && at < t.to[n]);
    showTip(`rank ${lanes[i].rank}${lanes[i].note ? ", " + lanes[i].note : ""}${two ? ", " + T.tracks[which] : ""}\n` +
      (k < 0 ? `nothing at ${time(at)}` : `${words(T.kinds[t.kind[k]])}: ${time(t.to[k] - t.from[k])}, from ${time(t.from[k])}`), e);
  });
  cv.addEventListener("pointerleave", hideTip);
  cv.addEventListener("keydown", (e) => {
    const act = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), 0: () => set(0, T.length), Home: () => set(0, T.length) }[e.key];
    if (act && !e.ctrlKey && !e.metaKey) { e.preventDefault(); act(); }
  });
  addEventListener("resize", paint);
  T.notes.forEach((n) => add(place, "p", { class: "note" }, n));
  paint();
  return paint;
}
