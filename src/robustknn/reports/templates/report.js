"use strict";
(() => {
const byId = (id) => document.getElementById(id);
const data = JSON.parse(byId("samples-data").textContent);
const PER_PAGE = 15;
const OUTCOMES = {f: "▲ fooled", s: "● stood", t: "● tied, counts as right", w: "○ wrong without attack"};
const SVG = "http://www.w3.org/2000/svg";
const state = {classifier: 0, attack: 0, eps: 0, label: "", outcome: "", winner: "", kept: false,
  sort: "sample", down: false, page: 0, open: null, step: 0};

// ------------------------------------------------------------------ small tools; text is only ever set as text

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
const name = (text) => element("bdi", {}, text);
const className = (number) => (number < 0 ? data.rejected : data.classes[number] ?? String(number));
const signed = (text) => text.replace("-", "−");
function figure(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  return signed(size === 0 || (size >= 1e-3 && size < 1e4) ? value.toFixed(3) : value.toExponential(2));
}
function drawing(tag, attributes, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}
function picture(number, alt) {
  if (number === null || number === undefined) return null;
  const held = data.pictures[number];
  if (Array.isArray(held) && held.length === 4) {
    return drawing("svg", {class: "plot", viewBox: `0 0 ${held[2]} ${held[3]}`, role: "img", "aria-label": alt},
      drawing("path", {class: held[1] ? "bars" : "lines", d: held[0]}));
  }
  const smooth = Array.isArray(held);
  return element("img", {src: smooth ? held[0] : held, alt, class: smooth ? "smooth" : null});
}

// ----------------------------------------------------------------------------------------- what is chosen

const classifier = () => data.classifiers[state.classifier];
const cellOf = (attack, eps = state.eps) => classifier().cells.find((c) => c.attack === attack && c.eps === eps);
const cell = () => cellOf(state.attack);
const rivals = () => classifier().cells.filter((c) => c.eps === state.eps);
const fooledBy = (row) => rivals().filter((c) => c.outcome[row] === "f").length;
const attackName = (place) => classifier().attacks[place].name;

function columns() {
  const {samples, attacks} = classifier();
  const here = cell();
  const parts = attacks[state.attack].parts;
  const all = [
    ["sample", "sample", (r) => samples.id[r]],
    ["label", "true class", (r) => samples.label[r], className],
    ["before", "without attack", (r) => samples.decision[r], className],
    ["after", "attacked", (r) => here.decision[r], className],
    ["outcome", "outcome", (r) => here.outcome[r], (o) => OUTCOMES[o]],
    ["lead", "lead before", (r) => samples.lead[r], figure],
    ["led", "lead attacked", (r) => here.lead[r], figure],
    ["l2", "L2", (r) => here.l2[r], figure],
    ["linf", "L∞", (r) => here.linf[r], figure],
  ];
  if (samples.credibility && here.credibility) {
    all.push(["credible", "credibility before", (r) => samples.credibility[r], figure]);
    all.push(["credibly", "credibility attacked", (r) => here.credibility[r], figure]);
  }
  if (here.winner) {
    const part = (r) => (here.outcome[r] === "f" && here.winner[r] >= 0 ? parts[here.winner[r]] ?? "" : "");
    all.push(["winner", "fooled first by", part, (text) => text || "–"]);
  }
  if (rivals().length > 1) {
    all.push(["rivals", `fooled by, of ${rivals().length} attacks`, fooledBy, String]);
  }
  return all.map(([id, title, value, text = String]) => ({id, title, value, text}));
}
const TEXTS = ["label", "before", "after", "outcome", "winner"];

function rows() {
  const {samples} = classifier();
  const here = cell();
  const shown = samples.id.map((_, row) => row).filter((row) =>
    (state.label === "" || samples.label[row] === Number(state.label)) &&
    (state.outcome === "" || here.outcome[row] === state.outcome) &&
    (state.winner === "" || (here.outcome[row] === "f" && here.winner[row] === Number(state.winner))) &&
    (!state.kept || here.shown[row] !== undefined));
  const column = columns().find((c) => c.id === state.sort) ?? columns()[0];
  const key = (row) => (column.id === "winner" ? column.value(row) : column.value(row) ?? -Infinity);
  const order = (a, b) => (key(a) < key(b) ? -1 : key(a) > key(b) ? 1 : 0);
  return shown.sort((a, b) => (state.down ? order(b, a) : order(a, b)) || a - b);
}

// ------------------------------------------------------------------------------------------------ choices

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => element("option", {value}, text)));
  select.value = String(chosen);
}
function choices() {
  const {attacks, radii, samples} = classifier();
  const here = cell();
  fill(byId("pick-classifier"), data.classifiers.map((c, i) => [i, c.name]), state.classifier);
  fill(byId("pick-attack"), attacks.map((a, i) => [i, `${a.flagged ? "▲ " : ""}${a.name}${a.blind ? " (blind)" : ""}`]),
    state.attack);
  const offered = radii.map((text, i) => [i, text]).filter(([i]) => cellOf(state.attack, i));
  fill(byId("pick-eps"), offered, state.eps);
  const labels = [...new Set(samples.label)].sort((a, b) => a - b);
  fill(byId("pick-class"), [["", "all"], ...labels.map((of) => [of, className(of)])], state.label);
  fill(byId("pick-outcome"), [["", "all"], ...Object.entries(OUTCOMES)], state.outcome);
  byId("winner").hidden = !here.winner;
  const parts = attacks[state.attack].parts.map((text, i) => [i, text]);
  fill(byId("pick-winner"), [["", "any"], ...parts], state.winner);
  byId("pick-kept").checked = state.kept;
}
function choose(changes) {
  Object.assign(state, {page: 0}, changes);
  if (state.attack >= classifier().attacks.length) state.attack = 0;
  if (!cell()) [state.attack, state.eps] = classifier().start;
  if (!cell().winner) state.winner = "";
  render();
}

