// Small things the page does by itself: Ctrl+Enter, copying, and light or dark.
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  const runs = [...document.querySelectorAll('button.candor-run')];
  const run = runs.find((button) => button.offsetParent !== null);
  if (run && !run.disabled) {
    event.preventDefault();
    run.click();
  }
});

window.candorCopy = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Outside a secure context the clipboard is only reached through a selection.
    const box = document.body.appendChild(document.createElement('textarea'));
    box.value = text;
    box.select();
    document.execCommand('copy');
    box.remove();
  }
};

window.candorTheme = () => {
  const dark = document.body.classList.toggle('dark');
  localStorage.setItem('candor-theme', dark ? 'dark' : 'light');
};

window.addEventListener('load', () => {
  const wanted = localStorage.getItem('candor-theme');
  if (wanted) document.body.classList.toggle('dark', wanted === 'dark');
});
