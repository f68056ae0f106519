// From numbers to colours: how far a guide moved a token, in steps that have names.

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
  return `${times < 1e4 ? short(times) : "over 10000"} times ${nats > 0 ? "likelier" : "less likely"} than under the base`;
}

export function percent(probability) {
  const value = 100 * probability;
  if (value > 0 && value < 0.01) return "<0.01%";
  return `${value >= 10 ? value.toFixed(0) : value >= 0.995 ? value.toFixed(1) : value.toFixed(2)}%`;
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
      const swatch = document.createElement("span");
      swatch.className = "t";
      swatch.dataset[colour] = level;
      swatch.textContent = name(level);
      return swatch;
    }),
  );
  element.ariaLabel =
    colour === "kl"
      ? `Colours: KL in nats, in steps of ${words.join(", ")}`
      : `Colours: how many times less or more likely than under the base, in steps of ${words.join(", ")}`;
}

function steps(value, edges) {
  return edges.filter((edge) => value >= edge).length;
}

function short(number) {
  return String(Number(number.toPrecision(2)));
}
