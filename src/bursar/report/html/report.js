// Sorts and searches tables, and tells of the mark that the pointer or the keys reach. The page says all of it without.
"use strict";
for (const table of document.querySelectorAll("table[data-sort]")) {
  const heads = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const number = head.classList.contains("n");
      const up = head.ariaSort === "descending" || (!number && head.ariaSort !== "ascending");
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        return number ? Number(cell.dataset.v ?? NaN) : (cell.dataset.v ?? cell.textContent);
      };
      const missing = (x) => number && Number.isNaN(x);
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (missing(a) || missing(b)) return missing(a) - missing(b);
        const order = number ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true });
        return up ? order : -order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}
for (const field of document.querySelectorAll("input[data-search]")) {
  const rows = [...document.getElementById(field.dataset.search).tBodies[0].rows];
  const words = rows.map((row) => row.textContent.toLowerCase());
  const told = field.parentElement.querySelector("output");
  field.parentElement.hidden = false;
  field.addEventListener("input", () => {
    const asked = field.value.trim().toLowerCase();
    let found = 0;
    rows.forEach((row, i) => {
      row.hidden = !words[i].includes(asked);
      found += !row.hidden;
    });
    told.textContent = asked ? `${found} of ${rows.length} rows` : "";
  });
}
for (const range of document.querySelectorAll("input[data-walk]")) {
  const figure = document.getElementById(range.dataset.walk);
  const told = figure.querySelector("output");
  const said = document.getElementById(`${figure.id}-said`);
  const texts = said && JSON.parse(said.textContent);
  const shown = () => [...figure.querySelectorAll("svg.plot")].find((svg) => svg.getClientRects().length);
  const marks = () => [...shown().querySelectorAll("[data-m]")];
  const title = (mark) => mark.querySelector("title").textContent;
  const light = (i) => {
    for (const old of figure.querySelectorAll(".on")) old.classList.remove("on");
    range.value = i;
    if (texts) {
      const columns = shown().querySelector(".columns");
      const { x0, w } = columns.dataset;
      const x = Number(x0) + (Math.max(0, i - 0.5) / (texts.length - 1)) * Number(w);
      const cursor = columns.querySelector(".cursor");
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.classList.add("on");
      told.textContent = texts[i];
    } else {
      const mark = marks()[i];
      if (mark) mark.classList.add("on");
      told.textContent = mark ? title(mark) : "";
    }
    range.setAttribute("aria-valuetext", told.textContent);
  };
  const count = () => {
    range.max = (texts ? texts.length : marks().length) - 1;
  };
  count();
  if (Number(range.max) < 1) continue;
  range.parentElement.hidden = false;
  light(Number(range.getAttribute("value")));
  range.addEventListener("input", () => light(Number(range.value)));
  figure.addEventListener("change", (event) => {
    if (event.target.type !== "radio") return;
    count();
    light(0);
  });
  figure.addEventListener("pointermove", (event) => {
    const svg = event.target.closest && event.target.closest("svg.plot");
    if (!svg) return;
    if (texts) {
      const { x0, w } = svg.querySelector(".columns").dataset;
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
      const i = Math.ceil(((at.x - Number(x0)) / Number(w)) * (texts.length - 1));
      light(Math.max(0, Math.min(texts.length - 1, i)));
    } else {
      const mark = event.target.closest("[data-m]");
      if (mark) light(marks().indexOf(mark));
    }
  });
}
