// One answer as it grows: its text, its tokens, and what can be said about them in numbers.

export class Answer {
  text = "";
  tokens = [];
  finish = null;
  draft = null; // what was rewritten; then the tokens are its own
  guides = []; // as the server used them, with their versions
  reward = null;
  #sent = performance.now();
  #first = null;
  #last = null;
  #before = 0; // tokens of earlier streams, behind which this one goes on

  /** `revised` says whether a guide rewrites it: then its text has no tokens. */
  constructor(body, { revised }) {
    this.body = body;
    this.revised = revised;
  }

  /** Whether the server can go on with it. */
  get resumable() {
    return this.tokens.length > 0 && !this.revised && !this.finish;
  }

  /** Take one event of the stream, and return the tokens and the text that came with it. */
  add(event) {
    const [choice] = event.choices;
    if (event.guides) this.guides = event.guides;
    if (!choice) return { tokens: [], text: "" };
    const tokens = choice.steering ?? [];
    const text = choice.delta.content ?? "";
    if (tokens.length || text) {
      this.#last = performance.now();
      this.#first ??= this.#last;
    }
    this.text += text;
    this.tokens.push(...tokens);
    this.finish = choice.finish_reason ?? this.finish;
    this.draft = choice.draft_text ?? this.draft;
    return { tokens, text };
  }

  /** The body of a request that goes on behind the tokens so far: the same text as unbroken. */
  resumed() {
    return { ...this.body, completed_token_ids: this.tokens.map((token) => token.token_id) };
  }

  /** Start the clocks again, for an answer that is gone on with. */
  restart() {
    this.finish = null;
    this.#sent = performance.now();
    this.#first = this.#last = null;
    this.#before = this.tokens.length;
  }

  /** [name, value] of what is known at this moment. */
  stats() {
    const count = this.tokens.length;
    if (count === 0) return [];
    const rows = [["tokens", this.finish === "length" ? `${count}, cut there` : `${count}`]];
    if (this.draft !== null) rows[0][0] = "tokens of the draft";
    const seconds = (this.#last - this.#first) / 1000;
    if (seconds > 0 && this.draft === null) {
      rows.push(["tokens/s", ((count - this.#before - 1) / seconds).toFixed(1)]);
    }
    const waited = (this.#first - this.#sent) / 1000;
    if (this.#first) rows.push(["first text", `${waited.toFixed(2)} s`]);
    const sum = this.tokens.reduce((total, token) => total + token.kl, 0);
    rows.push(["mean KL", `${(sum / count).toFixed(3)} nats`]);
    const drafted = this.tokens.filter((token) => token.drafted).length;
    if (drafted) rows.push(["drafted", `${Math.round((100 * drafted) / count)}%`]);
    for (const guide of this.guides) rows.push([guide.name, this.#inWords(guide)]);
    if (this.reward !== null) rows.push(["reward", this.reward]);
    return rows;
  }

  #inWords({ name, weight, version, accept_rate: accepted, gave_up_at: gaveUp }) {
    const weighted = this.body.guides.some((asked) => asked.name === name && "weight" in asked);
    const parts = [`version ${version}`];
    if (weighted) parts.unshift(`× ${weight}`);
    if (typeof accepted === "number") parts.push(`accepts ${Math.round(100 * accepted)}%`);
    if (typeof gaveUp === "number") parts.push(`did not answer: unguided from token ${gaveUp + 1}`);
    return parts.join(", ");
  }
}
