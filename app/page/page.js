// Small things the page does by itself: Ctrl+Enter, going to what was started, copying, and light
// or dark.
document.addEventListener('keydown', (event) => {
  if (event.key !== 'Enter' || !(event.ctrlKey || event.metaKey)) return;
  const runs = [...document.querySelectorAll('button.candor-run')];
  const run = runs.find((button) => button.offsetParent !== null);
  if (run && !run.disabled) {
    event.preventDefault();
    run.click();
  }
});

// On a narrow page the run lies screens below the button that starts or opens it, and above the one
// that continues it.
document.addEventListener('click', (event) => {
  const started = event.target.closest('.candor-run, .candor-runs [data-run], [data-fork]');
  const result = started?.closest('.candor-page')?.querySelector('.candor-result');
  const top = result?.getBoundingClientRect().top;
  if (top < 0 || top > window.innerHeight / 2) result.scrollIntoView({behavior: 'smooth'});
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
