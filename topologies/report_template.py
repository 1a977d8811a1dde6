"""The report's page around its sections: style sheet, the little script, and the frame that forbids any outside request.

The page's own Content-Security-Policy allows inline styles and exactly one script, by its hash: nothing that a model wrote can
run or load anything, and the file reads the same from a disk, a mail or a web server.
"""

from __future__ import annotations

import base64
import hashlib

STYLE = """
:root{color-scheme:light;--bg:#f5f6f8;--card:#fff;--ink:#161b22;--soft:#57606c;--hair:#dde1e6;--track:#e8ebef;--link:#1f5fbf;
--series-0:#2a78d6;--series-1:#d9480f;--series-2:#12906a;--series-3:#7048c6;--series-4:#b8860b;--series-5:#c2387e;
--series-6:#2b8a9e;--series-7:#6b7480;
--phase-0:#3b6fb5;--phase-1:#7a55b8;--phase-2:#b7791f;--phase-3:#2a8a6b;--phase-4:#9aa3ae;
--floor-4:#7a55b8;--floor-3:#3b6fb5;--floor-2:#b7791f;--floor-1:#2a8a6b;
--good:#12774f;--good-bg:#e2f4ec;--bad:#b42318;--bad-bg:#fdeae7;--on-phase:#fff}
@media (prefers-color-scheme:dark){:root:not([data-theme=light]){color-scheme:dark;DARK}}
:root[data-theme=dark]{color-scheme:dark;DARK}
*{box-sizing:border-box}
html{scroll-behavior:smooth;scroll-padding-top:16px;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.55 "Avenir Next",Avenir,"Segoe UI",Roboto,"Helvetica Neue",
"Liberation Sans",Arial,sans-serif;font-variant-numeric:tabular-nums}
a{color:var(--link)}a:focus-visible,button:focus-visible,select:focus-visible,input:focus-visible,.scroll:focus-visible
{outline:2px solid var(--link);outline-offset:2px}
p,h1,h2,h3,figure,ul,dl,dd,pre{margin:0;padding:0}ul{list-style:none}
pre,code{font-family:ui-monospace,"SF Mono","Cascadia Mono",Menlo,Consolas,"Liberation Mono",monospace;font-size:.87em}
pre{white-space:pre-wrap;overflow-wrap:anywhere}
.page{display:grid;grid-template-columns:minmax(0,1040px);justify-content:center;gap:0 44px;padding:40px 24px 96px}
h1{font-size:clamp(30px,5vw,46px);line-height:1.1;letter-spacing:-.025em;font-weight:700;overflow-wrap:anywhere}
h2{font-size:25px;line-height:1.2;letter-spacing:-.015em;font-weight:650}
h3{font-size:15px;font-weight:600;margin:26px 0 10px}
.facts{display:flex;flex-wrap:wrap;gap:2px 18px;color:var(--soft);margin-top:6px}
.lead,.note,.none{color:var(--soft)}.note{font-size:13px}.none{font-style:italic}
#theme{position:absolute;top:14px;right:16px;background:none;border:1px solid var(--hair);border-radius:6px;color:var(--soft);
font:inherit;font-size:13px;padding:3px 10px;cursor:pointer}
section{margin-top:64px}section>header{margin-bottom:20px}
.stage>header{border-left:4px solid var(--p);padding-left:14px}
.phase-0{--p:var(--phase-0)}.phase-1{--p:var(--phase-1)}.phase-2{--p:var(--phase-2)}.phase-3{--p:var(--phase-3)}
.phase-4{--p:var(--phase-4)}
.strip{display:flex;gap:2px;height:38px;margin-top:28px}
.strip a{flex:var(--w) 1 0;min-width:4px;background:var(--p);border-radius:3px;color:var(--on-phase);font-size:12.5px;
text-decoration:none;display:flex;align-items:center;padding:0 8px;overflow:hidden;white-space:nowrap}
.strip a:not(:has(span)){padding:0}.strip a:hover{filter:brightness(1.12)}
.keys,.legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:13px;color:var(--soft)}.keys{margin-top:9px}
.keys li::before{content:"";display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--p);margin-right:7px}
.keys b,.legend b{color:var(--ink);font-weight:600;margin-left:3px}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,170px),1fr));gap:22px 26px;margin-top:4px}
.figures.headline{margin-top:36px;grid-template-columns:repeat(auto-fit,minmax(min(46%,190px),1fr));gap:26px 30px}
.figure .label{font-size:13px;color:var(--soft);line-height:1.35}
.figure .value{font-size:25px;font-weight:600;letter-spacing:-.015em;line-height:1.3;overflow-wrap:anywhere}
.headline .value{font-size:35px;font-weight:650;letter-spacing:-.03em}
.figure .value.words{font-size:17px;letter-spacing:0;line-height:1.6}.headline .value.words{font-size:21px}
.unit{font-size:.56em;font-weight:500;color:var(--soft);letter-spacing:0}.figure .note{line-height:1.4;margin-top:1px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,400px),1fr));gap:18px;margin-top:26px}
.plot,.picture-frame{background:var(--card);border:1px solid var(--hair);border-radius:10px;padding:16px 18px 12px}
.plot{max-width:660px;min-width:0}.plot figcaption,.table figcaption{font-weight:600}
.plot figcaption span{font-weight:400;color:var(--soft);font-size:13px;margin-left:6px}
.legend{margin:3px 0 8px;gap:1px 16px}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;background:var(--c);margin-right:6px;vertical-align:4px}
svg{display:block;width:100%;height:auto;overflow:visible}svg text{font-family:inherit;fill:var(--ink)}
.chart{touch-action:pan-y;cursor:crosshair}.chart .tick{font-size:11.5px;fill:var(--soft)}
.end{text-anchor:end}.middle{text-anchor:middle}.tick.name{font-style:italic}
.grid{stroke:var(--hair)}.axis{stroke:var(--soft);stroke-opacity:.55}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.line.faint{stroke-width:1;stroke-opacity:.3}.dot{fill:var(--c);stroke:var(--card);stroke-width:1.5}
.cursor{display:none}.cursor.on{display:block}.cursor line{stroke:var(--soft);stroke-opacity:.7}
#tip{position:fixed;z-index:9;display:none;pointer-events:none;background:var(--ink);color:var(--bg);border-radius:7px;
padding:7px 11px;font-size:12.5px;line-height:1.5;max-width:280px}
#tip i{display:inline-block;width:9px;height:9px;border-radius:50%;margin-right:7px}#tip b{float:right;margin-left:16px}
.table{margin-top:26px}.scroll{overflow-x:auto;margin-top:6px;border-radius:10px;border:1px solid var(--hair);background:var(--card)}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{text-align:left;padding:7px 14px;white-space:nowrap;border-bottom:1px solid var(--hair)}
tbody tr:last-child td{border-bottom:0}th{font-weight:500;color:var(--soft);font-size:13px}
td:first-child{font-weight:500}.right{text-align:right}.table .note{margin-top:7px}
.picture-frame{padding:14px}.picture.narrow{display:none}
.floor{fill:color-mix(in srgb,var(--f) 7%,var(--card))}.edge{fill:var(--f)}
.floor-name{font-size:13px;font-weight:650;fill:var(--f)!important;white-space:pre}
.floor-note{font-weight:400;font-size:12px;fill:var(--soft)}
svg .chip{fill:var(--card);stroke:color-mix(in srgb,var(--f) 40%,var(--hair))}svg .chip.waiting{fill:none;stroke-dasharray:3 3}
.chip-text{font-size:12px;text-anchor:middle}svg a:hover .chip{stroke:var(--f)}
.chevron{fill:none;stroke:var(--soft);stroke-width:1.3}
.box{fill:var(--card);stroke:color-mix(in srgb,var(--f) 65%,var(--hair))}.box.passive{stroke-dasharray:4 3;fill:none}
.role{font-size:13.5px;font-weight:650;text-anchor:middle}.fact{font-size:11px;fill:var(--soft)!important;text-anchor:middle}
.track{fill:var(--track)}.busy{fill:var(--f)}
.flow{fill:none;stroke:var(--soft);stroke-width:1.4}.flow.loop{stroke:var(--f);stroke-width:2.2}
marker path{fill:context-stroke}.flows{font-size:11.5px;fill:var(--soft)!important}
.overview{display:grid;grid-template-columns:auto minmax(0,1fr) auto;gap:5px 16px;align-items:center;font-size:14px}
.marks{display:flex;flex-wrap:wrap;gap:3px}.marks>*{width:19px;height:19px;border-radius:4px;font-size:12px;line-height:19px;
text-align:center;text-decoration:none;background:var(--track);color:var(--soft);font-style:normal}
.marks i{background:none}.rate{font-weight:600;text-align:right}
.pass,.chip.pass{--v:var(--good);--vb:var(--good-bg)}.fail,.chip.fail{--v:var(--bad);--vb:var(--bad-bg)}
.unchecked{--v:var(--soft);--vb:var(--track)}.marks a{background:var(--vb);color:var(--v)}
.controls{display:flex;flex-wrap:wrap;gap:6px 22px;align-items:center;margin:24px 0 14px;font-size:14px;color:var(--soft)}
.controls select{font:inherit;color:var(--ink);background:var(--card);border:1px solid var(--hair);border-radius:6px;padding:2px 6px}
.sample{display:grid;grid-template-columns:minmax(200px,1fr) minmax(0,3fr);gap:20px;background:var(--card);
border:1px solid var(--hair);border-radius:10px;padding:16px 18px;margin-top:12px}.sample[hidden]{display:none}
.sample:target{border-color:var(--link)}
.by{font-size:13px;color:var(--soft);display:flex;gap:8px;align-items:center;justify-content:space-between;margin-bottom:5px}
.asked .by{justify-content:flex-start}.kind{border:1px solid var(--hair);border-radius:99px;padding:0 9px}
.asked pre{font-size:14px}.expected{font-size:13px;color:var(--soft);margin-top:9px;overflow-wrap:anywhere}
.expected code{color:var(--ink)}
.answers{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,205px),1fr));gap:14px 16px}
.answer{border-top:2px solid var(--v);padding-top:7px;min-width:0}.answer .by{color:var(--ink);font-weight:500}
.answer pre{max-height:15em;overflow:auto}
span.chip{font-size:12px;font-weight:600;border-radius:99px;padding:0 9px;color:var(--v);background:var(--vb);white-space:nowrap}
.bars>div{display:grid;align-items:center;gap:3px 14px;padding:5px 0;border-bottom:1px solid var(--hair)}
.bars.stages>div{grid-template-columns:minmax(0,2fr) minmax(0,4fr) 92px 58px}
.bars.actors>div{grid-template-columns:minmax(0,2fr) minmax(0,4fr) 92px 104px 92px}
.bars small{color:var(--soft);margin-left:4px}.bars .who{overflow-wrap:anywhere}.much{text-align:right;color:var(--soft);font-size:14px}
.bar{display:block;height:12px;border-radius:3px;background:var(--track);overflow:hidden}
.bar::before{content:"";display:block;width:var(--w);min-width:1px;height:100%;border-radius:3px;background:var(--p,var(--phase-0))}
.stages .bar{background:none}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:0 30px}
dl>div{display:flex;justify-content:space-between;gap:16px;padding:6px 0;border-bottom:1px solid var(--hair)}
dt{color:var(--soft)}dd{text-align:right;overflow-wrap:anywhere;min-width:0}
details{margin-top:22px}summary{cursor:pointer;font-weight:500}
details pre{margin-top:10px;background:var(--card);border:1px solid var(--hair);border-radius:10px;padding:16px 18px}
.contents{display:none}
@media (min-width:1340px){.page{grid-template-columns:180px minmax(0,1040px)}
.contents{display:flex;flex-direction:column;gap:1px;position:sticky;top:32px;align-self:start;font-size:13.5px;max-height:92vh;overflow:auto}
.contents a{color:var(--soft);text-decoration:none;padding:3px 0 3px 11px;border-left:3px solid var(--p,transparent)}
.contents a:hover{color:var(--ink)}}
@media (max-width:760px){.page{padding:26px 14px 64px}section{margin-top:48px}.picture.wide{display:none}.picture.narrow{display:block}
.picture-frame{padding:6px}.plot{padding:13px 12px 10px}.headline .value{font-size:29px}.sample{grid-template-columns:minmax(0,1fr);gap:14px;padding:14px}
.strip a{padding:0 5px;font-size:11.5px}th,td{padding:7px 11px}.overview{gap:8px 12px}
.bars.stages>div{grid-template-columns:minmax(0,1fr) auto 50px}.bars.actors>div{grid-template-columns:minmax(0,1fr) auto auto auto}
.bars .bar{grid-row:2;grid-column:1/-1}.bars .who{grid-column:1}.much{font-size:13px}}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{body{background:#fff}#theme,.controls,.contents{display:none}section,.plot,.sample{break-inside:avoid}}
""".replace(
    "DARK",
    "--bg:#0f1318;--card:#171c23;--ink:#e9edf2;--soft:#9aa5b3;--hair:#2b323c;--track:#262d37;--link:#7fb2ff;"
    "--series-0:#5b9df0;--series-1:#f08a54;--series-2:#3fbf94;--series-3:#a98bf0;--series-4:#d8ab3c;--series-5:#e879ae;"
    "--series-6:#5cbccf;--series-7:#a3adba;"
    "--phase-0:#5a8fd6;--phase-1:#9a7ad8;--phase-2:#cf9742;--phase-3:#45ab8a;--phase-4:#76808d;"
    "--floor-4:#a98be6;--floor-3:#6ea1e6;--floor-2:#d9a552;--floor-1:#52bb99;"
    "--good:#5fd3a4;--good-bg:#143629;--bad:#ff8f83;--bad-bg:#431c19;--on-phase:#0d1117",
)

