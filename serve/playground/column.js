// One answer on the page: its guides, its tokens, how it is coming along, and what went wrong.

import { Answer } from "./answer.js";
import { asCurl, fetchReward, streamChat } from "./api.js";
import { diffWords } from "./diff.js";
import { copyOf, make } from "./dom.js";
import { GuidePicker, titleOf } from "./guides.js";
import { requestBody } from "./settings.js";
import { TokenView } from "./tokens.js";

const TICK_MS = 100;
const QUIET_S = 0.5; // without a token for so long, the page says that it waits
const MOST_RETRIES = 5;

/**
 * Events of its element, which bubble: "removed", "begun", "ended", "reply" and "copy" (detail: the
 * text), "problem" (detail: the error), "said" (detail: words for who cannot see it).
 */
export class Column {
  #part;
  #view;
  #picker;
  #answer = null;
  #abort = null;
  #newsAt = 0;
  #waitingFor = "";
  #due = 0;

  /** `models` as of `fetchModels`; `settings` gives those of the page at that moment. */
  constructor({ base, guides }, settings, popover, { isBase }) {
    this.element = copyOf("column");
    this.#part = (selector) => this.element.querySelector(selector);
    this.#view = new TokenView(this.#part(".answer"), popover);
    const choices = isBase ? [] : guides;
    this.#picker = new GuidePicker(this.#part(".guides"), choices, () => this.#name());
    if (!choices.length) {
      const words = isBase ? "The frozen model alone, from the same seed." : "There are no guides.";
      this.#part(".guides").append(make("p", "quiet", words));
    }
    this.#part("header .remove").hidden = isBase;
    this.#part("header .remove").addEventListener("click", () => this.#tell("removed"));
    for (const button of this.element.querySelectorAll("[data-view]")) {
      button.addEventListener("click", () => this.#show(button.dataset.view));
    }
    const actions = {
      resume: () => this.resume(settings().scorer),
      reply: () => this.#tell("reply", this.#answer.text),
      copy: () => this.#tell("copy", this.#answer.text),
      curl: () => this.#tell("copy", asCurl(requestBody(base.id, settings(), this.guides))),
    };
    for (const [name, act] of Object.entries(actions)) {
      this.#part(`[data-do=${name}]`).addEventListener("click", act);
    }
    this.#name();
  }

  get guides() {
    return this.#picker.read();
  }

  get running() {
    return this.#abort !== null;
  }

  /** Choose guides, and return the names of those that this server does not have. */
  choose(guides) {
    const missing = this.#picker.write(guides);
    this.#name();
    return missing;
  }

  invalid() {
    return this.#picker.invalid();
  }

  /** Ask for an answer and show it as it comes. */
  async run(body, scorer) {
    this.stop();
    this.#view.clear();
    this.#answer = new Answer(body, { revised: this.#picker.revises });
    this.#part(".views").hidden = true;
    this.#part(".revision").replaceChildren();
    this.#show(this.#answer.revised ? "revision" : "draft");
    await this.#follow(body, scorer);
  }

  /** Go on with an answer that was stopped, or that broke off. */
  async resume(scorer) {
    const body = this.#answer.resumed();
    this.#answer.restart();
    await this.#follow(body, scorer);
  }

  stop() {
    this.#abort?.abort();
  }

  async #follow(body, scorer) {
    const abort = (this.#abort = new AbortController());
    const answer = this.#answer;
    this.#problem(null);
    this.#part("[data-do=resume]").hidden = true;
    this.#part("[data-do=reply]").disabled = this.#part("[data-do=copy]").disabled = true;
    this.element.ariaBusy = "true";
    this.#tell("begun");
    const ticking = setInterval(() => this.#tick(answer), TICK_MS);
    try {
      await this.#stream(answer, body, abort.signal);
      const count = answer.tokens.length;
      this.#tell("said", `${this.#title()} finished, ${count} tokens: ${answer.text}`);
    } catch (error) {
      if (error.name !== "AbortError") this.#problem(error);
    } finally {
      clearInterval(ticking);
      // Another run may have begun while this one was stopped.
      if (this.#abort === abort) this.#finish(answer);
    }
    if (answer.finish && scorer) await this.#score(answer, scorer);
  }

  #finish(answer) {
    this.#abort = null;
    this.element.ariaBusy = "false";
    this.#view.push([], answer.draft ?? "", true);
    this.#part(".waiting").hidden = true;
    this.#part("[data-do=resume]").hidden = !answer.resumable;
    this.#part("[data-do=reply]").disabled = this.#part("[data-do=copy]").disabled = !answer.text;
    this.#stats(answer);
    this.#tell("ended");
    if (answer.draft === null) return;
    this.#part(".views").hidden = false;
    const pieces = diffWords(answer.draft, answer.text);
    this.#part(".revision").replaceChildren(...pieces.map(asEdit));
  }

  /** One stream, asked for again while the server is full. */
  async #stream(answer, body, signal) {
    for (let tries = 1; ; tries++) {
      this.#wait(answer.revised ? "waiting for a draft and its revision" : "waiting for a token");
      try {
        for await (const event of streamChat(body, signal)) this.#add(answer, event);
        return;
      } catch (error) {
        if (error.status !== 429 || tries > MOST_RETRIES) throw error;
        const seconds = error.retryAfter ?? 1;
        this.#wait("the server is full; trying again", seconds);
        await pause(1000 * seconds, signal);
      }
    }
  }

  #add(answer, event) {
    const { tokens, text } = answer.add(event);
    if (!tokens.length && !text) return;
    if (answer.revised) {
      this.#view.push(tokens, "");
      this.#part(".revision").append(text);
    } else this.#view.push(tokens, text);
    this.#newsAt = performance.now();
    this.#waitingFor = "waiting for more";
    this.#part(".waiting").hidden = true;
  }

