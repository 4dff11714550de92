"use strict";
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, i) => head.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    heads.forEach((h) => h.setAttribute("aria-sort", h === head ? (down ? "descending" : "ascending") : "none"));
    const value = (row) => row.cells[i].dataset.sort === "" ? NaN : Number(row.cells[i].dataset.sort);
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (isNaN(x) || isNaN(y)) return isNaN(x) - isNaN(y);
      return down ? y - x : x - y;
    });
    table.tBodies[0].append(...rows);
  }));
}
