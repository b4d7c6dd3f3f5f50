/* Element-wise passes of the CPU path, float32, one pass over memory each.
 *
 * Every tensor is contiguous. Rows are divided among threads in fixed blocks and sums within a row have a fixed
 * order, so the same machine gives the same bits whatever the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "activation.h"

#define GATE_LOOP(act)                                     \
  _Pragma("omp parallel for simd schedule(static) num_threads(threads)") for (int64_t i = 0; i < n; i++) { \
    float value, slope;                                    \
    act(e[i], &value, &slope);                             \
    h[i] = value * g[i];                                   \
  }

/* h = act(e) g */
void pk_gate(const float *restrict e, const float *restrict g, float *restrict h, int64_t n, int act, int threads) {
  if (act == SILU) {
    GATE_LOOP(silu)
  } else {
    GATE_LOOP(gelu_tanh)
  }
}

#define GATE_BACKWARD_LOOP(act)                            \
  _Pragma("omp parallel for simd schedule(static) num_threads(threads)") for (int64_t i = 0; i < n; i++) { \
    float value, slope, grad = dh[i], up = g[i];           \
    act(e[i], &value, &slope);                             \
    de[i] = grad * up * slope;                             \
    dh[i] = grad * value;                                  \
    h[i] = value * up;                                     \
  }

/* de = dh g act'(e), dg = dh act(e) over dh, h = act(e) g */
void pk_gate_backward(float *restrict dh, const float *restrict e, const float *restrict g, float *restrict de,
                      float *restrict h, int64_t n, int act, int threads) {
  if (act == SILU) {
    GATE_BACKWARD_LOOP(silu)
  } else {
    GATE_BACKWARD_LOOP(gelu_tanh)
  }
}

/* y = (x r) (offset + w) with r = 1 / sqrt(mean(x^2) + eps) */
void pk_rms_norm(const float *restrict x, const float *restrict w, float *restrict y, float *restrict rstd,
                 int64_t rows, int64_t width, float eps, float offset, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    const float *xm = x + m * width;
    float *ym = y + m * width, sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < width; k++) sum += xm[k] * xm[k];
    float r = 1.0f / sqrtf(sum / (float)width + eps);
    rstd[m] = r;
#pragma omp simd
    for (int64_t k = 0; k < width; k++) ym[k] = (xm[k] * r) * (offset + w[k]);
  }
}

/* dx = r (u - x r^2 mean(u x)) with u = dy (offset + w) */
void pk_rms_norm_backward(const float *restrict dy, const float *restrict x, const float *restrict w,
                          const float *restrict rstd, float *restrict dx, int64_t rows, int64_t width, float offset,
                          int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    const float *xm = x + m * width, *gm = dy + m * width;
    float *dm = dx + m * width, sum = 0.0f, r = rstd[m];
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < width; k++) sum += gm[k] * (offset + w[k]) * xm[k];
    float correction = sum / (float)width * r * r;
#pragma omp simd
    for (int64_t k = 0; k < width; k++) dm[k] = r * (gm[k] * (offset + w[k]) - xm[k] * correction);
  }
}

/* y = (x - mean) r w + bias with r = 1 / sqrt(var + eps), the variance that of the centred row; bias may be null */
void pk_layer_norm(const float *restrict x, const float *restrict w, const float *restrict bias, float *restrict y,
                   float *restrict mean, float *restrict rstd, int64_t rows, int64_t width, float eps, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    const float *xm = x + m * width;
    float *ym = y + m * width, sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < width; k++) sum += xm[k];
    float middle = sum / (float)width;
#pragma omp simd reduction(+ : squares)
    for (int64_t k = 0; k < width; k++) squares += (xm[k] - middle) * (xm[k] - middle);
    float r = 1.0f / sqrtf(squares / (float)width + eps);
    mean[m] = middle;
    rstd[m] = r;
    if (bias) {
#pragma omp simd
      for (int64_t k = 0; k < width; k++) ym[k] = (xm[k] - middle) * r * w[k] + bias[k];
    } else {
#pragma omp simd
      for (int64_t k = 0; k < width; k++) ym[k] = (xm[k] - middle) * r * w[k];
    }
  }
}

