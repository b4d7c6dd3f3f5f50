"""The script of the pages: copy a command, sort a table, show the rows that match. Without it everything is shown."""

SCRIPT = """
document.querySelectorAll("[data-copy]").forEach(button => button.addEventListener("click", () => {
  const text = button.previousElementSibling, range = document.createRange();
  range.selectNodeContents(text);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
  const done = () => { button.textContent = "Copied"; setTimeout(() => { button.textContent = "Copy"; }, 1500); };
  if (navigator.clipboard) navigator.clipboard.writeText(text.textContent).then(done, () => {});
  else if (document.execCommand("copy")) done();
}));

const keyOf = cell => cell.dataset.key === undefined ? cell.textContent.trim() : Number(cell.dataset.key);
const compare = (a, b) => typeof a === "number" && typeof b === "number" ? a - b
  : typeof a === "number" ? -1 : typeof b === "number" ? 1 : a.localeCompare(b);
document.querySelectorAll("table.sortable").forEach(table => {
  table.querySelectorAll("th").forEach((title, column) => title.querySelector("button").addEventListener("click", () => {
    const order = title.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    title.setAttribute("aria-sort", order);
    const body = table.tBodies[0], sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map(row => [keyOf(row.cells[column]), row]);
    const empty = rows.filter(([key]) => key === "");
    rows.filter(([key]) => key !== "").sort((a, b) => sign * compare(a[0], b[0])).concat(empty)
      .forEach(([, row]) => body.append(row));
  }));
});

document.querySelectorAll("[data-filters]").forEach(filters => {
  const name = filters.dataset.filters, selects = [...filters.querySelectorAll("select")];
  const search = filters.querySelector("input");
  const items = () => document.querySelectorAll(`[data-table="${name}"] tbody tr, [data-figures="${name}"] figure`);
  const show = () => {
    const words = search ? search.value.toLowerCase().split(/\\s+/) : [];
    items().forEach(item => {
      const fits = selects.every(select => !select.value || item.dataset[select.dataset.key] === select.value);
      item.hidden = !fits || !words.every(word => item.textContent.toLowerCase().includes(word));
    });
  };
  selects.forEach(select => select.addEventListener("change", show));
  if (search) search.addEventListener("input", show);
  show();
});
"""
"""The script, which needs nothing but the page itself."""
