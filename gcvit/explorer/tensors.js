/** Arithmetic on tensors: what a library would bring. */

export const size = (shape) => shape.reduce((product, side) => product * side, 1);
export const tensor = (shape, data = new Float32Array(size(shape))) => ({ shape, data });
export const range = (count) => Array.from({ length: count }, (_, i) => i);
export const pair = (value) => (Array.isArray(value) ? value : [value, value]);

/** Return the n-th of the matrices that a tensor's last two axes make. */
export function matrix({ shape, data }, n) {
  const length = shape.at(-2) * shape.at(-1);
  return data.subarray(n * length, (n + 1) * length);
}

/** Swap rows and columns of each (rows, columns) matrix of some numbers. */
export function transpose(data, rows, columns) {
  const swapped = new Float32Array(data.length);
  for (let start = 0; start < data.length; start += rows * columns) {
    for (let i = 0; i < rows; i++) for (let j = 0; j < columns; j++) {
      swapped[start + j * rows + i] = data[start + i * columns + j];
    }
  }
  return swapped;
}

/**
 * Multiply each row of `a` with each row of `b`, which have `length` numbers, and add a bias.
 *
 * out[i · stride + j] = a[i] · b[j] + bias[j]. Two rows of `a` meet four of `b` at a time, so
 * that each number read is used several times. Where they do not come out even, the last row is
 * computed again.
 */
export function matmul(
  a, b, length, out, stride = b.length / length, bias = new Float32Array(stride),
) {
  const last = a.length / length - 1, end = b.length / length - 1;
  for (let i = 0; i <= last; i += 2) {
    const i1 = Math.min(i + 1, last), a0 = i * length, a1 = i1 * length;
    for (let j = 0; j <= end; j += 4) {
      const j1 = Math.min(j + 1, end), j2 = Math.min(j + 2, end), j3 = Math.min(j + 3, end);
      const b0 = j * length, b1 = j1 * length, b2 = j2 * length, b3 = j3 * length;
      let p0 = bias[j], p1 = bias[j1], p2 = bias[j2], p3 = bias[j3];
      let q0 = p0, q1 = p1, q2 = p2, q3 = p3;
      for (let k = 0; k < length; k++) {
        const p = a[a0 + k], q = a[a1 + k];
        const u0 = b[b0 + k], u1 = b[b1 + k], u2 = b[b2 + k], u3 = b[b3 + k];
        p0 += p * u0; p1 += p * u1; p2 += p * u2; p3 += p * u3;
        q0 += q * u0; q1 += q * u1; q2 += q * u2; q3 += q * u3;
      }
      const y0 = i * stride, y1 = i1 * stride;
      out[y0 + j] = p0; out[y0 + j1] = p1; out[y0 + j2] = p2; out[y0 + j3] = p3;
      out[y1 + j] = q0; out[y1 + j1] = q1; out[y1 + j2] = q2; out[y1 + j3] = q3;
    }
  }
}

/** Return the sum of two tensors of the same shape. */
export function add({ shape, data }, y) {
  const sum = tensor(shape);
  for (let i = 0; i < data.length; i++) sum.data[i] = data[i] + y.data[i];
  return sum;
}

/** Multiply x with factors, which are repeated over the leading axes that they lack. */
export function multiply({ shape, data }, factors) {
  const product = tensor(shape), row = factors.length;
  for (let start = 0; start < data.length; start += row) {
    for (let i = 0; i < row; i++) product.data[start + i] = data[start + i] * factors[i];
  }
  return product;
}

/** Turn some numbers of an array into shares of 1, in place, and return the array. */
export function softmax(data, start = 0, length = data.length) {
  const end = start + length;
  let most = -Infinity, sum = 0;
  for (let i = start; i < end; i++) most = Math.max(most, data[i]);
  // Without the largest one taken off, exp could exceed all numbers.
  for (let i = start; i < end; i++) sum += data[i] = Math.exp(data[i] - most);
  for (let i = start; i < end; i++) data[i] /= sum;
  return data;
}
