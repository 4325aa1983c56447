// HiPPO (arXiv 2008.07669): the coefficients of the best approximation of the past, updated sample by sample.
// The formulas are those of the library, `longscan.models.hippo_memory`; a test holds both together.

/** The measures, and how far back n functions reconstruct in each one's own time. */
export const MEASURES = {
  legs: { matrices: legs, span: () => 1 },
  legt: { matrices: legt, span: () => 1 },
  lmu: { matrices: lmu, span: () => 1 },
  lagt: { matrices: (n) => laguerre(n, 0.5), span: (n) => 2 * n },
  tlagt: { matrices: (n) => laguerre(n, 1), span: () => 8 },
  fourier: { matrices: fourier, span: () => 2 },
  foud: { matrices: foud, span: () => 1 },
};

const square = (n, entry) =>
  Array.from({ length: n }, (_, i) => Float64Array.from({ length: n }, (__, j) => entry(i, j)));
const vector = (n, entry) => Float64Array.from({ length: n }, (_, i) => entry(i));
const norm = (k) => Math.sqrt(2 * k + 1);
const parity = (k) => (k % 2 ? -1 : 1);

function legs(n) {
  return [square(n, (i, j) => (i > j ? -norm(i) * norm(j) : i === j ? -(i + 1) : 0)), vector(n, norm)];
}

function legt(n) {
  return [square(n, (i, j) => -norm(i) * norm(j) * (i < j ? parity(j - i) : 1)), vector(n, norm)];
}

function lmu(n) {
  const [A, B] = legt(n);
  const scale = (i) => norm(i) * parity(i);
  return [square(n, (i, j) => (scale(i) * A[i][j]) / scale(j)), vector(n, (i) => scale(i) * B[i])];
}

function laguerre(n, diagonal) {
  return [square(n, (i, j) => (i > j ? -1 : i === j ? -diagonal : 0)), vector(n, () => 1)];
}

function waves(n) {
  const turn = (k) => (k % 2 ? 0 : k / 2); // between coefficients k and k + 1
  const R = square(n, (i, j) => (i === j + 1 ? turn(j) : j === i + 1 ? -turn(i) : 0));
  return [R, vector(n, (i) => (i === 0 ? 1 : i % 2 ? 0 : Math.SQRT2))];
}

function fourier(n) {
  const [R, B] = waves(n);
  return [square(n, (i, j) => Math.PI * R[i][j] - B[i] * B[j]), B];
}

function foud(n) {
  const [R, B] = waves(n);
  return [square(n, (i, j) => 2 * Math.PI * R[i][j] - (i === j ? 0.5 : 0)), B];
}

function multiply(X, Y) {
  const n = X.length;
  const product = square(n, () => 0);
  for (let i = 0; i < n; i++) {
    for (let k = 0; k < n; k++) {
      const x = X[i][k];
      if (x) for (let j = 0; j < n; j++) product[i][j] += x * Y[k][j];
    }
  }
  return product;
}

/** Return the exponential of a matrix: a Taylor series of a small part of it, squared again and again. */
export function exponential(M) {
  const n = M.length;
  const size = Math.max(...M.map((row) => row.reduce((sum, x) => sum + Math.abs(x), 0)));
  const halvings = Math.max(0, Math.ceil(Math.log2(size || 1)) + 2);
  const small = square(n, (i, j) => M[i][j] / 2 ** halvings);
  let sum = square(n, (i, j) => (i === j ? 1 : 0));
  let term = sum;
  for (let k = 1; k <= 14; k++) {
    term = multiply(term, small);
    for (const row of term) for (let j = 0; j < n; j++) row[j] /= k;
    sum = square(n, (i, j) => sum[i][j] + term[i][j]);
  }
  for (let i = 0; i < halvings; i++) sum = multiply(sum, sum);
  return sum;
}

/** Return A_bar and B_bar of a measure other than "legs" by zero-order hold, for samples of duration dt. */
function held(measure, n, dt) {
  const [A, B] = MEASURES[measure].matrices(n);
  const both = exponential(square(n + 1, (i, j) => (i === n ? 0 : dt * (j === n ? B[i] : A[i][j]))));
  return [both.slice(0, n).map((row) => row.slice(0, n)), vector(n, (i) => both[i][n])];
}

/** Return the coefficients of samples, and what is needed to reconstruct them. */
export function compress(samples, n, measure, window = samples.length) {
  const c = new Float64Array(n);
  const dt = MEASURES[measure].span(n) / window;
  if (measure === "legs") {
    const [A, B] = legs(n);
    samples.forEach((f, k) => {
      // (I - A / 2t) c = (I + A / 2t) c + B f / t, and A is a lower triangle
      const t = k + 1;
      const right = vector(n, (i) => {
        let sum = c[i] + (B[i] * f) / t;
        for (let j = 0; j <= i; j++) sum += (A[i][j] * c[j]) / (2 * t);
        return sum;
      });
      for (let i = 0; i < n; i++) {
        let sum = right[i];
        for (let j = 0; j < i; j++) sum += (A[i][j] * c[j]) / (2 * t);
        c[i] = sum / (1 - A[i][i] / (2 * t));
      }
    });
  } else {
    const [A, B] = held(measure, n, dt);
    for (const f of samples) {
      c.set(
        vector(n, (i) => {
          let sum = B[i] * f;
          for (let j = 0; j < n; j++) sum += A[i][j] * c[j];
          return sum;
        }),
      );
    }
  }
  const oldest = measure === "legs" ? 0 : Math.max(0, samples.length - Math.floor(window));
  return { c, measure, dt, length: samples.length, oldest };
}

/** Return the samples that coefficients describe, from the oldest one they cover to the last. */
export function reconstruct({ c, measure, dt, length, oldest }) {
  return Array.from({ length: length - oldest }, (_, i) => {
    const age = length - 0.5 - (oldest + i); // a sample lasts from its index to the next
    const functions = basis(measure, c.length, measure === "legs" ? age / length : age * dt);
    return functions.reduce((sum, value, k) => sum + value * c[k], 0);
  });
}

/** Return the basis functions of a measure at an age. */
export function basis(measure, n, age) {
  if (measure === "legs" || measure === "legt") return legendre(1 - 2 * age, n).map((p, k) => norm(k) * p);
  if (measure === "lmu") return legendre(2 * age - 1, n);
  if (measure === "lagt" || measure === "tlagt") {
    const found = new Float64Array(n);
    let before = 0;
    let now = measure === "lagt" ? Math.exp(-age / 2) : 1;
    for (let k = 0; k < n; k++) {
      found[k] = now;
      [before, now] = [now, ((2 * k + 1 - age) * now - k * before) / (k + 1)];
    }
    return found;
  }
  const fading = measure === "foud" ? Math.exp(age / 2) : 1;
  return vector(n, (i) => {
    const angle = Math.floor(i / 2) * age * (measure === "fourier" ? Math.PI : 2 * Math.PI);
    return (i < 2 ? 1 : Math.SQRT2) * (i % 2 ? Math.sin(angle) : Math.cos(angle)) * fading;
  });
}

function legendre(x, n) {
  const found = new Float64Array(n);
  let before = 0;
  let now = 1;
  for (let k = 0; k < n; k++) {
    found[k] = now;
    [before, now] = [now, ((2 * k + 1) * x * now - k * before) / (k + 1)];
  }
  return found;
}
