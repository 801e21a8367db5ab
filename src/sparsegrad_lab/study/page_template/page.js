function valueOf(cell) {
  const text = cell.textContent.trim().replace(/,/g, '');
  const number = parseFloat(text);
  return isNaN(number) ? text : number;
}

function order(first, second) {  // numbers before words
  if (typeof first !== typeof second) return typeof first === 'number' ? -1 : 1;
  return first < second ? -1 : first > second ? 1 : 0;
}

for (const table of document.querySelectorAll('table')) {
  table.querySelectorAll('th button').forEach((button, column) => button.addEventListener('click', () => {
    const head = button.parentElement, ascending = head.getAttribute('aria-sort') !== 'ascending';
    table.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', ascending ? 'ascending' : 'descending');
    [...table.tBodies[0].rows]
      .sort((a, b) => order(valueOf(a.cells[column]), valueOf(b.cells[column])) * (ascending ? 1 : -1))
      .forEach(row => table.tBodies[0].append(row));
  }));
}

for (const input of document.querySelectorAll('input[data-filters]')) {
  input.addEventListener('input', () => {
    const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
    for (const row of document.getElementById(input.dataset.filters).tBodies[0].rows)
      row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
  });
}

function openLinked() {
  const linked = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let element = linked; element; element = element.parentElement)
    if (element.tagName === 'DETAILS') element.open = true;
  if (linked) linked.scrollIntoView();
}
addEventListener('hashchange', openLinked);
openLinked();

let closed = [];  // what the printer opens is closed again afterwards
addEventListener('beforeprint', () => {
  closed = [...document.querySelectorAll('.chapter, .chapter > details:not(.run)')].filter(details => !details.open);
  closed.forEach(details => { details.open = true; });
});
addEventListener('afterprint', () => closed.forEach(details => { details.open = false; }));
