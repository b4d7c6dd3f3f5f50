/* Passes of DoRA, float32: the norm of an updated weight, and its magnitude applied to outputs. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "activation.h"

enum { SUM_ROWS = 64, NORM_ROWS = 4, MAX_RANK = 256 };

#ifdef __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4)));

/* The squares of `count` rows of w + b a, summed; the updated rows exist in registers only. */
static inline __attribute__((always_inline)) void updated_squares(const float *w, const float *a, const float *b,
                                                                  float *squares, int64_t width, int64_t rank,
                                                                  const int count) {
  vec sum[NORM_ROWS][2] = {0};
  int64_t k = 0;
  for (; k + 2 * LANES <= width; k += 2 * LANES) {
    vec u[NORM_ROWS][2];
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      u[i][0] = *(const vec *)(w + i * width + k);
      u[i][1] = *(const vec *)(w + i * width + k + LANES);
      /* the rows that come next: too many short streams for the hardware to foresee */
      __builtin_prefetch(w + (i + count) * width + k);
      __builtin_prefetch(w + (i + count) * width + k + LANES);
    }
    for (int64_t r = 0; r < rank; r++) {
      vec a0 = *(const vec *)(a + r * width + k), a1 = *(const vec *)(a + r * width + k + LANES);
#pragma GCC unroll 4
      for (int i = 0; i < count; i++) {
        float factor = b[i * rank + r];
        u[i][0] += factor * a0;
        u[i][1] += factor * a1;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) {
      sum[i][0] += u[i][0] * u[i][0];
      sum[i][1] += u[i][1] * u[i][1];
    }
  }
  for (int i = 0; i < count; i++) {
    vec both = sum[i][0] + sum[i][1];
    float total = 0.0f;
    for (int lane = 0; lane < LANES; lane++) total += both[lane];
    for (int64_t rest = k; rest < width; rest++) {
      float u = w[i * width + rest];
      for (int64_t r = 0; r < rank; r++) u += b[i * rank + r] * a[r * width + rest];
      total += u * u;
    }
    squares[i] = total;
  }
}

/* norm = |w + scale b a| by rows, in one read of w [rows, width]; a [rank, width], b [rows, rank] */
void pk_updated_norm(const float *restrict w, const float *restrict a, const float *restrict b, float *restrict norm,
                     int64_t rows, int64_t width, int64_t rank, float scale, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < rows; n += NORM_ROWS) {
    float factors[NORM_ROWS * MAX_RANK], squares[NORM_ROWS];
    int64_t count = rows - n < NORM_ROWS ? rows - n : NORM_ROWS;
    for (int64_t i = 0; i < count * rank; i++) factors[i] = scale * b[n * rank + i];
    if (count == NORM_ROWS) {
      updated_squares(w + n * width, a, factors, squares, width, rank, NORM_ROWS);
    } else {
      for (int64_t i = 0; i < count; i++)
        updated_squares(w + (n + i) * width, a, factors + i * rank, squares + i, width, rank, 1);
    }
    for (int64_t i = 0; i < count; i++) norm[n + i] = sqrtf(squares[i]);
  }
}

/* dz = dy g columnwise; partial [ceil(rows / SUM_ROWS), width] = the sums of dy z over every SUM_ROWS rows, blocks that do
 * not depend on the number of threads */
void pk_scale_backward(const float *restrict dy, const float *restrict z, const float *restrict g, float *restrict dz,
                       float *restrict partial, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t first = 0; first < rows; first += SUM_ROWS) {
    int64_t last = first + SUM_ROWS < rows ? first + SUM_ROWS : rows;
    float *sum = partial + first / SUM_ROWS * width;
    memset(sum, 0, (size_t)width * sizeof(float));
    for (int64_t m = first; m < last; m++) {
      const float *grad = dy + m * width, *value = z + m * width;
      float *out = dz + m * width;
#pragma omp simd
      for (int64_t k = 0; k < width; k++) {
        out[k] = grad[k] * g[k];
        sum[k] += grad[k] * value[k];
      }
    }
  }
}

#define SCALED_GATE_LOOP(act)                                                              \
  for (int64_t m = 0; m < rows; m++) {                                                     \
    const float *e = ze + m * width, *u = zu + m * width;                                  \
    float *out = h + m * width;                                                            \
    _Pragma("omp simd") for (int64_t k = 0; k < width; k++) {                              \
      float value, slope;                                                                  \
      act(e[k] * ge[k] + be[k], &value, &slope);                                           \
      out[k] = value * (u[k] * gu[k] + bu[k]);                                             \
    }                                                                                      \
  }

/* h = act(ze ge + be) (zu gu + bu), factors and biases columnwise */
void pk_scaled_gate(const float *restrict ze, const float *restrict zu, const float *restrict ge,
                    const float *restrict gu, const float *restrict be, const float *restrict bu, float *restrict h,
                    int64_t rows, int64_t width, int act, int threads) {
  if (act == SILU) {
#pragma omp parallel for schedule(static) num_threads(threads)
    SCALED_GATE_LOOP(silu)
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    SCALED_GATE_LOOP(gelu_tanh)
  }
}

#define SCALED_GATE_BACKWARD_LOOP(act)                                                     \
  for (int64_t first = 0; first < rows; first += SUM_ROWS) {                               \
    int64_t last = first + SUM_ROWS < rows ? first + SUM_ROWS : rows;                      \
    float *dez = partial + first / SUM_ROWS * 4 * width, *duz = dez + width;               \
    float *des = duz + width, *dus = des + width;                                          \
    memset(dez, 0, (size_t)(4 * width) * sizeof(float));                                   \
    for (int64_t m = first; m < last; m++) {                                               \
      int64_t at = m * width;                                                              \
      _Pragma("omp simd") for (int64_t k = 0; k < width; k++) {                            \
        float value, slope, grad = dh[at + k], e = ze[at + k], u = zu[at + k];             \
        act(e * ge[k] + be[k], &value, &slope);                                            \
        float de = grad * (u * gu[k] + bu[k]) * slope, du = grad * value;                  \
        dze[at + k] = de * ge[k];                                                          \
        dzu[at + k] = du * gu[k];                                                          \
        dez[k] += de * e;                                                                  \
        duz[k] += du * u;                                                                  \
        des[k] += de;                                                                      \
        dus[k] += du;                                                                      \
      }                                                                                    \
    }                                                                                      \
  }

/* The gradients of pk_scaled_gate by ze and zu; partial [ceil(rows / SUM_ROWS), 4, width] = sums over every SUM_ROWS rows of
 * de ze, du zu, de and du, where de and du are the gradients by the two scaled values. */
void pk_scaled_gate_backward(const float *restrict dh, const float *restrict ze, const float *restrict zu,
                             const float *restrict ge, const float *restrict gu, const float *restrict be,
                             const float *restrict bu, float *restrict dze, float *restrict dzu,
                             float *restrict partial, int64_t rows, int64_t width, int act, int threads) {
  if (act == SILU) {
#pragma omp parallel for schedule(static) num_threads(threads)
    SCALED_GATE_BACKWARD_LOOP(silu)
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    SCALED_GATE_BACKWARD_LOOP(gelu_tanh)
  }
}