// ------------------------------------------------------------------------------------------------- table

function table(shown) {
  const every = columns();
  const sorting = every.some((c) => c.id === state.sort) ? state.sort : "sample";
  const heads = every.map((c) => {
    const here = sorting === c.id;
    const button = element("button", {type: "button"}, c.title, element("span", {"aria-hidden": "true"},
      here ? (state.down ? " ▼" : " ▲") : ""));
    button.addEventListener("click", () => {
      choose({sort: c.id, down: here && !state.down});
      byId("samples-table").querySelectorAll("thead button")[every.indexOf(c)].focus();
    });
    return element("th", {scope: "col", class: TEXTS.includes(c.id) ? "text" : null,
      "aria-sort": here ? (state.down ? "descending" : "ascending") : null}, button);
  });
  const body = shown.slice(state.page * PER_PAGE, (state.page + 1) * PER_PAGE).map((row) => {
    const open = state.open === row;
    const cells = every.map((c) => {
      const text = c.text(c.value(row));
      if (c.id !== "sample") return element("td", {class: TEXTS.includes(c.id) ? "text" : null}, name(text));
      const kept = cell().shown[row] !== undefined;
      const button = element("button", {type: "button", "aria-pressed": String(open)},
        text, kept ? " ▣" : "", kept ? element("span", {class: "unseen"}, " with neighbors") : null);
      button.addEventListener("click", () => show(row, true));
      return element("th", {scope: "row"}, button);
    });
    return element("tr", {class: open ? "chosen" : null}, ...cells);
  });
  byId("samples-table").tHead.replaceChildren(element("tr", {}, ...heads));
  byId("samples-table").tBodies[0].replaceChildren(...body);
  const last = Math.max(Math.ceil(shown.length / PER_PAGE), 1);
  byId("pages").hidden = last < 2;
  byId("page-before").disabled = state.page === 0;
  byId("page-after").disabled = state.page + 1 >= last;
  byId("page-number").textContent = `page ${state.page + 1} of ${last}`;
  const right = shown.filter((row) => cell().outcome[row] === "s" || cell().outcome[row] === "t").length;
  byId("samples-count").textContent = shown.length === 0 ? "No sample is like this." :
    `${shown.length} of ${classifier().samples.id.length} samples, ${right} of them right under ` +
    `${attackName(state.attack)} at eps ${classifier().radii[state.eps]}.`;
}

