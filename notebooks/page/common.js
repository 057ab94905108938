"use strict";
// What all pictures share. Each picture is a section with a script of its own, after this one.
const data = JSON.parse(document.getElementById("data").textContent);
const $ = selector => document.querySelector(selector);
const sum = values => values.reduce((a, b) => a + b, 0);
const range = n => Array.from({ length: n }, (_, i) => i);
const clamp = (x, low, high) => Math.min(high, Math.max(low, x));
const visible = text => text.replaceAll("\n", "⏎").replaceAll(" ", "·");
const label = text => /^ {2,}$/.test(text) ? `${text.length} spaces` : visible(text);
const short = (text, most = 12) => text.length > most ? text.slice(0, most - 1) + "…" : text;
const kindOf = name => name.split(" ")[0];  // "attn" or "ffn" of a slot's name

function add(parent, tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  parent.append(element);
  return element;
}

function softmax(z) {
  const top = Math.max(...z), e = z.map(x => Math.exp(x - top)), total = sum(e);
  return e.map(x => x / total);
}

// Shares (they add up to 1) as percentages with one decimal that add up to 100.0: by largest remainder.
function percentages(shares) {
  const exact = shares.map(x => 1000 * x), whole = exact.map(Math.floor);
  const order = range(shares.length).sort((a, b) => (exact[b] - whole[b]) - (exact[a] - whole[a]));
  for (const i of order.slice(0, Math.round(1000 - sum(whole)))) whole[i]++;
  return whole.map(x => (x / 10).toFixed(1) + "%");
}
const percent = p => (100 * p).toFixed(p < 0.0995 ? 1 : 0) + "%";

// One of several: a radio group. Tab reaches the chosen one, and arrows, while it has the focus, choose another.
function choice(buttons, label, pick, columns = 1) {
  const parent = buttons[0].parentElement;
  parent.setAttribute("role", "radiogroup");
  parent.ariaLabel = label;
  const choose = chosen => buttons.forEach((button, i) => {
    button.ariaChecked = i === chosen;
    button.tabIndex = i === chosen ? 0 : -1;
  });
  buttons.forEach((button, i) => {
    button.setAttribute("role", "radio");
    button.addEventListener("click", () => pick(i));
    button.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      const to = event.key === "Home" ? 0 : event.key === "End" ? buttons.length - 1 : i + step;
      if (event.key === " " || event.key === "Enter") event.preventDefault(), pick(i);
      if (Number.isNaN(to)) return;
      event.preventDefault();
      if (!buttons[to]) return;
      pick(to);
      buttons[to].focus();
    });
  });
  choose(0);
  return choose;
}

// Bars that one can drag: each sets a number. Tab reaches one of them; arrows up and down, while it has the focus, change
// the number, left and right go to its neighbours.
function grabbable(bars, { get, set, low, high, pixels, begin = () => {} }) {
  bars.forEach((bar, i) => {
    const to = x => set(i, clamp(x, low, high));
    let start;  // where it was grabbed, and what the number was
    bar.classList.add("grab");
    bar.setAttribute("role", "slider");
    bar.tabIndex = i ? -1 : 0;
    Object.assign(bar, { ariaOrientation: "vertical", ariaValueMin: low, ariaValueMax: high });
    bar.addEventListener("focus", () => bars.forEach(other => other.tabIndex = other === bar ? 0 : -1));
    bar.addEventListener("keydown", event => {
      const by = { ArrowUp: 0.25, ArrowDown: -0.25 }[event.key], step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by && !step) return;
      event.preventDefault();
      if (by) begin(), to(get(i) + by);
      else bars[i + step]?.focus();
    });
    bar.addEventListener("pointerdown", event => {
      begin();
      bar.setPointerCapture(event.pointerId);
      start = { y: event.clientY, x: get(i) };
    });
    bar.addEventListener("pointermove", event =>
      start && bar.hasPointerCapture(event.pointerId) && to(start.x + (start.y - event.clientY) / pixels()));
  });
}

// A text as tokens to choose from; spans, as no line can break inside a <button>. -> their elements, and `choose`
function tokenText(parent, tokens, label, pick) {
  const spans = tokens.map(text => {
    const span = add(parent, "span", { className: text === "<end>" ? "special" : "" });
    for (const part of text.split(/(\n)/)) {  // a line break is drawn, and then breaks the line
      if (part === "\n") add(span, "span", { className: "mark", textContent: "⏎" });
      span.append(part);
    }
    return span;
  });
  return [spans, choice(spans, label, pick)];
}

// Numbers as explore.py packed them.
async function unpack(text, Type) {
  const bytes = Uint8Array.from(atob(text), c => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Type(await new Response(stream).arrayBuffer());
}

// Whatever has data-tip shows it to a mouse above it, or for a moment to a finger that touches it. The tip stays above the
// picture that it belongs to, if it is no wider.
let tipTimer;
for (const type of ["pointermove", "pointerdown"]) document.addEventListener(type, event => {
  const tip = $("#tip"), target = event.target.closest("[data-tip]");
  clearTimeout(tipTimer);
  tip.hidden = !target;
  if (!target) return;
  tip.textContent = target.dataset.tip;
  const box = target.parentElement.getBoundingClientRect(), width = tip.offsetWidth;
  const right = Math.min(box.right, innerWidth - 12) - width;
  tip.style.left = clamp(event.clientX + 14, 12, Math.max(12, box.left, right)) + "px";
  tip.style.top = Math.max(4, event.clientY - tip.offsetHeight - 12) + "px";
  if (event.pointerType === "touch") tipTimer = setTimeout(() => tip.hidden = true, 1500);
});
addEventListener("scroll", () => $("#tip").hidden = true);