  async #score(answer, scorer) {
    const { model, messages } = answer.body;
    try {
      const reward = await fetchReward(model, messages, answer.text, scorer);
      answer.reward = `${reward.toFixed(2)} by ${scorer}`;
    } catch (error) {
      answer.reward = `none: ${error.message}`;
    }
    if (answer === this.#answer) this.#stats(answer);
  }

  /** Say at once what is waited for; where it is known how long, the seconds run down. */
  #wait(reason, seconds = 0) {
    this.#waitingFor = reason;
    this.#newsAt = performance.now();
    this.#due = seconds;
    this.#part(".waiting").hidden = false;
    this.#tick(this.#answer);
  }

  #tick(answer) {
    const silent = (performance.now() - this.#newsAt) / 1000;
    if (silent > QUIET_S) this.#part(".waiting").hidden = false;
    const clock = this.#due ? `in ${Math.ceil(this.#due - silent)} s` : `· ${silent.toFixed(1)} s`;
    this.#part(".why").textContent = `${this.#waitingFor} ${clock}`;
    this.#stats(answer);
  }

  #stats(answer) {
    const rows = answer.stats();
    this.#part(".stats").replaceChildren(
      ...rows.map(([name, value]) => make("div", "", make("dt", "", name), make("dd", "", value))),
    );
  }

  #problem(error) {
    const box = this.#part(".problem");
    box.hidden = error === null;
    box.replaceChildren();
    if (error === null) return;
    if (error.status) box.append(make("b", "", `${error.status} `));
    box.append(error.message);
    this.#tell("problem", error);
  }

  /** Show the tokens, which are those of the draft if there is one, or the revision of it. */
  #show(view) {
    this.#part(".answer").hidden = view !== "draft";
    this.#part(".revision").hidden = view === "draft";
    this.#part(".revision").dataset.view = view;
    for (const button of this.element.querySelectorAll("[data-view]")) {
      button.ariaPressed = String(button.dataset.view === view);
    }
  }

  #title() {
    return titleOf(this.guides);
  }

  #name() {
    this.#part("h2").textContent = this.#title();
    this.element.ariaLabel = `Answer of ${this.#title()}`;
    this.#part(".answer").ariaLabel = `Tokens of the answer of ${this.#title()}`;
  }

  #tell(name, detail) {
    this.element.dispatchEvent(new CustomEvent(name, { bubbles: true, detail }));
  }
}

function asEdit([kind, words]) {
  return make({ same: "span", gone: "del", new: "ins" }[kind], "", words);
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const stop = () => {
      clearTimeout(timer);
      reject(signal.reason);
    };
    const timer = setTimeout(() => {
      signal.removeEventListener("abort", stop);
      resolve();
    }, ms);
    signal.addEventListener("abort", stop, { once: true });
  });
}
