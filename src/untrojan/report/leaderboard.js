"use strict";

// Draws, sorts and filters the two tables. Everything in the data is text, and is never taken for HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const AT_A_TIME = 300;

const percent = (value) => (100 * value).toFixed(1).replace("-", "\u2212");
const spread = ([mean, deviation]) => percent(mean) + (deviation === null ? "" : ` ± ${percent(deviation)}`);
const seconds = ([value]) => (value < 10 ? value.toFixed(1) : Math.round(value).toLocaleString("en"));
const memory = ([value]) => `${Math.round(value / 1e6).toLocaleString("en")} MB`;
const from = (pair) => (pair ? `from ${percent(pair[0])}` : "");
const text = (name, title, show = (row) => row[name], note = () => "") => ({ name, title, note, sort: (row) => row[name], show });
const method = text(
  "defense",
  "Defense",
  (row) => row.defense.split(":", 1)[0],
  (row) => row.defense.split(":").slice(1).join(":").replaceAll(",", ", "),
);
const number = (name, title, show = spread, note = () => "") => ({
  name,
  title,
  note,
  number: true,
  sort: (row) => row[name]?.[0],
  show: (row) => (row[name] ? show(row[name]) : "–"),
});
const share = (name, title) => ({
  name,
  title,
  number: true,
  sort: (row) => (row[name][1] ? row[name][0] / row[name][1] : undefined),
  show: (row) => `${row[name][0]} of ${row[name][1]}`,
});
const flagged = { name: "flagged", title: "Flagged cells", number: true, sort: (row) => row.flagged, show: (row) => row.flagged };
const flags = {
  name: "flags",
  title: "Flags",
  sort: (row) => row.flags.length + row.failed,
  show: (row) => [...row.flags, ...(row.failed ? [`${row.failed} failed`] : [])].join(", "),
};

const tables = {
  defenses: {
    columns: [
      method,
      text("setting", "Clean images"),
      share("models", "Models"),
      number("acc_change", "ACC change"),
      number("asr", "ASR"),
      number("worst_asr", "Worst ASR"),
      number("ra", "RA"),
      number("der", "DER"),
      number("gap", "Oracle gap"),
      share("repaired", "Repaired"),
      number("seconds", "Seconds", seconds),
      number("memory", "Memory", memory),
      flagged,
    ],
    words: (row) => [row.defense, row.setting],
    sorted: { name: "der", down: true },
  },
  results: {
    columns: [
      text("model", "Model"),
      method,
      text("setting", "Clean images"),
      number("acc", "ACC", spread, (row) => from(row.acc_before)),
      number("asr", "ASR", spread, (row) => from(row.asr_before)),
      number("ra", "RA"),
      number("der", "DER"),
      number("gap", "Oracle gap"),
      share("repaired", "Repaired"),
      number("seconds", "Seconds", seconds),
      number("memory", "Memory", memory),
      flags,
    ],
    words: (row) => [row.model, row.defense, row.setting, row.attack ?? "", ...row.flags],
    opens: true,
    sorted: { name: "model", down: false },
  },
};
const opened = new Set();
let shown = AT_A_TIME;

// What a person cannot see is spelled out, so that no name turns the direction of the words around it.
const visible = (text) =>
  `${text}`.replace(/[^\P{C}\n]/gu, (each) => `\\u{${each.codePointAt(0).toString(16)}}`);

function make(tag, content, className) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.append(content instanceof Node ? content : visible(content));
  return element;
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
}

// Rows without the value stay at the end, whichever way the others are sorted.
function sorted(rows, { columns, sorted: { name, down } }) {
  const value = columns.find((column) => column.name === name).sort;
  return [...rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
    return down ? compare(y, x) : compare(x, y);
  });
}

const trusted = {
  all: () => true,
  sound: (row) => !row.flagged && !row.failed,
  flagged: (row) => row.flagged > 0,
  failed: (row) => row.failed > 0,
};

const has = (row, table, word) => table.words(row).some((each) => each.toLowerCase().includes(word));

function matching(name, words) {
  const table = tables[name];
  const fits = trusted[name === "results" ? document.getElementById("trust").value : "all"];
  return data[name].filter((row) => fits(row) && words.every((word) => has(row, table, word)));
}

