// What a run of the page is made of: as a value, as a link, and as the body of a request.

/**
 * Settings: { messages, temperature, max_tokens, seed, draft, scorer, colour, columns }.
 * `draft` and `scorer` name a guide, or nobody: "".
 * A column is the guides of one answer, {name: weight}; the weight of one that takes none is null.
 * The first column is the base, {}.
 */
export const DEFAULTS = {
  messages: [{ role: "user", content: "" }],
  temperature: 1,
  max_tokens: 128,
  seed: 1,
  draft: "",
  scorer: "",
  colour: "ratio",
  columns: null,
};

const NUM_ALTERNATIVES = 5;
const ROLES = ["user", "assistant", "system"];

/** Return the body that asks for the answer of one column. */
export function requestBody(model, settings, guides) {
  return {
    model,
    messages: settings.messages,
    temperature: settings.temperature,
    max_tokens: settings.max_tokens,
    seed: settings.seed,
    guides: Object.entries(guides).map(([name, weight]) =>
      weight === null ? { name } : { name, weight },
    ),
    ...(settings.draft in guides ? { draft: settings.draft } : {}),
    stream: true,
    return_steering: true,
    top_logprobs: NUM_ALTERNATIVES,
  };
}

/** Return the settings as the fragment of a link. */
export function toFragment(settings) {
  const bytes = new TextEncoder().encode(JSON.stringify(settings));
  const text = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

/** Return the settings of a link; throws where it is damaged. Anybody may have written it. */
export function fromFragment(fragment) {
  let read;
  try {
    const text = atob(fragment.replaceAll("-", "+").replaceAll("_", "/"));
    const bytes = Uint8Array.from(text, (letter) => letter.charCodeAt(0));
    read = { ...DEFAULTS, ...JSON.parse(new TextDecoder().decode(bytes)) };
  } catch {
    throw new Error("The link is damaged: its settings cannot be read.");
  }
  const valid =
    Array.isArray(read.messages) &&
    read.messages.length > 0 &&
    read.messages.every((m) => ROLES.includes(m?.role) && typeof m.content === "string") &&
    [read.temperature, read.max_tokens, read.seed].every(Number.isFinite) &&
    [read.draft, read.scorer].every((name) => typeof name === "string") &&
    ["ratio", "kl"].includes(read.colour) &&
    (read.columns === null || (Array.isArray(read.columns) && read.columns.every(isColumn)));
  if (!valid) throw new Error("The link is damaged: its settings make no sense.");
  return read;
}

function isColumn(guides) {
  return (
    guides !== null &&
    typeof guides === "object" &&
    Object.values(guides).every((weight) => weight === null || Number.isFinite(weight))
  );
}
