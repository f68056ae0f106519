// The page: reads the conversation and the settings, and sends them once per column.

import { fetchModels, setKey } from "./api.js";
import { Column } from "./column.js";
import { copyOf, make } from "./dom.js";
import { couple } from "./guides.js";
import { Popover } from "./popover.js";
import { drawLegend } from "./scale.js";
import { DEFAULTS, fromFragment, requestBody, toFragment } from "./settings.js";

const MOST_COLUMNS = 4;
const TOAST_MS = 2500;
const DRAFTING = ["genarm"]; // kinds with an LM that can draft
const REWARDING = ["best_of_n", "blockwise", "args", "controlled_decoding"]; // with a scorer

const $ = (id) => document.getElementById(id);
const popover = new Popover($("popover"));
let models = null;
let linked = DEFAULTS; // what the address said when it was last read
let columns = [];

// The conversation

function addTurn({ role, content }) {
  const turn = copyOf("turn");
  const [select, area] = [turn.querySelector("select"), turn.querySelector("textarea")];
  select.value = role;
  area.value = content;
  turn.querySelector(".remove").addEventListener("click", () => {
    turn.remove();
    if (!$("turns").childElementCount) addTurn(DEFAULTS.messages[0]);
  });
  $("turns").append(turn);
  return area;
}

function readTurns() {
  return Array.from($("turns").children, (turn) => ({
    role: turn.querySelector("select").value,
    content: turn.querySelector("textarea").value,
  }));
}

// Settings, to the page and from it

function readSettings() {
  return {
    messages: readTurns(),
    temperature: $("temperature").valueAsNumber,
    max_tokens: $("max-tokens").valueAsNumber,
    seed: $("seed").valueAsNumber,
    draft: $("draft").value,
    scorer: $("scorer").value,
    colour: $("colour").value,
    columns: columns.map((column) => column.guides),
  };
}

function writeSettings(settings) {
  $("turns").replaceChildren();
  settings.messages.forEach(addTurn);
  $("temperature").value = settings.temperature;
  $("temperature").dispatchEvent(new Event("input"));
  $("max-tokens").value = settings.max_tokens;
  $("seed").value = settings.seed;
  $("colour").value = settings.colour;
  colourBy(settings.colour);
  if (models) writeColumns(settings);
}

/** What depends on the guides of this server: the columns, who drafts, and who gives a reward. */
function writeColumns(settings) {
  columns.forEach(remove);
  const wanted = settings.columns ?? [{}, firstGuide()];
  const missing = wanted
    .slice(0, MOST_COLUMNS)
    .flatMap((guides, at) => addColumn(guides, { isBase: at === 0 }));
  $("draft").value = settings.draft;
  $("scorer").value = settings.scorer;
  if (missing.length) notice(`The link names guides that are not here: ${missing.join(", ")}.`);
}

function firstGuide() {
  const first = models.guides.find((guide) => guide.enabled);
  return first ? { [first.name]: first.takes_weight ? first.weight : null } : {};
}

function readLink() {
  try {
    notice(null);
    linked = location.hash ? fromFragment(location.hash.slice(1)) : DEFAULTS;
  } catch (error) {
    linked = DEFAULTS;
    notice(error.message);
  }
  writeSettings(linked);
}

function colourBy(scale) {
  document.body.dataset.colour = scale;
  drawLegend($("scale"), scale);
}

// Columns

function addColumn(guides, { isBase }) {
  const column = new Column(models, readSettings, popover, { isBase });
  const missing = column.choose(guides);
  column.element.addEventListener("removed", () => remove(column));
  columns.push(column);
  $("columns").append(column.element);
  $("add-column").disabled = columns.length >= MOST_COLUMNS;
  return missing;
}

function remove(column) {
  column.stop();
  column.element.remove();
  columns = columns.filter((other) => other !== column);
  $("add-column").disabled = false;
  running();
}

// Sending

function send() {
  popover.hide();
  document.querySelectorAll(".wrong").forEach((element) => element.classList.remove("wrong"));
  notice(null);
  const wrong = invalid();
  if (wrong || !models) {
    wrong?.focus();
    notice(wrong ? `${nameOf(wrong)}: ${wrong.validationMessage}` : "No model is loaded yet.");
    return;
  }
  const settings = readSettings();
  history.replaceState(null, "", `#${toFragment(settings)}`);
  for (const column of columns) {
    column.run(requestBody(models.base.id, settings, column.guides), settings.scorer);
  }
}

