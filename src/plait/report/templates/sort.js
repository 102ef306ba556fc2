document.querySelectorAll("table").forEach(table => table.querySelectorAll("th").forEach((head, column) => {
  head.addEventListener("click", () => {
    const down = head.dataset.down !== "1", body = table.tBodies[0];
    const key = row => { const t = row.cells[column].textContent.trim(), n = parseFloat(t); return isNaN(n) ? t : n; };
    const order = (a, b) => typeof a === typeof b ? (a < b ? -1 : a > b ? 1 : 0) : typeof a === "number" ? -1 : 1;
    table.querySelectorAll("th").forEach(other => delete other.dataset.down);
    head.dataset.down = down ? "1" : "0";
    [...body.rows].sort((a, b) => (down ? -1 : 1) * order(key(a), key(b))).forEach(row => body.append(row));
  });
}));