// ---------------------------------------------------------------------------------------- one sample

function show(row, focus = false) {
  const fresh = state.open !== row;
  state.open = row;
  if (fresh) state.step = 0;
  render();
  if (focus) byId("one-h").focus();
}
function neighbor(next) {
  const order = rows();
  const place = order.indexOf(state.open) + next;
  if (place >= 0 && place < order.length) {
    state.page = Math.floor(place / PER_PAGE);
    show(order[place]);
  }
}
const MARKS = {true: ["●", "true class"], taken: ["▲", "class it is taken for"]};

function strip(title, references, label, taken, bank, changes) {
  const list = element("ol", {"aria-label": `${title}, nearest first`});
  references.forEach(([id, of, far], place) => {
    const role = of === label ? "true" : of === taken ? "taken" : "other";
    const drawn = picture(data.references[`${bank} ${id}`], `reference ${id} at distance ${far}`);
    const mark = MARKS[role] ? element("span", {class: "mark", role: "img", "aria-label": MARKS[role][1]}, MARKS[role][0])
      : null;
    list.append(element("li", {class: `${role}${drawn ? "" : " bare"}`}, drawn,
      element("span", {class: "label"}, mark, name(className(of))),
      drawn ? null : element("span", {class: "far"}, far),
      changes[place] ? element("span", {class: "change"}, changes[place]) : null));
  });
  return element("div", {class: "strip"}, element("p", {class: "strip-title"}, title),
    references.length ? list : element("p", {class: "quiet"}, "No neighbor was found."));
}
function votes(found, k) {
  if (!found.votes.length) return null;
  const said = element("p", {class: "votes"}, "Votes, without attack → attacked: ");
  found.votes.slice(0, 8).forEach(([of, before, after], place) => {
    said.append(place ? ", " : "", name(className(of)), ` ${before} → ${after}`);
  });
  if (found.votes.length > 8) said.append(", …");
  said.append(`. ${found.entered} of ${k} voters are new under attack.`);
  return said;
}
function layers(kept, own, label, taken) {
  return own.voters.flatMap((voter, place) => {
    const found = kept.voters[place];
    const left = voter.near.map((_, i) => (found.left.includes(i) ? "left" : ""));
    return [
      element("h4", {}, "layer ", name(classifier().layers[place]), " ", element("span", {class: "quiet"}, name(voter.note))),
      votes(found, voter.k),
      element("div", {class: "strips"},
        strip("without attack", voter.near, label, taken, voter.bank, left),
        strip("attacked", found.near, label, taken, voter.bank, found.near.map((r) => (r[3] ? "new" : "")))),
    ].filter(Boolean);
  });
}

// --- the way: the lead at points of the straight line from the sample to its example

const BOX = {width: 320, height: 120, side: 40, top: 10, bottom: 26, right: 10};
function wayChart(leads) {
  const low = Math.min(0, ...leads);
  const high = Math.max(0, ...leads) > low ? Math.max(0, ...leads) : low + 1;
  const x = (i) => BOX.side + ((BOX.width - BOX.side - BOX.right) * i) / (leads.length - 1);
  const y = (v) => BOX.top + ((high - v) / (high - low)) * (BOX.height - BOX.top - BOX.bottom);
  const dot = (v, i) => (v >= 0 ? `M${x(i) - 3.2} ${y(v)}a3.2 3.2 0 1 0 6.4 0a3.2 3.2 0 1 0 -6.4 0z`
    : `M${x(i)} ${y(v) - 4}l4 7.2h-8z`);
  const word = (text, at, height, anchor) => drawing("text", {x: at, y: height, "text-anchor": anchor}, text);
  const ends = [low, high].filter((v) => Math.abs(y(v) - y(0)) > 12);
  const steps = leads.length - 1;
  const cursor = drawing("path", {class: "cursor", d: ""});
  const svg = drawing("svg", {class: "way", viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img",
    "aria-label": `lead of the true class in ${leads.length} steps: ${leads.map((v) => figure(v)).join(", ")}`},
    drawing("path", {class: "zero", d: `M${BOX.side} ${y(0)}H${BOX.width - BOX.right}`}), cursor,
    drawing("path", {class: "line", d: "M" + leads.map((v, i) => `${x(i)} ${y(v)}`).join("L")}),
    drawing("path", {class: "held", d: leads.map((v, i) => (v >= 0 ? dot(v, i) : "")).join("")}),
    drawing("path", {class: "lost", d: leads.map((v, i) => (v < 0 ? dot(v, i) : "")).join("")}),
    word("0", BOX.side - 8, y(0) + 4, "end"),
    ...ends.map((v) => word(signed(String(Number(v.toPrecision(2)))), BOX.side - 8, y(v) + 4, "end")),
    word("sample", BOX.side, BOX.height - 6, "start"), word("example", BOX.width - BOX.right, BOX.height - 6, "end"));
  const move = (step) => cursor.setAttribute("d", `M${x((step * steps) / 10)} ${BOX.top - 6}V${BOX.height - BOX.bottom + 4}`);
  return {svg, move};
}

