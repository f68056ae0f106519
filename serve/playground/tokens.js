// The tokens of one answer: drawn as they come, coloured, and walked with the keyboard.

import { make } from "./dom.js";
import { klLevel, ratioLevel } from "./scale.js";

const BROKEN = "\ufffd"; // what a token shows that holds only part of a character

/** Splits text among tokens: the text is right, the tokens' own strings are nearly so. */
class Cutter {
  #tokens = [];
  #text = "";

  /** Add what came, and return [token, its part of the text] for all that is decided. */
  push(tokens, text, ended) {
    this.#tokens.push(...tokens);
    this.#text += text;
    const cut = [];
    for (let found = this.#next(ended); found; found = this.#next(ended)) {
      const [count, size] = found;
      const part = this.#text.slice(0, size);
      const taken = this.#tokens.splice(0, count);
      this.#text = this.#text.slice(size);
      // A character in several tokens is complete, and shown, at the last of them.
      taken.forEach((token, at) => cut.push([token, at === count - 1 ? part : ""]));
    }
    return cut;
  }

  /** How many tokens come next, and how much of the text is theirs together. */
  #next(ended) {
    if (this.#tokens.length === 0) return null;
    const [first, ...others] = this.#tokens;
    const size = this.#reach(first);
    if (size !== null) return [1, size];
    for (const [at, token] of others.entries()) {
      const name = token.token.trim();
      const start = name && !name.includes(BROKEN) ? this.#text.indexOf(name) : -1;
      if (start >= 0) return [at + 1, this.#text.slice(0, start).trimEnd().length];
    }
    return ended ? [1, this.#text.length] : null;
  }

  /** The length of the text up to the end of a token that is next in it, or null. */
  #reach({ token }) {
    if (token && this.#text.startsWith(token)) return token.length;
    // Where the tokenizer puts blanks between tokens, they are not the token's own.
    const name = token.trim();
    const blanks = this.#text.length - this.#text.trimStart().length;
    return name && this.#text.startsWith(name, blanks) ? blanks + name.length : null;
  }
}

export class TokenView {
  #element;
  #popover;
  #cutter = new Cutter();
  #tokens = [];
  #queue = [];
  #frame = 0;

  constructor(element, popover) {
    this.#element = element;
    this.#popover = popover;
    const showing = (event) => {
      const span = event.target.closest(".t");
      if (span) popover.show(span, this.#tokens[span.dataset.at], Number(span.dataset.at));
    };
    element.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse") showing(event);
    });
    element.addEventListener("pointerleave", () => popover.leave());
    element.addEventListener("focusin", showing);
    element.addEventListener("focusout", () => popover.hide());
    element.addEventListener("click", (event) => this.#focus(event.target.closest(".t")));
    element.addEventListener("keydown", (event) => this.#walk(event));
  }

  clear() {
    this.#popover.hide();
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.#cutter = new Cutter();
    this.#tokens = [];
    this.#queue = [];
    this.#element.replaceChildren();
  }

  /** Add tokens and text that came together; once per frame they are drawn. */
  push(tokens, text, ended = false) {
    this.#queue.push(...this.#cutter.push(tokens, text, ended));
    if (this.#queue.length && !this.#frame) {
      this.#frame = requestAnimationFrame(() => this.#draw());
    }
  }

  #draw() {
    this.#frame = 0;
    const batch = document.createDocumentFragment();
    for (const [token, text] of this.#queue) {
      batch.append(span(token, text, this.#tokens.length));
      this.#tokens.push(token);
    }
    this.#queue = [];
    const first = this.#element.childElementCount === 0;
    this.#element.append(batch);
    if (first) this.#element.firstElementChild.tabIndex = 0;
  }

  #focus(span) {
    if (!span) return;
    const before = this.#element.querySelector("[tabindex='0']");
    if (before) before.tabIndex = -1;
    span.tabIndex = 0;
    span.focus();
  }

  #walk(event) {
    const at = Number(event.target.dataset.at);
    const last = this.#element.childElementCount - 1;
    const next = {
      ArrowRight: () => Math.min(at + 1, last),
      ArrowLeft: () => Math.max(at - 1, 0),
      ArrowDown: () => this.#moved(at, +1),
      ArrowUp: () => this.#moved(at, -1),
      Home: () => 0,
      End: () => last,
    }[event.key];
    if (!next || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#focus(this.#element.children[next()]);
  }

  /** The next token in a direction that a guide moved for everyone to see, or where we are. */
  #moved(from, direction) {
    for (let at = from + direction; this.#tokens[at]; at += direction) {
      if (Math.abs(ratioLevel(this.#tokens[at])) >= 2) return at;
    }
    return from;
  }
}

function span(token, text, at) {
  const element = make("span", "t", text);
  element.setAttribute("role", "option");
  element.tabIndex = -1;
  element.dataset.at = at;
  element.dataset.ratio = ratioLevel(token);
  element.dataset.kl = klLevel(token);
  if (!text) {
    // An end token, or the first parts of a character.
    const partial = !token.token || token.token.includes(BROKEN);
    element.classList.add("silent");
    element.textContent = partial ? "·" : token.token;
  }
  return element;
}
