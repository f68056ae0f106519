// The guides of one answer: which act, and how strongly.

import { copyOf } from "./dom.js";

/** Keep a slider and a number field on one value. The slider's ends do not bind the number. */
export function couple(range, number, changed = () => {}) {
  range.addEventListener("input", () => {
    number.value = range.value;
    changed();
  });
  number.addEventListener("input", () => {
    range.value = number.value;
    changed();
  });
}

export class GuidePicker {
  #rows = new Map();

  /** Guides as of `fetchModels`: those without a weight are on or off. */
  constructor(fieldset, guides, changed) {
    for (const guide of guides) {
      const row = copyOf("guide");
      const [box, range, number] = row.querySelectorAll("input");
      row.querySelector(".name").textContent = guide.name;
      const kind = guide.kind === guide.name ? "" : guide.kind.replaceAll("_", " ");
      row.querySelector(".kind").textContent = kind;
      row.title = guide.enabled ? `version ${guide.version}` : "switched off";
      box.disabled = !guide.enabled;
      box.addEventListener("change", changed);
      if (guide.takes_weight) {
        range.max = Math.max(2, 2 * guide.weight);
        range.ariaLabel = `Weight of ${guide.name}, slider`;
        number.ariaLabel = `Weight of ${guide.name}`;
        number.value = range.value = guide.weight;
        couple(range, number, () => {
          box.checked = true;
          changed();
        });
      } else {
        range.remove();
        number.remove();
      }
      fieldset.append(row);
      const revises = guide.stage === "revision";
      this.#rows.set(guide.name, { box, range, number, weighted: guide.takes_weight, revises });
    }
  }

  /** Return {name: weight} of the guides that are on; null where there is no weight. */
  read() {
    const chosen = [...this.#rows].filter(([, row]) => row.box.checked);
    return Object.fromEntries(
      chosen.map(([name, row]) => [name, row.weighted ? row.number.valueAsNumber : null]),
    );
  }

  /** Whether one of the guides that are on rewrites the answer. */
  get revises() {
    return [...this.#rows.values()].some((row) => row.revises && row.box.checked);
  }

  /** Set which guides are on, and return the names of those that are not served here. */
  write(chosen) {
    for (const [name, { box, range, number, weighted }] of this.#rows) {
      box.checked = name in chosen;
      if (box.checked && weighted) range.value = number.value = chosen[name] ?? number.value;
    }
    return Object.keys(chosen).filter((name) => !this.#rows.has(name));
  }

  /** Return the first field that holds no number it may hold, or null. */
  invalid() {
    const wrong = [...this.#rows.values()].find(
      (row) => row.weighted && row.box.checked && !row.number.checkValidity(),
    );
    return wrong?.number ?? null;
  }
}

/** Return what an answer by these guides is called. */
export function titleOf(chosen) {
  const names = Object.entries(chosen).map(([name, weight]) =>
    weight === null ? name : `${name} × ${weight}`,
  );
  return names.join(" + ") || "base";
}