function stepper(kept, own, number) {
  const way = kept.way;
  const on = picture(own.picture, `sample ${number} without attack`);
  const over = picture(kept.pictures[0], `sample ${number} attacked`);
  const chart = way ? wayChart(way[0]) : null;
  const slider = element("input", {type: "range", min: 0, max: 10, step: 1, id: "step", "aria-describedby": "step-said"});
  const said = element("p", {id: "step-said", role: "status", class: "said"});
  const drawn = Boolean(on && over && on.tagName === "IMG");
  const stack = drawn ? element("div", {class: "stack"}, on.cloneNode(), over.cloneNode()) : null;
  if (stack) {
    stack.setAttribute("role", "img");
    for (const image of stack.children) image.alt = "";
  }
  const update = () => {
    state.step = Number(slider.value);
    const share = `${10 * state.step} % of the way`;
    slider.setAttribute("aria-valuetext", share);
    if (stack) {
      stack.lastChild.style.opacity = String(state.step / 10);
      stack.setAttribute("aria-label", `the sample at ${share} to its example`);
    }
    const at = way ? Math.round((state.step * (way[0].length - 1)) / 10) : 0;
    said.replaceChildren(`${share}${way ? ": " : ""}`);
    if (way) {
      const lost = way[0][at] < 0;
      said.append(lost ? "▲ " : "● ", name(className(way[1][at])), `, lead ${figure(way[0][at])}`);
      chart.move(state.step);
    }
  };
  slider.value = String(state.step);
  slider.addEventListener("input", update);
  const jump = (text, to) => {
    const button = element("button", {type: "button"}, text);
    button.addEventListener("click", () => { slider.value = String(to); update(); });
    return button;
  };
  update();
  return element("div", {class: "stepper"},
    stack ? element("figure", {class: "mid"}, stack) : null,
    element("div", {class: "along"},
      element("label", {for: "step"}, "From the sample to its example"),
      element("div", {class: "slide"}, jump("without attack", 0), slider, jump("attacked", 10)), said),
    chart ? element("figure", {class: "chart-way"}, chart.svg, element("figcaption", {},
      "Lead of the true class in the hard decision on the straight line between the two; the attack itself need not have gone this way. Below zero (▲) another class leads.")) : null);
}
function pictures(kept, own, number, before, after) {
  const [amplified, scale] = kept.change;
  const image = picture(own.picture, `sample ${number} without attack`);
  if (!image) return null;
  const change = picture(kept.pictures[1], "the change, amplified");
  const plot = image.tagName !== "IMG";
  const framed = (drawn, ...words) => element("figure", {}, drawn, element("figcaption", {}, ...words));
  return element("div", {class: "trio"},
    framed(image, "without attack", element("br"), element("strong", {}, name(before))),
    framed(picture(kept.pictures[0], `sample ${number} attacked`), "attacked", element("br"),
      element("strong", {}, name(after))),
    change ? framed(change, `the change, amplified ${amplified} times`, element("br"),
      `${plot ? "bottom" : "black"} −${scale}, ${plot ? "top" : "white"} +${scale}`) : null);
}
function others(row) {
  const list = element("ul", {class: "others", "aria-label": "this sample under every attack at this eps"});
  for (const c of rivals()) {
    const here = c.attack === state.attack;
    const button = element("button", {type: "button", "aria-pressed": String(here)}, name(attackName(c.attack)));
    button.addEventListener("click", () => {
      choose({attack: c.attack});
      byId("one").querySelectorAll(".others button")[rivals().indexOf(c)].focus();
    });
    const fooled = c.outcome[row] === "f";
    list.append(element("li", {}, button, " ", OUTCOMES[c.outcome[row]], fooled ? ", as " : "",
      fooled ? name(className(c.decision[row])) : null));
  }
  return list;
}
function detail(order) {
  const {samples} = classifier();
  const row = state.open;
  byId("one").hidden = row === null;
  if (row === null) return;
  const here = cell();
  const [label, after, number] = [samples.label[row], here.decision[row], samples.id[row]];
  const outcome = OUTCOMES[here.outcome[row]];
  byId("one-h").replaceChildren(`Sample ${number}: `, name(className(label)),
    element("span", {class: "quiet"}, ` ${outcome}`, ...(after === label ? [] : [", taken for ", name(className(after))]),
      " under ", name(attackName(state.attack)), `, eps ${classifier().radii[state.eps]}`));
  const kept = here.shown[row];
  const own = classifier().shown[row];
  const inside = [others(row)];
  if (kept && own) {
    inside.push(pictures(kept, own, number, className(samples.decision[row]), className(after)),
      stepper(kept, own, number), ...layers(kept, own, label, after));
  } else {
    inside.push(element("p", {}, "Decision without attack: ", element("strong", {}, name(className(samples.decision[row]))),
      "; attacked: ", element("strong", {}, name(className(after))),
      `. Moved by L2 ${figure(here.l2[row])}, L∞ ${figure(here.linf[row])}.`),
    element("p", {class: "note"}, "The page holds no picture and no neighbors of this sample; those that have them are marked ▣."));
  }
  byId("one-body").replaceChildren(...inside.filter(Boolean));
  byId("one-before").disabled = order.indexOf(row) <= 0;
  byId("one-after").disabled = order.indexOf(row) < 0 || order.indexOf(row) + 1 >= order.length;
}

