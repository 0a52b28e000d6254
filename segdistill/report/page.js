"use strict";
// Tables: a click on a head sorts by it, down, up, and back to the order of the page.
for (const table of document.querySelectorAll("table.sortable")) {
  const bodies = [...table.tBodies].map((body) => [body, [...body.rows]]);
  const heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const cell = row.cells[column];
    return "value" in cell.dataset ? Number(cell.dataset.value) : cell.classList.contains("text") ? cell.textContent.trim() : null;
  };
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const words = head.classList.contains("text");
    const orders = words ? ["ascending", "descending", "none"] : ["descending", "ascending", "none"];
    const order = orders[(orders.indexOf(head.ariaSort) + 1) % 3];
    for (const other of heads) other.ariaSort = "none";
    head.ariaSort = order;
    const sign = order === "ascending" ? 1 : -1;
    for (const [body, rows] of bodies) {
      const sorted = order === "none" ? rows : [...rows].sort((left, right) => {
        const [a, b] = [key(left, column), key(right, column)];
        if (a === null || b === null) return (a === null) - (b === null); // what has no number is last either way
        return sign * (words ? a.localeCompare(b) : a - b);
      });
      body.append(...sorted);
    }
  }));
}

// Pictures: the border between left and right follows the slider.
for (const slider of document.querySelectorAll(".slider input")) {
  const move = () => slider.closest(".slider").style.setProperty("--split", slider.value + "%");
  slider.addEventListener("input", move);
  move(); // a browser may remember where it was
}

// A table that is wider than its place becomes a card for each row.
const fold = () => {
  for (const table of document.querySelectorAll(".folds")) {
    table.classList.remove("cards");
    table.classList.toggle("cards", table.parentElement.scrollWidth > table.parentElement.clientWidth);
  }
};
addEventListener("resize", fold);
fold();

// On paper nothing can be unfolded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => { part.open = true; }));