function drawHead(name) {
  const table = tables[name];
  const row = document.createElement("tr");
  for (const column of table.columns) {
    const button = make("button", column.title);
    button.addEventListener("click", () => {
      const again = table.sorted.name === column.name;
      table.sorted = { name: column.name, down: again ? !table.sorted.down : Boolean(column.number) };
      draw();
      document.querySelector(`#${name} th[aria-sort] button`).focus();
    });
    const head = make("th", button, column.number ? "number" : "");
    head.scope = "col";
    if (table.sorted.name === column.name) head.ariaSort = table.sorted.down ? "descending" : "ascending";
    row.append(head);
  }
  document.querySelector(`#${name} thead`).replaceChildren(row);
}

function drawCell(cell) {
  const box = make("div", make("h4", `Seed ${cell.seed}`), "cell");
  const say = (...parts) => box.append(make("p", parts.filter(Boolean).join(" ")));
  if (cell.error !== null) {
    say("The cell failed:");
    box.append(make("pre", cell.error));
  } else {
    const rates = [["ACC", "acc"], ["ASR", "asr"], ["RA", "ra"]]
      .filter(([, name]) => cell[`${name}_after`] !== null)
      .map(([title, name]) => `${title} ${percent(cell[`${name}_after`])}`);
    say([...rates, ...(cell.der === null ? [] : [`DER ${percent(cell.der)}`])].join(" · "));
    const suspect = cell.suspect === null ? "" : `, label ${cell.suspect} suspected`;
    say(`Scan: ${cell.verdict.replace("_", " ")}${suspect}.`);
    say(`${cell.status.replaceAll("_", " ")}: ${cell.reason}.`);
    say(`${seconds([cell.repair_seconds])} s, ${memory([cell.peak_memory_bytes])}.`);
    for (const flag of cell.flags) say(`⚑ ${flag.name}: ${flag.detail}.`);
  }
  say(`Record: cells/${cell.key.slice(0, 2)}/${cell.key}.json`);
  return box;
}

function drawRow(row, { columns, opens }) {
  const line = document.createElement("tr");
  const drawn = [line];
  for (const [index, column] of columns.entries()) {
    const cell = document.createElement(index ? "td" : "th");
    cell.className = column.number ? "number" : column.name;
    if (opens && !index) {
      const button = make("button", column.show(row));
      button.ariaExpanded = opened.has(row);
      button.addEventListener("click", () => {
        if (!opened.delete(row)) opened.add(row);
        const [anew, ...under] = drawRow(row, tables.results);
        line.nextElementSibling?.classList.contains("open") && line.nextElementSibling.remove();
        line.replaceWith(anew, ...under);
        anew.querySelector("button").focus();
      });
      cell.append(button);
    } else {
      cell.append(visible(column.show(row)));
    }
    const note = column.note?.(row);
    if (note) cell.append(make("small", note));
    line.append(cell);
  }
  if (opens && opened.has(row)) {
    const under = make("td", "");
    under.colSpan = columns.length;
    under.append(...row.cells.map(drawCell));
    drawn.push(make("tr", under, "open"));
  }
  return drawn;
}

function draw() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  // A word that names no defense or setting is about models, and does not empty the table over all of them.
  const about = words.filter((word) => data.defenses.some((row) => has(row, tables.defenses, word)));
  const found = { defenses: matching("defenses", about), results: matching("results", words) };
  for (const [name, table] of Object.entries(tables)) {
    drawHead(name);
    const rows = sorted(found[name], table).slice(0, shown);
    document.querySelector(`#${name} tbody`).replaceChildren(...rows.flatMap((row) => drawRow(row, table)));
  }
  document.getElementById("count").textContent = `${found.results.length} of ${data.results.length} result${data.results.length === 1 ? "" : "s"}`;
  document.getElementById("more").hidden = found.results.length <= shown;
}

document.getElementById("filter").addEventListener("input", draw);
document.getElementById("trust").addEventListener("change", draw);
document.getElementById("more").addEventListener("click", () => {
  shown += AT_A_TIME;
  draw();
});
draw();
