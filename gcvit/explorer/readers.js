/** What a checkpoint holds, read from its bytes. */

/** Read two bytes for each number, whose bits `widen` puts where a float32 has them. */
function readHalf(buffer, widen) {
  const halves = new Uint16Array(buffer, 0, Math.floor(buffer.byteLength / 2));
  const data = new Float32Array(halves.length);
  const bits = new Uint32Array(data.buffer);
  for (let i = 0; i < bits.length; i++) bits[i] = widen(halves[i]);
  return data;
}

// A file that was cut off may end within a number, which is left out.
const READERS = {
  F32: (buffer) => new Float32Array(buffer, 0, Math.floor(buffer.byteLength / 4)),
  // The upper half of a float32.
  BF16: (buffer) => readHalf(buffer, (bits) => bits << 16),
  // Three bits fewer for the exponent, which counts from 15 and not from 127. What is not
  // finite would come out as 2^16 or more, which no finite float16 is.
  F16: (buffer) => readHalf(buffer, (bits) => ((bits & 0x8000) << 16) | ((bits & 0x7fff) << 13))
    .map((value) => (Math.abs(value *= 2 ** 112) < 2 ** 16 ? value : NaN)),
};

/**
 * Read a .safetensors file.
 *
 * Returns `tensors`, an object from names to { shape, data } with float32 data, and `metadata`,
 * the texts in the file's header.
 */
export function readSafetensors(buffer) {
  const length = buffer.byteLength < 8 ? 0 : Number(new DataView(buffer).getBigUint64(0, true));
  if (!length || 8 + length > buffer.byteLength) {
    throw new Error(`No .safetensors file: its header should take ${length} bytes, and there are `
      + `${buffer.byteLength} in all.`);
  }
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const { __metadata__: metadata = {}, ...entries } = header;
  const tensors = {};
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(entries)) {
    if (!READERS[dtype]) {
      if (name.endsWith("relative_position_index")) continue;
      throw new Error(`${name} holds ${dtype}; ${Object.keys(READERS)} can be read.`);
    }
    const data = READERS[dtype](buffer.slice(8 + length + start, 8 + length + end));
    const wanted = shape.reduce((product, side) => product * side, 1);
    if (data.length !== wanted) {
      throw new Error(`${name} should hold ${wanted} numbers; the file has ${data.length}.`);
    }
    if (!data.every(Number.isFinite)) throw new Error(`${name} holds values that are not finite.`);
    tensors[name] = { shape, data };
  }
  return { tensors, metadata };
}
