// Pictures from the disk, the clipboard or a drag: looked at here, sent as they are. Only one above the server's limits is scaled.

import * as keep from "./keep.js";
import { number } from "./dom.js";

const held = new Map(); // id -> {id, blob, name, width, height, url}
const sent = new Map(); // id -> data URL
const TIFF = /^(II\*\0|MM\0\*)/;

export class NoPicture extends Error {}

// A picture ready to be sent, and what was done to it (if anything), in words. Throws NoPicture.
export async function take(file, limits) {
  const name = file.name || "the pasted picture";
  if (!file.size) throw new NoPicture(`${name} is empty. Save it anew and add it again.`);
  const head = new TextDecoder("latin1").decode(await file.slice(0, 4).arrayBuffer());
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap && !TIFF.test(head)) {
    throw new NoPicture(`${name} cannot be opened as a picture. JPEG, PNG, WebP, GIF, BMP and TIFF can; a broken one must be saved anew.`);
  }
  const [width, height] = bitmap ? [bitmap.width, bitmap.height] : [0, 0];
  const picture = { id: crypto.randomUUID?.() ?? `p${Date.now()}${Math.random()}`, blob: file, name, width, height };
  const scale = bitmap ? fitting(file, width, height, limits) : 1;
  let note = null;
  if (scale < 1) {
    Object.assign(picture, await scaled(bitmap, scale, file.type));
    note = `${name} was scaled from ${number(width)} × ${number(height)} to ${number(picture.width)} × ${number(picture.height)}: this server takes ` +
      `up to ${number(Math.floor(limits.max_image_pixels / 1e6))} megapixels and ${number(Math.floor(limits.max_image_bytes / 1e6))} MB.`;
  }
  bitmap?.close();
  hold(picture);
  await keep.pictures.write(picture);
  return { picture: held.get(picture.id), note };
}

// By how much the sides must shrink so that pixels, side and (roughly) bytes fit; 1 leaves the file untouched.
function fitting(file, width, height, limits) {
  const pixels = Math.sqrt(limits.max_image_pixels / (width * height));
  const side = limits.max_image_side / Math.max(width, height);
  const bytes = file.size > limits.max_image_bytes ? Math.sqrt(limits.max_image_bytes / file.size) * 0.9 : 1;
  return Math.min(1, pixels, side, bytes);
}

async function scaled(bitmap, scale, type) {
  const width = Math.max(1, Math.floor(bitmap.width * scale)), height = Math.max(1, Math.floor(bitmap.height * scale));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  if (type !== "image/png") {
    pen.fillStyle = "#fff"; // as the server lays transparency over white
    pen.fillRect(0, 0, width, height);
  }
  pen.drawImage(bitmap, 0, 0, width, height);
  const blob = await new Promise((done) => canvas.toBlob(done, type === "image/png" ? type : "image/jpeg", 0.92));
  if (!blob) throw new NoPicture("The picture is too large for this browser to scale. Scale it down and add it again.");
  return { blob, width, height };
}

function hold(picture) {
  held.set(picture.id, { ...picture, url: URL.createObjectURL(picture.blob) });
}

export const get = (id) => held.get(id);

// Bring pictures back after a reload; those that are no longer kept stay unknown.
export async function restore(ids) {
  for (const id of ids) {
    const kept = held.has(id) ? null : await keep.pictures.read(id);
    if (kept?.blob instanceof Blob) hold(kept);
  }
}

export async function forget(ids) {
  for (const id of ids) {
    if (held.has(id)) URL.revokeObjectURL(held.get(id).url);
    held.delete(id);
    sent.delete(id);
  }
  await keep.pictures.forget(ids);
}

export async function dataUrl(id) {
  if (!held.has(id)) return null;
  if (!sent.has(id)) {
    const reader = new FileReader();
    await new Promise((done, failed) => {
      reader.onload = done;
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(held.get(id).blob);
    });
    sent.set(id, reader.result.replace(/^data:[^;,]*[^,]*,/, (head) => (head.includes(";base64") ? head : "data:image/png;base64,")));
  }
  return sent.get(id);
}
