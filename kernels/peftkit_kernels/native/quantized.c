/* Passes over quantised weights and activations. */
#include <math.h>
#include <stdint.h>
#include <string.h>

static const float LEVELS[16] = {
    -1.0f,           -0.69619280099f, -0.52507305145f, -0.39491748809f, -0.28444138169f, -0.18477343022f,
    -0.09105003625f, 0.0f,            0.07958029955f,  0.16093020141f,  0.24611230194f,  0.33791524171f,
    0.44070982933f,  0.56261700391f,  0.72295683622f,  1.0f};

/* y [rows, width] = rows first_row ... of the NF4 weight, times row_scale (all ones where NULL).
 *
 * Blocks run across rows, so a row may start inside a block and on the low nibble. A table of 256 pairs turns a byte
 * into two values with one load; it is exact, as it holds levels, not products. */
void pk_nf4(const uint8_t *restrict packed, const float *restrict absmax, const float *restrict row_scale,
            float *restrict y, int64_t rows, int64_t width, int64_t row_stride, int64_t blocksize, int64_t first_row,
            int threads) {
  float pairs[256][2];
  for (int byte = 0; byte < 256; byte++) {
    pairs[byte][0] = LEVELS[byte >> 4];
    pairs[byte][1] = LEVELS[byte & 15];
  }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    int64_t i = (first_row + m) * width, end = i + width;
    float *out = y + m * row_stride, factor = row_scale ? row_scale[first_row + m] : 1.0f;
    while (i < end) {
      int64_t block = i / blocksize, stop = (block + 1) * blocksize;
      float scale = absmax[block];
      if (stop > end) stop = end;
      if (i & 1) *out++ = LEVELS[packed[i++ >> 1] & 15] * scale * factor;
      int64_t bytes = (stop - i) >> 1;
      const uint8_t *from = packed + (i >> 1);
      for (int64_t b = 0; b < bytes; b++) {
        out[2 * b] = pairs[from[b]][0] * scale * factor;
        out[2 * b + 1] = pairs[from[b]][1] * scale * factor;
      }
      out += 2 * bytes;
      i += 2 * bytes;
      if (i < stop) *out++ = LEVELS[packed[i++ >> 1] >> 4] * scale * factor;
    }
  }
}

/* codes = round(x f) with f = 127 (1 / absmax of the row), x times column_scale first (all ones where NULL); a row of zeros
 * gives zeros. Magnitudes are compared as integers: so NaN is the largest of all and spoils its row. */
void pk_quantize_rows(const float *restrict x, const float *restrict column_scale, int8_t *restrict codes,
                      float *restrict absmax, int64_t rows, int64_t width, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    const float *xm = x + m * width;
    int8_t *cm = codes + m * width;
    int32_t top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t k = 0; k < width; k++) {
      float value = column_scale ? xm[k] * column_scale[k] : xm[k];
      int32_t bits;
      memcpy(&bits, &value, 4);
      bits &= 0x7fffffff;
      top = bits > top ? bits : top;
    }
    float largest;
    memcpy(&largest, &top, 4);
    float factor = top ? 127.0f * (1.0f / largest) : 0.0f;
    absmax[m] = largest;
#pragma omp simd
    for (int64_t k = 0; k < width; k++) {
      float value = column_scale ? xm[k] * column_scale[k] : xm[k];
      cm[k] = (int8_t)(int32_t)rintf(value * factor);
    }
  }
}

enum { STRIP = 64 };

/* y = acc row_scale column_scale + bias + s t for acc [rows, width] and t [rank, width]; column_scale may be NULL for
 * ones, bias NULL for zeros. A strip of a row is summed in registers, so y is written once. */
void pk_int8_epilogue(const int32_t *restrict acc, const float *restrict row_scale,
                      const float *restrict column_scale, const float *restrict bias, const float *restrict s,
                      const float *restrict t, float *restrict y, int64_t rows, int64_t width, int64_t rank,
                      int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t m = 0; m < rows; m++) {
    for (int64_t start = 0; start < width; start += STRIP) {
      int64_t count = width - start < STRIP ? width - start : STRIP;
      const int32_t *from = acc + m * width + start;
      float sum[STRIP] = {0};
      for (int64_t r = 0; r < rank; r++) {
        float factor = s[m * rank + r];
        const float *column = t + r * width + start;
        if (count == STRIP) {
#pragma omp simd
          for (int64_t k = 0; k < STRIP; k++) sum[k] += factor * column[k];
        } else {
          for (int64_t k = 0; k < count; k++) sum[k] += factor * column[k];
        }
      }
#pragma omp simd
      for (int64_t k = 0; k < count; k++) {
        float scale = column_scale ? row_scale[m] * column_scale[start + k] : row_scale[m];
        float shift = bias ? bias[start + k] : 0.0f;
        y[m * width + start + k] = (float)from[k] * scale + (sum[k] + shift);
      }
    }
  }
}
