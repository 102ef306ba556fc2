// A table sorts by a column at a click, or at Enter and the space bar; what is too wide says so, and can be scrolled by keys.
const number = cell => {
  const key = cell.dataset.key ?? cell.firstChild?.textContent.trim() ?? "";
  return key !== "" && isFinite(key) ? Number(key) : null;
};
const order = (a, b, column, down) => {
  const [x, y] = [number(a.cells[column]), number(b.cells[column])];
  if (x !== null && y !== null) return down ? y - x : x - y;
  if (x !== null || y !== null) return x === null ? 1 : -1; // what has no number stays below
  return (down ? -1 : 1) * a.cells[column].textContent.localeCompare(b.cells[column].textContent);
};
for (const table of document.querySelectorAll("table")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  if (body.rows.length < 2 || table.classList.contains("heat")) continue;
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    button.insertBefore(document.createElement("span"), button.childNodes[1] ?? null); // the arrow
    head.append(button);
    button.addEventListener("click", () => {
      const numbers = [...body.rows].some(row => number(row.cells[column]) !== null);
      const down = head.ariaSort ? head.ariaSort === "ascending" : numbers;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...[...body.rows].sort((a, b) => order(a, b, column, down)));
    });
  });
}
const MORE = "More columns to the right: swipe, or scroll sideways.";
const scrollable = () => {
  for (const box of document.querySelectorAll(".scroll")) {
    const hidden = box.scrollWidth > box.clientWidth + 1;
    hidden ? box.setAttribute("tabindex", "0") : box.removeAttribute("tabindex");
    let hint = box.previousElementSibling?.matches(".hint") ? box.previousElementSibling : null;
    if (hidden && !hint) {
      hint = document.createElement("p");
      hint.className = "hint";
      hint.textContent = MORE;
      box.before(hint);
    } else if (!hidden) hint?.remove();
  }
};
scrollable();
addEventListener("resize", scrollable);
const details = [...document.querySelectorAll("details")];
details.forEach(one => one.addEventListener("toggle", scrollable)); // what is folded away has no width
addEventListener("beforeprint", () => details.forEach(one => { one.dataset.was = one.open; one.open = true; }));
addEventListener("afterprint", () => details.forEach(one => { one.open = one.dataset.was === "true"; }));
for (const told of document.querySelectorAll(".script")) told.hidden = false;
