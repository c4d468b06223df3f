"use strict";

// Draws the charts in the colors of the style sheet, and again when the color scheme changes.
const plots = JSON.parse(document.getElementById("plots").textContent);
const touch = matchMedia("(pointer: coarse)").matches;
let drawn = [];

function readItem(item) {
  const style = getComputedStyle(document.documentElement);
  const colors = new Map(
    Object.entries(plots.colors).map(([color, name]) => [color, style.getPropertyValue(`--${name}`).trim()]),
  );
  // On touch screens a drag must scroll the page, so there no tool takes it until one is chosen.
  return JSON.parse(JSON.stringify(item), (key, value) =>
    touch && key === "active_drag" ? null : (colors.get(value) ?? value),
  );
}

async function draw() {
  for (const views of drawn) views.clear();
  drawn = [];
  for (const [name, item] of Object.entries(plots.figures)) {
    const place = document.getElementById(`plot-${name}`);
    place.replaceChildren();
    drawn.push(await Bokeh.embed.embed_item(readItem(item), place));
  }
}

let drawing = draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawing = drawing.then(draw);
});

const copy = document.getElementById("copy");
copy?.addEventListener("click", async () => {
  const command = document.getElementById("command");
  try {
    await navigator.clipboard.writeText(command.textContent);
    copy.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(command);
    copy.textContent = "Selected: press Ctrl+C";
  }
});
