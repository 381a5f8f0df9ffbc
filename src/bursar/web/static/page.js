// Gives number fields a slider over sensible values, and marks the field that an answer complains of. Works without.
"use strict";
document.documentElement.classList.add("js");
const number = (text) => {
  const found = /^\s*([\d.]+)\s*([kMBT]?)\s*$/.exec(text);
  return found ? Number(found[1]) * { "": 1, k: 1e3, M: 1e6, B: 1e9, T: 1e12 }[found[2]] : NaN;
};
for (const field of document.querySelectorAll("input[data-stops]")) {
  const stops = field.dataset.stops.split(" ");
  const values = stops.map(number);
  const slider = document.createElement("input");
  const label = field.getAttribute("aria-label") || field.closest(".field").querySelector("label").textContent.trim();
  slider.type = "range";
  slider.min = 0;
  slider.max = stops.length - 1;
  slider.setAttribute("aria-label", `${label}, slider`);
  const first = document.getElementById(field.id.replace("f-b.", "f-"));
  const nearest = () => {
    const asked = number(field.value || first.value); // an empty second field is as the first
    if (Number.isNaN(asked)) return;
    let best = 0;
    values.forEach((v, i) => {
      if (Math.abs(Math.log(v / asked)) < Math.abs(Math.log(values[best] / asked))) best = i;
    });
    slider.value = best;
    slider.setAttribute("aria-valuetext", field.value);
  };
  nearest();
  slider.addEventListener("input", (event) => {
    event.stopPropagation();
    field.value = stops[slider.value];
    slider.setAttribute("aria-valuetext", field.value);
    field.dispatchEvent(new Event("change", { bubbles: true }));
  });
  slider.addEventListener("change", (event) => event.stopPropagation());
  field.addEventListener("input", nearest);
  if (first !== field) first.addEventListener("change", nearest);
  field.after(slider);
}
const mark = () => {
  for (const old of document.querySelectorAll("form [aria-invalid]")) old.removeAttribute("aria-invalid");
  const wrong = document.getElementById("wrong");
  const field = wrong && wrong.dataset.field && document.getElementById(`f-${wrong.dataset.field}`);
  if (field) field.setAttribute("aria-invalid", "true");
};
document.addEventListener("htmx:afterSwap", () => {
  mark();
  const title = document.querySelector("#answer h1");
  if (title) document.title = `${title.textContent.trim()} · bursar`;
});
