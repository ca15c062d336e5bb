"use strict";
// Makes the page handier; without it everything is there, in the order of the studies.
const all = (where, what) => [...where.querySelectorAll(what)];
all(document, ".tools").forEach((one) => { one.hidden = false; });

// what a link leads to is opened, in browsers too that do not do so themselves
const reveal = () => {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let one = target.parentElement; one; one = one.parentElement) if (one.tagName === "DETAILS") one.open = true;
  target.scrollIntoView();
};
addEventListener("hashchange", reveal);
reveal();

// on a narrow screen the menu is closed until asked for, and closes again behind a link
const menu = document.querySelector("nav > details");
const narrow = matchMedia("(max-width: 63.99rem)");
if (menu) {
  document.body.classList.add("scripted");
  const settle = () => { menu.open = !narrow.matches; };
  narrow.addEventListener("change", settle);
  settle();
  menu.addEventListener("click", (event) => { if (event.target.closest("a") && narrow.matches) menu.open = false; });
}

for (const button of all(document, "[data-all]")) {
  button.addEventListener("click", () => {
    for (const one of all(document, ".study > details")) one.open = Boolean(button.dataset.all);
  });
}

// the filter: every word has to be in a study's title, methods, backbones or tasks
const box = document.querySelector("input[type=search]");
if (box) {
  const studies = all(document, "section.study");
  const entries = new Map(all(menu, "li[data-of]").map((one) => [one.dataset.of, one]));
  const filter = () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const study of studies) {
      const fits = words.every((word) => study.dataset.words.includes(word));
      study.hidden = entries.get(study.dataset.of).hidden = !fits;
      shown += fits;
    }
    for (const title of all(menu, ".group")) title.hidden = !title.nextElementSibling.querySelector("li:not([hidden])");
    box.parentElement.querySelector("[role=status]").textContent = words.length ? `${shown} of ${studies.length}` : "";
  };
  box.addEventListener("input", filter);
  filter();
}

// a column's head sorts the rows of each backbone: falling, rising, as they were
const worth = (row, column) => {
  const cell = row.cells[column];
  return cell.dataset.value === undefined ? cell.textContent.trim() : Number(cell.dataset.value);
};
const compare = (a, b, turn) => {
  const numbers = [a, b].map((one) => typeof one === "number");
  if (numbers[0] !== numbers[1]) return numbers[0] ? -1 : 1;  // what has no number is last
  return turn * (numbers[0] ? b - a : a.localeCompare(b, undefined, { numeric: true }));
};
for (const table of all(document, "table.sortable")) {
  const before = all(table, "tbody").map((body) => [body, all(body, "tr:not(.group)")]);
  const heads = all(table, "thead th");
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { descending: "ascending", ascending: "none" }[head.ariaSort] || "descending";
      heads.forEach((one) => one.removeAttribute("aria-sort"));
      if (next !== "none") head.ariaSort = next;
      for (const [body, rows] of before) {
        const sorted = next === "none" ? rows
          : [...rows].sort((a, b) => compare(worth(a, column), worth(b, column), next === "descending" ? 1 : -1));
        body.append(...sorted);
      }
    });
  });
}
