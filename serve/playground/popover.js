// What is known about one token, beside it: the laws of base and guides, and who moved it.

import { make } from "./dom.js";
import { inWords, moved, percent } from "./scale.js";

const SEEN_KL = 0.0005; // nats; below it the numbers shown are 0
const LEAVE_MS = 150; // so that the pointer can reach the popover itself

// Notes that guides leave with a token, by name, in sentences.
const STORIES = {
  expected_rejects: (guide, count) =>
    `${guide} keeps ${percent(1 / (1 + count))} of what is proposed here. Proposals turned down ` +
    `first, on average: ${count.toFixed(1)}.`,
  ess: (guide, count) =>
    `${guide} valued the candidates with as much as ${count.toFixed(1)} rollouts each.`,
  gate_open: (guide, open) =>
    `${guide} was ${open ? "let in: the base was unsure" : "kept out: the base was sure"}.`,
};

export class Popover {
  #element;
  #leaving = 0;
  #anchor = null;

  constructor(element) {
    this.#element = element;
    element.addEventListener("pointerenter", () => clearTimeout(this.#leaving));
    element.addEventListener("pointerleave", () => this.leave());
    addEventListener("resize", () => this.hide());
  }

  get shown() {
    return !this.#element.hidden;
  }

  show(anchor, token, at) {
    clearTimeout(this.#leaving);
    this.#release();
    this.#anchor = anchor;
    anchor.classList.add("shown");
    anchor.setAttribute("aria-describedby", this.#element.id);
    this.#element.replaceChildren(...describe(token, at));
    this.#element.hidden = false;
    this.#place(anchor);
  }

  /** The pointer has left; a token that has the focus keeps its popover. */
  leave() {
    clearTimeout(this.#leaving);
    if (this.#anchor === document.activeElement) return;
    this.#leaving = setTimeout(() => this.hide(), LEAVE_MS);
  }

  hide() {
    clearTimeout(this.#leaving);
    this.#release();
    this.#element.hidden = true;
  }

  #release() {
    this.#anchor?.classList.remove("shown");
    this.#anchor?.removeAttribute("aria-describedby");
    this.#anchor = null;
  }

  /** Below the token, or above it where there is no room; within its column as far as it fits. */
  #place(anchor) {
    const token = anchor.getClientRects()[0] ?? anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.#element;
    const column = anchor.closest(".column").getBoundingClientRect();
    const room = Math.min(column.right, document.documentElement.clientWidth) - width - 8;
    const above = token.bottom + height + 8 > innerHeight && token.top > height + 8;
    this.#element.style.left = `${scrollX + Math.max(8, Math.min(token.left, room))}px`;
    this.#element.style.top = `${scrollY + (above ? token.top - height - 6 : token.bottom + 6)}px`;
  }
}

function describe(token, at) {
  const place = make("span", "quiet", ` token ${at + 1}, id ${token.token_id}`);
  const title = make("p", "title", make("b", "", `“${visible(token.token)}”`), place);
  const facts = make("p", "", `${capital(inWords(moved(token)))}.`);
  if (token.kl >= SEEN_KL) facts.append(` Moved most by `, make("b", "", token.moved_by), ".");
  facts.append(` KL of this step: ${token.kl.toFixed(3)} nats.`);
  if (token.drafted) facts.append(" Drafted by a guide, and kept.");
  return [title, facts, alternatives(token), ...stories(token.notes)];
}

/** A row of two bars for each alternative, and for the token itself. */
function alternatives(token) {
  const rows = [...token.top];
  if (!rows.some((other) => other.token_id === token.token_id)) rows.push(token);
  const heads = ["token", "base", "", "guided"].map((name) => make("th", "", name));
  const table = make("table", "", make("tr", "", ...heads));
  for (const other of rows) {
    const [base, guided] = [Math.exp(other.base_logprob), Math.exp(other.logprob)];
    const row = make("tr", other.token_id === token.token_id ? "chosen" : "");
    row.append(
      make("th", "", visible(other.token)),
      make("td", "number", percent(base)),
      make("td", "bars", bar("base", base), bar("guided", guided)),
      make("td", "number", percent(guided)),
    );
    table.append(row);
  }
  return table;
}

function bar(kind, share) {
  const element = make("span", `bar ${kind}`);
  element.style.setProperty("--share", share);
  return element;
}

function stories(notes = {}) {
  return Object.entries(notes).map(([name, value]) => {
    const dot = name.lastIndexOf(".");
    const story = STORIES[name.slice(dot + 1)];
    return make("p", "story", story ? story(name.slice(0, dot), value) : `${name}: ${value}`);
  });
}

function visible(text) {
  const shown = text.replaceAll("\n", "↵").replaceAll("\t", "⇥");
  return shown.replace(/^ +| +$/g, (blanks) => "␣".repeat(blanks.length));
}

function capital(text) {
  return text[0].toUpperCase() + text.slice(1);
}
