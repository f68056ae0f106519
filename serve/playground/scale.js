// From numbers to colours: how far a guide moved a token, in steps that have names.

import { make } from "./dom.js";

// In nats. e^0.1 is a tenth more likely, e^3 is twenty times.
const RATIO_STEPS = [0.1, 0.5, 1.5, 3];
const KL_STEPS = [0.01, 0.1, 0.5, 1.5];

/** Return by how many nats guides made this token likelier than it was under the base. */
export function moved(token) {
  return token.logprob - token.base_logprob;
}

/** Return -4 to 4: far less likely than under the base, to far more. */
export function ratioLevel(token) {
  return Math.sign(moved(token)) * steps(Math.abs(moved(token)), RATIO_STEPS);
}

/** Return 0 to 4: the guided law is the base's, to far from it. */
export function klLevel(token) {
  return steps(token.kl, KL_STEPS);
}

/** Return a ratio of probabilities in words: "4.5 times likelier than under the base". */
export function inWords(nats) {
  if (Math.abs(nats) < 0.005) return "as likely as under the base";
  const times = Math.exp(Math.abs(nats));
  const count = times < 1e4 ? short(times) : "over 10000";
  return `${count} times ${nats > 0 ? "likelier" : "less likely"} than under the base`;
}

export function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.01) return "<0.01%";
  return `${value.toFixed(value >= 10 ? 0 : value >= 0.995 ? 1 : 2)}%`;
}

/** Fill the legend with one swatch per step of the chosen scale. */
export function drawLegend(element, colour) {
  const edges = colour === "kl" ? KL_STEPS : RATIO_STEPS.map((nats) => Math.exp(nats));
  const words = edges.map(short);
  const levels = colour === "kl" ? [0, 1, 2, 3, 4] : [-4, -3, -2, -1, 0, 1, 2, 3, 4];
  const name = (level) => {
    if (level === 0) return colour === "kl" ? "0" : "same";
    return `${colour === "kl" ? "≥ " : level < 0 ? "÷ " : "× "}${words[Math.abs(level) - 1]}`;
  };
  element.replaceChildren(
    ...levels.map((level) => {
      const swatch = make("span", "t", name(level));
      swatch.dataset[colour] = level;
      return swatch;
    }),
  );
  const meaning =
    colour === "kl" ? "KL in nats" : "how many times less or more likely than under the base";
  element.ariaLabel = `Colours: ${meaning}, in steps of ${words.join(", ")}`;
}

function steps(value, edges) {
  return edges.filter((edge) => value >= edge).length;
}

function short(number) {
  return String(Number(number.toPrecision(2)));
}
