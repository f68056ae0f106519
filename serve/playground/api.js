// The HTTP API, as the page uses it. Knows no element of the page.

/** What the server says instead of an answer. `param` names the field that is wrong; `status` is
 * null for an error in the middle of a stream. */
export class ApiError extends Error {
  constructor(status, error, retryAfter = null) {
    super(error?.message ?? `The server answered with status ${status}.`);
    this.status = status;
    this.param = error?.param ?? null;
    this.retryAfter = retryAfter;
  }
}

/** The server cannot be reached, or the connection to it broke. */
export class NetworkError extends Error {}

// In memory alone: never stored, never part of an address.
let key = "";

export function setKey(value) {
  key = value.trim();
}

/** The cards of `GET /v1/models`: that of the base, and those of its guides with their names. */
export async function fetchModels() {
  const { data } = await (await call("v1/models")).json();
  const base = data.find((card) => !card.parent);
  const guides = data
    .filter((card) => card.parent === base.id)
    .map((card) => ({ name: card.id.slice(base.id.length + 1), ...card.guide }));
  return { base, guides };
}

/** Yield the events of one streamed answer. */
export async function* streamChat(body, signal) {
  const response = await call("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  try {
    let rest = "";
    for (;;) {
      const { done, value } = await broken(reader.read());
      if (done) throw new NetworkError("The stream ended before the answer did.");
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      for (const block of blocks) {
        if (!block.startsWith("data: ")) continue; // a comment, which keeps the connection open
        if (block === "data: [DONE]") return;
        const event = JSON.parse(block.slice(6));
        if (event.error) throw new ApiError(null, event.error);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** Return the reward that one guide's scorer gives a finished answer. */
export async function fetchReward(model, messages, response, scorer) {
  const body = { model, messages, response, guides: [{ name: scorer }] };
  const { data } = await (await call("v1/score", body)).json();
  const [{ reward }] = data;
  if (reward === null) throw new ApiError(null, { message: `${scorer} judges no answers.` });
  return reward;
}

/** Return a command that asks for the same in a shell. The key stays out of it. */
export function asCurl(body) {
  const quoted = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  const lines = [
    `curl -N ${new URL("v1/chat/completions", document.baseURI)}`,
    "-H 'Content-Type: application/json'",
    ...(key ? ['-H "Authorization: Bearer $API_KEY"'] : []),
    `-d '${quoted}'`,
  ];
  return lines.join(" \\\n  ");
}

async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  const response = await broken(
    fetch(path, { method, headers, body: body && JSON.stringify(body), signal, cache: "no-store" }),
  );
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const retryAfter = Number(response.headers.get("Retry-After")) || null;
  throw new ApiError(response.status, answer?.error, retryAfter);
}

async function broken(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new NetworkError("The connection to the server broke.");
  }
}
