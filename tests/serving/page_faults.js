// What is wrong with a page: text too faint for its ground, controls without a name, anything wider than the window.
() => {
  const faults = [];
  const numbers = (color) => color.match(/[\d.]+/g).map(Number);
  const linear = (value) => (value / 255 <= 0.03928 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const opaque = (color) => (color[3] ?? 1) > 0.9;
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const color = numbers(getComputedStyle(node).backgroundColor);
      if (opaque(color)) return color;
    }
    return [255, 255, 255];
  };
  const left = ".unseen, option, noscript, .skip, svg, [disabled], .tool > span"; // not seen, or not to be used now
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const words = walker.currentNode.data.trim(), node = walker.currentNode.parentElement;
    const color = getComputedStyle(node).color;
    if (!words || !node.checkVisibility() || node.closest(left) || !color.startsWith("rgb")) continue;
    const [more, less] = [light(numbers(color)), light(ground(node))].sort((one, other) => other - one);
    const ratio = (more + 0.05) / (less + 0.05);
    if (ratio < 4.5) faults.push(`faint: ${words.slice(0, 40)} ${ratio.toFixed(1)}`);
  }
  const named = (one) => one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.length || one.querySelector("img[alt]")?.alt;
  for (const one of document.querySelectorAll("button, input:not([type=file]), textarea, select")) {
    if (one.checkVisibility() && !named(one)) faults.push(`nameless: ${one.outerHTML.slice(0, 80)}`);
  }
  if (document.documentElement.scrollWidth > innerWidth) faults.push(`wide: ${document.documentElement.scrollWidth}`);
  return faults;
}