function invalid() {
  const fields = [...document.querySelectorAll("#composer .knob input[type=number]")];
  return (
    fields.find((field) => !field.checkValidity()) ??
    columns.map((column) => column.invalid()).find((field) => field)
  );
}

function nameOf(field) {
  return field.ariaLabel ?? field.labels[0].textContent.trim();
}

function running() {
  $("stop").disabled = !columns.some((column) => column.running);
}

function stop() {
  columns.forEach((column) => column.stop());
}

// What is said to the user

function notice(words) {
  $("notice").hidden = words === null;
  $("notice").textContent = words ?? "";
}

function onProblem({ status, param }) {
  if (status === 401) askForKey();
  const field = param && document.querySelector(`#composer [data-param="${CSS.escape(param)}"]`);
  if (field) field.classList.add("wrong");
}

function askForKey() {
  $("key").classList.add("wrong");
  $("key").placeholder = "wanted";
  $("key").focus();
}

async function copy(text, done) {
  if (navigator.clipboard) await navigator.clipboard.writeText(text);
  else {
    // Browsers have no clipboard for pages that came over plain HTTP from elsewhere.
    const area = make("textarea", "", text);
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  $("toast").textContent = done;
  setTimeout(() => ($("toast").textContent = ""), TOAST_MS);
}

// Starting

async function loadModels() {
  try {
    models = await fetchModels();
  } catch (error) {
    notice(error.message);
    const again = make("button", "", "Try again");
    again.type = "button";
    again.addEventListener("click", retry);
    $("notice").append(again);
    onProblem(error);
    return;
  }
  $("served").textContent = `${models.base.id} · ${models.base.max_model_len} tokens`;
  $("send").disabled = false;
  $("max-tokens").max = models.base.max_model_len;
  offer($("draft"), DRAFTING);
  offer($("scorer"), REWARDING);
  writeColumns(linked);
}

/** Let one guide of certain kinds be chosen, where there is any. */
function offer(select, kinds) {
  const guides = models.guides.filter((guide) => kinds.includes(guide.kind));
  select.parentElement.hidden = guides.length === 0;
  select.replaceChildren(new Option("nobody", ""), ...guides.map(({ name }) => new Option(name)));
}

function retry() {
  notice(null);
  loadModels();
}

function wire() {
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("stop").addEventListener("click", stop);
  $("add-turn").addEventListener("click", () => addTurn(DEFAULTS.messages[0]).focus());
  $("add-column").addEventListener("click", () => {
    addColumn(columns.at(-1).guides, { isBase: false });
  });
  $("new-seed").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0];
  });
  $("share").addEventListener("click", () => {
    history.replaceState(null, "", `#${toFragment(readSettings())}`);
    copy(location.href, "The link is copied.");
  });
  $("colour").addEventListener("change", () => colourBy($("colour").value));
  $("key").addEventListener("input", () => {
    setKey($("key").value);
    $("key").classList.remove("wrong");
  });
  $("key").addEventListener("change", () => models || retry());
  $("theme").addEventListener("change", () => {
    localStorage.setItem("theme", $("theme").value);
    document.documentElement.style.colorScheme = $("theme").value;
  });
  document.querySelectorAll(".knob input[type=range]").forEach((range) => {
    couple(range, range.parentElement.querySelector("input[type=number]"));
  });
  const answers = $("columns");
  answers.addEventListener("begun", running);
  answers.addEventListener("ended", running);
  answers.addEventListener("problem", (event) => onProblem(event.detail));
  answers.addEventListener("said", (event) => ($("announcer").textContent = event.detail));
  answers.addEventListener("copy", (event) => copy(event.detail, "Copied."));
  answers.addEventListener("reply", (event) => {
    addTurn({ role: "assistant", content: event.detail });
    addTurn(DEFAULTS.messages[0]).focus();
  });
  addEventListener("hashchange", readLink);
  addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) send();
    else if (event.key === "Escape" && popover.shown) popover.hide();
    else if (event.key === "Escape") stop();
  });
}

const theme = localStorage.getItem("theme") ?? "light dark";
$("theme").value = theme;
document.documentElement.style.colorScheme = theme;
wire();
readLink();
loadModels();
