// What changed between two texts, word by word.

const MOST_CELLS = 4e6; // of the table; beyond it a text is all new

/** Return [kind, text] pieces, kind "same", "gone" or "new": a shortest edit of words. */
export function diffWords(before, after) {
  const a = before.match(/\s+|\S+/g) ?? [];
  const b = after.match(/\s+|\S+/g) ?? [];
  if (a.length * b.length > MOST_CELLS) return [["gone", before], ["new", after]];
  const common = commonLengths(a, b);
  const pieces = [];
  const add = (kind, word) => {
    if (pieces.at(-1)?.[0] === kind) pieces.at(-1)[1] += word;
    else pieces.push([kind, word]);
  };
  let i = 0;
  let j = 0;
  while (i < a.length && j < b.length) {
    if (a[i] === b[j]) {
      add("same", a[i]);
      i += 1;
      j += 1;
    } else if (common[i + 1][j] >= common[i][j + 1]) add("gone", a[i++]);
    else add("new", b[j++]);
  }
  while (i < a.length) add("gone", a[i++]);
  while (j < b.length) add("new", b[j++]);
  return pieces;
}

/** common[i][j] is the length of the longest common subsequence of a[i:] and b[j:]. */
function commonLengths(a, b) {
  const common = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--) {
    for (let j = b.length - 1; j >= 0; j--) {
      common[i][j] =
        a[i] === b[j] ? common[i + 1][j + 1] + 1 : Math.max(common[i + 1][j], common[i][j + 1]);
    }
  }
  return common;
}