SCRIPT = """
(() => {
  const root = document.documentElement, tip = document.getElementById("tip");
  const make = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return node;
  };
  document.getElementById("theme").onclick = () => {
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
  };
  const show = value => value === null ? "not finite" : Number(value.toPrecision(5)).toLocaleString("en", {maximumSignificantDigits: 5});
  const nearest = (xs, x) => {
    let best = 0;
    xs.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = index; });
    return best;
  };
  for (const svg of document.querySelectorAll("svg.chart")) {
    const {window: [x0, x1, y0, y1], box: [left, right, bottom, top], x: label, series} = JSON.parse(svg.dataset.chart);
    const cursor = svg.querySelector(".cursor"), line = cursor.querySelector("line"), dots = cursor.querySelector(".dots");
    const px = x => left + (x - x0) / (x1 - x0) * (right - left), py = y => bottom - (y - y0) / (y1 - y0) * (bottom - top);
    const hide = () => { cursor.classList.remove("on"); tip.style.display = "none"; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", event => {
      const area = svg.getBoundingClientRect();
      const wanted = x0 + ((event.clientX - area.left) / area.width * svg.viewBox.baseVal.width - left) / (right - left) * (x1 - x0);
      const found = series.map(one => ({one, at: nearest(one.x, wanted)}));
      const x = found.map(({one, at}) => one.x[at]).reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
      dots.replaceChildren();
      tip.replaceChildren(Object.assign(document.createElement("div"), {textContent: label + " " + show(x)}));
      for (const {one, at} of found) {
        if (Math.abs(one.x[at] - x) > (x1 - x0) / 40) continue;
        const y = one.y[at], row = document.createElement("div"), mark = document.createElement("i"), value = document.createElement("b");
        mark.style.background = `var(--series-${one.colour})`;
        value.textContent = show(y);
        row.append(value, mark, one.name);
        tip.append(row);
        if (y !== null) dots.append(make("circle", {class: "dot", cx: px(one.x[at]), cy: py(y), r: 4, style: `--c:var(--series-${one.colour})`}));
      }
      for (const [key, value] of [["x1", px(x)], ["x2", px(x)], ["y1", top], ["y2", bottom]]) line.setAttribute(key, value);
      cursor.classList.add("on");
      tip.style.display = "block";
      const over = event.clientX + 18 + tip.offsetWidth > innerWidth;
      tip.style.left = Math.max(4, over ? event.clientX - 18 - tip.offsetWidth : event.clientX + 18) + "px";
      tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
    });
  }
  const split = document.getElementById("split"), kind = document.getElementById("kind"), shown = document.getElementById("shown");
  const cards = [...document.querySelectorAll(".sample")];
  const filter = () => {
    for (const card of cards)
      card.hidden = (split.checked && card.dataset.split === "0") || (kind && kind.value && card.dataset.kind !== kind.value);
    shown.textContent = cards.filter(card => !card.hidden).length + " of " + cards.length + " prompts";
  };
  if (split) { split.onchange = filter; if (kind) kind.onchange = filter; filter(); }
})();
"""


def page(*, title: str, contents: str, body: str) -> str:
    """The whole document. `title` is escaped text; `contents` and `body` are HTML."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">'
        f"<title>{title}</title><style>{STYLE}</style></head><body>"
        '<button id="theme" type="button">light / dark</button>'
        f'<div class="page">{contents}<main>{body}</main></div><div id="tip" role="status"></div>'
        f"<script>{SCRIPT}</script></body></html>\n"
    )