// ------------------------------------------------------------------------------------------------ start

function render() {
  const {samples} = classifier();
  if (state.open !== null && state.open >= samples.id.length) state.open = null;
  const shown = rows();
  choices();
  table(shown);
  detail(shown);
}
function listen(id, change) {
  byId(id).addEventListener("change", (event) => choose(change(event.target)));
}
listen("pick-classifier", (t) => {
  const held = state.open === null ? null : classifier().samples.id[state.open];
  const other = data.classifiers[Number(t.value)];
  const row = other.samples.id.indexOf(held);
  const same = other.attacks.findIndex((a) => a.name === attackName(state.attack));
  return {classifier: Number(t.value), attack: same < 0 ? other.start[0] : same, open: row < 0 ? null : row};
});
listen("pick-attack", (t) => ({attack: Number(t.value), winner: ""}));
listen("pick-eps", (t) => ({eps: Number(t.value)}));
listen("pick-class", (t) => ({label: t.value}));
listen("pick-outcome", (t) => ({outcome: t.value}));
listen("pick-winner", (t) => ({winner: t.value}));
listen("pick-kept", (t) => ({kept: t.checked}));
const turn = (by) => () => { state.page += by; render(); };
byId("page-before").addEventListener("click", turn(-1));
byId("page-after").addEventListener("click", turn(1));
byId("one-before").addEventListener("click", () => neighbor(-1));
byId("one-after").addEventListener("click", () => neighbor(1));
byId("one-close").addEventListener("click", () => {
  const row = state.open;
  state.open = null;
  render();
  const place = rows().indexOf(row) - state.page * PER_PAGE;
  byId("samples-table").querySelectorAll("tbody button")[Math.max(place, 0)]?.focus();
});
[state.attack, state.eps] = classifier().start;
const first = rows().find((row) => cell().shown[row] && cell().outcome[row] === "f");
byId("explorer").hidden = false;
state.open = first ?? null;
render();
})();
