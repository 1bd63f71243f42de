/** The worker, the checkpoint, and the reader's files. */

/** Start a worker from its text, and return what asks it a question and awaits the answer. */
function startWorker(text) {
  const address = URL.createObjectURL(new Blob([text], { type: "text/javascript" }));
  const worker = new Worker(address);
  const waiting = new Map();
  worker.onmessage = ({ data: { id, answer, error } }) => {
    const [resolve, reject] = waiting.get(id);
    waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(answer);
  };
  // What fails outside of a question leaves all that wait without an answer.
  worker.onerror = ({ message }) => {
    for (const [, reject] of waiting.values())
      reject(new Error(message || "No worker starts here."));
    waiting.clear();
  };
  let last = 0;
  return (name, given = {}, handedOver = []) =>
    new Promise((resolve, reject) => {
      waiting.set(++last, [resolve, reject]);
      worker.postMessage({ id: last, name, ...given }, handedOver);
    });
}

const MOST_BYTES = 2 ** 30; // of a checkpoint: a browser's tab has no room for more

const bytesOf = (base64) => Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));

/** Return the bytes of the checkpoint, from this page or from the file that all pages share. */
async function checkpoint({ base64, address, name, length }, progress) {
  if (base64) return bytesOf(base64).buffer;
  const missing = new Error(
    `There is no ${address} beside this page: run the chapter in a notebook, which brings its own.`,
  );
  if (location.protocol === "file:") {
    // A page that was opened as a file may not fetch, but it may load a script.
    await new Promise((resolve, reject) => {
      const script = Object.assign(document.createElement("script"), { src: address });
      script.onload = resolve;
      script.onerror = () => reject(missing);
      document.head.append(script);
    });
    return bytesOf(globalThis.gcvitCheckpoints[name]).buffer;
  }
  const response = await fetch(address);
  if (response.status === 404) throw missing;
  if (!response.ok) throw new Error(`${address} answers ${response.status}.`);
  const parts = [];
  let arrived = 0;
  for (const reader = response.body.getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    arrived += value.length;
    progress(arrived / length);
  }
  const text = await new Blob(parts).text();
  return bytesOf(text.split('"')[3]).buffer; // of (...)["name"]="base64"
}

// Larger photographs are reduced while they are drawn: phones refuse large canvases, and the
// model sees much less than this.
const MOST_PIXELS = 2 ** 21;

/**
 * Return the pixels of an image file as gcvit.images reads them: turned as the camera held it,
 * on white, the first picture of an animation, the numbers of the file whatever its profile.
 */
async function pixelsOf(blob) {
  const bitmap = await createImageBitmap(blob, {
    imageOrientation: "from-image",
    colorSpaceConversion: "none",
  });
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)));
  const [width, height] = [bitmap.width, bitmap.height].map((side) =>
    Math.max(1, Math.floor(side * scale)));
  const canvas = Object.assign(document.createElement("canvas"), { width, height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "#fff";
  context.fillRect(0, 0, width, height);
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  bitmap.close();
  const pixels = context.getImageData(0, 0, width, height).data;
  canvas.width = canvas.height = 0; // gives its memory back at once
  return { pixels, height, width };
}
