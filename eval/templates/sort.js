for (const table of document.querySelectorAll("table.sortable")) {
  table.classList.add("sorts");
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const sort = (head, column) => {
    const down = head.ariaSort === "descending" || (!head.ariaSort && column === 0);
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.ariaSort = down ? "ascending" : "descending";
    const sign = down ? 1 : -1;
    const key = (row) => row.cells[column].dataset.sort;
    const compare = (one, two) => {
      if (column === 0) return sign * one.cells[0].textContent.localeCompare(two.cells[0].textContent);
      const a = key(one), b = key(two);
      if (a === undefined || b === undefined) return (a === undefined) - (b === undefined);
      return sign * (Number(a) - Number(b));
    };
    [...body.rows].sort(compare).forEach((row) => body.append(row));
  };
  heads.forEach((head, column) => {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head, column));
    head.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(head, column);
    });
  });
}
