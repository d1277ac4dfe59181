// A picture with what the model makes of it drawn over. Places are fractions of the picture; beyond 0..1 lies padding.

const TALLEST = 380; // CSS pixels
const images = new Map();

function loaded(url) {
  if (!url) return null;
  if (!images.has(url)) {
    const image = Object.assign(new Image(), { src: url });
    images.clear();
    images.set(url, image.decode().then(() => image, () => null));
  }
  return images.get(url);
}

export async function paint(canvas, url, picture, mode, heat) {
  const image = await loaded(url);
  if (!canvas.isConnected) return;
  const color = (name) => {
    canvas.style.color = `var(${name})`; // the browser resolves light and dark
    return getComputedStyle(canvas).color;
  };
  const area = around(picture);
  const wide = canvas.parentElement.clientWidth;
  const scale = Math.min(wide / (area.width * picture.width), TALLEST / (area.height * picture.height));
  const width = area.width * picture.width * scale, height = area.height * picture.height * scale;
  const dots = window.devicePixelRatio || 1;
  canvas.width = Math.round(width * dots);
  canvas.height = Math.round(height * dots);
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const pen = canvas.getContext("2d");
  pen.scale(dots, dots);
  const place = (box) => [(box.left - area.left) / area.width * width, (box.top - area.top) / area.height * height, box.width / area.width * width, box.height / area.height * height];
  const whole = place({ left: 0, top: 0, width: 1, height: 1 });
  hatch(pen, width, height, color("--sunken"), color("--line"));
  pen.save();
  if (mode === "attention") pen.filter = "grayscale(1) brightness(.5)";
  if (image) pen.drawImage(image, ...whole);
  else (pen.fillStyle = color("--sunken")), pen.fillRect(...whole);
  pen.restore();
  if (mode === "views") views(pen, picture, place, color);
  if (mode === "patches") for (const patches of [...picture.patches].reverse()) grid(pen, patches, place(patches.box), color(patches === picture.patches[0] ? "--second" : "--accent"), patches === picture.patches[0] && picture.patches.length > 1);
  if (mode === "attention" && heat) glow(pen, heat, place);
  canvas.classList.remove("waiting");
}

// The picture and everything that is drawn around it.
function around(picture) {
  const boxes = [{ left: 0, top: 0, width: 1, height: 1 }, picture.base, ...picture.tiles];
  const left = Math.min(...boxes.map((box) => box.left)), top = Math.min(...boxes.map((box) => box.top));
  return { left, top, width: Math.max(...boxes.map((box) => box.left + box.width)) - left, height: Math.max(...boxes.map((box) => box.top + box.height)) - top };
}

function hatch(pen, width, height, ground, line) {
  pen.fillStyle = ground;
  pen.fillRect(0, 0, width, height);
  pen.strokeStyle = line;
  pen.lineWidth = 1;
  pen.beginPath();
  for (let x = -height; x < width; x += 7) pen.moveTo(x, height), pen.lineTo(x + height, 0);
  pen.stroke();
}

function views(pen, picture, place, color) {
  picture.tiles.forEach((tile, at) => {
    const [x, y, width, height] = place(tile);
    frame(pen, x, y, width, height, color("--accent"), []);
    badge(pen, String(at + 1), x + 6, y + 6, color("--accent"), color("--accent-ink"));
  });
  const [x, y, width, height] = place(picture.base);
  const inside = picture.tiles.length ? 4 : 0;
  frame(pen, x + inside, y + inside, width - 2 * inside, height - 2 * inside, color("--second"), picture.tiles.length ? [6, 4] : []);
  badge(pen, picture.tiles.length ? "whole" : "view", x + width - 6 - inside, y + height - 26 - inside, color("--second"), color("--second-ink"), true);
}

function frame(pen, x, y, width, height, color, dash) {
  pen.setLineDash(dash);
  pen.lineWidth = 4;
  pen.strokeStyle = "rgb(255 255 255 / .55)";
  pen.strokeRect(x + 1, y + 1, width - 2, height - 2);
  pen.lineWidth = 2;
  pen.strokeStyle = color;
  pen.strokeRect(x + 1, y + 1, width - 2, height - 2);
  pen.setLineDash([]);
}

function badge(pen, words, x, y, ground, ink, right = false) {
  pen.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
  const width = pen.measureText(words).width + 12;
  const left = right ? x - width : x;
  pen.fillStyle = ground;
  pen.beginPath();
  pen.roundRect(left, y, width, 20, 5);
  pen.fill();
  pen.fillStyle = ink;
  pen.textBaseline = "middle";
  pen.fillText(words, left + 6, y + 10.5);
}

function grid(pen, { columns, rows }, [x, y, width, height], color, faint) {
  if (!columns || !rows) return; // of a very narrow picture the original's arithmetic keeps nothing
  pen.strokeStyle = color;
  pen.globalAlpha = faint ? 0.55 : 0.85;
  pen.lineWidth = faint ? 1.5 : 1;
  pen.setLineDash(faint ? [3, 3] : []);
  pen.beginPath();
  for (let at = 0; at <= columns; at++) pen.moveTo(x + width * at / columns, y), pen.lineTo(x + width * at / columns, y + height);
  for (let at = 0; at <= rows; at++) pen.moveTo(x, y + height * at / rows), pen.lineTo(x + width, y + height * at / rows);
  pen.stroke();
  pen.setLineDash([]);
  pen.globalAlpha = 1;
}

// Heat of all maps, each blurred from its patches: the hottest patch of the picture is full.
function glow(pen, heat, place) {
  const all = heat.flatMap((map) => map.values).sort((one, other) => one - other);
  const least = all[all.length >> 1], most = Math.max(all.at(-1), least + 1e-9); // what got less than half of the patches stays dark
  for (const map of heat.filter((one) => one.values.length)) {
    const small = Object.assign(document.createElement("canvas"), { width: map.columns, height: map.rows });
    const dots = small.getContext("2d").createImageData(map.columns, map.rows);
    map.values.forEach((value, at) => {
      const warm = Math.pow(Math.max(0, value - least) / (most - least), 0.7);
      dots.data.set([255, 96 + 140 * warm, 24 + 90 * warm * warm, 240 * warm], at * 4);
    });
    small.getContext("2d").putImageData(dots, 0, 0);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(small, ...place(map.box));
  }
}
