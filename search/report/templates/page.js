"use strict";
// Tables sort by a click on a heading: numbers by value, what is no number last.
function value(cell) {
  const text = (cell ? cell.innerText : "").trim();
  const found = text.replace(/^[^\d.+-]*(?=[+-]?\.?\d)/, "").match(/^[+-]?\d*\.?\d+(e[+-]?\d+)?/i);
  return [found ? parseFloat(found[0]) : NaN, text];
}
function compare(a, b) {
  const [x, s] = a, [y, t] = b;
  if (isNaN(x) || isNaN(y)) return isNaN(x) && isNaN(y) ? s.localeCompare(t) : isNaN(x) ? 1 : -1;
  return x - y || s.localeCompare(t);
}
for (const table of document.querySelectorAll("main table")) {
  const body = table.tBodies[0];
  if (!body || body.rows.length < 3) continue;
  for (const head of table.tHead.rows[0].cells) {
    const sort = () => {
      const falls = head.getAttribute("aria-sort") === "ascending";
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falls ? "descending" : "ascending");
      const at = head.cellIndex;
      const rows = [...body.rows].map(row => [value(row.cells[at]), row]);
      rows.sort((a, b) => {
        const last = isNaN(a[0][0]) !== isNaN(b[0][0]);  // what is no number stays last, whichever way
        return falls && !last ? compare(b[0], a[0]) : compare(a[0], b[0]);
      });
      body.append(...rows.map(([, row]) => row));
    };
    head.tabIndex = 0;
    head.classList.add("sorts");
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  }
}
// A link to what is folded opens it; paper shows everything.
const sections = [...document.querySelectorAll("main details")];
function reveal() {
  const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let at = target; at && at !== document.body; at = at.parentElement) if (at.tagName === "DETAILS") at.open = true;
  if (target) target.scrollIntoView();
}
addEventListener("hashchange", reveal);
reveal();
let before = null;
addEventListener("beforeprint", () => { before = sections.map(s => s.open); sections.forEach(s => { s.open = true; }); });
addEventListener("afterprint", () => { if (before) sections.forEach((s, i) => { s.open = before[i]; }); });
for (const button of document.querySelectorAll("nav button"))
  button.addEventListener("click", () => { for (const s of sections) s.open = button.dataset.open === "true"; });
