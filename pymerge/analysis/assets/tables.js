// Tables that are sorted by a click on a heading, and searched. Works without the plots.
(() => {
  "use strict";

  const value = (row, column) => row.cells[column].textContent;

  // Numbers by size, texts by language; what is not defined ("-") comes last either way.
  function sort(table, column, heading) {
    const down = heading.getAttribute("aria-sort") === "descending" ? false
      : heading.getAttribute("aria-sort") === "ascending" ? true
      : !heading.classList.contains("text");
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const body = table.tBodies[0];
    const text = heading.classList.contains("text");
    const collator = new Intl.Collator("en", { numeric: true });
    const rows = [...body.rows].map((row) => {
      const shown = value(row, column);
      return { row, key: text ? shown : parseFloat(shown) };
    });
    rows.sort((a, b) => {
      if (text) return (down ? -1 : 1) * collator.compare(a.key, b.key);
      if (Number.isNaN(a.key) || Number.isNaN(b.key)) {
        return Number(Number.isNaN(a.key)) - Number(Number.isNaN(b.key));
      }
      return (down ? -1 : 1) * (a.key - b.key);
    });
    body.append(...rows.map((entry) => entry.row));
  }

  for (const table of document.querySelectorAll("table")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => sort(table, column, heading));
    });
  }

  for (const input of document.querySelectorAll("input[data-of]")) {
    const rows = [...document.getElementById("table-" + input.dataset.of).tBodies[0].rows];
    const found = document.getElementById("found-" + input.dataset.of);
    input.addEventListener("input", () => {
      const wanted = input.value.toLowerCase();
      let count = 0;
      for (const row of rows) {
        row.hidden = !value(row, 0).toLowerCase().includes(wanted);
        count += row.hidden ? 0 : 1;
      }
      found.textContent = count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
    });
  }
})();