/* dx = r (u - mean(u) - n mean(u n)) with n = (x - mean) r and u = dy w */
void pk_layer_norm_backward(const float *restrict dy, const float *restrict x, const float *restrict w,
                            const float *restrict mean, const float *restrict rstd, float *restrict dx, int64_t rows,
                            int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    const float *xm = x + m * width, *gm = dy + m * width;
    float *dm = dx + m * width, sum = 0.0f, products = 0.0f, middle = mean[m], r = rstd[m];
#pragma omp simd reduction(+ : sum, products)
    for (int64_t k = 0; k < width; k++) {
      float u = gm[k] * w[k];
      sum += u;
      products += u * ((xm[k] - middle) * r);
    }
    float shift = sum / (float)width, slope = products / (float)width * r;
#pragma omp simd
    for (int64_t k = 0; k < width; k++) dm[k] = r * (gm[k] * w[k] - shift - (xm[k] - middle) * slope);
  }
}

/* Cross entropy of rows of logits against one target each; z becomes the gradient of the loss by the logits, times
 * grad_scale. A target outside [0, width) gives loss 0 and gradient 0. */
void pk_cross_entropy(float *restrict z, const int64_t *restrict target, float *restrict loss, float *restrict lse,
                      int64_t rows, int64_t width, float smoothing, float z_loss, float grad_scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    float *zm = z + m * width;
    int64_t t = target[m];
    if (t < 0 || t >= width) {
      memset(zm, 0, (size_t)width * sizeof(float));
      loss[m] = lse[m] = 0.0f;
      continue;
    }
    float top = -INFINITY, sum = 0.0f, total = 0.0f, zt = zm[t];
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < width; k++) top = zm[k] > top ? zm[k] : top;
    if (smoothing > 0.0f) {
#pragma omp simd reduction(+ : total)
      for (int64_t k = 0; k < width; k++) total += zm[k];
    }
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < width; k++) {
      float p = exp_f32(zm[k] - top);
      zm[k] = p;
      sum += p;
    }
    float l = top + logf(sum);
    lse[m] = l;
    loss[m] = l - (1.0f - smoothing) * zt - smoothing * total / (float)width + z_loss * l * l;
    float weight = (1.0f + 2.0f * z_loss * l) * grad_scale / sum, uniform = smoothing / (float)width * grad_scale;
#pragma omp simd
    for (int64_t k = 0; k < width; k++) zm[k] = zm[k] * weight - uniform;
    zm[t] -= (1.0f - smoothing) * grad_scale;
  }
}

/* The 8 16-bit draws of one philox4x32-7 call. */
static inline void philox(uint64_t counter, uint64_t seed, uint16_t draws[8]) {
  uint32_t c0 = (uint32_t)counter, c1 = (uint32_t)(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 7; round++) {
    uint64_t p0 = (uint64_t)c0 * 0xD2511F53u, p1 = (uint64_t)c2 * 0xCD9E8D57u;
    uint32_t n0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0, n2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c1 = (uint32_t)p1;
    c3 = (uint32_t)p0;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  uint32_t words[4] = {c0, c1, c2, c3};
  for (int j = 0; j < 8; j++) draws[j] = (uint16_t)(words[j / 2] >> (j % 2 * 16));
}

/* y = x scale where the draw of (row, column) is at least the threshold, else 0 */
void pk_dropout(const float *restrict x, float *restrict y, int64_t rows, int64_t width, int64_t threshold,
                float scale, int64_t seed, int threads) {
  int64_t groups = (width + 7) / 8;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t q = 0; q < groups; q++) {
      uint16_t draws[8];
      philox((uint64_t)(m * groups + q), (uint64_t)seed, draws);
      int64_t start = m * width + q * 8, count = width - q * 8 < 8 ? width - q * 8 : 8;
      for (int64_t j = 0; j < count; j++) y[start + j] = draws[j] >= threshold ? x[start + j] * scale : 0.0f;
    }
  }
}
