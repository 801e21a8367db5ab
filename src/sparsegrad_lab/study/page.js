for (const table of document.querySelectorAll('table')) {
  table.querySelectorAll('th button').forEach((button, column) => button.addEventListener('click', () => {
    const head = button.parentElement, up = head.getAttribute('aria-sort') !== 'ascending';
    table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
    const value = row => { const text = row.cells[column].textContent.replace(/,/g, ''), number = parseFloat(text);
                           return isNaN(number) ? text : number; };
    [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      const order = typeof x === typeof y ? (x < y ? -1 : x > y ? 1 : 0) : typeof x === 'number' ? -1 : 1;
      return up ? order : -order;
    }).forEach(row => table.tBodies[0].append(row));
  }));
}
for (const input of document.querySelectorAll('input[data-filters]')) {
  input.addEventListener('input', () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.getElementById(input.dataset.filters).tBodies[0].rows)
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}
const open = () => { const found = location.hash && document.querySelector(location.hash);
                     if (found && found.tagName === 'DETAILS') found.open = true; };
addEventListener('hashchange', open); open();
