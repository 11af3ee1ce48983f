"""Style and script of the report page, kept in the page itself.

The script reads values back from the lines' coordinates for tooltips, and widens a picture when it is clicked; without
it the page shows the same.
"""

CSS = """
:root { --ink: #1c2430; --soft: #5d6775; --rule: #e3e7ec; --wash: #f6f8fa; --link: #3465a4; --good: #1b7f3b; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; }
body { margin: 0; color: var(--ink); background: #fff; font: 14px/1.5 system-ui, -apple-system, "Segoe UI", Roboto,
  "Helvetica Neue", Arial, sans-serif; -webkit-font-smoothing: antialiased; }
header, nav, main { max-width: 1160px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 30px; }
.kicker { margin: 0; color: var(--soft); font-size: 12px; letter-spacing: .06em; text-transform: uppercase; }
h1 { margin: 2px 0 6px; font-size: 28px; line-height: 1.2; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 0 0 12px; font-size: 19px; font-weight: 650; letter-spacing: -.005em; }
h3 { margin: 22px 0 8px; font-size: 14px; font-weight: 650; }
h3 small { margin-left: 8px; color: var(--soft); font-weight: 400; }
h3.run { font-size: 16px; border-bottom: 1px solid var(--rule); padding-bottom: 4px; }
p { margin: 8px 0; }
section > p, section table + p, .scroll + p { color: var(--soft); font-size: 13px; max-width: 80ch; }
header p { display: flex; gap: 10px; align-items: center; }
.state { padding: 1px 9px; border-radius: 10px; font-size: 12px; font-weight: 600; color: #fff;
  background: var(--soft); }
.state.done { background: var(--good); } .state.running { background: var(--link); }
.state.failed { background: #b3344d; } .state.preempted { background: #a86a00; }
dl { display: flex; flex-wrap: wrap; gap: 10px 34px; margin: 12px 0 16px; }
dt { color: var(--soft); font-size: 12px; } dd { margin: 0; font-weight: 550; font-variant-numeric: tabular-nums; }
.timeline { display: flex; gap: 2px; margin-bottom: 18px; }
.timeline span { flex: 1 1 0; min-width: 5px; padding: 3px 8px; border-radius: 3px; color: #fff; font-size: 12px;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
nav { position: sticky; top: 0; z-index: 2; background: #fffffff2; }
nav::after { content: ""; display: block; border-bottom: 1px solid var(--rule); }
nav a { display: inline-block; margin-right: 20px; padding: 9px 0; color: var(--soft); text-decoration: none;
  font-size: 13px; } nav a:hover { color: var(--link); }
section { padding: 26px 0 6px; scroll-margin-top: 30px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--soft); font-size: 13px; margin: 0; }
.key { display: inline-block; width: 14px; height: 3px; border-radius: 2px; vertical-align: middle; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(250px, 1fr)); gap: 12px; }
figure { margin: 0; }
.chart { border: 1px solid var(--rule); border-radius: 6px; padding: 9px 10px 4px; break-inside: avoid; }
.chart figcaption { display: flex; align-items: baseline; gap: 7px; font-size: 13px; }
.chart b { font-weight: 600; color: var(--ink); } .unit { color: var(--soft); font-size: 11.5px; }
.ends { margin-left: auto; display: flex; gap: 0 8px; font-size: 11.5px; font-variant-numeric: tabular-nums; }
.ends i { display: inline-block; width: 8px; height: 8px; border-radius: 2px; margin-right: 4px; }
.ends span { white-space: nowrap; } .ends { flex-wrap: wrap; justify-content: flex-end; color: var(--ink); }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { font-size: 10px; fill: var(--soft); font-variant-numeric: tabular-nums; }
svg .grid { stroke: #eceff3; } svg .axis { stroke: #b9c1cb; }
svg polyline { fill: none; stroke-linejoin: round; stroke-linecap: round; }
svg .line { stroke-width: 1.5; } svg .raw { stroke-width: .6; opacity: .28; }
svg .cursor { stroke: #8a93a0; stroke-dasharray: 2 2; visibility: hidden; } svg.on .cursor { visibility: visible; }
#tip { position: absolute; z-index: 3; pointer-events: none; padding: 5px 9px; border-radius: 5px; background: #1c2430;
  color: #fff; font-size: 12px; line-height: 1.45; white-space: pre; font-variant-numeric: tabular-nums; }
.film { display: grid; grid-template-columns: repeat(5, 1fr); gap: 12px; align-items: start; }
.film figure { cursor: zoom-in; break-inside: avoid; }
.film figure.wide { grid-column: 1 / -1; cursor: zoom-out; }
.lead { display: grid; gap: 14px; }
.lead img { display: block; max-width: min(100%, 900px); height: auto; border: 1px solid var(--rule);
  border-radius: 6px; }
.film img { display: block; max-width: 100%; height: auto; border: 1px solid var(--rule); border-radius: 6px; }
figure figcaption { margin-top: 3px; color: var(--soft); font-size: 12px; }
.captions { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 8px 24px; padding: 0;
  list-style: none; } .captions small { display: block; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { padding: 5px 12px 5px 0; text-align: left; color: var(--soft); font-weight: 500; font-size: 12px;
  border-bottom: 1px solid #c9d0d9; white-space: nowrap; }
td { padding: 5px 12px 5px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
.num { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.evaluation td:nth-child(4) { color: var(--soft); }
.good { color: var(--good); font-weight: 650; } .poor { color: #a86a00; font-weight: 650; }
code { font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  overflow-wrap: anywhere; }
.config td { padding-top: 2px; padding-bottom: 2px; }
.config td:nth-child(3) { color: var(--soft); white-space: nowrap; } .config td:first-child { white-space: nowrap; }
.facts thead { display: none; } .facts td:first-child { color: var(--soft); white-space: nowrap; width: 1%; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--link); font-size: 13px; }
details[open] > summary { margin-bottom: 8px; }
@media (max-width: 860px) { .film { gap: 8px; }
  header, nav, main { padding: 0 18px; } header { padding-top: 20px; } }
@media print {
  nav, details:not([open]) { display: none; } body { font-size: 10pt; } .film figure:not(.wide) { max-width: 45%; }
  header, main { max-width: none; padding: 0; } section { break-inside: auto; } h2, h3 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

SCRIPT = """
(() => {
  const tip = document.getElementById("tip");
  const short = v => !isFinite(v) ? "" : Math.abs(v) >= 1e6 ? (v / 1e6).toPrecision(4) + "M"
    : Math.abs(v) >= 1e4 ? (v / 1e3).toPrecision(4) + "k"
    : v !== 0 && Math.abs(v) < 1e-3 ? v.toExponential(2) : String(+v.toPrecision(4));
  const value = ([low, high, start, end, log], px) => {
    const share = (px - start) / (end - start);
    return log ? low * Math.pow(high / low, share) : low + share * (high - low);
  };
  for (const svg of document.querySelectorAll("svg[data-x]")) {
    const x = svg.dataset.x.split(" ").map(Number), y = svg.dataset.y.split(" ").map(Number);
    const lines = [...svg.querySelectorAll(".line")].map(line => ({
      label: line.dataset.label, points: [...line.points].map(p => [p.x, p.y]) }));
    const cursor = svg.querySelector(".cursor");
    svg.addEventListener("pointermove", event => {
      const box = svg.getBoundingClientRect();
      const at = (event.clientX - box.left) * svg.viewBox.baseVal.width / box.width;
      const near = lines.map(l => l.points.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a));
      const best = near.reduce((a, b) => Math.abs(b[0] - at) < Math.abs(a[0] - at) ? b : a);
      cursor.setAttribute("x1", best[0]); cursor.setAttribute("x2", best[0]); svg.classList.add("on");
      tip.textContent = ["step " + Math.round(value(x, best[0])), ...lines.map((l, i) => {
        const step = Math.round(value(x, near[i][0])), far = Math.abs(near[i][0] - best[0]) > 2;
        return l.label + "  " + short(value(y, near[i][1])) + (far ? "  (step " + step + ")" : "");
      })].join("\\n");
      tip.hidden = false;
      const left = event.pageX + 14, room = document.documentElement.clientWidth - tip.offsetWidth - 8;
      tip.style.left = Math.min(left, room) + "px"; tip.style.top = event.pageY + 14 + "px";
    });
    svg.addEventListener("pointerleave", () => { tip.hidden = true; svg.classList.remove("on"); });
  }
  for (const figure of document.querySelectorAll(".film figure"))
    figure.addEventListener("click", () => figure.classList.toggle("wide"));
})();
"""
