// The report's page: colour scheme, the values under the pointer, the filters of samples and rollouts. Texts go in by textContent only.
(() => {
  const root = document.documentElement, tip = document.getElementById("tip");
  const make = (name, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    return node;
  };
  document.getElementById("theme").onclick = () => {
    const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
    root.dataset.theme = (root.dataset.theme || system) === "dark" ? "light" : "dark";
  };
  const digits = {maximumSignificantDigits: 5};
  const show = value => value === null ? "not finite" : value.toLocaleString("en", digits);
  const nearest = (xs, x) => {
    let best = 0;
    xs.forEach((value, index) => { if (Math.abs(value - x) < Math.abs(xs[best] - x)) best = index; });
    return best;
  };
  for (const svg of document.querySelectorAll("svg.chart")) {
    const {window: [x0, x1, y0, y1], box: [left, right, bottom, top], x: label, series} = JSON.parse(svg.dataset.chart);
    const cursor = svg.querySelector(".cursor");
    const line = cursor.querySelector("line"), dots = cursor.querySelector(".dots");
    const px = x => left + (x - x0) / (x1 - x0) * (right - left);
    const py = y => bottom - (y - y0) / (y1 - y0) * (bottom - top);
    const hide = () => { cursor.classList.remove("on"); tip.style.display = "none"; };
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("pointermove", event => {
      const area = svg.getBoundingClientRect();
      const pointer = (event.clientX - area.left) / area.width * svg.viewBox.baseVal.width;
      const wanted = x0 + (pointer - left) / (right - left) * (x1 - x0);
      const found = series.map(one => ({one, at: nearest(one.x, wanted)}));
      const xs = found.map(({one, at}) => one.x[at]), x = xs[nearest(xs, wanted)];
      dots.replaceChildren();
      tip.replaceChildren(Object.assign(document.createElement("div"), {textContent: label + " " + show(x)}));
      for (const {one, at} of found) {
        if (Math.abs(one.x[at] - x) > (x1 - x0) / 40) continue;
        const [row, mark, value] = ["div", "i", "b"].map(name => document.createElement(name));
        const y = one.y[at], colour = `var(--series-${one.colour})`;
        mark.style.background = colour;
        value.textContent = show(y);
        row.append(value, mark, one.name);
        tip.append(row);
        if (y !== null) dots.append(make("circle", {class: "dot", cx: px(one.x[at]), cy: py(y), r: 4, style: `--c:${colour}`}));
      }
      const ends = {x1: px(x), x2: px(x), y1: top, y2: bottom};
      for (const key in ends) line.setAttribute(key, ends[key]);
      cursor.classList.add("on");
      tip.style.display = "block";
      const over = event.clientX + 18 + tip.offsetWidth > innerWidth;
      tip.style.left = Math.max(4, over ? event.clientX - 18 - tip.offsetWidth : event.clientX + 18) + "px";
      tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 10) + "px";
    });
  }
  for (const browser of document.querySelectorAll(".browser")) {
    const [iteration, prompt, count] = [".iteration", ".prompt", ".shown"].map(name => browser.querySelector(name));
    const groups = [...browser.querySelectorAll(".rollout")];
    const choose = (at, asked) => {
      iteration.value = at;
      prompt.value = asked;
      for (const group of groups) {
        const {iteration: its, prompt: own} = group.dataset;
        group.hidden = Boolean((at && its !== at) || (asked && own !== asked));
      }
      count.textContent = groups.filter(group => !group.hidden).length + " of " + groups.length + " groups";
    };
    iteration.onchange = prompt.onchange = () => choose(iteration.value, prompt.value);
    for (const button of browser.querySelectorAll(".step")) button.onclick = () => {
      const next = iteration.options[iteration.selectedIndex + Number(button.value)];
      if (next) choose(next.value, prompt.value);
    };
    for (const group of groups) group.querySelector(".follow").onclick = () => {
      choose("", group.dataset.prompt);
      browser.querySelector(".controls").scrollIntoView();
    };
    const single = group => choose(group.dataset.iteration, group.dataset.prompt);
    for (const link of browser.querySelectorAll(".matrix a")) {
      link.onclick = () => single(document.getElementById(link.hash.slice(1)));
    }
    const linked = groups.find(group => "#" + group.id === location.hash);
    if (linked) { single(linked); linked.scrollIntoView(); } else choose(browser.dataset.start, "");
  }
  const [split, kind, shown] = ["split", "kind", "shown"].map(id => document.getElementById(id));
  const cards = [...document.querySelectorAll("#samples .sample")];
  const filter = () => {
    for (const card of cards) {
      const {split: differs, kind: its} = card.dataset;
      card.hidden = (split.checked && differs === "0") || Boolean(kind && kind.value && its !== kind.value);
    }
    shown.textContent = cards.filter(card => !card.hidden).length + " of " + cards.length + " prompts";
  };
  if (split) { split.onchange = filter; if (kind) kind.onchange = filter; filter(); }
})();
